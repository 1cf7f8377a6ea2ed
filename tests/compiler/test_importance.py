"""Importance finds planted redundancy, and a silenced unit costs what a sliced one does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.assemble import Storage, load_tier, write_weights
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.importance import LayerScores, loss_under_mask, observe
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, tier_config
from eopc_compiler.model import Llama, build_model
from eopc_compiler.weights import WeightReader

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
CONTEXT = 64


@pytest.fixture
def batches() -> list[Tensor]:
    """Two batches of random tokens, of different sizes."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 160, shape, generator=generator) for shape in ((2, 24), (1, 16))]


def weight(tensors: dict[str, Tensor], layer: int, name: str) -> Tensor:
    """A checkpoint matrix of a layer, to plant something in."""
    return tensors[f"model.layers.{layer}.{name}.weight"]


def score(config: LlamaConfig, tensors: dict[str, Tensor], batches: Sequence[Tensor]) -> tuple[LayerScores, ...]:
    return observe(build_model(config, tensors, CONTEXT), batches).scores


def test_shares_of_a_layer_sum_to_one_and_reflect_planted_sizes(make_tiny: MakeTiny, batches: list[Tensor]) -> None:
    """A channel and a group whose output weights are ten times larger come first; shares add up."""
    config, tensors = make_tiny()
    weight(tensors, 1, "mlp.down_proj")[:, 77] *= 10
    weight(tensors, 1, "self_attn.o_proj")[:, 2 * 32 : 3 * 32] *= 10  # group 2: query heads 4 and 5, 16 wide
    scores = score(config, tensors, batches)
    for layer in scores:
        assert sum(layer.kv_groups) == pytest.approx(1) and sum(layer.ffn_channels) == pytest.approx(1)
        assert 0 < layer.influence < 2
    assert scores[1].order().ffn_channels[0] == 77 and scores[1].order().kv_groups[0] == 2


@pytest.mark.parametrize("matrix", ["down_proj", "up_proj", "gate_proj"])
def test_a_channel_with_zero_weights_scores_zero_and_comes_last(
    make_tiny: MakeTiny, batches: list[Tensor], matrix: str
) -> None:
    """A channel that cannot reach the output is worth nothing, whichever of its three vectors is zero."""
    config, tensors = make_tiny()
    planted = weight(tensors, 2, f"mlp.{matrix}")
    planted[(slice(None), 50) if matrix == "down_proj" else (50, slice(None))] = 0
    scores = score(config, tensors, batches)
    assert scores[2].ffn_channels[50] == 0 and scores[2].order().ffn_channels[-1] == 50
    assert min(scores[1].ffn_channels) > 0


@pytest.mark.parametrize("matrix", ["o_proj", "v_proj"])
def test_a_kv_group_with_zero_weights_scores_zero_and_comes_last(
    make_tiny: MakeTiny, batches: list[Tensor], matrix: str
) -> None:
    """A group that adds nothing is found, from its values as from its output columns."""
    config, tensors = make_tiny()
    planted = weight(tensors, 0, f"self_attn.{matrix}")
    planted[(slice(None), slice(32, 64)) if matrix == "o_proj" else (slice(16, 32), slice(None))] = 0  # group 1
    scores = score(config, tensors, batches)
    assert scores[0].kv_groups[1] == 0 and scores[0].order().kv_groups[-1] == 1
    assert min(scores[1].kv_groups) > 0


def test_a_layer_whose_output_projections_are_zero_has_no_influence(make_tiny: MakeTiny, batches: list[Tensor]) -> None:
    """An identity layer has influence 0 up to fp32 rounding, finite scores, and dropping it changes no loss."""
    config, tensors = make_tiny()
    weight(tensors, 1, "self_attn.o_proj").zero_()
    weight(tensors, 1, "mlp.down_proj").zero_()
    model = build_model(config, tensors, CONTEXT)
    scores = observe(model, batches).scores
    assert 0 <= scores[1].influence < 1e-6
    assert min(scores[0].influence, scores[2].influence) > 0.05
    assert all(math.isfinite(v) for s in scores for v in (*s.kv_groups, *s.ffn_channels))
    orders = [s.order() for s in scores]
    assert sorted(orders[1].ffn_channels) == list(range(128)) and sorted(orders[1].kv_groups) == list(range(4))
    full = full_mask(config)
    dropped = Mask((full.layers[0], full.layers[2]))
    dense = loss_under_mask(model, batches, full, orders, config)
    assert loss_under_mask(model, batches, dropped, orders, config) == pytest.approx(dense, abs=1e-6)
    assert abs(loss_under_mask(model, batches, Mask(full.layers[:2]), orders, config) - dense) > 1e-3


