"""Masks: nesting, prefix orders, files given by users and their refusals, and what a tier costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eopc_compiler.config import LayerDims, LlamaConfig, tensor_shapes
from eopc_compiler.ladder import (
    Mask,
    UnitOrder,
    full_mask,
    keep_shares,
    mask_to_json,
    matrix_shapes,
    parameter_count,
    prompt_cost,
    read_masks,
    tier_config,
    tier_cost,
)
from eopc_compiler.model import Cache, Llama
from eopc_compiler.prompt_pass import PromptPass
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.errors import ModelError
from eopc_runtime.tier_info import FREE, PASS

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
ALIGN = 32  # of the tiny model: 3 layers, 4 KV groups, 128 FFN channels
PRUNED = Mask((LayerDims(0, 2, 64), LayerDims(2, 3, 96)))


@pytest.fixture(scope="module")
def config(make_tiny: MakeTiny) -> LlamaConfig:
    """The tiny model's config."""
    return make_tiny()[0]


def masks_of(full: Mask) -> st.SearchStrategy[Mask]:
    """Any mask inside `full`."""

    def keep(dims: LayerDims) -> st.SearchStrategy[LayerDims | None]:
        kept = st.builds(
            LayerDims,
            st.just(dims.source_layer),
            st.integers(1, dims.num_key_value_heads),
            st.sampled_from(range(ALIGN, dims.intermediate_size + 1, ALIGN)),
        )
        return st.one_of(st.none(), kept)

    layers = st.tuples(*map(keep, full.layers)).map(lambda t: tuple(d for d in t if d is not None))
    return layers.filter(bool).map(Mask)


FULL = Mask(tuple(LayerDims(i, 4, 128) for i in range(3)))


@given(st.data())
def test_masks_drawn_inside_one_another_are_nested_all_the_way(data: st.DataObject) -> None:
    """Nesting is transitive, and mutual nesting means equality."""
    a = data.draw(masks_of(FULL))
    b, c = data.draw(masks_of(a)), data.draw(masks_of(FULL))
    assert a.nested_in(FULL) and a.nested_in(a) and b.nested_in(a) and b.nested_in(FULL)
    assert not (a.nested_in(c) and c.nested_in(a)) or a == c
    if c.nested_in(b):
        assert c.nested_in(a)


@pytest.mark.parametrize(
    "bigger",
    [
        Mask((LayerDims(0, 3, 64), LayerDims(2, 3, 96))),
        Mask((LayerDims(0, 2, 96), LayerDims(2, 3, 96))),
        Mask((*PRUNED.layers, LayerDims(1, 1, 32))),
    ],
    ids=["one more group", "more channels", "one more layer"],
)
def test_keeping_more_anywhere_is_not_nested(bigger: Mask) -> None:
    """One group, one channel or one layer more breaks nesting; the other way round it holds."""
    assert not bigger.nested_in(PRUNED)
    assert PRUNED.nested_in(bigger)


