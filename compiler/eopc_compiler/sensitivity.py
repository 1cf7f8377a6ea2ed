"""How much the loss minds a change of a sub-block's output: the Fisher information of the residual stream.

For a small change Δy of what attention or the FFN of a layer adds to the residual stream, the loss rises by about
½ E[Δyᵀ F Δy] with F = E[g gᵀ], g the gradient of -log p(token) with the token drawn from the model itself (so that F is
the Fisher information, whatever the text). The metric of a layer is ½ F: errors under it are nats per token, and layers
can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.model import Llama
from eopc_compiler.sequences import fast_math, run_attention, run_ffn

METRIC_SEQUENCES = 12  # the Fisher information settles long before the covariances do


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """½ F at the outputs of a layer's two sub-blocks, [hidden, hidden] fp64."""

    attention: Tensor
    ffn: Tensor


def metric_windows(batches: Sequence[Batch]) -> list[Tensor]:
    """The first windows of every batch, METRIC_SEQUENCES or a little less in all, but at least one of each."""
    share = max(1, METRIC_SEQUENCES // len(batches))
    return [batch.tokens[:share] for batch in batches]


def output_metrics(
    model: Llama, batches: Sequence[Tensor], seed: int = 0, report: Callable[[int, int], None] | None = None
) -> tuple[LayerMetrics, ...]:
    """The metrics of every layer on token batches [n, S]; needs memory for the activations of one sequence.

    Args:
        model: any form; its parameters must not require gradients.
        seed: of the drawn tokens.
        report: called with (done, total) batches.
    """
    size = model.config.hidden_size
    sums = [torch.zeros(2, size, size, dtype=torch.float64) for _ in model.blocks]
    generator = torch.Generator().manual_seed(seed)
    sequences = [row[None] for tokens in batches for row in tokens]
    for done, row in enumerate(sequences):
        for index, gradients in enumerate(_gradients(model, row, generator)):
            for part, g in enumerate(gradients):
                g = g.double()  # products rounded to fp32 would leave a sum of few tokens indefinite
                sums[index][part] += g.t() @ g
        if report:
            report(done + 1, len(sequences))
    tokens = sum(row.numel() for row in sequences)
    return tuple(LayerMetrics(*s.div_(2 * tokens)) for s in sums)


def _gradients(model: Llama, tokens: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Gradients [tokens, hidden] of the summed loss at the residual stream behind attention and FFN of every layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.enable_grad(), fast_math():
        x = model.model.embed_tokens(tokens).detach().requires_grad_(True)
        for layer in model.blocks:
            x = run_attention(model, layer, x)
            middle = x.view_as(x)  # a node of its own, also where attention was left out
            x = run_ffn(layer, middle)
            x = x.view_as(x)
            for node in (middle, x):
                node.retain_grad()
            seen.append((middle, x))
        logits = model.lm_head(model.model.norm(x[0, :-1])).float()
        with torch.no_grad():
            drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    gradients = []
    for pair in seen:
        grads = [node.grad for node in pair]
        assert grads[0] is not None and grads[1] is not None
        gradients.append((grads[0][0].float(), grads[1][0].float()))
    return gradients