def test_equal_scores_keep_the_original_order() -> None:
    """Ties are broken by index, so that a ladder does not depend on a sort."""
    order = LayerScores((0.25, 0.25, 0.5), (0.2, 0.3, 0.2, 0.3), 0.1).order()
    assert order == UnitOrder((2, 0, 1), (1, 3, 0, 2))


def test_input_peaks_are_the_largest_magnitudes_each_matrix_sees(make_tiny: MakeTiny, batches: list[Tensor]) -> None:
    """Peaks have their matrix's width, and agree with hooks on a run of the whole model."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, CONTEXT)
    observed = observe(model, batches)
    seen: list[Tensor] = []
    handle = model.blocks[2].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for tokens in batches:
        model.score(tokens)
    handle.remove()
    want = torch.cat([x.flatten(0, -2) for x in seen]).abs().amax(0)
    # the same sums, batched differently
    torch.testing.assert_close(observed.peaks[2].down, want, rtol=1e-5, atol=1e-5)
    assert (observed.peaks[0].o.shape, observed.peaks[0].down.shape) == ((128,), (128,))


def next_token_loss(model: Llama, batches: Sequence[Tensor]) -> float:
    """Mean next-token loss of a model by its own logits."""
    parts = [
        F.cross_entropy(model.score(t)[:, :-1].flatten(0, 1), t[:, 1:].flatten(), reduction="none") for t in batches
    ]
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask((LayerDims(0, 4, 128), LayerDims(1, 4, 128), LayerDims(2, 4, 128))),
        Mask((LayerDims(0, 1, 32), LayerDims(1, 2, 96), LayerDims(2, 4, 64))),
        Mask((LayerDims(0, 3, 64), LayerDims(2, 1, 32))),
    ],
    ids=["full", "narrower", "a layer dropped"],
)
def test_the_loss_under_a_mask_is_that_of_the_sliced_model(
    make_tiny: MakeTiny, batches: list[Tensor], tmp_path: Path, mask: Mask, changes: dict[str, bool]
) -> None:
    """Silencing units gives the loss of the model that is really sliced, written and read back, to 1e-5."""
    config, tensors = make_tiny(**changes)
    model = build_model(config, tensors, CONTEXT)
    orders = [s.order() for s in observe(model, batches).scores]
    silenced = loss_under_mask(model, batches, mask, orders, config)

    storage = Storage.choose("fp32", "float32", DIALECTS["native"], {32}, layers=3)
    path = tmp_path / "weights.bin"
    table, _ = write_weights(path, config, tensors.__getitem__, orders, [mask], storage, CONTEXT)
    sliced = load_tier(tier_config(config, mask), table, WeightReader(path), CONTEXT)
    # fp32 sums in another order: below 1e-6 observed
    assert silenced == pytest.approx(next_token_loss(sliced, batches), abs=1e-5)
    if mask == full_mask(config):
        assert silenced == pytest.approx(next_token_loss(build_model(config, tensors), batches), abs=1e-5)


def test_scoring_and_silencing_leave_the_model_as_it_was(make_tiny: MakeTiny, batches: list[Tensor]) -> None:
    """No hook and no changed weight stays behind, also when a batch fails."""
    config, tensors = make_tiny()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model = build_model(config, tensors, CONTEXT)
    want = model.score(batches[0])
    orders = [s.order() for s in observe(model, batches).scores]
    loss_under_mask(model, batches, Mask((LayerDims(0, 1, 32),)), orders, config)
    with pytest.raises(IndexError):
        loss_under_mask(model, [torch.tensor([[999, 1]])], Mask((LayerDims(0, 1, 32),)), orders, config)
    assert torch.equal(model.score(batches[0]), want)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