def test_the_full_mask_keeps_everything(config: LlamaConfig) -> None:
    """t0's mask is the model's own dimensions, shares 1."""
    assert tier_config(config, full_mask(config)) == config
    assert keep_shares(config, full_mask(config)) == {"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0}


def test_keep_shares_count_units_of_the_whole_model(config: LlamaConfig) -> None:
    """Shares are of all groups and channels, those of dropped layers included."""
    assert keep_shares(config, PRUNED) == {"layers": 2 / 3, "kv_groups": 5 / 12, "ffn": 160 / 384}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mask", [FULL, PRUNED], ids=["full", "pruned"])
def test_parameter_count_is_that_of_the_sliced_torch_model(make_tiny: MakeTiny, mask: Mask, tied: bool) -> None:
    """parameter_count equals the parameters of the model built with the tier's dimensions, biases included."""
    config, _ = make_tiny(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Llama(tier_config(config, mask))
    count = sum(p.numel() for name, p in model.named_parameters() if not (tied and name == "lm_head.weight"))
    assert parameter_count(config, mask) == count


@pytest.mark.parametrize("mask", [FULL, PRUNED], ids=["full", "pruned"])
def test_tier_cost_counts_what_the_tensor_shapes_say(make_tiny: MakeTiny, mask: Mask) -> None:
    """Bytes and FLOPs equal a count over checkpoint shapes: matrices and head, no embedding, norm or bias."""
    config, _ = make_tiny(attention_bias=True)
    shapes = tensor_shapes(tier_config(config, mask))
    matrices = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "layers" in n)
    head = math.prod(shapes["lm_head.weight"])
    keys = sum(shapes[n][0] for n in shapes if n.endswith("k_proj.weight"))
    queries = sum(shapes[n][0] for n in shapes if n.endswith("q_proj.weight"))
    cost = tier_cost(config, mask, bytes_per_weight=lambda _name, _layer: 1.0625, cache_bytes=2)
    assert cost.layers == len(mask.layers)
    assert cost.weight_bytes == round((matrices + head) * 1.0625)
    assert cost.flops_per_token == 2 * matrices and cost.head_flops == 2 * head
    assert cost.kv_bytes_per_token == 2 * keys * 2  # keys and values, two bytes each
    assert cost.attn_flops_per_context == 4 * queries  # q kᵀ and weights v, a product and a sum each


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pruned_prefill_costs_its_layers_and_keys_and_values_of_the_rest(make_tiny: MakeTiny, depth: int) -> None:
    """Counted over the parameters of the module that is exported: no head, and no embedding, norm or bias."""
    config, _ = make_tiny(attention_bias=True)
    with torch.device("meta"):
        module = PromptPass(config, PromptPath(depth))
    matrices = sum(p.numel() for n, p in module.named_parameters() if p.dim() == 2 and "layers" in n)
    cost = prompt_cost(config, FULL, PromptPath(depth), bytes_per_weight=lambda _name, _layer: 1.0625, cache_bytes=2)
    whole = tier_cost(config, FULL, lambda _name, _layer: 1.0625, 2)
    assert cost.weight_bytes == round(matrices * 1.0625) and cost.flops_per_token == 2 * matrices
    assert (cost.head_flops, cost.kv_bytes_per_token) == (0, whole.kv_bytes_per_token)
    assert cost.attn_flops_per_context == whole.attn_flops_per_context * depth / len(FULL.layers)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_a_prompt_never_costs_more_than_its_price(make_tiny: MakeTiny, share: float) -> None:
    """Counted product by product while the module runs, in passes of PASS; less only by what few tokens make.

    Attention, which the module computes without regard to order, is bounded by hand: if the last tokens run.
    """
    config, _ = make_tiny(max_position_embeddings=1024)
    path, per_token = PromptPath(1, share), {"bytes_per_weight": lambda _name, _layer: 1.0, "cache_bytes": 2}
    module = PromptPass(config, path, context=1024)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    cost = prompt_cost(config, FULL, path, **per_token)  # type: ignore[arg-type]
    one = cost.head_flops / path.most[1]  # what one token more makes in the layer that chooses
    pair = cost.attn_flops_per_context / (1 + path.most[0] * (2 - path.most[0]))  # of one layer
    for tokens in (1, 2, FREE + 1, PASS, PASS + 1, 2 * PASS + FREE, 1000):
        cache, ran, attention = Cache.empty(config, tokens, torch.float32), 0, 0.0
        with FlopCounterMode(display=False) as counter:
            for start in range(0, tokens, PASS):
                length = min(PASS, tokens - start)
                module.fill(cache, [3] * length)
                ran += path.kept(length)
                attention += pair * tokens * (length + path.kept(length))  # against the cache's every slot
        looks = (1 - path.most[0]) * path.most[1] * pair * tokens
        price = cost.flops_per_token * tokens - looks + cost.head_flops
        assert 0 <= price - (counter.get_total_flops() - attention) < 2 * (path.most[1] + 1) * one
        last = sum(range(tokens - ran, tokens)) * pair  # tokens before those that run
        assert last <= (cost.attn_flops_per_context - pair) * tokens**2 / 2 + looks


def test_a_tied_head_costs_what_an_untied_one_does(make_tiny: MakeTiny) -> None:
    """The head is read every step whether or not it shares the embedding's values."""
    costs = [
        tier_cost(make_tiny(tie_word_embeddings=tied)[0], FULL, lambda _name, _layer: 1.0, 4) for tied in (False, True)
    ]
    assert costs[0] == costs[1]


def test_matrix_shapes_are_those_of_the_fused_model(config: LlamaConfig) -> None:
    """The four deployment-form matrices have the shapes that fuse() gives."""
    sliced = tier_config(config, PRUNED)
    with torch.device("meta"):
        model = Llama(sliced).fuse()
    for index, dims in enumerate(PRUNED.layers):
        for name, shape in matrix_shapes(sliced, dims).items():
            assert tuple(model.get_parameter(f"model.layers.{index}.{name}.weight").shape) == shape


def entry(layer: int, kv: list[int], ffn: list[int]) -> dict[str, Any]:
    return {"source_layer": layer, "kv_groups": kv, "ffn_channels": ffn}


def write(folder: Path, name: str, *layers: dict[str, Any], **more: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"schema": 1, "layers": list(layers), **more}), encoding="utf-8")
    return path


