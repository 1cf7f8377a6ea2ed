"""Baselines equal their formulas computed plainly, and what they choose is what slicing computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eopc_compiler.baselines import (
    ColumnMoments,
    Method,
    embed,
    flap,
    magnitude,
    observe_layer,
    output_gates,
    random_units,
    silenced,
    standardise,
    wanda_sp,
)
from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import capture_inputs
from eopc_compiler.model import Llama, build_model
from eopc_compiler.prune_request import PruneRequest, unit_costs
from eopc_compiler.pruned import Choice, KeptLayer, PrunedModel, keep_all, slice_model
from eopc_compiler.sequences import run_blocks, run_layer

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
METHODS: list[Method] = [magnitude, random_units, wanda_sp, flap]
VARIANTS = [{}, {"num_key_value_heads": 8}, {"num_key_value_heads": 2, "tie_word_embeddings": True}, {"mlp_bias": True}]


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    """Two domains of random tokens: 3 x 24 and 6 x 24."""
    generator = torch.Generator().manual_seed(3)
    return CalibrationSet(
        (
            ("a", torch.randint(0, 80, (3, 24), generator=generator)),
            ("b", torch.randint(0, 160, (6, 24), generator=generator)),
        )
    )


def tiny(make_tiny: MakeTiny, **changes: object) -> tuple[Llama, dict[str, Tensor]]:
    config, tensors = make_tiny(**changes)
    return build_model(config, tensors, 64), tensors


def cut(model: Llama, tensors: dict[str, Tensor], choice: Choice) -> PrunedModel:
    return slice_model(model.config, tensors.__getitem__, choice.kept, choice.changed)


def masked_hidden(model: Llama, choice: Choice, tokens: Tensor) -> Tensor:
    """The dense model with dropped input channels zeroed and the biases added: the independent path."""
    x = model.model.embed_tokens(tokens)
    for layer, kept in zip(model.blocks, choice.kept, strict=True):
        for name, module, gate in output_gates(model, layer, kept):
            bias = choice.changed.get(f"model.layers.{kept.source_layer}.{name}.bias")
            module.weight.data = module.weight.data * gate
            if bias is not None:
                module.bias = torch.nn.Parameter(bias, requires_grad=False)
        x = run_layer(model, layer, x)
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", VARIANTS)
def test_masked_equals_sliced(
    make_tiny: MakeTiny, calibration: CalibrationSet, method: Method, changes: dict[str, object]
) -> None:
    """Zeroed unit inputs plus bias compute what the sliced model computes, with and without GQA, tied or not."""
    model, tensors = tiny(make_tiny, **changes)
    choice = method(model, calibration, PruneRequest(0.4, align=16))
    tokens = calibration.tokens[:4]
    sliced = run_blocks(cut(model, tensors, choice).build(64), tokens)
    torch.testing.assert_close(sliced, masked_hidden(model, choice, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_is_the_dense_model_bit_for_bit(
    make_tiny: MakeTiny, calibration: CalibrationSet, method: Method
) -> None:
    """Everything is kept, nothing is added, and every tensor is equal."""
    model, tensors = tiny(make_tiny)
    choice = method(model, calibration, PruneRequest(0.0, align=32))
    assert choice == Choice(keep_all(model.config), {})
    pruned = cut(model, tensors, choice)
    assert pruned.config == model.config
    assert all(torch.equal(pruned.tensors[n], t) for n, t in tensors.items()) and len(pruned.tensors) == len(tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("units", ["ffn", "all"])
def test_counted_parameters_are_the_predicted_ones(
    make_tiny: MakeTiny, calibration: CalibrationSet, method: Method, units: str
) -> None:
    """The dense count less the cost of every unit that went, plus the biases that came."""
    model, tensors = tiny(make_tiny)
    config, costs = model.config, unit_costs(model.config)
    choice = method(model, calibration, PruneRequest(0.4, units, 16))  # type: ignore[arg-type]
    groups = sum(d.num_key_value_heads - len(k.kv_groups) for d, k in zip(config.layers, choice.kept, strict=True))
    channels = sum(d.intermediate_size - len(k.ffn_channels) for d, k in zip(config.layers, choice.kept, strict=True))
    biases = 2 * config.hidden_size * len(config.layers) if choice.changed else 0
    counted = sum(t.numel() for t in cut(model, tensors, choice).tensors.values())
    assert counted == config.param_count - groups * costs.kv_group - channels * costs.ffn_channel + biases
    assert groups == 0 if units == "ffn" else groups > 0


def test_magnitude_keeps_the_largest_columns(make_tiny: MakeTiny, calibration: CalibrationSet) -> None:
    """Per layer, ||W_:,j|| of down_proj, and its sum over the columns of a group of o_proj."""
    model, tensors = tiny(make_tiny)
    choice = magnitude(model, calibration, PruneRequest(0.25, align=32))
    for kept in choice.kept:
        down = tensors[f"model.layers.{kept.source_layer}.mlp.down_proj.weight"]
        o = tensors[f"model.layers.{kept.source_layer}.self_attn.o_proj.weight"]
        largest = sorted(range(128), key=lambda j: -float(down[:, j].square().sum()))[: len(kept.ffn_channels)]
        assert set(kept.ffn_channels) == set(largest)
        sums = [sum(float(o[:, c].norm()) for c in range(32 * g, 32 * g + 32)) for g in range(4)]
        assert set(range(4)) - set(kept.kv_groups) == {sums.index(min(sums))}


def test_random_follows_the_seed_alone(make_tiny: MakeTiny, calibration: CalibrationSet) -> None:
    """The same seed gives the same units, another seed others, with the same counts."""
    model, _ = tiny(make_tiny)
    first, again, other = (random_units(model, calibration, PruneRequest(0.3, align=16, seed=s)) for s in (1, 1, 2))
    assert first == again != other
    assert [len(k.ffn_channels) for k in first.kept] == [len(k.ffn_channels) for k in other.kept]


def test_wanda_scores_each_layer_on_the_pruned_layers_below(make_tiny: MakeTiny, calibration: CalibrationSet) -> None:
    """mean |W_ij| ||x_j|| with x from a model whose earlier layers are really sliced, computed in one plain loop."""
    model, tensors = tiny(make_tiny)
    choice = wanda_sp(model, calibration, PruneRequest(0.4, align=8))
    config, everything = model.config, keep_all(model.config)
    for index in range(3):
        partly = slice_model(config, tensors.__getitem__, (*choice.kept[:index], *everything[index:])).build(64)
        with capture_inputs({"down": partly.blocks[index].mlp.down_proj}) as inputs:
            for _, tokens in calibration.domains:
                run_blocks(partly, tokens)
        x, weight = torch.cat(inputs["down"]).double(), partly.blocks[index].mlp.down_proj.weight.double()
        scores = (weight.abs() * x.norm(dim=0)).mean(0)
        kept = choice.kept[index].ffn_channels
        assert set(kept) == set(scores.topk(len(kept)).indices.tolist())


def test_flap_is_its_formula(make_tiny: MakeTiny, calibration: CalibrationSet) -> None:
    """WIFV, standardised, lowest first over all layers; the bias is W_:,U E[x_U]: one plain loop on the dense model."""
    model, tensors = tiny(make_tiny)
    choice = flap(model, calibration, PruneRequest(0.3, "ffn", align=1))
    scores = []
    for index, layer in enumerate(model.blocks):
        with capture_inputs({"down": layer.mlp.down_proj}) as inputs:
            for _, tokens in calibration.domains:
                run_blocks(model, tokens)
        x, weight = torch.cat(inputs["down"]).double(), tensors[f"model.layers.{index}.mlp.down_proj.weight"].double()
        wifv = x.var(0, unbiased=False) * weight.square().sum(0)
        scores.append((wifv - wifv.mean()) / wifv.std())
        gone = sorted(set(range(128)) - set(choice.kept[index].ffn_channels))
        bias = choice.changed[f"model.layers.{index}.mlp.down_proj.bias"]
        torch.testing.assert_close(bias, (weight[:, gone] @ x[:, gone].mean(0)).float())
    lowest = set(torch.cat(scores).argsort()[: round(0.3 * 3 * 128)].tolist())
    removed = {128 * k.source_layer + j for k in choice.kept for j in set(range(128)) - set(k.ffn_channels)}
    assert removed == lowest


def test_the_bias_keeps_the_mean_output_of_the_first_layer(make_tiny: MakeTiny, calibration: CalibrationSet) -> None:
    """Compensated attention puts out the dense mean on the calibration text; without the bias it does not."""
    model, tensors = tiny(make_tiny)
    choice = flap(model, calibration, PruneRequest(0.4, align=16))
    assert len(choice.kept[0].kv_groups) < 4  # else nothing is tested

    def mean_output(changed: dict[str, Tensor]) -> Tensor:
        sliced = slice_model(model.config, tensors.__getitem__, choice.kept, changed).build(64)
        return first_attention(sliced, calibration.tokens)

    dense = first_attention(model, calibration.tokens)
    torch.testing.assert_close(mean_output(dict(choice.changed)), dense, rtol=1e-4, atol=1e-5)
    assert (mean_output({}) - dense).abs().max() > 1e-2


def first_attention(model: Llama, tokens: Tensor) -> Tensor:
    """Mean over tokens of what the first attention adds to the residual stream, [hidden]."""
    layer = model.blocks[0]
    with capture_inputs({"o": layer.self_attn.o_proj}) as inputs:
        run_layer(model, layer, model.model.embed_tokens(tokens))
    out: Tensor = layer.self_attn.o_proj(torch.cat(inputs["o"]))
    return out.mean(0)


def test_a_channel_that_never_fluctuates_goes_with_flap_and_stays_with_wanda(
    make_tiny: MakeTiny, calibration: CalibrationSet
) -> None:
    """A constant input is free once its mean is a bias, however large; without a bias it is worth keeping."""
    config, tensors = make_tiny(mlp_bias=True)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"][5] = 0
        tensors[f"model.layers.1.mlp.{name}.bias"][5] = 4.0  # silu(4) x 4, always
    model = build_model(config, tensors, 64)
    assert 5 not in flap(model, calibration, PruneRequest(0.1, "ffn")).kept[1].ffn_channels
    assert 5 in wanda_sp(model, calibration, PruneRequest(0.5, "ffn")).kept[1].ffn_channels


def test_silencing_ends_with_its_block(make_tiny: MakeTiny) -> None:
    """Hooks are gone afterwards, and inside they change the output."""
    model, _ = tiny(make_tiny)
    layer, x = model.blocks[0], torch.randn(1, 5, 64)
    before = run_layer(model, layer, x)
    with silenced(model, layer, KeptLayer(0, (0, 2), tuple(range(32)))):
        assert not torch.allclose(run_layer(model, layer, x), before)
    assert torch.equal(run_layer(model, layer, x), before)


def test_moments_of_parts_are_the_moments_of_the_whole() -> None:
    """Chan's update equals numpy-style mean and variance in one go, far from zero as well."""
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = ColumnMoments.empty(7)
    for part in rows.split([1, 30, 19]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.variance, rows.var(0, unbiased=False), rtol=1e-6, atol=0)


def test_a_layer_without_attention_or_ffn_is_observed_as_empty(
    make_tiny: MakeTiny, calibration: CalibrationSet
) -> None:
    """Models that lost sub-blocks before can be pruned again."""
    config, tensors = make_tiny()
    kept = (KeptLayer(0, (), tuple(range(64))), KeptLayer(1, (0, 1), ()), keep_all(config)[2])
    smaller = slice_model(config, tensors.__getitem__, kept)
    model = smaller.build(64)
    o, down, after = observe_layer(model, model.blocks[0], embed(model, calibration))
    assert (o.count, o.mean.shape) == (0, (0,)) and down.count == calibration.tokens.numel()
    assert torch.cat(after).shape == (9, 24, 64)
    for method in METHODS:
        choice = method(model, calibration, PruneRequest(0.3, align=16))
        assert run_blocks(cut(model, smaller.tensors, choice).build(64), calibration.tokens[:1]).isfinite().all()


def test_standardised_scores_of_equal_units_are_zero() -> None:
    """No division by a spread of nothing."""
    assert standardise(torch.ones(4)).tolist() == [0.0] * 4
    assert standardise(torch.tensor([2.0])).tolist() == [0.0]
