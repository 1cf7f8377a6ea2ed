"""The parity gate: what every exported graph computes against PyTorch, through the runtime that ships it.

Prefill, then 16 cached decode steps, teacher-forced. Two comparisons:

* exact: floating-point activations on both sides. It decides. Inputs that a graph rounds to int8 codes are left
  unrounded on both sides here, because rounding makes tiny differences large: a value on the border between two codes
  falls on either side, and the next layers see a whole code of difference (seen on SmolLM2-135M: PyTorch in fp32 and
  in fp64 then differ by 3e-2 of the largest logit, as much as rounding itself changes).
* runtime: the graph as it ships, on the kernels that ship. It is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from eopc_compiler.model import Cache, Llama, Projection, Rows
from eopc_compiler.prompt_pass import PromptPass
from eopc_compiler.selector import ChannelSelector
from eopc_runtime.bundle import Bundle
from eopc_runtime.errors import ParityError
from eopc_runtime.memory import release_memory
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.tier_info import TierInfo

STEPS = 16
PROMPT = 48
# Largest logit error over largest logit. fp32 graphs differ by summation order (seen: 6e-6 on 30 layers); fp16 keeps
# 11 bits through every operator (seen: 2e-3). A wrong graph (mask, rotary, cache slot, slicing) is off by far more.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}


@dataclass(slots=True)
class Reference:
    """A tier in PyTorch: the model, the pass its prompts run through where that is another one, what that chooses.

    Args:
        steps_round: single tokens read rounded inputs as prompts do; not where they run through a graph of their own.
    """

    model: Llama
    prompt: PromptPass | None = None
    selector: ChannelSelector | None = None
    steps_round: bool = True

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Logits [len(tokens), vocab] of a sequence; behind a pruned prompt, only from its last token on.

        Where steps do not round, inputs of the model are no longer rounded afterwards.
        """
        cache, found = Cache.empty(self.model.config, len(tokens), torch.float32), list[Tensor]()
        rows: Rows = ()
        if self.prompt is None:
            found.append(self.model.step(cache, tokens[:PROMPT]))
        else:
            energies = self.prompt.fill(cache, tokens[: PROMPT - 1])
            rows = self.selector(energies) if self.selector else ()
        if not self.steps_round:
            unround(self.model)
        found.append(self.model.step(cache, tokens[cache.length :], rows))
        return torch.cat(found).numpy()

    def unround(self) -> None:
        """Leave inputs as they are from now on."""
        for part in filter(None, (self.model, self.prompt)):
            unround(part)


def unround(model: nn.Module) -> None:
    """Have every projection of a model read its inputs as they are."""
    for module in model.modules():
        if isinstance(module, Projection):
            module.rounds = False


def check_parity(
    bundle: Bundle, info: TierInfo, reference: Reference, tokens: list[int], dtype: str
) -> dict[str, float | int]:
    """Compare a tier's graph with its PyTorch model on PROMPT + STEPS tokens.

    Args:
        reference: of `load_tier`, and `load_prompt_pass`; its inputs are no longer rounded afterwards.
        dtype: the graph's compute type.

    Returns:
        The largest errors as shares of the largest logit, exact and of the runtime's kernels, and the tolerance.

    Raises:
        ParityError: the exact error is above the tolerance.
    """
    shipped = _error(_logits(OrtTier(bundle, info), tokens), reference.logits(tokens))
    release_memory()  # of the first session, before the second is opened
    reference.unround()
    gather = info.selector and info.selector.graph
    graphs = {path: without_rounded_inputs(bundle.graph(path)) for path in info.graphs if path != gather}
    expected = reference.logits(tokens)
    exact = _error(_logits(OrtTier(bundle, info, exact=graphs), tokens), expected)
    if info.step is not None:  # then steps have not run through the graph of all tokens, which other runners use
        del graphs[info.step]
        release_memory()
        exact = max(exact, _error(_logits(OrtTier(bundle, info, exact=graphs), tokens), expected))
    if not exact <= TOLERANCE[dtype]:
        raise ParityError(
            f"{info.tier}: the exported graph differs from PyTorch by {exact:.2e} of the largest logit "
            f"(allowed: {TOLERANCE[dtype]:.0e}). The bundle was not written; please report the model and versions."
        )
    return {
        "max_logit_error": exact,
        "max_logit_error_runtime_kernels": shipped,
        "tolerance": TOLERANCE[dtype],
        "prefill_tokens": PROMPT,
        "decode_steps": len(tokens) - PROMPT,
    }


def without_rounded_inputs(graph: bytes) -> bytes:
    """A graph whose matrices read their inputs as they come, not through QuantizeLinear and DequantizeLinear."""
    model = onnx.load_from_string(graph)
    codes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    unrounded, kept = {}, []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            unrounded[node.output[0]] = codes[node.input[0]]
        elif node.op_type != "QuantizeLinear":
            kept.append(node)
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = unrounded.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return bytes(model.SerializeToString())


def _logits(runner: OrtTier, tokens: list[int]) -> npt.NDArray[np.float32]:
    """The same through the runtime: a prefill, and one cached step per further token."""
    cache = runner.new_cache()
    if runner.has_prompt_graph:
        rows = [runner.prefill(cache, tokens[:PROMPT]).copy()]
    else:
        rows = [runner.forward(cache, tokens[:PROMPT], logits="all")]
    rows += [runner.forward(cache, [token]).copy() for token in tokens[PROMPT:]]
    return np.concatenate(rows)


def _error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
