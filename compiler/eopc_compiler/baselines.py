"""Published pruning criteria as baselines: re-implementations from their formulas, on KV groups instead of heads.

All score the inputs of o_proj and down_proj, W [out, in] being the matrix and x_j its input channel j; a KV group sums
(FLAP: averages) over the columns of its query heads.

* `magnitude`: ||W_:,j||_2.
* `random_units`: a seeded draw.
* `wanda_sp`: mean over rows of |W_ij| ||x_j||_2 (Wanda, arXiv 2306.11695, in the structured form of FLAP's authors).
  Equal shares in every layer; each layer is scored on what the pruned layers below it put out; no bias.
* `flap`: FLAP (arXiv 2312.11983). WIFV, var(x_j) ||W_:,j||²; "AL-AM": attention scores squared, all scores standardised
  per layer, the lowest of the whole model go; the mean of what is removed stays as a bias, b += W_:,U E[x_U]. One shot.

Unlike FLAP's code, statistics are the plain mean and variance over all tokens of all domains, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import capture_inputs
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.prune_request import (
    PruneRequest,
    UnitScores,
    choose_evenly,
    choose_globally,
    even_counts,
    keep_best,
)
from eopc_compiler.pruned import Choice, KeptLayer, unit_columns
from eopc_compiler.sequences import run_layer

Method = Callable[[Llama, CalibrationSet, PruneRequest], Choice]

BATCH = 4  # sequences at a time, so that activations stay small


def magnitude(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Keep the units with the largest output columns; the text is not read."""
    scores = [
        UnitScores(
            by_group(layer.self_attn.o_proj.weight.double().norm(dim=0), model.config).sum(1),
            layer.mlp.down_proj.weight.double().norm(dim=0),
        )
        for layer in model.blocks
    ]
    return Choice(choose_evenly(model.config, scores, request))


