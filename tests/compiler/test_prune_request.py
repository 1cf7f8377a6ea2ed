"""Sharing a ratio out: counts that add up, aligned widths, floors, and what is said when whole units do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eopc_compiler.config import LayerDims, LlamaConfig, normalize_config
from eopc_compiler.prune_request import (
    PruneRequest,
    UnitScores,
    check_align,
    choice_share,
    choose_evenly,
    choose_globally,
    default_align,
    even_counts,
    spread,
    stock_head_counts,
    unit_costs,
)
from eopc_compiler.pruned import keep_all, pruned_config
from eopc_runtime.errors import UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
SMOLLM2 = normalize_config(
    {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }
)  # fmt: skip


def random_scores(config: LlamaConfig, seed: int = 0) -> list[UnitScores]:
    """Standard normal scores for every unit."""
    generator = torch.Generator().manual_seed(seed)
    return [
        UnitScores(
            torch.randn(d.num_key_value_heads, generator=generator),
            torch.randn(d.intermediate_size, generator=generator),
        )
        for d in config.layers
    ]


@pytest.mark.parametrize(
    ("config", "per_group", "per_channel"),
    [
        (SMOLLM2, 512 * 576, 3 * 576),  # FLAP's 512/3 happens to hold here
        (replace(SMOLLM2, query_group_size=4), 640 * 576, 3 * 576),
        (replace(SMOLLM2, attention_bias=True, mlp_bias=True), 512 * 576 + 5 * 64, 3 * 576 + 2),
    ],
)
def test_parameters_per_unit_are_counted(config: LlamaConfig, per_group: int, per_channel: int) -> None:
    """2 d h (g + 1) per KV group and 3 d per channel, biases of the rows that go included."""
    costs = unit_costs(config)
    assert (costs.kv_group, costs.ffn_channel) == (per_group, per_channel)


@pytest.mark.parametrize("choose", [choose_evenly, choose_globally])
@pytest.mark.parametrize("units", ["ffn", "all"])
@settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0, 0.6), align=st.sampled_from([1, 8, 32]), seed=st.integers(0, 5))
def test_a_choice_meets_the_ratio_to_half_a_block(choose, units, ratio, align, seed) -> None:  # type: ignore[no-untyped-def]
    """The parameters that go, counted from the sliced config, are within half an aligned block of the ratio's."""
    dims = tuple(LayerDims(i, 4, 128) for i in range(3))
    config = replace(SMOLLM2, hidden_size=64, head_dim=16, query_group_size=2, layers=dims)
    request = PruneRequest(ratio, units, align)
    kept = choose(config, random_scores(config, seed), request)
    costs = unit_costs(config)
    total = 3 * (128 * costs.ffn_channel + (4 * costs.kv_group if units == "all" else 0))
    removed = config.block_param_count - pruned_config(config, kept).block_param_count
    assert abs(removed - ratio * total) <= align * costs.ffn_channel / 2 + 1e-6
    assert choice_share(config, kept, units) == pytest.approx(removed / total)
    for layer in kept:
        assert len(layer.ffn_channels) % align == 0 and layer.ffn_channels and layer.kv_groups
        assert units == "all" or len(layer.kv_groups) == 4
        assert list(layer.ffn_channels) == sorted(set(layer.ffn_channels))


@pytest.mark.parametrize("choose", [choose_evenly, choose_globally])
def test_ratio_zero_keeps_everything(choose: Callable[..., object]) -> None:
    """No unit goes, whatever the scores."""
    assert choose(SMOLLM2, random_scores(SMOLLM2), PruneRequest(0.0, align=32)) == keep_all(SMOLLM2)


def test_the_lowest_scores_go_wherever_they_are() -> None:
    """Globally, a layer with low scores pays; evenly, each layer loses its own lowest."""
    config = replace(SMOLLM2, layers=tuple(LayerDims(i, 3, 64) for i in range(4)))
    scores = [UnitScores(torch.ones(3) * 9, torch.arange(64.0) + 100 * i) for i in range(4)]
    request = PruneRequest(0.125, "ffn", 8)  # 32 of 256 channels
    assert [len(k.ffn_channels) for k in choose_globally(config, scores, request)] == [32, 64, 64, 64]
    assert choose_globally(config, scores, request)[0].ffn_channels == tuple(range(32, 64))
    assert [k.ffn_channels for k in choose_evenly(config, scores, request)] == [tuple(range(8, 64))] * 4


def test_where_no_whole_group_fits_the_ffn_carries_the_ratio_and_it_is_said() -> None:
    """20 % of 3 KV groups is none: 1536 channels give 0.2 x (1536 + 512) = 409.6 instead of 307."""
    said: list[str] = []
    request = PruneRequest(0.2, "all", 32, say=said.append)
    counts = even_counts(SMOLLM2, request)
    assert {d.num_key_value_heads for d in counts} == {3}
    widths = [d.intermediate_size for d in counts]
    assert set(widths) == {1536 - 12 * 32, 1536 - 13 * 32}
    assert sum(1536 - w for w in widths) / 30 == pytest.approx(409.6, abs=0.6)
    assert any("FFN carries all" in line for line in said)