EVENS, QUARTER = list(range(0, 128, 2)), list(range(0, 128, 4))


def test_masks_from_files_become_prefixes_of_one_order(tmp_path: Path, config: LlamaConfig) -> None:
    """Two nested files give orders in which each kept set is a prefix; the smaller comes first."""
    large = write(tmp_path, "1.json", entry(2, [3, 1, 0], EVENS), entry(0, [2, 0], EVENS))
    small = write(tmp_path, "2.json", entry(2, [1], QUARTER))
    orders, masks = read_masks([large, small], config, ALIGN)
    assert masks[0] == Mask((LayerDims(0, 2, 64), LayerDims(2, 3, 64)))
    assert masks[1] == Mask((LayerDims(2, 1, 32),))
    assert masks[1].nested_in(masks[0]) and masks[0].nested_in(full_mask(config))
    assert orders[2].kv_groups == (1, 3, 0, 2)
    assert set(orders[2].ffn_channels[:32]) == set(QUARTER)
    assert set(orders[2].ffn_channels[:64]) == set(EVENS)
    for order in orders:  # every unit of every layer once, dropped layers too
        assert sorted(order.kv_groups) == list(range(4))
        assert sorted(order.ffn_channels) == list(range(128))


def test_a_written_mask_reads_back_as_the_same_tier(tmp_path: Path, config: LlamaConfig) -> None:
    """mask.json of a ladder, read again, gives the same masks and keeps the same units."""
    generator = torch.Generator().manual_seed(0)
    orders = [
        UnitOrder(
            tuple(torch.randperm(4, generator=generator).tolist()),
            tuple(torch.randperm(128, generator=generator).tolist()),
        )
        for _ in range(3)
    ]
    smaller = Mask((LayerDims(2, 1, 32),))
    paths = []
    for tier, mask in (("t1", PRUNED), ("t2", smaller)):
        paths.append(tmp_path / f"{tier}.json")
        paths[-1].write_text(json.dumps(mask_to_json(tier, mask, orders)))
    read_orders, masks = read_masks(paths, config, ALIGN)
    assert masks == (PRUNED, smaller)
    for mask in masks:
        for d in mask.layers:
            mine, theirs = orders[d.source_layer], read_orders[d.source_layer]
            assert mine.kv_groups[: d.num_key_value_heads] == theirs.kv_groups[: d.num_key_value_heads]
            assert set(mine.ffn_channels[: d.intermediate_size]) == set(theirs.ffn_channels[: d.intermediate_size])