def random_units(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Keep units drawn by the seed; the text is not read."""
    generator = torch.Generator().manual_seed(request.seed)
    scores = [
        UnitScores(
            torch.rand(d.num_key_value_heads, generator=generator), torch.rand(d.intermediate_size, generator=generator)
        )
        for d in model.config.layers
    ]
    return Choice(choose_evenly(model.config, scores, request))


def wanda_sp(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Prune layer by layer on the outputs of the layers pruned before; a layer's own scores see it whole."""
    counts, kept = even_counts(model.config, request), []
    hidden = embed(model, calibration)
    for index, layer in enumerate(model.blocks):
        o, down, _ = observe_layer(model, layer, hidden)
        scores = UnitScores(
            by_group(_wanda(layer.self_attn.o_proj.weight, o), model.config).sum(1),
            _wanda(layer.mlp.down_proj.weight, down),
        )
        kept.append(keep_best(index, scores, counts[index]))
        with silenced(model, layer, kept[-1]):
            hidden = [run_layer(model, layer, x) for x in hidden]
        request.tick(f"wanda-sp: {index + 1}/{len(model.blocks)} layers")
    return Choice(tuple(kept))


def flap(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Remove what fluctuates least in the dense model, and keep its mean as a bias."""
    scores, means = [], []
    hidden = embed(model, calibration)
    for index, layer in enumerate(model.blocks):
        o, down, hidden = observe_layer(model, layer, hidden)
        heads = standardise(_wifv(layer.self_attn.o_proj.weight, o) ** 2)
        channels = standardise(_wifv(layer.mlp.down_proj.weight, down))
        scores.append(UnitScores(by_group(heads, model.config).mean(1), channels))
        means.append((o.mean, down.mean))
        request.tick(f"flap: {index + 1}/{len(model.blocks)} layers")
    kept = choose_globally(model.config, scores, request)
    return Choice(kept, compensation(model, kept, means))


@dataclass(slots=True)
class ColumnMoments:
    """Running mean and variance of columns in fp64, over rows that arrive in parts (Chan's update).

    Not the diagonal of `surgery.MomentSums`: that takes a full product of the inputs, hundreds of times the work, and
    weights domains by the mixture, which the published criteria do not know.
    """

    count: int
    mean: Tensor  # [width]
    deviations: Tensor  # [width]: sum of squared distances from the mean

    @classmethod
    def empty(cls, width: int) -> ColumnMoments:
        """Of no rows."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, width], n >= 1."""
        rows = rows.double()
        n, total = len(rows), self.count + len(rows)
        mean = rows.mean(0)
        shift = mean - self.mean
        self.deviations += (rows - mean).pow(2).sum(0) + shift.pow(2) * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """E[(x - E[x])²], [width]."""
        return self.deviations / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """E[x²], [width]."""
        return self.variance + self.mean.pow(2)


def embed(model: Llama, calibration: CalibrationSet) -> list[Tensor]:
    """Inputs [n, S, hidden] of the first layer, all domains in batches of a few windows."""
    return [model.model.embed_tokens(t) for _, tokens in calibration.domains for t in torch.split(tokens, BATCH)]


def observe_layer(
    model: Llama, layer: Block, hidden: Sequence[Tensor]
) -> tuple[ColumnMoments, ColumnMoments, list[Tensor]]:
    """Moments of the inputs of o_proj and of down_proj, and the layer's outputs, batch by batch."""
    modules = {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
    moments = {name: ColumnMoments.empty(module.weight.shape[1]) for name, module in modules.items()}
    after = []
    with capture_inputs(modules) as inputs:
        for x in hidden:
            after.append(run_layer(model, layer, x))
            for name, parts in inputs.items():
                while parts:  # taken out at once: the inputs of all batches together may not fit
                    moments[name].add(parts.pop())
    return moments["o"], moments["down"], after


@contextmanager
def silenced(model: Llama, layer: Block, kept: KeptLayer) -> Iterator[None]:
    """Zero the inputs of o_proj and down_proj that are not kept: the layer computes what slicing it would."""
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, gate=gate: (args[0] * gate,))
        for _, module, gate in output_gates(model, layer, kept)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def output_gates(model: Llama, layer: Block, kept: KeptLayer) -> list[tuple[str, Projection, Tensor]]:
    """Name, module and gate [in] of a layer's two output matrices: 1 where an input channel is kept, else 0."""
    width = model.config.query_group_size * model.config.head_dim
    gates = []
    for name, module, columns in (
        ("self_attn.o_proj", layer.self_attn.o_proj, unit_columns(kept.kv_groups, width)),
        ("mlp.down_proj", layer.mlp.down_proj, unit_columns(kept.ffn_channels, 1)),
    ):
        gates.append((name, module, torch.zeros(module.weight.shape[1]).index_fill_(0, columns, 1.0)))
    return gates


def compensation(model: Llama, kept: Sequence[KeptLayer], means: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Biases that keep the mean of what is removed, b + W_:,U E[x_U], by Hugging Face name; fp32.

    Args:
        means: of the inputs of o_proj and down_proj, per source layer.
    """
    biases = {}
    for layer in kept:
        gates = output_gates(model, model.blocks[layer.source_layer], layer)
        for (name, module, gate), mean in zip(gates, means[layer.source_layer], strict=True):
            if bool(gate.all()):
                continue
            bias = module.weight.double() @ ((1 - gate.double()) * mean)
            bias = bias if module.bias is None else bias + module.bias.double()
            biases[f"model.layers.{layer.source_layer}.{name}.bias"] = bias.float()
    return biases


def by_group(columns: Tensor, config: LlamaConfig) -> Tensor:
    """Values of o_proj's input columns, [kv_heads, columns per group]."""
    return columns.view(-1, config.query_group_size * config.head_dim)


def standardise(scores: Tensor) -> Tensor:
    """(x - mean) / std over a layer; zeros where all are alike."""
    centred = scores - scores.mean()
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return centred / spread if spread > 0 else torch.zeros_like(scores)


def _wanda(weight: Tensor, inputs: ColumnMoments) -> Tensor:
    """Mean over rows of |W_ij| times the root mean square of input j (a constant times ||x_j||_2)."""
    return weight.double().abs().mean(0) * inputs.second_moment.sqrt()


def _wifv(weight: Tensor, inputs: ColumnMoments) -> Tensor:
    """var(x_j) ||W_:,j||²."""
    return inputs.variance * weight.double().pow(2).sum(0)
