"""Masks made smaller until they fit a budget of joules: by layers, least influential first, then by units of layers.

Pure functions of masks, of the curves of `importance.py` and of a price; which masks are worth trying is the planner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from eopc_compiler.allocate import Curve, Key, allocate, last_slope
from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask

Price = Callable[[Mask], float]  # joules of the reference workload

LAYER_STEPS = 8  # candidates of the heuristic differ by how many layers they drop
LEAST_LAYERS = 1 / 6  # share of the layers that every tier keeps
# Of KV groups against FFN channels; further than this one probe is not believed. With 4 SmolLM2-135M keeps all groups
# at 10 of 10.9 J, as with any more; at 5 J 2.5 and 5.9 lose the same within 0.03 nats of 4.2.
WEIGHTS = (0.5, 4.0)
EMPTY = Mask(())


def depth_steps(full: Mask, below: Mask, fits: Callable[[Mask], bool], curves: Sequence[LayerCurves]) -> list[Mask]:
    """`full` with 0, then ever more of its least influential layers dropped, to the first that fits by depth alone.

    Layers of `below` stay, without one LEAST_LAYERS of all; at most LAYER_STEPS + 1 masks, evenly apart.
    """
    needed = {d.source_layer for d in below.layers}
    weakest = sorted(full.layers, key=lambda d: curves[d.source_layer].influence)
    going = [d.source_layer for d in weakest if d.source_layer not in needed]
    least = len(needed) or math.ceil(LEAST_LAYERS * len(full.layers))
    masks = list[Mask]()
    for count in range(len(full.layers) - least + 1):
        gone = set(going[:count])
        masks.append(Mask(tuple(d for d in full.layers if d.source_layer not in gone)))
        if fits(masks[-1]):
            break
    last = len(masks) - 1
    return [masks[i] for i in sorted({round(last * step / LAYER_STEPS) for step in range(LAYER_STEPS + 1)})]


def shrink_to_budget(
    mask: Mask,
    budget_j: float,
    curves: Sequence[LayerCurves],
    price: Price,
    align: int,
    below: Mask = EMPTY,
) -> Mask | None:
    """Take KV groups and parcels of FFN channels, least loss per joule first, until it fits; None if it cannot.

    Units that `below` keeps are not taken.
    """
    excess = price(mask) - budget_j
    if excess <= 0:
        return mask
    parcels = {"kv_groups": 1, "ffn": align}
    needed = {d.source_layer: d for d in below.layers}
    ahead: dict[Key, Curve] = {}
    for d in mask.layers:
        groups, channels = curves[d.source_layer].kv_ahead(d), curves[d.source_layer].ffn_ahead(d)
        if least := needed.get(d.source_layer):
            groups = groups[: d.num_key_value_heads - least.num_key_value_heads]
            channels = channels[: (d.intermediate_size - least.intermediate_size) // align]
        ahead[d.source_layer, "kv_groups"], ahead[d.source_layer, "ffn"] = groups, channels
    unit_j = {kind: price(mask) - price(_less_one(mask, kind, parcels[kind])) for kind in parcels}
    saving = {kind: joules / parcels[kind] for kind, joules in unit_j.items()}
    for _ in range(4):  # prices are not quite additive
        counts = allocate(ahead, parcels, lambda kind: max(saving[kind], 1e-12), excess, at_least=True)
        smaller = Mask(
            tuple(
                replace(
                    d,
                    num_key_value_heads=d.num_key_value_heads - counts[d.source_layer, "kv_groups"],
                    intermediate_size=d.intermediate_size - counts[d.source_layer, "ffn"],
                )
                for d in mask.layers
            )
        )
        left = price(smaller) - budget_j
        if left <= 0:
            return smaller
        excess += left + 1e-9
    return None


def probe_masks(full: Mask, curves: Sequence[LayerCurves], price: Price, align: int) -> tuple[Mask, Mask] | None:
    """Two masks of all layers at one price, half of what FFN channels can save: by the curves, and in channels alone.

    None where the curves take no KV group there.
    """
    groups = Mask(tuple(replace(d, intermediate_size=min(align, d.intermediate_size)) for d in full.layers))
    budget_j = (price(full) + price(groups)) / 2
    mixed = shrink_to_budget(full, budget_j, curves, price, align)
    channels = shrink_to_budget(full, budget_j, curves, price, align, groups)
    return None if mixed is None or channels is None or mixed == channels else (mixed, channels)


def group_weight(curves: Sequence[LayerCurves], masks: tuple[Mask, Mask], lost: tuple[float, float]) -> float:
    """How many times what their curves say KV groups lose, in units of what FFN channels lose for what theirs say.

    With e the sum of curves and s = lost_channels / e_channels: lost_mixed = s (e_ffn + weight x e_kv), of the mixed
    mask. Within WEIGHTS; 1 where the masks tell nothing of it.

    Args:
        masks: those of `probe_masks`.
        lost: nats per token that the two tiers lose, repaired.
    """

    def channels(mask: Mask) -> float:
        whole = {c.dims.source_layer: c.dims.num_key_value_heads for c in curves}
        return curves_added(
            curves, Mask(tuple(replace(d, num_key_value_heads=whole[d.source_layer]) for d in mask.layers))
        )

    (mixed, narrow), (lost_mixed, lost_narrow) = masks, lost
    groups = curves_added(curves, mixed) - channels(mixed)
    if min(groups, lost_narrow, channels(narrow)) <= 0:
        return 1.0
    scale, (least, most) = lost_narrow / channels(narrow), WEIGHTS
    return min(most, max(least, (lost_mixed / scale - channels(mixed)) / groups))


def curves_added(curves: Sequence[LayerCurves], mask: Mask) -> float:
    """Nats per token that cutting the kept layers down to a mask adds, as their curves say."""
    return sum(curves[d.source_layer].added(d) for d in mask.layers)


def dual(mask: Mask, curves: Sequence[LayerCurves], price: Price, align: int) -> float:
    """λ of a tier, nats per joule: the loss added per joule saved by the dearest cut into its layers; 0 without any.

    One λ for the whole model: `shrink_to_budget` cuts wherever a joule costs less than it, so a smaller budget has a
    larger λ. A layer's loss per joule is that of its last cut on the convex hull of its curve.
    """
    found = 0.0
    for kind, parcel in (("kv_groups", 1), ("ffn", align)):
        saved_j = max(price(mask) - price(_less_one(mask, kind, parcel)), 1e-12)
        for d in mask.layers:
            c = curves[d.source_layer]
            whole, errors = (c.dims.num_key_value_heads, c.kv_errors), (c.dims.intermediate_size, c.ffn_errors)
            units, curve = whole if kind == "kv_groups" else errors
            kept = d.num_key_value_heads if kind == "kv_groups" else d.intermediate_size
            found = max(found, last_slope(curve, (units - kept) // parcel) / saved_j)
    return found


def smallest_mask(mask: Mask, curves: Sequence[LayerCurves], align: int) -> Mask:
    """The least a tier may be: LEAST_LAYERS of the layers, one parcel of FFN channels and one KV group in each."""
    fewest = depth_steps(mask, EMPTY, lambda _mask: False, curves)[-1]
    return Mask(tuple(_narrowest(d, align) for d in fewest.layers))


def cheapest_mask(full: Mask, align: int) -> Mask:
    """No tier costs less, whichever layers matter: as few layers as it may have, each the narrowest there are."""
    layers = sorted(
        (_narrowest(d, align) for d in full.layers), key=lambda d: (d.intermediate_size, d.num_key_value_heads)
    )
    return Mask(tuple(layers[: math.ceil(LEAST_LAYERS * len(layers))]))


def _narrowest(dims: LayerDims, align: int) -> LayerDims:
    return replace(
        dims,
        num_key_value_heads=min(1, dims.num_key_value_heads),
        intermediate_size=min(align, dims.intermediate_size),
    )


def _less_one(mask: Mask, kind: str, parcel: int) -> Mask:
    """The mask with one parcel less of its widest layer, to see what that saves."""
    field = {"kv_groups": "num_key_value_heads", "ffn": "intermediate_size"}[kind]
    widest = max(mask.layers, key=lambda d: getattr(d, field))

    def less(d: LayerDims) -> LayerDims:
        if d != widest:
            return d
        groups, width = d.num_key_value_heads, d.intermediate_size
        return (
            replace(d, num_key_value_heads=groups - 1)
            if kind == "kv_groups"
            else replace(d, intermediate_size=max(0, width - parcel))
        )

    return Mask(tuple(less(d) for d in mask.layers))
