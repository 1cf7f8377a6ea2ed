"""Repair of static tiers on the cache that they inherit: output maps fitted so that what was removed is made up for.

From the first layer up, behind already repaired ones, W' minimises the distance of the tier's residual stream to that
of the whole model *in front of the next kept layer*, so that a layer also makes up, as far as it can, for what was
removed below and right above it. Least squares with a ridge towards the weights as they are (surgery.repair), and of
the change only as much as holds on windows it was not fitted to (surgery.held_share).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eopc_compiler.calibration import Batch
from eopc_compiler.handover import Met, half, inherited, walk
from eopc_compiler.ladder import Mask
from eopc_compiler.model import Llama, Projection
from eopc_compiler.quantize import Quantized
from eopc_compiler.sequences import add_attention, add_output, ffn_inputs
from eopc_compiler.surgery import Moments, MomentSums, held_share, repair, sum_halves, weighted_mean
from eopc_compiler.tier_model import tier_view
from eopc_compiler.token_selector import PrunedPrompt


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a tier has of its own in one layer: down_proj as it is stored (None: the shared one), its bias."""

    source_layer: int
    weight: Tensor | Quantized | None  # [in, out], in the basis of the stored weights
    bias: Tensor


Round = Callable[[int, Tensor, Tensor], Tensor | Quantized]  # source layer, weight [in, out], covariance of the inputs
RepairedTier = tuple[Llama, tuple[Repaired, ...]]  # its view of the weights, and what it has of its own


def _as_it_is(_layer: int, weight: Tensor, _covariance: Tensor) -> Tensor:
    return weight


@torch.no_grad()
def repair_tiers(
    model: Llama,
    masks: Sequence[tuple[Mask, Collection[int]]],
    batches: Sequence[Batch],
    prompt: int,
    round_weight: Round = _as_it_is,
    report: Callable[[int, int], None] | None = None,
    pruned: PrunedPrompt | None = None,
    walked: Iterable[Met] | None = None,
) -> list[RepairedTier]:
    """Re-fit down_proj where a layer was narrowed or stands before a gap, on the cache the tiers inherit.

    The whole model runs over the text once, whatever the number of tiers.

    Args:
        model: the whole model in deployment form; it is left as it is, and runs the prompts.
        masks: of the tiers, each with the source layers that may have a down_proj of their own; the others that need
            it get only a bias.
        prompt: tokens of every window [n, S] whose keys and values are inherited.
        round_weight: how a new matrix is stored; later layers are fitted behind the stored one.
        report: called with (done, total) layers of the whole model.
        pruned: how the prompts have run (`PromptCache`); None for through all layers.
        walked: the `walk` of the same arguments, where it is at hand.
    """
    repairs = [_Repair(model, mask, own, batches, round_weight) for mask, own in masks]
    layers = len(model.blocks)
    for at, met in enumerate(walk(model, batches, prompt, pruned) if walked is None else walked):
        for tier in repairs:
            tier.meet(at, met)
        if report and at:
            report(at, layers)
    return [(tier.view, tuple(tier.repaired)) for tier in repairs]


def repair_tier(
    model: Llama,
    mask: Mask,
    batches: Sequence[Batch],
    prompt: int,
    own: Collection[int],
    round_weight: Round = _as_it_is,
    report: Callable[[int, int], None] | None = None,
    pruned: PrunedPrompt | None = None,
    walked: Iterable[Met] | None = None,
) -> RepairedTier:
    """One tier; see `repair_tiers`."""
    return repair_tiers(model, [(mask, own)], batches, prompt, round_weight, report, pruned, walked)[0]


class _Repair:
    """One tier on its way up, beside the whole model."""

    def __init__(
        self, model: Llama, mask: Mask, own: Collection[int], batches: Sequence[Batch], round_weight: Round
    ) -> None:
        self.view, self.repaired = tier_view(model, mask), list[Repaired]()
        self._model, self._mask, self._own, self._batches, self._round = model, mask, own, batches, round_weight
        self._position, self._running = 0, False  # of the layer that runs next, or waits in front of its FFN
        self._hidden: list[Tensor] = []  # in front of either

    def meet(self, at: int, met: Met) -> None:
        """Take in what stands in front of source layer `at`, one after the other, and behind the last."""
        if not at:
            self._hidden = [x.float() for x in met.hidden]
        if self._running and at == next_source(self._mask, self._position, self._model):
            self._end(met)
        if self._position < len(self._mask.layers) and at == self._mask.layers[self._position].source_layer:
            self._begin(met)

    def _begin(self, met: Met) -> None:
        """Run the layer's attention on the cache it inherits."""
        layer, groups = self.view.blocks[self._position], self._mask.layers[self._position].num_key_value_heads
        for i, past in enumerate(met.pasts):
            self._hidden[i] = add_attention(self.view, layer, self._hidden[i], inherited(past, groups))
        self._running = True

    def _end(self, met: Met) -> None:
        """Run its FFN, whose last map is fitted, where the layer needs it, to what the whole model has behind it.

        That is, in front of the next layer kept. Inputs of the map wait in half precision, as targets may.
        """
        layer, source = self.view.blocks[self._position], self._mask.layers[self._position].source_layer
        inputs = [half(ffn_inputs(layer, x)) for x in self._hidden]
        if needs_repair(self._mask, self._position, self._model):
            targets = [whole.float() - x for whole, x in zip(met.hidden, self._hidden, strict=True)]
            self.repaired.append(self._mend(layer.mlp.down_proj, source, inputs, targets))
        for i, h in enumerate(inputs):
            self._hidden[i] = add_output(self._hidden[i], layer.mlp.down_proj, h.float())
        self._running, self._position = False, self._position + 1

    def _mend(self, output: Projection, source: int, inputs: list[Tensor], targets: list[Tensor]) -> Repaired:
        """The repaired map of a layer, put in place: a new matrix and bias, or only the bias."""
        stored: Tensor | Quantized | None = None
        if source in self._own:
            fitted, moments = _fitted(output.weight.data.t(), *sum_halves(self._batches, inputs, targets))
            mean, target_mean = moments.mean, moments.target_mean
            stored = self._round(source, fitted.t().float().contiguous(), moments.covariance)
        else:
            mean, target_mean = (weighted_mean(self._batches, values) for values in (inputs, targets))
        weight = output.weight.data if stored is None else _values(stored)
        bias = (target_mean - mean @ weight.double()).float()
        _set_output(output, stored, bias)
        return Repaired(source, stored, bias)


def _fitted(weight: Tensor, first: MomentSums, second: MomentSums) -> tuple[Tensor, Moments]:
    """A map [out, in] fitted to both halves of the text, and their moments.

    As much of the change as has proved good on the second half where it was fitted to the first: layers that lost
    little have little to make up for, and a fit to few windows moves them more than it should.
    """
    kept, share = torch.arange(weight.shape[1]), 1.0
    if second.rows:
        share = held_share(repair(first.moments(), weight, kept)[0], weight, second.moments())
    first.merge(second)
    moments = first.moments()
    fitted, _ = repair(moments, weight, kept)
    return torch.lerp(weight.double(), fitted, share), moments


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


def _set_output(output: Projection, weight: Tensor | Quantized | None, bias: Tensor) -> None:
    if weight is not None:
        output.weight = nn.Parameter(_values(weight), requires_grad=False)
    output.bias = nn.Parameter(bias, requires_grad=False)


def _values(weight: Tensor | Quantized) -> Tensor:
    return weight.dequantize() if isinstance(weight, Quantized) else weight
