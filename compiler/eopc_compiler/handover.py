"""What a decode tier really meets: a cache that its prefill tier has filled.

A plan `t0>t2` runs the prompt on t0 and the answer on t2, over t0's cache restricted to what t2 keeps. So the loss of a
decode tier is measured, and its repair fitted, on the second part of every window, behind the first part's inherited
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eopc_compiler.calibration import Batch
from eopc_compiler.ladder import Mask
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.prompt_cache import PromptCache
from eopc_compiler.quantize import Quantized
from eopc_compiler.sequences import (
    Past,
    add_attention,
    add_output,
    fast_math,
    ffn_inputs,
    next_token_losses,
    run_layer,
)
from eopc_compiler.surgery import Moments, repair, sum_moments
from eopc_compiler.tier_model import tier_view
from eopc_compiler.token_selector import PrunedPrompt

KEPT_EVERY = 5  # layers: all hidden states would take as much memory as a small model, and save little time


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a tier has of its own in one layer: down_proj as it is stored (None: the shared one), its bias."""

    source_layer: int
    weight: Tensor | Quantized | None  # [in, out], in the basis of the stored weights
    bias: Tensor


Round = Callable[[int, Tensor, Tensor], Tensor | Quantized]  # source layer, weight [in, out], covariance of the inputs


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

    @torch.no_grad()
    def of_tier(self, tier: Llama, mask: Mask) -> dict[int, float]:
        """The same for a tier whose matrices may be its own."""
        self.evaluations += 1
        totals, counts = dict[int, float](), dict[int, int]()
        start = self._shared(tier, mask)
        for index, (domain, _, tokens) in enumerate(self.batches):
            x = self._inputs[index][start // KEPT_EVERY]  # behind shared layers, whatever the tier leaves out after
            with fast_math():
                for dims, layer in list(zip(mask.layers, tier.blocks, strict=True))[start:]:
                    past = inherited(self._past[index][dims.source_layer], dims.num_key_value_heads)
                    x = run_layer(tier, layer, x, past)
                losses = next_token_losses(tier, x, tokens[:, self.prompt :])
            totals[domain] = totals.get(domain, 0.0) + float(losses.sum())
            counts[domain] = counts.get(domain, 0) + losses.numel()
        return {domain: totals[domain] / counts[domain] for domain in totals}

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
        """The same to keep: hidden states in half precision, which a repair's targets bear, unless one is too large."""
        halves = [x.half() for x in self.hidden]
        return Met(self.pasts, tuple(h if h.isfinite().all() else x for h, x in zip(halves, self.hidden, strict=True)))


def walk(model: Llama, batches: Sequence[Batch], prompt: int, pruned: PrunedPrompt | None = None) -> Iterator[Met]:
    """The whole model's own way through the layers, which a repair aims at; arguments as those of `repair_tier`.

    One `Met` in front of every layer, and one behind the last. Several repairs on one text can share them as a tuple.
    """
    with torch.no_grad():
        dense = [model.model.embed_tokens(batch.tokens) for batch in batches]
        caches = [PromptCache(model, prompt, pruned) for _ in batches]
        for index in range(len(model.blocks)):
            pasts = tuple(cache.enter(index, x)[0] for cache, x in zip(caches, dense, strict=True))
            yield Met(pasts, tuple(x[:, prompt:].clone() for x in dense))
            dense = [_through(model, index, x) for x in dense]
        yield Met((), tuple(x[:, prompt:].clone() for x in dense))


@torch.no_grad()
def repair_tier(
    model: Llama,
    mask: Mask,
    batches: Sequence[Batch],
    prompt: int,
    own: Collection[int],
    round_weight: Round = lambda _layer, weight, _covariance: weight,
    report: Callable[[int, int], None] | None = None,
    pruned: PrunedPrompt | None = None,
    walked: Iterable[Met] | None = None,
) -> tuple[Llama, tuple[Repaired, ...]]:
    """Re-fit down_proj where a layer was narrowed or stands before a gap, on the cache the tier inherits.

    From the first layer up, behind already repaired ones, W' minimises the distance of the tier's residual stream to
    that of the whole model *in front of the next kept layer*, so that a layer also makes up, as far as it can, for what
    was removed below and right above it. Least squares with a ridge towards the weights as they are (surgery.repair).

    Args:
        model: the whole model in deployment form; it is left as it is, and runs the prompts.
        prompt: tokens of every window [n, S] whose keys and values are inherited.
        own: source layers that may have a down_proj of their own; the others that need it get only a bias.
        round_weight: how a new matrix is stored; later layers are fitted behind the stored one.
        pruned: how the prompts have run (`PromptCache`); None for through all layers.
        walked: the `walk` of the same arguments, where it is at hand.

    Returns:
        The repaired tier, and what it has of its own.
    """
    tier, repaired = tier_view(model, mask), list[Repaired]()
    way = enumerate(walked if walked is not None else walk(model, batches, prompt, pruned))
    at, met = next(way)
    ours = [x.float() for x in met.hidden]
    for position, (dims, layer) in enumerate(zip(mask.layers, tier.blocks, strict=True)):
        while at < dims.source_layer:
            at, met = next(way)
        pasts = [inherited(past, dims.num_key_value_heads) for past in met.pasts]
        while at < next_source(mask, position, model):
            at, met = next(way)
        middle = [add_attention(tier, layer, x, past) for x, past in zip(ours, pasts, strict=True)]
        inputs = [ffn_inputs(layer, x) for x in middle]
        if needs_repair(mask, position, model):
            targets = [whole.float() - x for whole, x in zip(met.hidden, middle, strict=True)]
            moments = sum_moments(batches, inputs, targets).moments()
            fresh = _fit(layer, dims.source_layer, moments, dims.source_layer in own, round_weight)
            repaired.append(fresh)
        ours = [add_output(x, layer.mlp.down_proj, h) for x, h in zip(middle, inputs, strict=True)]
        if report:
            report(position + 1, len(mask.layers))
    return tier, tuple(repaired)


def needs_repair(mask: Mask, position: int, model: Llama) -> bool:
    """Whether the layer at this position of a tier was narrowed, or layers right above it are gone."""
    dims = mask.layers[position]
    narrowed = dims != model.config.layers[dims.source_layer]
    return narrowed or next_source(mask, position, model) > dims.source_layer + 1


def next_source(mask: Mask, position: int, model: Llama) -> int:
    """The source layer that follows in the tier; one past the last where none does."""
    return mask.layers[position + 1].source_layer if position + 1 < len(mask.layers) else len(model.blocks)


def apply_repair(tier: Llama, mask: Mask, repaired: Sequence[Repaired]) -> Llama:
    """Put what a tier has of its own into its view, in place."""
    own = {r.source_layer: r for r in repaired}
    for dims, layer in zip(mask.layers, tier.blocks, strict=True):
        if fresh := own.get(dims.source_layer):
            _set_output(layer.mlp.down_proj, fresh.weight, fresh.bias)
    return tier


def _fit(layer: Block, source: int, moments: Moments, own: bool, round_weight: Round) -> Repaired:
    """The repaired map of a layer, put in place: a new matrix and bias, or only the bias."""
    output = layer.mlp.down_proj
    every = torch.arange(output.weight.shape[0])
    stored: Tensor | Quantized | None = None
    weight = output.weight.data
    if own:
        fitted, _ = repair(moments, weight.t(), every)
        stored = round_weight(source, fitted.t().float().contiguous(), moments.covariance)
        weight = stored.dequantize() if isinstance(stored, Quantized) else stored
    bias = (moments.target_mean - moments.mean @ weight.double()).float()
    _set_output(output, stored, bias)
    return Repaired(source, stored, bias)


def _set_output(output: Projection, weight: Tensor | Quantized | None, bias: Tensor) -> None:
    if weight is not None:
        values = weight.dequantize() if isinstance(weight, Quantized) else weight
        output.weight = nn.Parameter(values, requires_grad=False)
    output.bias = nn.Parameter(bias, requires_grad=False)


def _through(model: Llama, index: int, x: Tensor) -> Tensor:
    with fast_math():
        return run_layer(model, model.blocks[index], x).float()
