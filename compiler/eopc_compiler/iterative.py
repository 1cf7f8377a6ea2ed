"""Iterative structured pruning: a little at a time, with statistics of the model as it is by then.

The frame is Iterative Structured Pruning with Multi-Domain Calibration (arXiv 2601.02674): units are inputs of o_proj
(KV groups) and down_proj (FFN channels), statistics come from a mixture of domains, the mean of what is removed goes
into a bias, and every step looks at the model that the step before has left. What we do differently, each for a
measured reason: units are ranked by what the *repaired* layer loses (OBS) and not by their own variance; errors are
measured in nats through the Fisher information of the residual stream, so that the global choice needs no z-scores; and
kept columns are re-fitted by least squares.

    for s = 1..S, each with windows of its own
        choose how much every layer loses by then: least loss added per cost saved, from the last step's curves
        from the first layer up: moments of the inputs, behind the already cut layers below, added to earlier steps'
                                 remove, re-fit the dense map to what is left, record the curve for the next step
    once more over all windows: re-fit, nothing removed

Two habits made iteration lose to one step, and are avoided: fitting what the last step had fitted (errors of small
samples pile up), and giving every step the same windows (it learns them by heart).
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
    DAMPING,
    Moments,
    MomentSums,
    Removals,
    compensate,
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
    damping: float = DAMPING
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
        return self.block.self_attn.o_proj if kind == "kv_groups" else self.block.mlp.down_proj

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
    for step, windows in enumerate(deal(batches, settings.steps), start=1):
        run.step(windows, settings.ratio * step / settings.steps, f"step {step}/{settings.steps}")
    if settings.steps > 1:
        run.settle(batches)
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
        self.settings, self.cost, self.batches, self.report = settings, cost, batches, report
        self.dense, self.model = model, working_copy(model)
        self.layers = [_Layer(b, d) for b, d in zip(self.model.blocks, model.config.layers, strict=True)]
        self.metrics = self._metrics()
        self.units = {"kv_groups": 1, "ffn": settings.align}  # units that go at a time
        self.curves: dict[Key, Curve] = {}
        self.sums: dict[Key, MomentSums] = {}
        self.total = sum(cost(kind) * len(layer.left[kind]) for layer in self.layers for kind in settings.kinds)

    def step(self, windows: Sequence[Batch], ratio: float, what: str) -> None:
        """Bring the removed cost to `ratio` of the total on these windows, and learn the curves from there on."""
        self.batches = windows
        counts = self._counts(ratio, what)
        self._sweep(counts, what)

    def settle(self, windows: Sequence[Batch]) -> None:
        """Re-fit everything once more on all windows, behind the model as it is in the end."""
        self.batches = windows
        self.sums.clear()
        self._sweep({}, "settling")

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

    def _counts(self, ratio: float, what: str) -> Counts:
        """Units to remove now, per layer and kind."""
        if self.settings.targets:
            return self._towards(self.settings.targets, ratio / (self.settings.ratio or 1.0))
        left = {(i, k): len(layer.left[k]) for i, layer in enumerate(self.layers) for k in self.settings.kinds}
        removed = self.total - sum(self.cost(kind) * n for (_, kind), n in left.items())
        goal = ratio * self.total - removed
        if not self.curves:
            self._sweep({}, f"{what}, looking")
            self.sums.clear()  # the same windows come again
        return allocate(self.curves, self.units, self.cost, goal)

    def _towards(self, targets: Sequence[LayerDims], share: float) -> Counts:
        """Units to remove now, so that `share` of what separates each layer from its target is gone, in parcels."""
        counts: Counts = {}
        for index, (layer, dims) in enumerate(zip(self.layers, targets, strict=True)):
            keeps = {"kv_groups": dims.num_key_value_heads, "ffn": dims.intermediate_size}
            for kind in self.settings.kinds:
                parcels = (layer.units[kind] - keeps[kind]) // self.units[kind]
                gone = layer.units[kind] - len(layer.left[kind])
                counts[index, kind] = int(share * parcels + 0.5) * self.units[kind] - gone
        return counts

    @torch.no_grad()
    def _sweep(self, counts: Counts, what: str) -> None:
        """From the first layer up: cut what `counts` says, re-fit, and record what going on would cost."""
        hidden = [self.model.model.embed_tokens(batch.tokens) for batch in self.batches]
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                if not layer.left[kind]:
                    continue
                inputs = [self._inputs(layer.block, kind, x) for x in hidden]
                if kind in self.settings.kinds:
                    self._operate(index, kind, inputs, counts.get((index, kind), 0))
                hidden = [add_output(x, layer.output(kind), z) for x, z in zip(hidden, inputs, strict=True)]
            if self.report:
                self.report(what, index + 1, len(self.layers))

    def _operate(self, index: int, kind: Kind, inputs: list[Tensor], count: int) -> None:
        """Remove `count` units and re-fit the map, always from the dense one, so that fits do not drift."""
        layer, dense = self.layers[index], self._dense_output(index, kind)
        output, at_once = layer.output(kind), self.units[kind]
        moments = self._moments((index, kind), inputs, dense)
        units, columns = layer.left[kind], layer.columns(kind)
        ahead = min(len(units) - at_once, count + self._horizon(len(units), kind))
        removals = self._removals(index, kind, output.weight.data[:, columns], moments.restricted(columns), ahead)
        done = removals.errors[count - 1] if count else 0.0
        self.curves[index, kind] = tuple(e - done for e in removals.errors[count + at_once - 1 :: at_once])
        gone = set(removals.units[:count])
        layer.left[kind] = [u for i, u in enumerate(units) if i not in gone]
        if layer.is_cut(kind):
            kept = layer.columns(kind)
            if self.settings.repair:
                fitted, bias = repair(moments, dense.weight, kept, self.settings.damping)
            else:
                fitted, bias = compensate(moments, dense.weight, kept)
            weight = torch.zeros_like(dense.weight)
            weight[:, kept] = fitted.float()
            output.weight = nn.Parameter(weight, requires_grad=False)
            output.bias = nn.Parameter(bias.float(), requires_grad=False)

    def _dense_output(self, index: int, kind: Kind) -> Projection:
        block = self.dense.blocks[index]
        return block.self_attn.o_proj if kind == "kv_groups" else block.mlp.down_proj

    def _horizon(self, units: int, kind: Kind) -> int:
        """How far ahead curves must reach: a layer may lose up to three times the average of a step, and some."""
        share = self.settings.ratio / self.settings.steps
        at_once = self.units[kind]
        return at_once * (1 + -int(-min(0.9, 3 * share + 0.1) * units // at_once))

    def _removals(self, index: int, kind: Kind, weight: Tensor, moments: Moments, count: int) -> Removals:
        """The next units to go, counted among those that are left."""
        metric = self.metrics[index].attention if kind == "kv_groups" else self.metrics[index].ffn
        if not self.settings.use_metric:  # error relative to what the sub-block adds
            power = torch.einsum("oi,ij,oj->", weight.double(), moments.covariance, weight.double())
            metric = torch.eye(len(metric), dtype=metric.dtype) / power
        width = weight.shape[1] // len(self.layers[index].left[kind])
        if self.settings.importance == "wifv":
            return wifv_removals(weight, moments.covariance, metric, width, count)
        damping, at_once = self.settings.damping, self.units[kind]
        return obs_removals(weight, moments.covariance, metric, width, count, at_once, damping)

    def _moments(self, key: Key, inputs: list[Tensor], dense: Projection) -> Moments:
        """Moments of a map's inputs, of this step and all before it, against the dense map's output of them."""
        sums = sum_moments(self.batches, inputs)
        if earlier := self.sums.get(key):
            sums.merge(earlier)
        if self.settings.steps > 1:
            self.sums[key] = sums
        seen, weight = sums.moments(self.settings.within), dense.weight.double()
        mean = weight @ seen.mean if dense.bias is None else weight @ seen.mean + dense.bias.double()
        return Moments(seen.mean, seen.covariance, mean, weight @ seen.covariance)

    def _inputs(self, block: Block, kind: Kind, x: Tensor) -> Tensor:
        """What o_proj or down_proj of a block reads."""
        return attention_inputs(self.model, block, x) if kind == "kv_groups" else ffn_inputs(block, x)

    def _metrics(self) -> tuple[LayerMetrics, ...]:
        report = self.report
        return output_metrics(
            self.model,
            metric_windows(self.batches),
            self.settings.seed,
            (lambda done, total: report("sensitivity of the loss", done, total)) if report else None,
        )


def working_copy(model: Llama) -> Llama:
    """A model that shares the tensors of another, with modules of its own to change."""
    with torch.device("meta"):
        copy = Llama(model.config, context=1)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(parameter.data, requires_grad=False))
    copy.cos, copy.sin = model.get_buffer("cos"), model.get_buffer("sin")
    return copy