def test_where_the_ffn_cannot_carry_the_rest_more_groups_go_and_it_is_said() -> None:
    """A large ratio of a model with few channels takes groups beyond their share."""
    config = replace(SMOLLM2, layers=tuple(LayerDims(i, 3, 64) for i in range(2)))
    said: list[str] = []
    counts = even_counts(config, PruneRequest(0.6, "all", 32, say=said.append))
    assert {d.num_key_value_heads for d in counts} == {1}  # floor(0.6 x 3) = 1 would go
    assert any("more KV groups" in line for line in said)


def test_a_group_that_no_longer_fits_leaves_its_place_to_channels() -> None:
    """A ratio below one group: the lowest-scoring group stays, and that is said."""
    config = replace(SMOLLM2, layers=tuple(LayerDims(i, 3, 512) for i in range(2)))
    scores = [UnitScores(-torch.ones(3), torch.ones(512)) for _ in range(2)]
    said: list[str] = []
    kept = choose_globally(config, scores, PruneRequest(0.05, "all", 32, say=said.append))
    assert [len(k.kv_groups) for k in kept] == [3, 3]
    assert sum(512 - len(k.ffn_channels) for k in kept) == 96  # 0.05 x 6144 d / 3 d = 102.4 channels
    assert any("did not fit" in line for line in said)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6])
@pytest.mark.parametrize("choose", [choose_evenly, choose_globally])
def test_uniform_gives_every_layer_the_same_widths(choose: Callable[..., tuple[object, ...]], ratio: float) -> None:
    """One pair of counts, the share within half a block per layer."""
    kept = choose(SMOLLM2, random_scores(SMOLLM2), PruneRequest(ratio, "all", 32, uniform=True))
    widths = {(len(k.kv_groups), len(k.ffn_channels)) for k in kept}  # type: ignore[attr-defined]
    assert len(widths) == 1
    assert choice_share(SMOLLM2, kept, "all") == pytest.approx(ratio, abs=16 / 2048)  # type: ignore[arg-type]


def test_uniform_takes_only_head_counts_that_stock_configs_accept() -> None:
    """transformers wants hidden_size to be a multiple of the query heads: 7 of 8 groups of 4 do not divide 2048."""
    config = replace(SMOLLM2, hidden_size=2048, query_group_size=4, layers=(LayerDims(0, 8, 8192),) * 2)
    assert stock_head_counts(config, 8) == [1, 2, 4, 8]
    for ratio in (0.2, 0.4, 0.6):
        counts = even_counts(config, PruneRequest(ratio, "all", 64, uniform=True))
        assert counts[0].num_key_value_heads in (1, 2, 4, 8)


def test_a_ratio_out_of_reach_names_the_most_there_is() -> None:
    """One group and one block of every layer stay."""
    for uniform in (False, True):
        request = PruneRequest(0.95, "all", 32, uniform=uniform)
        with pytest.raises(UsageError, match=r"0\.95 cannot be reached.*0\.9"):
            choose_evenly(SMOLLM2, random_scores(SMOLLM2), request)
    with pytest.raises(UsageError, match="cannot be reached"):
        choose_globally(SMOLLM2, random_scores(SMOLLM2), PruneRequest(0.99, "ffn", 32))


def test_uniform_of_layers_that_differ_is_refused() -> None:
    """There is no common width to start from."""
    config = replace(SMOLLM2, layers=(LayerDims(0, 3, 64), LayerDims(1, 2, 64)))
    with pytest.raises(UsageError, match="differ in width"):
        even_counts(config, PruneRequest(0.1, uniform=True))


def test_a_model_pruned_before_can_be_pruned_again() -> None:
    """Layers of different widths, one without attention and one without FFN, keep their floors."""
    config = replace(SMOLLM2, layers=(LayerDims(0, 3, 96), LayerDims(1, 0, 64), LayerDims(2, 2, 0)))
    for choose in (choose_evenly, choose_globally):
        kept = choose(config, random_scores(config), PruneRequest(0.3, "all", 32))
        assert kept[1].kv_groups == () and kept[2].ffn_channels == ()
        assert kept[0].kv_groups and kept[0].ffn_channels and kept[1].ffn_channels and kept[2].kv_groups


@settings(max_examples=200, deadline=None)
@given(capacities=st.lists(st.integers(0, 50), min_size=1, max_size=40), share=st.floats(0, 1))
def test_spread_keeps_the_total_and_the_capacities(capacities: list[int], share: float) -> None:
    """Whole numbers that add up, none above its capacity."""
    total = round(share * sum(capacities))
    parts = spread(total, capacities)
    assert sum(parts) == total
    assert all(0 <= p <= c for p, c in zip(parts, capacities, strict=True))


def test_alignment_defaults_by_hidden_size_and_must_divide() -> None:
    """32 below 1024 and 64 from there; less where the width is odd; a given one is checked."""
    assert default_align(SMOLLM2) == 32
    assert default_align(replace(SMOLLM2, hidden_size=2048)) == 64
    assert default_align(replace(SMOLLM2, layers=(LayerDims(0, 3, 1229),))) == 1
    with pytest.raises(UsageError, match="does not divide"):
        check_align(SMOLLM2, 7)
