"""What a pattern costs: mean next-token cross-entropy in nats on token windows, with the removed units skipped.

Three savings, none of which changes a number: a prefix of the forward pass that patterns share is computed once, as
long as memory holds it; a loss once known is never computed again; and the tokens come in *stages*, so that a searcher
may look at few tokens first. The loss at stage s is the mean over all tokens of stages 0..s: going one stage further
costs the tokens of that stage only.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from eopc_compiler.evop.pattern import Pattern
from eopc_compiler.evop.prefixes import LIMIT_BYTES, Prefixes
from eopc_compiler.model import Llama, build_model
from eopc_compiler.sequences import next_token_losses, run_attention, run_ffn
from eopc_runtime.errors import UsageError


@dataclass(slots=True)
class Work:
    """Halves of layers (attention or FFN) that patterns asked for, and that were really run."""

    asked: int = 0
    run: int = 0

    def add(self, other: Work) -> None:
        """Count another worker's work in."""
        self.asked += other.asked
        self.run += other.run

    @property
    def layers_saved(self) -> float:
        """Forward passes of a layer that sharing saved."""
        return (self.asked - self.run) / 2


class Losses(Protocol):
    """Where losses come from: a model in this process, workers, or a table."""

    work: Work

    @property
    def keys(self) -> tuple[str, ...]:
        """One per stage: a hash of everything its losses depend on, except the pattern."""

    @property
    def weights(self) -> tuple[int, ...]:
        """One per stage: how many next tokens it scores."""

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """(index into `patterns`, mean loss on the tokens of this stage alone), in any order, as they are known."""


class Fitness:
    """Losses of patterns, each computed once."""

    def __init__(self, source: Losses | Mapping[str, float]) -> None:
        """From a source, or from a plain table of losses by `Pattern.bits`."""
        self.source: Losses = TableLosses(source) if isinstance(source, Mapping) else source
        self.computed = 0  # losses of one pattern on one stage
        self.on_loss: Callable[[str, int, float], None] | None = None  # bits, stage, loss: as soon as it is known
        self._cache: dict[tuple[str, str], float] = {}

    @property
    def stages(self) -> int:
        """How many stages there are; the last sees all tokens."""
        return len(self.source.keys)

    def knows(self, pattern: Pattern, stage: int = -1) -> bool:
        """Whether this loss would be had without computing anything."""
        keys = self.source.keys[: self._index(stage) + 1]
        return all((pattern.bits, key) in self._cache for key in keys)

    def remember(self, entries: Iterable[tuple[str, str, float]]) -> None:
        """Take over losses found earlier: (stage key, bits, loss)."""
        self._cache.update({(bits, key): loss for key, bits, loss in entries})

    def losses(self, patterns: Sequence[Pattern], stage: int = -1) -> list[float]:
        """Mean loss of each pattern over the tokens of all stages up to this one; infinite where it overflows."""
        last = self._index(stage)
        for index in range(last + 1):
            self._compute(patterns, index)
        keys, weights = self.source.keys[: last + 1], self.source.weights[: last + 1]
        return [
            sum(w * self._cache[p.bits, k] for k, w in zip(keys, weights, strict=True)) / sum(weights) for p in patterns
        ]

    def _compute(self, patterns: Sequence[Pattern], stage: int) -> None:
        key = self.source.keys[stage]
        missing = list({p.bits: p for p in patterns if (p.bits, key) not in self._cache}.values())
        if not missing:
            return
        for index, loss in self.source.score(missing, stage):
            bits, value = missing[index].bits, loss if math.isfinite(loss) else math.inf
            self._cache[bits, key] = value
            self.computed += 1
            if self.on_loss:
                self.on_loss(bits, stage, value)

    def _index(self, stage: int) -> int:
        return stage if stage >= 0 else self.stages + stage


class TableLosses:
    """A table of losses by `Pattern.bits`, with one stage; for replaying searchers."""

    keys = ("table",)
    weights = (1,)

    def __init__(self, table: Mapping[str, float]) -> None:
        self.table = table
        self.work = Work()

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """Look the losses up; UsageError for a pattern that is not in the table."""
        for index, pattern in enumerate(patterns):
            if pattern.bits not in self.table:
                raise UsageError(
                    f"The table has no loss for {pattern.bits} ({len(pattern.removed)} units removed). Replay a "
                    "method that asks for other counts on a table that holds them."
                )
            yield index, self.table[pattern.bits]


