"""What a decode tier really meets: a cache that its prefill tier has filled.

A plan `t0>t2` runs the prompt on t0 and the answer on t2, over t0's cache restricted to what t2 keeps. So the loss of a
decode tier is measured, and its repair fitted (`tier_repair.py`), on the second part of every window, behind the first
part's inherited keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eopc_compiler.calibration import Batch, domain_means
from eopc_compiler.ladder import Mask
from eopc_compiler.model import Llama, Projection
from eopc_compiler.prompt_cache import PromptCache
from eopc_compiler.sequences import (
    Past,
    fast_math,
    next_token_losses,
    run_layer,
)
from eopc_compiler.tier_model import tier_view
from eopc_compiler.token_selector import PrunedPrompt
from eopc_runtime.memory import trim_heap

KEPT_EVERY = 5  # layers: all hidden states would take as much memory as a small model, and save little time


class ContinuationLoss:
    """Continuation losses of masks of one deployment-form model, prompts and unchanged lower layers computed once.

    Args:
        model: the whole model, which also runs the prompts.
        batches: windows [n, S] of every domain.
        prompt: tokens of every window that the whole model has run already.
        pruned: how the prompt has run (`PromptCache`); None for through all layers.
    """

    def __init__(self, model: Llama, batches: Sequence[Batch], prompt: int, pruned: PrunedPrompt | None = None) -> None:
        self.model, self.batches, self.prompt, self.pruned = model, batches, prompt, pruned
        self.evaluations = 0
        self._past: list[list[Past]] = []  # per batch, per source layer
        self._inputs: list[list[Tensor]] = []  # [n, S - prompt, hidden] in front of source layers 0, KEPT_EVERY, ...
        with torch.no_grad(), fast_math():
            for _, _, tokens in batches:
                x, cache = model.model.embed_tokens(tokens), PromptCache(model, prompt, pruned)
                pasts, inputs = list[Past](), list[Tensor]()
                for index, layer in enumerate(model.blocks):
                    past, behind = cache.enter(index, x)
                    pasts.append(past)
                    if index % KEPT_EVERY == 0:
                        inputs.append(behind.clone())
                    if index < cache.depth:
                        x = run_layer(model, layer, x)
                self._past.append(pasts)
                self._inputs.append(inputs)

    def of_mask(self, mask: Mask) -> dict[int, float]:
        """Mean loss by domain, nats per continuation token, of the unrepaired tier."""
        return self.of_tier(tier_view(self.model, mask), mask)

    def of_tier(self, tier: Llama, mask: Mask) -> dict[int, float]:
        """The same for a tier whose matrices may be its own."""
        return domain_means(self.batches, self.by_batch(tier, mask))

    @torch.no_grad()
    def by_batch(self, tier: Llama, mask: Mask) -> list[Tensor]:
        """Losses [n, S - prompt - 1] in nats of every batch's continuations."""
        self.evaluations += 1
        found = list[Tensor]()
        start = self._shared(tier, mask)
        for index, batch in enumerate(self.batches):
            x = self._inputs[index][start // KEPT_EVERY]  # behind shared layers, whatever the tier leaves out after
            with fast_math():
                for dims, layer in list(zip(mask.layers, tier.blocks, strict=True))[start:]:
                    past = inherited(self._past[index][dims.source_layer], dims.num_key_value_heads)
                    x = run_layer(tier, layer, x, past)
                found.append(next_token_losses(tier, x, batch.tokens[:, self.prompt :]))
        return found

    def _shared(self, tier: Llama, mask: Mask) -> int:
        """How many of the tier's first layers need not be run: those of the whole model, to where inputs are kept."""
        count = 0
        for dims, whole, ours, theirs in zip(
            mask.layers, self.model.config.layers, tier.blocks, self.model.blocks, strict=False
        ):
            if dims != whole or not _same(ours.mlp.down_proj, theirs.mlp.down_proj):
                break
            count += 1
        return min(count, len(mask.layers) - 1) // KEPT_EVERY * KEPT_EVERY


def losses_of_tiers(
    model: Llama, batches: Sequence[Batch], prompt: int, tiers: Sequence[tuple[Llama, Mask]]
) -> list[dict[int, float]]:
    """`ContinuationLoss.of_tier` of some tiers, in the memory that one batch takes."""
    found: list[list[Tensor]] = [[] for _ in tiers]
    for batch in batches:
        losses = ContinuationLoss(model, [batch], prompt)
        for parts, (tier, mask) in zip(found, tiers, strict=True):
            parts += losses.by_batch(tier, mask)
        del losses  # before the next batch's are made beside them
        trim_heap()
    return [domain_means(batches, parts) for parts in found]


def _same(ours: Projection, theirs: Projection) -> bool:
    """Whether a tier's map is the shared one: neither its matrix nor its bias is the tier's own."""
    a, b = ours.bias, theirs.bias
    biases = a is b if a is None or b is None else a.data_ptr() == b.data_ptr()
    return biases and ours.weight.data_ptr() == theirs.weight.data_ptr()


def inherited(past: Past, kv_heads: int) -> Past:
    """The cache of a larger tier, restricted to the KV groups a smaller one keeps: a prefix."""
    return past[0][:, :kv_heads], past[1][:, :kv_heads]


@dataclass(frozen=True, slots=True)
class Met:
    """What stands in front of one layer of the whole model, for every batch; behind the last layer, no pasts."""

    pasts: tuple[Past, ...]  # the prompt's keys and values in that layer
    hidden: tuple[Tensor, ...]  # hidden states [n, S - prompt, hidden] behind the prompt

    def halved(self) -> Met:
        """The same to keep: hidden states in half precision, which a repair's targets bear."""
        return Met(self.pasts, tuple(half(x) for x in self.hidden))


def half(x: Tensor) -> Tensor:
    """A tensor in half precision, as it is where one value is too large for that."""
    halved = x.half()
    return halved if halved.isfinite().all() else x


def walk(model: Llama, batches: Sequence[Batch], prompt: int, pruned: PrunedPrompt | None = None) -> Iterator[Met]:
    """The whole model's own way through the layers, which a repair aims at; arguments as those of `repair_tiers`.

    One `Met` in front of every layer, and one behind the last. Several repairs on one text can share them as a tuple.
    """
    with torch.no_grad():
        dense = [model.model.embed_tokens(batch.tokens) for batch in batches]
        caches = [PromptCache(model, prompt, pruned) for _ in batches]
        for index in range(len(model.blocks)):
            pasts = tuple(cache.enter(index, x)[0] for cache, x in zip(caches, dense, strict=True))
            yield Met(pasts, tuple(x[:, prompt:] for x in dense))
            dense = [_through(model, index, x) for x in dense]
        yield Met((), tuple(x[:, prompt:] for x in dense))


def _through(model: Llama, index: int, x: Tensor) -> Tensor:
    with fast_math():
        return run_layer(model, model.blocks[index], x).float()
