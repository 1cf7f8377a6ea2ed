"""From scores to a choice: how many units every layer loses, and which ones, for a share of its parameters.

Units are KV groups (a KV head with its query heads) and FFN channels; channels go in aligned blocks. A ratio is the
share of the parameters of the *chosen* units that goes: of the FFN, or of attention and FFN. Every layer keeps at least
one group and one block, so that no sub-block disappears by accident. Two ways to share a ratio out:

* `choose_evenly`: the same counts in every layer, whatever the scores; blocks that do not divide evenly are spread
  over the layers, unless the layers have to be alike.
* `choose_globally`: the lowest scores of the whole model go first, so scores must be comparable between layers.

Parameters per unit are counted from the config, never assumed: without biases 2 d h (g + 1) per group, 3 d per channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from eopc_compiler.config import LayerDims, LlamaConfig, layer_tensor_shapes
from eopc_compiler.pruned import KeptLayer
from eopc_runtime.errors import UsageError

Units = Literal["ffn", "all"]
Say = Callable[[str], None]


def _silent(_text: str) -> None:
    """The default of progress: nobody listens."""


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What a pruning method is asked for."""

    ratio: float  # share of the chosen units' parameters to remove, 0 <= ratio < 1
    units: Units = "all"  # FFN channels only, or KV groups as well
    align: int = 1  # kept FFN widths are multiples of it; divides every width
    uniform: bool = False  # the same widths in every layer, and head counts that stock loaders accept
    seed: int = 0
    steps: int = 5  # of methods that remove a little at a time
    sub_blocks: bool = False  # attentions and as many FFNs, of methods that remove whole layers
    say: Say = field(default=_silent, compare=False)  # a line for whatever a user should know
    tick: Say = field(default=_silent, compare=False)  # a count that replaces the one before


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Importance of one layer's units, larger is more important."""

    kv_groups: Tensor  # [kv_heads]
    ffn_channels: Tensor  # [ffn]


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Parameters per unit, biases included."""

    kv_group: int
    ffn_channel: int


def unit_costs(config: LlamaConfig) -> UnitCosts:
    """Parameters that one KV group and one FFN channel hold, counted from the tensor shapes."""

    def count(kv_heads: int, width: int) -> int:
        return sum(math.prod(shape) for shape in layer_tensor_shapes(config, LayerDims(0, kv_heads, width)).values())

    bare = count(0, 0)
    return UnitCosts(count(1, 0) - bare, count(0, 1) - bare)


def choice_share(config: LlamaConfig, kept: Sequence[KeptLayer], units: Units) -> float:
    """The share of the chosen units' parameters that a choice removes: what its ratio came to."""
    costs = unit_costs(config)
    left = sum(len(k.ffn_channels) for k in kept) * costs.ffn_channel
    left += sum(len(k.kv_groups) for k in kept) * costs.kv_group if units == "all" else 0
    return 1 - left / _total(config, units)


def default_align(config: LlamaConfig) -> int:
    """32 channels for hidden sizes below 1024, else 64; less where that does not divide the widths."""
    wanted = 32 if config.hidden_size < 1024 else 64
    return next(a for a in (wanted, 32, 16, 8, 4, 2, 1) if a <= wanted and _divides(a, config))


def check_align(config: LlamaConfig, align: int) -> None:
    """Raise UsageError unless every FFN width is a multiple of `align`."""
    if align < 1 or not _divides(align, config):
        widths = sorted({d.intermediate_size for d in config.layers})
        raise UsageError(
            f"--align {align} does not divide the FFN width {', '.join(map(str, widths))}. "
            f"Choose a divisor, for example {default_align(config)}."
        )


def choose_evenly(config: LlamaConfig, scores: Sequence[UnitScores], request: PruneRequest) -> tuple[KeptLayer, ...]:
    """The best units of every layer, with the counts of `even_counts`."""
    counts = even_counts(config, request)
    return tuple(keep_best(d.source_layer, s, d) for s, d in zip(scores, counts, strict=True))


