"""Iterative structured pruning: a little at a time, with statistics of the model as it is by then.

The frame is Iterative Structured Pruning with Multi-Domain Calibration (arXiv 2601.02674): units are inputs of o_proj
(KV groups) and down_proj (FFN channels), statistics come from a mixture of domains, the mean of what is removed goes
into a bias, and every step looks at the model that the step before has left. What we do differently, each for a
measured reason: units are ranked by what the *repaired* layer loses (OBS) and not by their own variance; errors are
measured in nats through the Fisher information of the residual stream, so that the global choice needs no z-scores; and
kept columns are re-fitted by least squares.

    for s = 1..S
        choose how much every layer loses by then: least loss added per cost saved, from the last step's curves
        from the first layer up: moments of the inputs, behind the already cut layers below
                                 remove, repair, record the curve for the next step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eopc_compiler.allocate import KINDS, Counts, Curve, Kind, allocate, uniform_counts
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.pruned import Choice, KeptLayer, keep_all, unit_columns
from eopc_compiler.sensitivity import LayerMetrics, output_metrics
from eopc_compiler.sequences import attend, fast_math
from eopc_compiler.surgery import (
    DAMPING,
    Moments,
    MomentSums,
    Removals,
    compensate,
    obs_removals,
    repair,
    wifv_removals,
)

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
    uniform: bool = False  # the same count in every layer
    pull: float = 0.0  # share of the residual stream's error so far that a layer's repair makes up for
    refit: bool = False  # re-fit every output map, also where nothing is removed
    damping: float = DAMPING
    metric_sequences: int = 12  # the Fisher information needs far fewer than the covariances
    seed: int = 0


class _Layer:
    """One layer of the working copy and what is left of it."""

    def __init__(self, block: Block, kept: KeptLayer) -> None:
        self.block, self.source = block, kept.source_layer
        self.left = {"kv_groups": list(kept.kv_groups), "ffn": list(kept.ffn_channels)}
        self.cut: set[Kind] = set()

    def output(self, kind: Kind) -> Projection:
        """The map whose inputs are the units."""
        return self.block.self_attn.o_proj if kind == "kv_groups" else self.block.mlp.down_proj


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
    for step in range(1, settings.steps + 1):
        run.step(settings.ratio * step / settings.steps, f"step {step}/{settings.steps}")
    return run.choice()


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
        self.config: LlamaConfig = model.config
        self.dense, self.model = model, working_copy(model)
        self.layers = [_Layer(b, k) for b, k in zip(self.model.blocks, keep_all(model.config), strict=True)]
        self.domains = 1 + max(domain for domain, _, _ in batches)
        self.metrics = self._metrics()
        self.units = {"kv_groups": 1, "ffn": settings.align}  # units that go at a time
        self.curves: dict[tuple[int, Kind], Curve] = {}
        self.total = sum(cost(kind) * len(layer.left[kind]) for layer in self.layers for kind in settings.kinds)

    def step(self, ratio: float, what: str) -> None:
        """Bring the removed cost to `ratio` of the total, and learn the curves from there on."""
        counts = self._counts(ratio, what)
        self._sweep(counts, what)

    def choice(self) -> Choice:
        """What is kept, ascending, and the changed tensors in the same order."""
        kept, changed = [], dict[str, Tensor]()
        for layer in self.layers:
            orders = {}
            for kind, name in (("kv_groups", "self_attn.o_proj"), ("ffn", "mlp.down_proj")):
                left = layer.left[kind]
                orders[kind] = sorted(range(len(left)), key=left.__getitem__)
                if kind in layer.cut:
                    output = layer.output(kind)
                    columns = unit_columns(orders[kind], output.weight.shape[1] // len(left))
                    prefix = f"model.layers.{layer.source}.{name}"
                    changed[f"{prefix}.weight"] = output.weight.data[:, columns].contiguous()
                    assert output.bias is not None
                    changed[f"{prefix}.bias"] = output.bias.data
            kept.append(KeptLayer(layer.source, *(tuple(sorted(layer.left[k])) for k in ("kv_groups", "ffn"))))
        return Choice(tuple(kept), changed)

    def _counts(self, ratio: float, what: str) -> Counts:
        """Units to remove now, per layer and kind."""
        left = {(i, k): len(layer.left[k]) for i, layer in enumerate(self.layers) for k in self.settings.kinds}
        removed = self.total - sum(self.cost(kind) * n for (_, kind), n in left.items())
        goal = ratio * self.total - removed
        if self.settings.uniform:
            return uniform_counts(left, self.units, self.cost, goal)
        if not self.curves:
            self._sweep({}, f"{what}, looking")
        return allocate(self.curves, self.units, self.cost, goal)

    @torch.no_grad()
    def _sweep(self, counts: Counts, what: str) -> None:
        """From the first layer up: cut what `counts` says, and record what going on would cost."""
        hidden = [self.model.model.embed_tokens(tokens) for _, _, tokens in self.batches]
        dense = list(hidden) if self.settings.pull else []
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                if not layer.left[kind]:
                    continue
                dense = [self._ahead(self.dense, self.dense.blocks[index], kind, x) for x in dense]
                inputs = [self._inputs(self.model, layer.block, kind, x) for x in hidden]
                self._operate(index, kind, inputs, hidden, dense, counts)
                hidden = [self._add(x, layer.output(kind), z) for x, z in zip(hidden, inputs, strict=True)]
            if self.report:
                self.report(what, index + 1, len(self.layers))

    def _operate(
        self, index: int, kind: Kind, inputs: list[Tensor], hidden: list[Tensor], dense: list[Tensor], counts: Counts
    ) -> None:
        """Remove and repair; `inputs` are narrowed in place to what is kept."""
        refit = self.settings.refit and bool(counts)
        if kind not in self.settings.kinds and not refit:
            return
        layer = self.layers[index]
        output, count = layer.output(kind), counts.get((index, kind), 0)
        moments = self._moments(inputs, output, hidden, dense)
        units = len(layer.left[kind])
        width = output.weight.shape[1] // units
        gone = set[int]()
        if kind in self.settings.kinds:
            ahead = min(units - self.units[kind], count + self._horizon(units, kind))
            removals = self._removals(index, kind, output, moments, width, ahead)
            done = removals.errors[count - 1] if count else 0.0
            at_once = self.units[kind]
            self.curves[index, kind] = tuple(e - done for e in removals.errors[count + at_once - 1 :: at_once])
            gone = set(removals.units[:count])
        if not gone and not refit:
            return
        kept = [u for u in range(units) if u not in gone]
        columns = unit_columns(kept, width)
        if self.settings.repair:
            fitted = repair(moments, output.weight, columns, self.settings.damping)
        else:
            fitted = compensate(moments, output.weight, columns)
        output.weight, output.bias = (nn.Parameter(t.float(), requires_grad=False) for t in fitted)
        layer.cut.add(kind)
        if gone:
            narrow(self.config, layer.block, kind, kept)
            layer.left[kind] = [layer.left[kind][u] for u in kept]
            inputs[:] = [x[..., columns] for x in inputs]

    def _horizon(self, units: int, kind: Kind) -> int:
        """How far ahead curves must reach: a layer may lose up to three times the average of a step, and some."""
        share = self.settings.ratio / self.settings.steps
        at_once = self.units[kind]
        return at_once * (1 + -int(-min(0.9, 3 * share + 0.1) * units // at_once))

    def _removals(
        self, index: int, kind: Kind, output: Projection, moments: Moments, width: int, count: int
    ) -> Removals:
        metric = self.metrics[index].attention if kind == "kv_groups" else self.metrics[index].ffn
        if not self.settings.use_metric:  # error relative to what the sub-block adds
            power = torch.einsum("oi,ij,oj->", output.weight.double(), moments.covariance, output.weight.double())
            metric = torch.eye(len(metric), dtype=metric.dtype) / power
        if self.settings.importance == "wifv":
            return wifv_removals(output.weight, moments.covariance, metric, width, count)
        at_once = self.units[kind]
        damping = self.settings.damping
        return obs_removals(output.weight, moments.covariance, metric, width, count, at_once, damping)

    def _moments(self, inputs: list[Tensor], output: Projection, hidden: list[Tensor], dense: list[Tensor]) -> Moments:
        """Moments of a map's inputs against its own output, moved by `pull` towards the dense residual stream."""
        sums = MomentSums(output.weight.shape[1], output.weight.shape[0], self.domains)
        pull = self.settings.pull
        for i, ((domain, weight, _), x) in enumerate(zip(self.batches, inputs, strict=True)):
            target = output(x)
            if pull:
                target = (1 - pull) * target + pull * (dense[i] - hidden[i])
            sums.add(x.flatten(0, 1), target.flatten(0, 1), domain, weight)
        return sums.moments(self.settings.within)

    def _inputs(self, model: Llama, block: Block, kind: Kind, x: Tensor) -> Tensor:
        """What o_proj or down_proj of a block reads."""
        with fast_math():
            if kind == "kv_groups":
                return attend(model, block, block.input_layernorm(x)).float()
            inputs: Tensor = block.mlp.hidden(block.post_attention_layernorm(x))
        return inputs.float()

    def _ahead(self, model: Llama, block: Block, kind: Kind, x: Tensor) -> Tensor:
        """The residual stream behind one sub-block."""
        output = block.self_attn.o_proj if kind == "kv_groups" else block.mlp.down_proj
        return self._add(x, output, self._inputs(model, block, kind, x))

    def _add(self, x: Tensor, output: Projection, inputs: Tensor) -> Tensor:
        with fast_math():
            added: Tensor = output(inputs)
        return x + added.float()

    def _metrics(self) -> tuple[LayerMetrics, ...]:
        tokens = [t for _, _, t in self.batches]
        share = max(1, round(self.settings.metric_sequences / len(tokens)))
        report = self.report
        return output_metrics(
            self.model,
            [t[:share] for t in tokens],
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


def narrow(config: LlamaConfig, block: Block, kind: Kind, kept: Sequence[int]) -> None:
    """Drop the maps that feed removed units, in a checkpoint-form block; the output map is the caller's."""
    if kind == "ffn":
        rows = {"gate_proj": unit_columns(kept, 1), "up_proj": unit_columns(kept, 1)}
        owner: nn.Module = block.mlp
        block.mlp.width = len(kept)
    else:
        head = config.head_dim
        rows = {"q_proj": unit_columns(kept, config.query_group_size * head)}
        rows |= dict.fromkeys(("k_proj", "v_proj"), unit_columns(kept, head))
        owner = block.self_attn
        block.self_attn.kv_heads, block.self_attn.q_heads = len(kept), len(kept) * config.query_group_size
    for name, index in rows.items():
        projection = owner.get_submodule(name)
        for leaf in ("weight", "bias"):
            if (value := getattr(projection, leaf)) is not None:
                setattr(projection, leaf, nn.Parameter(value.data[index], requires_grad=False))
