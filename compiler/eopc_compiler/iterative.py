"""Iterative structured pruning: a little at a time, with statistics of the model as it is by then.

The frame is Iterative Structured Pruning with Multi-Domain Calibration (arXiv 2601.02674): units are inputs of o_proj
(KV groups) and down_proj (FFN channels), statistics come from a mixture of domains, the mean of what is removed goes
into a bias, and every step looks at the model that the step before has left. What we do differently, each for a
measured reason: units are ranked by what the *repaired* layer loses (OBS) and not by their own variance; errors are
measured in nats through the Fisher information of the residual stream, so that the global choice needs no z-scores; and
kept columns are re-fitted by least squares.

    look: curves of the loss added by removing 1, 2, ... parcels of units, per layer, on the dense model
    for s = 1..S
        choose how much every layer has lost by then: least loss added per cost saved, from the last sweep's curves
        from the first layer up: moments of the inputs, behind the layers below as they are cut by now;
                                 choose the units among all, re-fit the dense map to what is left, record the curve
        in the last step a re-fitted map also makes up for part of the error that the layers below have left

The windows are dealt to the look and the steps before the last, whose moments add up; the last step sees all of them.
One step (S = 1) means one-shot: all statistics, those of the fit too, are of the dense model.

Three habits are avoided: fitting what the last step had fitted (errors of small samples pile up), giving every step the
same windows (it learns them by heart), and never taking back a unit that went when little text had been seen. The first
two made iteration clearly lose to one step. Without them ten steps gain over one shot on the same text (README).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eopc_compiler.allocate import KINDS, Counts, Curve, Key, Kind, allocate
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.pruned import Choice, KeptLayer, unit_columns
from eopc_compiler.sensitivity import LayerMetrics, metric_windows, output_metrics
from eopc_compiler.sequences import add_output, attention_inputs, ffn_inputs
from eopc_compiler.surgery import (
    Moments,
    MomentSums,
    Removals,
    compensate,
    correction,
    obs_removals,
    repair,
    sum_moments,
    wifv_removals,
)

OUTPUTS: dict[Kind, str] = {"kv_groups": "self_attn.o_proj", "ffn": "mlp.down_proj"}  # whose inputs are the units
BATCH_WINDOWS = 8  # that are in memory at a time

Report = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True, slots=True)
class Settings:
    """How to prune; every switch can be turned off to see what it brings."""

    ratio: float  # share of the cost of the units in question to remove
    kinds: tuple[Kind, ...] = ("kv_groups", "ffn")
    align: int = 32  # FFN channels are removed this many at a time
    steps: int = 5
    importance: Literal["obs", "wifv"] = "obs"
    repair: bool = True  # least squares; else only the bias
    use_metric: bool = True  # Fisher information; else squared error relative to the layer's output
    within: bool = False  # V_within in place of V_total
    targets: tuple[LayerDims, ...] | None = None  # what every layer keeps in the end; None: by loss added and cost
    damping: float | None = None  # of the ridge; None: by the text there is (surgery.RIDGE_TOKENS)
    pull: float = 0.5  # share of the error of all layers below that a re-fitted map makes up for, in the last step
    pull_damping: float = 0.1
    seed: int = 0


class _Layer:
    """One layer of the working copy and what is left of it; maps keep their full width until the end."""

    def __init__(self, block: Block, dims: LayerDims) -> None:
        self.block, self.source = block, dims.source_layer
        self.left: dict[Kind, list[int]] = {
            "kv_groups": list(range(dims.num_key_value_heads)),
            "ffn": list(range(dims.intermediate_size)),
        }
        self.units = {kind: len(units) for kind, units in self.left.items()}

    def output(self, kind: Kind) -> Projection:
        """The map whose inputs are the units."""
        return _output(self.block, kind)

    def columns(self, kind: Kind) -> Tensor:
        """Inputs of that map that are left, ascending."""
        return unit_columns(self.left[kind], self.output(kind).weight.shape[1] // self.units[kind])

    def is_cut(self, kind: Kind) -> bool:
        return len(self.left[kind]) < self.units[kind]


def prune_iteratively(
    model: Llama,
    batches: Sequence[Batch],
    settings: Settings,
    cost: Callable[[Kind], float],
    report: Report | None = None,
) -> Choice:
    """Prune a checkpoint-form model; it is left as it was.

    Args:
        batches: token windows with their domain and the weight of a token of it in the mixture.
        cost: of one KV group or one FFN channel; only its ratio matters.

    Returns:
        What is kept, and the repaired o_proj and down_proj with their biases, by source layer.
    """
    run = _Run(model, batches, settings, cost, report)
    hands = deal(batches, settings.steps)
    run.sweep(hands[0], 0.0, "looking")
    if settings.steps == 1:
        run.cut_in_one_shot()
        return run.choice()
    for step, windows in enumerate([*hands[1:], list(batches)], start=1):
        if step == settings.steps:
            run.sums.clear()  # what follows sees the same windows again
        run.sweep(windows, settings.ratio * step / settings.steps, f"step {step}/{settings.steps}")
    return run.choice()


def deal(batches: Sequence[Batch], steps: int) -> list[list[Batch]]:
    """The windows dealt to the steps, so that each sees every domain in its share and no window is seen twice.

    A domain with fewer windows than steps is seen whole by every step.
    """
    domains = sorted({batch.domain for batch in batches})
    hands: list[list[Batch]] = [[] for _ in range(steps)]
    for domain in domains:
        parts = [batch for batch in batches if batch.domain == domain]
        windows, share = torch.cat([b.tokens for b in parts]), sum(b.weight * b.tokens.numel() for b in parts)
        for step, hand in enumerate(hands):
            mine = windows[step::steps] if len(windows) >= steps else windows
            hand += [Batch(domain, share / mine.numel(), part) for part in torch.split(mine, BATCH_WINDOWS)]
    return hands


class _Run:
    """The working copy and the curves between two steps."""

    def __init__(
        self,
        model: Llama,
        batches: Sequence[Batch],
        settings: Settings,
        cost: Callable[[Kind], float],
        report: Report | None,
    ) -> None:
        self.settings, self.cost, self.report = settings, cost, report
        self.dense, self.model = model, working_copy(model)
        self.layers = [_Layer(b, d) for b, d in zip(self.model.blocks, model.config.layers, strict=True)]
        self.metrics = self._metrics(batches) if settings.use_metric else ()
        self.units = {"kv_groups": 1, "ffn": settings.align}  # units that go at a time
        self.curves: dict[Key, Curve] = {}
        self.sums: dict[Key, MomentSums] = {}
        self.total = sum(cost(kind) * len(layer.left[kind]) for layer in self.layers for kind in settings.kinds)

    def choice(self) -> Choice:
        """What is kept, ascending, and the changed tensors in the same order."""
        kept, changed = [], dict[str, Tensor]()
        for layer in self.layers:
            for kind in KINDS:
                if layer.is_cut(kind):
                    output, prefix = layer.output(kind), f"model.layers.{layer.source}.{OUTPUTS[kind]}"
                    assert output.bias is not None
                    changed[f"{prefix}.weight"] = output.weight.data[:, layer.columns(kind)].contiguous()
                    changed[f"{prefix}.bias"] = output.bias.data
            kept.append(KeptLayer(layer.source, *(tuple(layer.left[kind]) for kind in KINDS)))
        return Choice(tuple(kept), changed)

    def _counts(self, ratio: float) -> Counts:
        """Units that are gone at a ratio, per layer and kind."""
        if not ratio:
            return {}
        if self.settings.targets:
            return self._towards(self.settings.targets, ratio / self.settings.ratio)
        return allocate(self.curves, self.units, self.cost, ratio * self.total)

    def _towards(self, targets: Sequence[LayerDims], share: float) -> Counts:
        """Units that are gone when `share` of what separates each layer from its target is, in parcels."""
        counts: Counts = {}
        for index, (layer, dims) in enumerate(zip(self.layers, targets, strict=True)):
            keeps = {"kv_groups": dims.num_key_value_heads, "ffn": dims.intermediate_size}
            for kind in self.settings.kinds:
                parcels = (layer.units[kind] - keeps[kind]) // self.units[kind]
                counts[index, kind] = int(share * parcels + 0.5) * self.units[kind]
        return counts

    @torch.no_grad()
    def sweep(self, windows: Sequence[Batch], ratio: float, what: str) -> None:
        """From the first layer up: bring the removed cost to `ratio` of the total, re-fit, and record the curves."""
        counts = self._counts(ratio)
        hidden = [self.model.model.embed_tokens(batch.tokens) for batch in windows]
        pulls = self._is_last(ratio) and self.settings.repair and self.settings.pull > 0
        whole = list(hidden) if pulls else []  # the same in the dense model
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                if not layer.units[kind]:
                    continue
                inputs = [self._inputs(self.model, index, kind, x) for x in hidden]
                whole = [self._dense_step(index, kind, x) for x in whole]
                if kind in self.settings.kinds:
                    sums = self._sums((index, kind), windows, inputs)
                    self._operate(index, kind, sums, counts.get((index, kind), 0), self._horizon(layer, kind, ratio))
                    if pulls and layer.is_cut(kind):
                        self._pull(index, kind, windows, hidden, inputs, whole)
                hidden = [add_output(x, layer.output(kind), z) for x, z in zip(hidden, inputs, strict=True)]
            if self.report:
                self.report(what, index + 1, len(self.layers))

    @torch.no_grad()
    def cut_in_one_shot(self) -> None:
        """Remove all there is to remove, and re-fit, on the statistics of the look: those of the dense model."""
        counts = self._counts(self.settings.ratio)
        for done, ((index, kind), sums) in enumerate(self.sums.items(), start=1):
            self._operate(index, kind, sums, counts.get((index, kind), 0), 0)
            if self.report:
                self.report("step 1/1", done, len(self.sums))

    def _operate(self, index: int, kind: Kind, sums: MomentSums, count: int, horizon: int) -> None:
        """Remove `count` of all the units there were, re-fit the dense map to the rest, and look up to `horizon`."""
        layer, dense = self.layers[index], _output(self.dense.blocks[index], kind)
        output, at_once = layer.output(kind), self.units[kind]
        moments = self._moments(sums, dense)
        removals = self._removals(index, kind, dense.weight.data, moments, max(count, horizon))
        self.curves[index, kind] = removals.errors[at_once - 1 :: at_once]
        gone = set(removals.units[:count])
        layer.left[kind] = [u for u in range(layer.units[kind]) if u not in gone]
        if not gone:
            output.weight, output.bias = dense.weight, dense.bias
            return
        kept = layer.columns(kind)
        if self.settings.repair:
            fitted, bias = repair(moments, dense.weight, kept, self.settings.damping)
        else:
            fitted, bias = compensate(moments, dense.weight, kept)
        weight = torch.zeros_like(dense.weight)
        weight[:, kept] = fitted.float()
        output.weight = nn.Parameter(weight, requires_grad=False)
        output.bias = nn.Parameter(bias.float(), requires_grad=False)

    def _pull(
        self,
        index: int,
        kind: Kind,
        windows: Sequence[Batch],
        hidden: list[Tensor],
        inputs: list[Tensor],
        whole: list[Tensor],
    ) -> None:
        """Let a re-fitted map also make up for what the layers below have lost: whole - (hidden + dense map)."""
        layer, dense = self.layers[index], _output(self.dense.blocks[index], kind)
        missing = [w - add_output(x, dense, z) for w, x, z in zip(whole, hidden, inputs, strict=True)]
        kept, output = layer.columns(kind), layer.output(kind)
        moments = sum_moments(windows, inputs, missing).moments()
        weight, bias = correction(moments, kept, self.settings.pull, self.settings.pull_damping)
        assert output.bias is not None
        output.weight.data[:, kept] += weight.float()
        output.bias.data += bias.float()

    def _dense_step(self, index: int, kind: Kind, x: Tensor) -> Tensor:
        """The dense model's residual stream [n, S, hidden] behind one of its sub-blocks."""
        return add_output(x, _output(self.dense.blocks[index], kind), self._inputs(self.dense, index, kind, x))

    def _is_last(self, ratio: float) -> bool:
        return ratio * (1 + 1e-9) >= self.settings.ratio

    def _horizon(self, layer: _Layer, kind: Kind, ratio: float) -> int:
        """How far curves must reach for the next step: a layer may lose up to three times the average, and some."""
        if self._is_last(ratio):
            return 0
        parcel, units = self.units[kind], layer.units[kind]
        following = ratio + self.settings.ratio / self.settings.steps
        return min(units - parcel, parcel * (1 + -int(-min(0.9, 3 * following + 0.1) * units // parcel)))

    def _removals(self, index: int, kind: Kind, weight: Tensor, moments: Moments, count: int) -> Removals:
        """The units to go, in order, and the loss that adds."""
        if self.settings.use_metric:
            metric = self.metrics[index].attention if kind == "kv_groups" else self.metrics[index].ffn
        else:  # error relative to what the sub-block adds
            power = torch.einsum("oi,ij,oj->", weight.double(), moments.covariance, weight.double())
            metric = torch.eye(len(weight), dtype=power.dtype) / power
        width = weight.shape[1] // self.layers[index].units[kind]
        if self.settings.importance == "wifv":
            return wifv_removals(weight, moments.covariance, metric, width, count)
        damping = moments.damping if self.settings.damping is None else self.settings.damping
        return obs_removals(weight, moments.covariance, metric, width, count, self.units[kind], damping=damping)

    def _sums(self, key: Key, windows: Sequence[Batch], inputs: list[Tensor]) -> MomentSums:
        """Sums over a map's inputs, with those of earlier sweeps."""
        sums = sum_moments(windows, inputs)
        if earlier := self.sums.get(key):
            sums.merge(earlier)
        self.sums[key] = sums
        return sums

    def _moments(self, sums: MomentSums, dense: Projection) -> Moments:
        """Moments of a map's inputs against the dense map's output of them."""
        seen, weight = sums.moments(self.settings.within), dense.weight.double()
        mean = weight @ seen.mean if dense.bias is None else weight @ seen.mean + dense.bias.double()
        return Moments(seen.mean, seen.covariance, mean, weight @ seen.covariance, seen.rows)

    def _inputs(self, model: Llama, index: int, kind: Kind, x: Tensor) -> Tensor:
        """What o_proj or down_proj of a block reads."""
        block = model.blocks[index]
        return attention_inputs(model, block, x) if kind == "kv_groups" else ffn_inputs(block, x)

    def _metrics(self, batches: Sequence[Batch]) -> tuple[LayerMetrics, ...]:
        report = self.report
        return output_metrics(
            self.model,
            metric_windows(batches),
            self.settings.seed,
            (lambda done, total: report("sensitivity of the loss", done, total)) if report else None,
        )


def _output(block: Block, kind: Kind) -> Projection:
    """The map whose inputs are the units."""
    return block.self_attn.o_proj if kind == "kv_groups" else block.mlp.down_proj


def working_copy(model: Llama) -> Llama:
    """A model that shares the tensors of another, with modules of its own to change."""
    with torch.device("meta"):
        copy = Llama(model.config, context=1)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(parameter.data, requires_grad=False))
    copy.cos, copy.sin = model.get_buffer("cos"), model.get_buffer("sin")
    return copy
