"""What removing would cost, layer by layer, on the whole model: orders of units and curves of loss, nothing trained.

* Units inside a layer (KV groups, FFN channels) go in the order of OBS with repair (surgery.py) on the moments of the
  calibration mixture, measured in nats through the Fisher information of the residual stream (sensitivity.py).
* A layer: block influence of ShortGPT (arXiv 2403.03853), 1 - cos(input, output), averaged over tokens; it only gives
  the planner's search a place to start from.

A decode tier inherits the cache of its prefill tier; on the whole model that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eopc_compiler.allocate import Curve
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.model import Llama, Projection
from eopc_compiler.sensitivity import LayerMetrics, metric_windows, output_metrics
from eopc_compiler.sequences import add_output, attention_inputs, cosine_sum, ffn_inputs
from eopc_compiler.surgery import Removals, obs_removals, sum_moments

Report = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True)
class LayerCurves:
    """The units of one source layer from most to least important, and the nats that removing from the end adds."""

    dims: LayerDims
    parcel: int  # FFN channels that go at a time
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    kv_errors: Curve  # with 1, 2, ... groups removed; at least one stays
    ffn_errors: Curve  # with 1, 2, ... parcels removed; at least one stays
    influence: float  # 1 - cos(input, output), in 0..2

    def order(self) -> UnitOrder:
        """The one order of units that all tiers share."""
        return UnitOrder(self.kv_groups, self.ffn_channels)

    def added(self, kept: LayerDims) -> float:
        """Nats per token that cutting the layer down to `kept` adds, repaired."""
        return _at(self.kv_errors, self._groups_gone(kept)) + _at(self.ffn_errors, self._parcels_gone(kept))

    def weighed(self, kv_groups: float) -> LayerCurves:
        """The same curves where removing KV groups adds so many times as much."""
        return replace(self, kv_errors=tuple(kv_groups * error for error in self.kv_errors))

    def kv_ahead(self, kept: LayerDims) -> Curve:
        """The curve from `kept` on, in groups."""
        return _from(self.kv_errors, self._groups_gone(kept))

    def ffn_ahead(self, kept: LayerDims) -> Curve:
        """The curve from `kept` on, in parcels."""
        return _from(self.ffn_errors, self._parcels_gone(kept))

    def _groups_gone(self, kept: LayerDims) -> int:
        return self.dims.num_key_value_heads - kept.num_key_value_heads

    def _parcels_gone(self, kept: LayerDims) -> int:
        return (self.dims.intermediate_size - kept.intermediate_size) // self.parcel


@dataclass(frozen=True, slots=True)
class InputPeaks:
    """Largest magnitude of every input channel of a layer's two output matrices, original order."""

    o: Tensor  # [q_heads * head_dim]
    down: Tensor  # [ffn]


@dataclass(frozen=True, slots=True)
class Observations:
    """What the calibration text tells of the dense model."""

    curves: tuple[LayerCurves, ...]
    peaks: tuple[InputPeaks, ...]


@torch.no_grad()
def observe(
    model: Llama,
    batches: Sequence[Batch],
    parcel: int,
    seed: int = 0,
    report: Report | None = None,
    rank: bool = True,
    metric_report: Report | None = None,
) -> Observations:
    """Order the units of every layer of a checkpoint-form model and price their removal in nats; record input peaks.

    Args:
        parcel: FFN channels that are removed at a time.
        report: called with (done, total) steps.
        rank: else units stay in their order and curves are empty: for a ladder without pruned tiers.
        metric_report: called with (done, total) sequences while the sensitivity of the loss is measured, before.
    """
    layers = len(model.blocks)
    metrics: Sequence[LayerMetrics | None] = [None] * layers
    if rank:
        metrics = output_metrics(model, metric_windows(batches), seed, metric_report)
    curves, peaks, tokens = [], [], sum(batch.tokens.numel() for batch in batches)
    hidden = [model.model.embed_tokens(tokens) for _, _, tokens in batches]
    for index, (dims, layer, metric) in enumerate(zip(model.config.layers, model.blocks, metrics, strict=True)):
        before = hidden
        inputs = [attention_inputs(model, layer, x) for x in hidden]
        hidden = [add_output(x, layer.self_attn.o_proj, z) for x, z in zip(hidden, inputs, strict=True)]
        groups = dims.num_key_value_heads
        kv = Removals((), ())
        if metric:
            kv = _removals(layer.self_attn.o_proj, batches, inputs, metric.attention, groups, groups - 1, 1)
        o_peaks = _peaks(inputs)
        inputs = [ffn_inputs(layer, x) for x in hidden]
        hidden = [add_output(x, layer.mlp.down_proj, h) for x, h in zip(hidden, inputs, strict=True)]
        width = dims.intermediate_size
        ffn = Removals((), ())
        if metric:
            ffn = _removals(layer.mlp.down_proj, batches, inputs, metric.ffn, width, width - parcel, parcel)
        cosine = sum(map(cosine_sum, before, hidden)) / tokens
        curves.append(
            LayerCurves(
                dims,
                parcel,
                _order(kv, groups),
                _order(ffn, width),
                kv.errors,
                ffn.errors[parcel - 1 :: parcel],
                max(0.0, 1.0 - cosine),  # rounding may put a cosine above 1
            )
        )
        peaks.append(InputPeaks(o_peaks, _peaks(inputs)))
        if report:
            report(index + 1, layers)
    return Observations(tuple(curves), tuple(peaks))


def _removals(
    output: Projection,
    batches: Sequence[Batch],
    inputs: Sequence[Tensor],
    metric: Tensor,
    units: int,
    count: int,
    at_once: int,
) -> Removals:
    """The order in which the units that feed a map would go, all but the last ones."""
    moments = sum_moments(batches, inputs).moments()
    width = output.weight.shape[1] // units
    return obs_removals(output.weight, moments.covariance, metric, width, count, at_once, damping=moments.damping)


def _order(removals: Removals, units: int) -> tuple[int, ...]:
    """All units from most to least important: what stays, as it was, then what goes, last first."""
    gone = set(removals.units)
    return (*(u for u in range(units) if u not in gone), *reversed(removals.units))


def _at(curve: Curve, count: int) -> float:
    return curve[count - 1] if count else 0.0


def _from(curve: Curve, count: int) -> Curve:
    return tuple(e - _at(curve, count) for e in curve[count:])


@contextmanager
def capture_inputs(modules: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of modules, flattened to [tokens, width], while the block runs."""
    captured: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _module, args: captured[name].append(args[0].detach().flatten(0, -2))

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _peaks(inputs: Sequence[Tensor]) -> Tensor:
    """Largest magnitude per column over all rows."""
    return torch.stack([x.abs().flatten(0, -2).amax(0) for x in inputs]).amax(0)