REFUSED: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not a mask file"),
    "a list": ("[]", "not a mask file"),
    "null": ("null", "not a mask file"),
    "no layers key": ("{}", "not a mask file"),
    "a key missing": ('{"layers": [{"source_layer": 0, "kv_groups": [0]}]}', "ffn_channels"),
    "layers no list": ('{"layers": 3}', "not a mask file"),
    "another schema": ('{"schema": 2, "layers": []}', "schema 2"),
    "no layer": ('{"schema": 1, "layers": []}', "keeps no layer"),
    "unknown layer": ([entry(3, [0], QUARTER)], "layer 3 does not exist"),
    "negative layer": ([entry(-1, [0], QUARTER)], "layer -1 does not exist"),
    "no groups": ([entry(0, [], QUARTER)], "layer 0: kv_groups"),
    "no channels": ([entry(0, [0], [])], "layer 0: ffn_channels"),
    "unknown group": ([entry(0, [4], QUARTER)], r"0\.\.3"),
    "unknown channel": ([entry(0, [0], [*QUARTER[1:], 128])], r"0\.\.127"),
    "a channel twice": ([entry(0, [0], QUARTER[:-1] + QUARTER[:1])], "distinct"),
    "text for groups": ([entry(0, "01", QUARTER)], "kv_groups"),  # type: ignore[arg-type]
    "unaligned": ([entry(0, [0], EVENS[:40])], "40 FFN channels, not a multiple of 32"),
    "a layer twice": ([entry(0, [0], QUARTER), entry(0, [1], QUARTER)], "layer 0 twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_mask_file_is_refused_by_name(tmp_path: Path, config: LlamaConfig, case: str) -> None:
    """Every fault gives one ModelError that names the file and the fault."""
    content, message = REFUSED[case]
    if isinstance(content, str):
        path = tmp_path / "bad.json"
        path.write_text(content)
    else:
        path = write(tmp_path, "bad.json", *content)
    with pytest.raises(ModelError, match=message) as caught:
        read_masks([path], config, ALIGN)
    assert "bad.json" in str(caught.value)


def test_a_missing_mask_file_is_refused(tmp_path: Path, config: LlamaConfig) -> None:
    """A path without a file is a ModelError, not a traceback."""
    with pytest.raises(ModelError, match="cannot be read"):
        read_masks([tmp_path / "none.json"], config, ALIGN)


@pytest.mark.parametrize(
    ("smaller", "message"),
    [
        (entry(1, [0], QUARTER), "keeps more"),
        (entry(0, [0, 1, 2], QUARTER), "keeps more"),
        (entry(0, [3], QUARTER), "kv_groups: a smaller mask keeps"),
        (entry(0, [0], [q + 1 for q in QUARTER]), "ffn_channels: a smaller mask keeps"),
    ],
    ids=["another layer", "more groups", "other groups", "other channels"],
)
def test_masks_that_are_not_nested_are_refused(
    tmp_path: Path, config: LlamaConfig, smaller: dict[str, Any], message: str
) -> None:
    """The second mask must lie inside the first, by layers, counts and units."""
    paths = [write(tmp_path, "1.json", entry(0, [0, 1], EVENS)), write(tmp_path, "2.json", smaller)]
    with pytest.raises(ModelError, match=message):
        read_masks(paths, config, ALIGN)


def test_masks_from_small_to_large_are_refused(tmp_path: Path, config: LlamaConfig) -> None:
    """Files in the wrong order say which order is right."""
    paths = [write(tmp_path, "1.json", entry(0, [0], QUARTER)), write(tmp_path, "2.json", entry(0, [0], EVENS))]
    with pytest.raises(ModelError, match="from large to small"):
        read_masks(paths, config, ALIGN)


def test_slicing_keeps_all_but_the_layers_of_a_config(config: LlamaConfig) -> None:
    """A tier's config differs from the model's in its layers alone."""
    assert replace(tier_config(config, PRUNED), layers=config.layers) == config
