"""What ranks a prompt's tokens in each layer, fitted in one pass: what the answer would lose if one did not run.

A layer adds Δ_t to token t of the prompt. To first order the loss L of the answer changes by <∂L/∂Δ_t, Δ_t> where the
token passes the layer instead: the gate of POP (arXiv 2602.03295, section 3), of one token. Its size is known only
behind the answer, so a score that is linear in what the layer reads stands in for its logarithm: ridge regression over
the calibration text, within each window, as only tokens of one prompt are ever compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.model import Llama
from eopc_compiler.sequences import next_token_losses, run_layer
from eopc_compiler.surgery import MomentSums, repair
from eopc_compiler.token_selector import FIRST, TokenScorers

LEAST = 1e-8  # nats that count as none


def fit_token_scorers(
    model: Llama, batches: Sequence[Batch], prompt: int, report: Callable[[int, int], None] | None = None
) -> TokenScorers:
    """Scorers of every layer that could choose tokens: all but the first and the last.

    Args:
        model: the whole model in deployment form, whose parameters do not require gradients.
        batches: windows [n, S].
        prompt: tokens of every window that are ranked, above FIRST; the others are the answer.
    """
    layers, width = range(1, len(model.blocks) - 1), model.config.hidden_size
    sums = {i: MomentSums(width, 1, 1 + max(b.domain for b in batches)) for i in layers}
    for done, batch in enumerate(batches, start=1):
        for index, (inputs, effects) in zip(layers, token_effects(model, batch.tokens, prompt), strict=True):
            ranked = [_within(x) for x in (inputs, torch.log(effects.abs() + LEAST)[..., None])]
            sums[index].add(ranked[0].flatten(0, 1), ranked[1].flatten(0, 1), batch.domain, batch.weight)
        if report:
            report(done, len(batches))
    every, nothing = torch.arange(width), torch.zeros(1, width)
    return {i: repair(s.moments(), nothing, every)[0].t().float().contiguous() for i, s in sums.items()}


def token_effects(model: Llama, tokens: Tensor, prompt: int) -> list[tuple[Tensor, Tensor]]:
    """What each layer but the first and the last reads of a prompt [n, prompt - 1, hidden], and <∂L/∂Δ, Δ> of it.

    L is summed over the answer of every window [n, S], in nats; the prompt's last token runs through the whole model in
    any case, and is left out.
    """
    reads, added = list[Tensor](), list[Tensor]()
    last = len(model.blocks) - 1
    with torch.enable_grad():
        x = model.model.embed_tokens(tokens).detach().requires_grad_()
        for index, layer in enumerate(model.blocks):
            delta = run_layer(model, layer, x) - x
            if 0 < index < last:
                reads.append(layer.input_layernorm(x).detach()[:, : prompt - 1])
                added.append(delta)
            x = x + delta
        loss = next_token_losses(model, x[:, prompt - 1 :], tokens[:, prompt - 1 :]).sum()
        slopes = torch.autograd.grad(loss, added)
    effects = [(slope * delta.detach()).sum(-1)[:, : prompt - 1] for slope, delta in zip(slopes, added, strict=True)]
    return list(zip(reads, effects, strict=True))


def _within(values: Tensor) -> Tensor:
    """Of values [n, T, d], those of tokens that are ranked, less their mean over the window."""
    ranked = values[:, FIRST:]
    return ranked - ranked.mean(1, keepdim=True)
