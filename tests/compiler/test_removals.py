"""What a tier removed, and in which order: with a made-up price and curves."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.removals import Removal, removals


def price(mask: Mask) -> float:
    """Joules that add up over layers, groups and channels."""
    return 1.0 + sum(0.5 + 0.3 * d.num_key_value_heads + 0.1 * d.intermediate_size for d in mask.layers)


def layer(source: int, kv: float, ffn: float, influence: float) -> LayerCurves:
    """Three groups and four parcels of two channels, each as dear as the one before."""
    losses = tuple(accumulate([kv] * 2)), tuple(accumulate([ffn] * 3))
    return LayerCurves(LayerDims(source, 3, 8), 2, (0, 1, 2), tuple(range(8)), *losses, influence)


CURVES = (layer(0, 0.3, 0.01, 0.9), layer(1, 0.1, 0.2, 0.2), layer(2, 0.1, 0.1, 0.1), layer(3, 0.2, 0.1, 0.5))
WHOLE = Mask(tuple(c.dims for c in CURVES))


def test_layers_go_first_and_then_units_by_loss_per_joule() -> None:
    """The least influential layer, then the cheapest nats; every row has its own joules and the nats of its curve."""
    kept = Mask((LayerDims(0, 2, 4), LayerDims(3, 3, 6)))
    assert removals(WHOLE, kept, CURVES, price) == (
        Removal(2, "layer", 1, pytest.approx(2.2), None),
        Removal(1, "layer", 1, pytest.approx(2.2), None),
        Removal(0, "ffn", 4, pytest.approx(0.4), pytest.approx(0.02)),
        Removal(3, "ffn", 2, pytest.approx(0.2), pytest.approx(0.1)),
        Removal(0, "kv_groups", 1, pytest.approx(0.3), pytest.approx(0.3)),
    )


def test_the_rows_add_up_to_what_the_tier_saves() -> None:
    """With a price that is a sum, nothing is left out and nothing is counted twice."""
    kept = Mask((LayerDims(0, 1, 2), LayerDims(1, 2, 8), LayerDims(3, 3, 6)))
    assert sum(r.energy_saved_j for r in removals(WHOLE, kept, CURVES, price)) == pytest.approx(
        price(WHOLE) - price(kept)
    )


def test_the_second_tier_counts_from_the_first() -> None:
    """What went before is not named again, and its loss is not added again; an equal tier removes nothing."""
    first = Mask((LayerDims(0, 3, 6), *(c.dims for c in CURVES[1:])))
    second = Mask((LayerDims(0, 3, 2), *(c.dims for c in CURVES[1:])))
    (only,) = removals(first, second, CURVES, price)
    assert (only.units, only.loss_added) == (4, pytest.approx(0.02))
    assert removals(first, first, CURVES, price) == ()


def test_given_masks_have_no_loss() -> None:
    """Without curves joules are known and nats are not."""
    bare = tuple(replace(c, kv_errors=(), ffn_errors=()) for c in CURVES)
    kept = Mask((LayerDims(0, 2, 8), *(c.dims for c in CURVES[1:])))
    assert [(r.kind, r.loss_added) for r in removals(WHOLE, kept, bare, price)] == [("kv_groups", None)]