class ModelLosses:
    """Losses of an eager model in this process, with shared prefixes."""

    def __init__(
        self,
        model: Llama,
        stages: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        model_key: str | None = None,
        prefix_bytes: int = LIMIT_BYTES,
    ) -> None:
        """Prepare a model in checkpoint form.

        Args:
            model: it is not changed.
            stages: token ids [n, S], one tensor per stage.
            dtype: of weights and hidden states; left out, the model's own. Another takes a copy. bfloat16 is 3-4 times
                as fast on a CPU with avx512_bf16, and rounds.
            model_key: a hash of the weights; left out, it is computed when a key is needed.
            prefix_bytes: of hidden states kept for patterns that begin alike.
        """
        check_stages(stages, model.config.vocab_size)
        self.model = cast_model(model, dtype or model.dtype)
        self.stages = tuple(stages)
        self.work = Work()
        self._model_key = model_key
        self._blocks = self.model.blocks
        self._prefixes = Prefixes(self._run, prefix_bytes)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Model, dtype and tokens, one hash per stage."""
        model_key = self._model_key or hash_tensors(p.detach() for _, p in sorted(self.model.named_parameters()))
        return tuple(stage_key(model_key, self.model.dtype, tokens) for tokens in self.stages)

    @property
    def weights(self) -> tuple[int, ...]:
        """Next tokens per stage."""
        return tuple(tokens[:, 1:].numel() for tokens in self.stages)

    @torch.no_grad()
    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """In the order of the forward pass, so that a pattern finds what its neighbour has left."""
        tokens, depths = self.stages[stage], 2 * len(self._blocks)
        order = sorted(range(len(patterns)), key=lambda i: patterns[i].path)
        for path, same in itertools.groupby(order, key=lambda i: patterns[i].path):
            assert len(path) == depths, f"a pattern of {len(path) // 2} layers"
            indices, kept = list(same), [depth for depth in range(depths) if path[depth]]
            self.work.asked += len(indices) * len(kept)
            every = 1 if patterns[indices[0]].sub_blocks else 2
            hidden = self._prefixes.run(stage, kept, lambda: self.model.model.embed_tokens(tokens), every)
            loss = float(next_token_losses(self.model, hidden, tokens).mean())
            yield from ((index, loss) for index in indices)

    def _run(self, depth: int, hidden: Tensor) -> Tensor:
        self.work.run += 1
        return run_half(self.model, depth, hidden)


@torch.no_grad()
def plain_losses(model: Llama, tokens: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """One pattern after the other from the embedding on, nothing shared, nothing kept: the yardstick."""
    losses = []
    for pattern in patterns:
        hidden: Tensor = model.model.embed_tokens(tokens)
        for depth, keep in enumerate(pattern.path):
            if keep:
                hidden = run_half(model, depth, hidden)
        losses.append(float(next_token_losses(model, hidden, tokens).mean()))
    return losses


def run_half(model: Llama, depth: int, hidden: Tensor) -> Tensor:
    """The attention (even depth) or the FFN (odd) of layer depth // 2 added to hidden [n, S, hidden]."""
    layer = model.blocks[depth // 2]
    return run_ffn(layer, hidden) if depth % 2 else run_attention(model, layer, hidden)


def cast_model(model: Llama, dtype: torch.dtype) -> Llama:
    """The model itself if it has this dtype, or a copy with weights and rotary tables rounded to it."""
    if model.dtype == dtype:
        return model
    tied = model.config.tie_word_embeddings
    parameters = ((n, p.detach()) for n, p in model.named_parameters() if not (tied and n == "lm_head.weight"))
    cos, sin = model.get_buffer("cos"), model.get_buffer("sin")
    copy = build_model(model.config, {name: value.to(dtype) for name, value in parameters}, context=len(cos))
    copy.cos, copy.sin = cos.to(dtype), sin.to(dtype)  # or queries would come out wider than values
    return copy


def check_stages(stages: Sequence[Tensor], vocab_size: int) -> None:
    """UsageError unless every stage is a matrix of token ids of this vocabulary with at least one next token."""
    for tokens in stages:
        if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2 or int(tokens.min()) < 0:
            raise UsageError(
                f"Tokens of shape {list(tokens.shape)} cannot be scored; give windows [n, S] with n >= 1 and S >= 2."
            )
        if int(tokens.max()) >= vocab_size:
            raise UsageError(
                f"Token {int(tokens.max())} is outside the model's vocabulary of {vocab_size}; use its own tokenizer."
            )
    if not stages:
        raise UsageError("There are no tokens to score patterns on; give at least one window.")


def stage_key(model_key: str, dtype: torch.dtype, tokens: Tensor) -> str:
    """A hash of what the losses of a stage depend on."""
    text = f"{model_key}\0{dtype}\0{tuple(tokens.shape)}\0{hash_tensors([tokens])}"
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over shapes and raw contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
