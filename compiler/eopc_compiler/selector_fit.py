"""A tier that chooses channels by its prompt, fitted to the choices it will make.

The answer runs behind the whole model's cache, on the core and on what each prompt chose. Left-out channels change from
sequence to sequence, so no map can make up for them one by one; but over the calibration text the kept ones tell
something of the others. From the first layer up, behind already fitted ones, W' minimises E||W'(m ⊙ z) - W z||² over
continuations, m being 1 for the core and the chosen channels (least squares with a ridge towards W, surgery.repair).

The ridge counts the squares of z over prompts too. A sequence's first token is unlike all others: a few of its channels
are hundreds of times larger, and all later attention rests on it. Where no prompt has run, it meets W' as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.model import Block, Llama
from eopc_compiler.prompt_cache import PromptCache
from eopc_compiler.quantize import Quantized
from eopc_compiler.selector import PRIOR_TOKENS, Selector, first_of, utility
from eopc_compiler.sequences import Past, add_attention, ffn_inputs, next_token_losses
from eopc_compiler.surgery import repair, sum_moments
from eopc_compiler.tier_repair import Round

# Of the ridge, as surgery.RIDGE_TOKENS: choices that differ from prompt to prompt make covariances noisier.
RIDGE_TOKENS = 9000


@dataclass(frozen=True, slots=True)
class Scorer:
    """What ranks the channels of one layer's pool, [pool] each: see selector.py."""

    prior: Tensor
    weight: Tensor


Scorers = tuple[Scorer | None, ...]  # by layer; None: nothing to choose


@dataclass(frozen=True, slots=True)
class FittedChannels:
    """The FFN of one layer of a selecting tier, as it is stored.

    Args:
        core: down_proj of the core [core, hidden].
        pool: of the pool [pool, hidden].
        bias: [hidden].
        prior: what the calibration text's mean energy adds to a prompt's [pool].
        weight: utility per energy [pool].
    """

    core: Tensor | Quantized
    pool: Tensor
    bias: Tensor
    prior: Tensor
    weight: Tensor

    def down(self) -> Tensor:
        """down_proj of core and pool [core + pool, hidden], fp32."""
        core = self.core.dequantize() if isinstance(self.core, Quantized) else self.core
        return torch.cat([core, self.pool])

    def kept(self, energy: Tensor, chosen: int) -> Tensor:
        """1 for what runs and 0 for the rest [n, core + pool], from energies of prompts [n, core + pool]."""
        core = energy.shape[1] - len(self.pool)
        ids = first_of(utility(energy[:, core:], self.prior, self.weight), chosen)
        kept = torch.zeros_like(energy)
        kept[:, :core] = 1.0
        return kept.scatter_(1, core + ids, 1.0)


def with_scorers(fitted: Sequence[FittedChannels], scorers: Scorers) -> tuple[FittedChannels, ...]:
    """The same maps, with channels ranked by these scorers."""
    pairs = zip(fitted, scorers, strict=True)
    return tuple(f if s is None else replace(f, prior=s.prior, weight=s.weight) for f, s in pairs)


@torch.no_grad()
def fit_selector(
    model: Llama,
    selector: Selector,
    batches: Sequence[Batch],
    prompt: int,
    round_weight: Round = lambda _layer, weight, _covariance: weight,
    dtype: torch.dtype = torch.float32,
    report: Callable[[int, int], None] | None = None,
) -> tuple[FittedChannels, ...]:
    """Fit every layer of a tier that chooses channels.

    Args:
        model: the whole model in deployment form; it is left as it is, and runs the prompts.
        prompt: tokens of every window [n, S] that the choice is made by.
        round_weight: how the core's matrix is stored; pools are stored in `dtype`.
    """
    ours, fitted = [model.model.embed_tokens(b.tokens)[:, prompt:] for b in batches], list[FittedChannels]()
    for index, (pasts, energies) in enumerate(_prompts(model, batches, prompt)):
        layer, core, pool = model.blocks[index], selector.core[index], selector.pool[index]
        width, down = core + pool, layer.mlp.down_proj
        middle = [add_attention(model, layer, x, past) for x, past in zip(ours, pasts, strict=True)]
        hidden = [ffn_inputs(layer, x) for x in middle]
        targets = [down(h) for h in hidden]
        mean = _mean_squares(energies, batches, prompt)[:width]
        plain = _unfitted(layer, selector, index, mean)
        masks = [plain.kept(energy[:, :width], selector.chosen[index]) for energy in energies]
        inputs = [h[..., :width] * mask[:, None] for h, mask in zip(hidden, masks, strict=True)]
        moments = sum_moments(batches, inputs, targets).moments()
        every = torch.arange(width)
        damping = RIDGE_TOKENS / moments.rows
        weight = repair(moments, down.weight[:width].t(), every, damping, mean)[0].t().float().contiguous()
        stored = round_weight(index, weight[:core].contiguous(), moments.covariance[:core, :core])
        whole = replace(plain, core=stored, pool=weight[core:].to(dtype).float())
        weight = whole.down()  # as it is stored
        bias = (moments.target_mean - moments.mean @ weight.double()).float()
        fitted.append(replace(whole, bias=bias))
        ours = [x + h @ weight + bias for x, h in zip(middle, inputs, strict=True)]
        if report:
            report(index + 1, len(model.blocks))
    return tuple(fitted)


