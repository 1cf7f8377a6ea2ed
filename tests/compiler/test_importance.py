"""Importance finds planted redundancy, and its curves are what the planner takes them for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.importance import LayerCurves, observe
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.model import build_model

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
CONTEXT = 64
PARCEL = 16


@pytest.fixture
def batches() -> list[Batch]:
    """Two domains of random tokens, of different sizes and weights."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((6, 48), (4, 32))
    return [Batch(i, 0.5 / math.prod(s), torch.randint(0, 160, s, generator=generator)) for i, s in enumerate(sizes)]


def weight(tensors: dict[str, Tensor], layer: int, name: str) -> Tensor:
    """A checkpoint matrix of a layer, to plant something in."""
    return tensors[f"model.layers.{layer}.{name}.weight"]


def curves_of(
    config: LlamaConfig, tensors: dict[str, Tensor], batches: Sequence[Batch], parcel: int = PARCEL
) -> tuple[LayerCurves, ...]:
    return observe(build_model(config, tensors, CONTEXT), batches, parcel).curves


def test_curves_reach_to_the_last_unit_and_never_fall(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Every layer has a nat figure for each group and parcel but the last ones, growing, and an order of all units."""
    config, tensors = make_tiny()
    for curve in curves_of(config, tensors, batches):
        assert (len(curve.kv_errors), len(curve.ffn_errors)) == (3, 128 // PARCEL - 1)
        for errors in (curve.kv_errors, curve.ffn_errors):
            assert errors[0] > 0 and all(a < b for a, b in pairwise(errors))
        order = curve.order()
        assert sorted(order.kv_groups) == list(range(4)) and sorted(order.ffn_channels) == list(range(128))
        assert 0 < curve.influence < 2


def test_a_unit_with_large_output_weights_comes_first(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """A channel and a group whose output weights are ten times larger are the last to go."""
    config, tensors = make_tiny()
    weight(tensors, 1, "mlp.down_proj")[:, 77] *= 10
    weight(tensors, 1, "self_attn.o_proj")[:, 2 * 32 : 3 * 32] *= 10  # group 2: query heads 4 and 5, 16 wide
    order = curves_of(config, tensors, batches, parcel=1)[1].order()
    assert order.ffn_channels[0] == 77 and order.kv_groups[0] == 2


@pytest.mark.parametrize("matrix", ["down_proj", "up_proj", "gate_proj"])
def test_a_channel_with_zero_weights_costs_nothing_and_comes_last(
    make_tiny: MakeTiny, batches: list[Batch], matrix: str
) -> None:
    """Channels that cannot reach the output go first, whichever of their three vectors is zero, for next to nothing."""
    config, tensors = make_tiny()
    planted = weight(tensors, 2, f"mlp.{matrix}")
    if matrix == "down_proj":
        planted[:, 16:32] = 0
    else:
        planted[16:32] = 0
    curves = curves_of(config, tensors, batches)
    assert set(curves[2].ffn_channels[-PARCEL:]) == set(range(16, 32))
    # the ridge holds weights where they are, as if the inputs had some variance: a hundredth of the mean
    assert curves[2].ffn_errors[0] < 0.2 * curves[1].ffn_errors[0]


@pytest.mark.parametrize("matrix", ["o_proj", "v_proj"])
def test_a_kv_group_with_zero_weights_costs_nothing_and_comes_last(
    make_tiny: MakeTiny, batches: list[Batch], matrix: str
) -> None:
    """A group that adds nothing is found, from its values as from its output columns."""
    config, tensors = make_tiny()
    planted = weight(tensors, 0, f"self_attn.{matrix}")
    planted[(slice(None), slice(32, 64)) if matrix == "o_proj" else (slice(16, 32), slice(None))] = 0  # group 1
    curves = curves_of(config, tensors, batches)
    assert curves[0].kv_groups[-1] == 1
    assert curves[0].kv_errors[0] < 0.2 * curves[0].kv_errors[1]


def test_a_layer_whose_output_projections_are_zero_has_no_influence(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """An identity layer has influence 0 up to fp32 rounding, and all of its units cost nothing."""
    config, tensors = make_tiny()
    weight(tensors, 1, "self_attn.o_proj").zero_()
    weight(tensors, 1, "mlp.down_proj").zero_()
    curves = curves_of(config, tensors, batches)
    assert 0 <= curves[1].influence < 1e-6
    assert min(curves[0].influence, curves[2].influence) > 0.05
    assert curves[1].added(LayerDims(1, 1, PARCEL)) == 0
    assert sorted(curves[1].ffn_channels) == list(range(128)) and sorted(curves[1].kv_groups) == list(range(4))


def test_added_loss_and_the_way_ahead_are_read_off_the_curves() -> None:
    """`added` sums both curves at what is gone; `ahead` is the rest of a curve, counted from there."""
    curve = LayerCurves(LayerDims(0, 3, 8), 2, (2, 0, 1), tuple(range(8)), (0.5, 1.5), (0.125, 0.25, 1.0), 0.1)
    assert curve.order() == UnitOrder((2, 0, 1), tuple(range(8)))
    assert curve.added(curve.dims) == 0
    assert curve.added(LayerDims(0, 2, 8)) == 0.5 and curve.added(LayerDims(0, 1, 4)) == 1.75
    assert curve.kv_ahead(curve.dims) == (0.5, 1.5) and curve.ffn_ahead(curve.dims) == (0.125, 0.25, 1.0)
    assert curve.kv_ahead(LayerDims(0, 2, 8)) == (1.0,) and curve.kv_ahead(LayerDims(0, 1, 8)) == ()
    assert curve.ffn_ahead(LayerDims(0, 3, 4)) == (0.75,)


def test_only_the_proportions_of_domain_weights_count(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Twice all weights give the same curves up to rounding; another mixture gives others."""
    config, tensors = make_tiny()
    want = curves_of(config, tensors, batches)[0]
    doubled = curves_of(config, tensors, [b._replace(weight=2 * b.weight) for b in batches])[0]
    assert doubled.ffn_errors == pytest.approx(want.ffn_errors, rel=1e-4)
    first, second = batches
    skewed = curves_of(config, tensors, [first._replace(weight=first.weight * 50), second])[0]
    assert skewed.ffn_errors != pytest.approx(want.ffn_errors, rel=1e-2)


def test_input_peaks_are_the_largest_magnitudes_each_matrix_sees(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Peaks have their matrix's width, and agree with hooks on a run of the whole model."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, CONTEXT)
    observed = observe(model, batches, PARCEL)
    seen: list[Tensor] = []
    handle = model.blocks[2].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for batch in batches:
        model.score(batch.tokens)
    handle.remove()
    want = torch.cat([x.flatten(0, -2) for x in seen]).abs().amax(0)
    # the same sums, batched differently
    torch.testing.assert_close(observed.peaks[2].down, want, rtol=1e-5, atol=1e-5)
    assert (observed.peaks[0].o.shape, observed.peaks[0].down.shape) == ((128,), (128,))


def test_observing_leaves_the_model_as_it_was_and_is_repeatable(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """No hook and no changed weight stays behind; the seed decides the rest."""
    config, tensors = make_tiny()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model = build_model(config, tensors, CONTEXT)
    want = model.score(batches[0].tokens)
    first, again = (observe(model, batches, PARCEL, seed=1).curves for _ in range(2))
    assert first == again != observe(model, batches, PARCEL, seed=2).curves
    assert torch.equal(model.score(batches[0].tokens), want)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_progress_counts_the_layers(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """The reporter hears of every layer once."""
    config, tensors = make_tiny()
    heard: list[tuple[int, int]] = []
    observe(build_model(config, tensors, CONTEXT), batches, PARCEL, report=lambda *row: heard.append(row))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_bfloat16_products_hardly_change_what_is_seen(
    make_tiny: MakeTiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products in bfloat16 the curves stay within a few percent."""
    config, tensors = make_tiny()
    exact = curves_of(config, tensors, batches)
    monkeypatch.setattr("eopc_compiler.sequences.native_bfloat16", lambda: True)
    rough = curves_of(config, tensors, batches)
    assert rough != exact
    for a, b in zip(exact, rough, strict=True):
        assert b.ffn_errors == pytest.approx(a.ffn_errors, rel=0.1)
        assert b.kv_errors == pytest.approx(a.kv_errors, rel=0.1)
