"""What a tier removed, in the order it went: layers first, then units by loss added per joule saved.

The search decides about layers together, so a single layer has no loss of its own; units follow their curves. Joules
are those of one removal alone, out of the tier above; they add up but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.shrink import Price


@dataclass(frozen=True, slots=True)
class Removal:
    """Units of one kind that left a layer; loss_added is what its curve predicts, in nats, null where it has none."""

    source_layer: int
    kind: Literal["layer", "kv_groups", "ffn"]
    units: int
    energy_saved_j: float
    loss_added: float | None


def removals(above: Mask, mask: Mask, curves: Sequence[LayerCurves], price: Price) -> tuple[Removal, ...]:
    """Return what `mask` keeps less than `above`, which it is nested in.

    Args:
        curves: of every source layer; without loss where masks were given.
        price: joules of the reference workload.
    """
    kept = {d.source_layer: d for d in mask.layers}
    whole_j = price(above)

    def saved_j(old: LayerDims, new: LayerDims | None) -> float:
        layers = (new if d is old else d for d in above.layers)
        return whole_j - price(Mask(tuple(d for d in layers if d is not None)))

    gone = [d for d in above.layers if d.source_layer not in kept]
    found = [
        Removal(d.source_layer, "layer", 1, saved_j(d, None), None)
        for d in sorted(gone, key=lambda d: curves[d.source_layer].influence)
    ]
    cuts = []
    for old in above.layers:
        new = kept.get(old.source_layer, old)
        fewer = replace(old, num_key_value_heads=new.num_key_value_heads)
        narrower = replace(old, intermediate_size=new.intermediate_size)
        curve = curves[old.source_layer]
        if groups := old.num_key_value_heads - new.num_key_value_heads:
            cuts.append(Removal(old.source_layer, "kv_groups", groups, saved_j(old, fewer), _added(curve, old, fewer)))
        if channels := old.intermediate_size - new.intermediate_size:
            cuts.append(
                Removal(old.source_layer, "ffn", channels, saved_j(old, narrower), _added(curve, old, narrower))
            )
    return (*found, *sorted(cuts, key=lambda cut: (cut.loss_added or 0.0) / max(cut.energy_saved_j, 1e-12)))


def _added(curve: LayerCurves, old: LayerDims, new: LayerDims) -> float | None:
    return curve.added(new) - curve.added(old) if curve.kv_errors or curve.ffn_errors else None