@torch.no_grad()
def unfitted(model: Llama, selector: Selector, batches: Sequence[Batch], prompt: int) -> tuple[FittedChannels, ...]:
    """The same without a fit: the maps as they are, and what ranks the channels."""
    layers = enumerate(_prompts(model, batches, prompt))
    return tuple(
        _unfitted(model.blocks[i], selector, i, _mean_squares(energies, batches, prompt)) for i, (_, energies) in layers
    )


@torch.no_grad()
def selected_losses(
    model: Llama, selector: Selector, fitted: Sequence[FittedChannels], batches: Sequence[Batch], prompt: int
) -> list[Tensor]:
    """Losses [n, S - prompt - 1] in nats of every batch's continuations on the tier, behind the whole model's cache."""
    ours = [model.model.embed_tokens(b.tokens)[:, prompt:] for b in batches]
    for index, (pasts, energies) in enumerate(_prompts(model, batches, prompt)):
        layer, channels, width = model.blocks[index], fitted[index], selector.core[index] + selector.pool[index]
        following = list[Tensor]()
        for x, past, energy in zip(ours, pasts, energies, strict=True):
            middle = add_attention(model, layer, x, past)
            kept = channels.kept(energy[:, :width], selector.chosen[index])
            inputs = ffn_inputs(layer, middle)[..., :width] * kept[:, None]
            following.append(middle + inputs @ channels.down() + channels.bias)
        ours = following
    return [next_token_losses(model, x, b.tokens[:, prompt:]) for x, b in zip(ours, batches, strict=True)]


@torch.no_grad()
def prompt_energies(model: Llama, batches: Sequence[Batch], prompt: int) -> list[Tensor]:
    """Per layer: the energies [N, ffn] that the prompts of all windows choose by."""
    return [torch.cat(energies) for _, energies in _prompts(model, batches, prompt)]


def _prompts(model: Llama, batches: Sequence[Batch], prompt: int) -> Iterator[tuple[list[Past], list[Tensor]]]:
    """Per layer: what it holds of the prompts, and the energies [n, ffn] of all their tokens but the last."""
    dense = [model.model.embed_tokens(b.tokens[:, :prompt]) for b in batches]
    caches = [PromptCache(model, prompt) for _ in batches]
    for index, layer in enumerate(model.blocks):
        pasts = [cache.enter(index, x)[0] for cache, x in zip(caches, dense, strict=True)]
        middle = [add_attention(model, layer, x) for x in dense]
        hidden = [ffn_inputs(layer, x) for x in middle]
        yield pasts, [h[:, :-1].pow(2).sum(1) for h in hidden]
        dense = [x + layer.mlp.down_proj(h) for x, h in zip(middle, hidden, strict=True)]


def _mean_squares(energies: Sequence[Tensor], batches: Sequence[Batch], prompt: int) -> Tensor:
    """Mean squares [ffn] of what down_proj reads over prompts, from their energies."""
    shares = [b.weight * energy.sum(0) for b, energy in zip(batches, energies, strict=True)]
    tokens = sum(b.weight * len(energy) * (prompt - 1) for b, energy in zip(batches, energies, strict=True))
    return torch.stack(shares).sum(0) / tokens


def _unfitted(layer: Block, selector: Selector, index: int, mean: Tensor) -> FittedChannels:
    """A layer as the whole model has it, with what ranks its channels: mean squares over prompts [core + pool]."""
    core, width = selector.core[index], selector.core[index] + selector.pool[index]
    weight = layer.mlp.down_proj.weight.data
    return FittedChannels(
        weight[:core],
        weight[core:width],
        torch.zeros(weight.shape[1]),
        PRIOR_TOKENS * mean[core:width],
        weight[core:width].pow(2).sum(1),
    )