def keep_best(source_layer: int, scores: UnitScores, counts: LayerDims) -> KeptLayer:
    """The highest-scoring units of one layer; ties go to the lower index."""
    return KeptLayer(
        source_layer,
        _best(scores.kv_groups, counts.num_key_value_heads),
        _best(scores.ffn_channels, counts.intermediate_size),
    )


def even_counts(config: LlamaConfig, request: PruneRequest) -> tuple[LayerDims, ...]:
    """How many units every layer keeps when all lose the same share.

    KV groups come in whole numbers: of each layer's, floor(ratio x groups) go, and FFN blocks carry the rest of the
    budget. Where they cannot, more groups go. Rounds to the nearest block over all layers (`uniform`: per layer).

    Raises:
        UsageError: the ratio is out of reach, or `uniform` is asked of layers that differ.
    """
    costs, target = unit_costs(config), budget(config, request)
    if request.uniform and len({(d.num_key_value_heads, d.intermediate_size) for d in config.layers}) > 1:
        raise UsageError(
            "the layers of this model differ in width, so --uniform has nothing to start from; leave it out."
        )
    capacities = [_spare(d.intermediate_size // request.align) for d in config.layers]
    block = request.align * costs.ffn_channel
    for extra in range(max(d.num_key_value_heads for d in config.layers) + 1):
        groups = [_groups_to_remove(config, d, request, extra) for d in config.layers]
        rest = max(0.0, target - sum(groups) * costs.kv_group)
        if request.uniform:
            blocks = [math.floor(rest / block / len(capacities) + 0.5)] * len(capacities)
        else:
            blocks = spread(math.floor(rest / block + 0.5), capacities)
        if all(b <= c for b, c in zip(blocks, capacities, strict=True)):
            _tell_groups(request, config, sum(groups), extra)
            return tuple(
                LayerDims(d.source_layer, d.num_key_value_heads - g, d.intermediate_size - b * request.align)
                for d, g, b in zip(config.layers, groups, blocks, strict=True)
            )
    raise _unreachable(config, request)


def choose_globally(config: LlamaConfig, scores: Sequence[UnitScores], request: PruneRequest) -> tuple[KeptLayer, ...]:
    """Remove the lowest scores of the whole model until the budget is spent, to half a block.

    A layer's channels are sorted and cut into blocks, which score the mean of their channels. A KV group that no longer
    fits is passed over, and smaller FFN blocks take the rest. `uniform` falls back to `choose_evenly`.

    Raises:
        UsageError: the ratio is out of reach.
    """
    if request.uniform:
        return choose_evenly(config, scores, request)
    costs, target = unit_costs(config), budget(config, request)
    block = request.align * costs.ffn_channel
    candidates = []  # (score, layer, is a group), in the order in which a layer would lose them
    for i, (layer, dims) in enumerate(zip(scores, config.layers, strict=True)):
        groups = _spare(dims.num_key_value_heads) if request.units == "all" else 0
        means = layer.ffn_channels.double().sort().values.view(-1, request.align).mean(1)
        candidates += [(s, i, True) for s in layer.kv_groups.double().sort().values[:groups].tolist()]
        candidates += [(s, i, False) for s in means[: _spare(len(means))].tolist()]
    removed, passed_over, groups_gone, blocks_gone = 0, False, [0] * len(scores), [0] * len(scores)
    for _, i, is_group in sorted(candidates):
        cost = costs.kv_group if is_group else block
        if removed + cost <= target + block / 2:
            removed += cost
            (groups_gone if is_group else blocks_gone)[i] += 1
        elif removed + block <= target + block / 2:
            passed_over = True
    if passed_over:
        request.say("a KV group was due but did not fit into the rest of the ratio; FFN channels go in its place")
    return tuple(
        keep_best(
            d.source_layer,
            s,
            LayerDims(d.source_layer, d.num_key_value_heads - g, d.intermediate_size - b * request.align),
        )
        for d, s, g, b in zip(config.layers, scores, groups_gone, blocks_gone, strict=True)
    )


def budget(config: LlamaConfig, request: PruneRequest) -> float:
    """Parameters to remove.

    Raises:
        UsageError: more than can go while every layer keeps a group and a block.
    """
    costs = unit_costs(config)
    target = request.ratio * _total(config, request.units)
    if target > _reachable(config, request) + request.align * costs.ffn_channel / 2:
        raise _unreachable(config, request)
    return target


def spread(total: int, capacities: Sequence[int]) -> list[int]:
    """Whole numbers of the given total, proportional to the capacities, with what is left over spread evenly.

    No number exceeds its capacity unless the total exceeds theirs.
    """
    whole = sum(capacities)
    if not whole:
        return [total, *[0] * (len(capacities) - 1)]  # too much, which the caller sees
    marks = [math.floor(total * c / whole + 0.5) for c in accumulate(capacities, initial=0)]
    return [above - below for below, above in pairwise(marks)]


def stock_head_counts(config: LlamaConfig, groups: int) -> list[int]:
    """KV head counts up to `groups` that stock configs accept, ascending: query heads must divide hidden_size."""
    size = config.query_group_size
    return [n for n in range(1, groups + 1) if n == groups or config.hidden_size % (n * size) == 0]


def _groups_to_remove(config: LlamaConfig, dims: LayerDims, request: PruneRequest, extra: int) -> int:
    """KV groups that a layer loses: the whole ones of its share, and `extra` more."""
    if request.units == "ffn":
        return 0
    groups = dims.num_key_value_heads
    removed = min(math.floor(request.ratio * groups + 1e-9) + extra, _spare(groups))  # 0.29 x 100 is 28.999...
    if request.uniform and groups:
        return groups - next(n for n in stock_head_counts(config, groups) if n >= groups - removed)
    return removed


def _tell_groups(request: PruneRequest, config: LlamaConfig, removed: int, extra: int) -> None:
    """Say where whole KV groups and the ratio did not agree."""
    if request.units == "ffn" or not request.ratio:
        return
    if not removed:
        most = max(d.num_key_value_heads for d in config.layers)
        request.say(f"{request.ratio:.1%} of {most} KV groups is no whole one that can go; the FFN carries all of it")
    elif extra:
        request.say("the FFN could not carry the rest of the ratio, so more KV groups go than their share")


def _reachable(config: LlamaConfig, request: PruneRequest) -> int:
    """Parameters that can go at most."""
    costs = unit_costs(config)
    channels = sum(_spare(d.intermediate_size // request.align) for d in config.layers) * request.align
    groups = sum(_spare(d.num_key_value_heads) for d in config.layers) if request.units == "all" else 0
    return channels * costs.ffn_channel + groups * costs.kv_group


def _unreachable(config: LlamaConfig, request: PruneRequest) -> UsageError:
    most = math.floor(1000 * _reachable(config, request) / _total(config, request.units)) / 1000
    stays = "one KV group and " if request.units == "all" else ""
    return UsageError(
        f"--ratio {request.ratio:g} cannot be reached: every layer keeps {stays}{request.align} FFN channels, so "
        f"{most:g} is the most. Lower --ratio or --align."
    )


def _total(config: LlamaConfig, units: Units) -> int:
    """Parameters of all chosen units."""
    costs = unit_costs(config)
    channels = sum(d.intermediate_size for d in config.layers) * costs.ffn_channel
    groups = sum(d.num_key_value_heads for d in config.layers) * costs.kv_group
    return channels + groups if units == "all" else channels


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending."""
    order = torch.sort(scores.double(), descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _spare(count: int) -> int:
    """Units a layer can lose while it keeps one."""
    return max(count - 1, 0)


def _divides(align: int, config: LlamaConfig) -> bool:
    return all(d.intermediate_size % align == 0 for d in config.layers)
