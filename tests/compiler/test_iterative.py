"""Iterative pruning of models with planted redundancy: what is said twice can go, and repair restores the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.allocate import Kind
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.iterative import Settings, prune_iteratively
from eopc_compiler.model import Llama, build_model
from eopc_compiler.pruned import Choice, PrunedModel, keep_all, pruned_config, slice_model, unit_columns

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
LENGTH, HEAD, GROUP = 48, 16, 32  # GROUP: columns of o_proj that belong to a KV group
COSTS: dict[Kind, float] = {"kv_groups": 40.0, "ffn": 1.0}
FFN = Settings(0.3, ("ffn",), align=16, steps=2)
BOTH = replace(FFN, kinds=("kv_groups", "ffn"))


def cost(kind: Kind) -> float:
    return COSTS[kind]


def windows(seed: int, count: int = 20) -> Tensor:
    return torch.randint(0, 160, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Two domains of random tokens with unequal weights."""
    return [Batch(i, w / (20 * LENGTH), windows(i)) for i, w in enumerate((0.6, 0.4))]


def twin_channels(tensors: dict[str, Tensor]) -> None:
    """Make every odd FFN channel compute what the even one before it does; down_proj reads both, differently."""
    for layer in range(3):
        for name in ("gate_proj", "up_proj"):
            rows = tensors[f"model.layers.{layer}.mlp.{name}.weight"]
            rows[1::2] = rows[::2]


def twin_groups(tensors: dict[str, Tensor]) -> None:
    """Make KV groups 1 and 3 compute what 0 and 2 do."""
    for layer in range(3):
        for name, width in (("q_proj", GROUP), ("k_proj", HEAD), ("v_proj", HEAD)):
            groups = tensors[f"model.layers.{layer}.self_attn.{name}.weight"].view(4, width, -1)
            groups[1::2] = groups[::2].clone()


def prune(
    config: LlamaConfig, tensors: dict[str, Tensor], batches: list[Batch], settings: Settings, **more: Any
) -> tuple[Choice, PrunedModel]:
    choice = prune_iteratively(build_model(config, tensors, LENGTH), batches, settings, cost, **more)
    return choice, slice_model(config, tensors.__getitem__, choice.kept, choice.changed)


def error(a: Llama, b: Llama, tokens: Tensor) -> float:
    """Relative deviation of logits."""
    return float((a.score(tokens) - b.score(tokens)).norm() / b.score(tokens).norm())


def divergence(model: Llama, dense: Llama, tokens: Tensor) -> float:
    """Mean KL from the dense model, nats."""
    want, got = (F.log_softmax(m.score(tokens).double(), -1) for m in (dense, model))
    return float((want.exp() * (want - got)).sum(-1).mean())


@pytest.mark.parametrize(("kind", "twins"), [("ffn", twin_channels), ("kv_groups", twin_groups)])
def test_half_of_all_twins_can_go_and_nothing_changes(
    make_tiny: MakeTiny, batches: list[Batch], kind: Kind, twins: Callable[[dict[str, Tensor]], None]
) -> None:
    """One of every pair goes, the other's output column becomes the sum, and fresh text sees no difference."""
    config, tensors = make_tiny()
    twins(tensors)
    # a single unit at a time: two of one pair taken at once would not be seen to be twins
    settings = Settings(0.5, (kind,), align=1, steps=2, damping=1e-6)
    choice, small = prune(config, tensors, batches, settings)
    for layer in choice.kept:
        units = layer.ffn_channels if kind == "ffn" else layer.kv_groups
        assert [u // 2 for u in units] == list(range(64 if kind == "ffn" else 2))
    dense = build_model(config, tensors, LENGTH)
    assert error(small.build(LENGTH), dense, windows(9)) < 1e-3
    bare = slice_model(config, tensors.__getitem__, choice.kept)
    assert error(bare.build(LENGTH), dense, windows(9)) > 0.1


@pytest.mark.parametrize("kinds", [("ffn",), ("kv_groups",), ("kv_groups", "ffn")], ids="+".join)
@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_what_is_removed_is_what_was_asked_within_a_parcel(
    make_tiny: MakeTiny, batches: list[Batch], kinds: tuple[Kind, ...], ratio: float
) -> None:
    """The cost removed, over the units in question, is the ratio; other kinds stay whole; every layer keeps some."""
    config, tensors = make_tiny()
    choice, small = prune(config, tensors, batches, replace(FFN, ratio=ratio, kinds=kinds))
    whole: dict[Kind, int] = {"kv_groups": 12, "ffn": 384}
    left: dict[Kind, int] = {
        "kv_groups": sum(len(k.kv_groups) for k in choice.kept),
        "ffn": sum(len(k.ffn_channels) for k in choice.kept),
    }
    removed = sum(cost(k) * (whole[k] - left[k]) for k in kinds)
    parcel = max(40.0 if "kv_groups" in kinds else 0.0, 16.0 if "ffn" in kinds else 0.0)
    assert abs(removed - ratio * sum(cost(k) * whole[k] for k in kinds)) <= parcel
    assert all(left[k] == whole[k] for k in whole if k not in kinds)
    assert all(k.kv_groups and k.ffn_channels and len(k.ffn_channels) % 16 == 0 for k in choice.kept)
    assert small.config.param_count < config.param_count + 6 * 64  # smaller but for the biases


def test_a_ratio_of_nothing_changes_nothing(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Everything is kept, no tensor is replaced."""
    config, tensors = make_tiny()
    assert prune(config, tensors, batches, replace(BOTH, ratio=0.0))[0] == Choice(keep_all(config), {})


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_the_sliced_model_is_the_whole_one_with_zeroed_columns(
    make_tiny: MakeTiny, batches: list[Batch], changes: dict[str, bool]
) -> None:
    """Putting the repaired columns back in their places, with zeros for what is gone, gives the same logits."""
    config, tensors = make_tiny(**changes)
    choice, small = prune(config, tensors, batches, replace(BOTH, ratio=0.4))
    assert choice.kept != keep_all(config)
    masked = {**tensors, **{n: t for n, t in choice.changed.items() if n.endswith("bias")}}
    for layer in choice.kept:
        for name, units, width in (
            ("self_attn.o_proj", layer.kv_groups, GROUP),
            ("mlp.down_proj", layer.ffn_channels, 1),
        ):
            key = f"model.layers.{layer.source_layer}.{name}"
            if f"{key}.weight" in choice.changed:
                masked[f"{key}.weight"] = torch.zeros_like(tensors[f"{key}.weight"])
                masked[f"{key}.weight"][:, unit_columns(units, width)] = choice.changed[f"{key}.weight"]
            masked.setdefault(f"{key}.bias", torch.zeros(64))
    whole = build_model(pruned_config(config, keep_all(config), biased=True), masked, LENGTH)
    assert error(small.build(LENGTH), whole, windows(5)) < 1e-5


def test_repair_beats_a_bias_and_a_bias_beats_nothing(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """With twins that differ a little, least squares loses far less than keeping the columns."""
    config, tensors = make_tiny()
    twin_channels(tensors)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    dense, tokens = build_model(config, tensors, LENGTH), batches[0].tokens
    settings = Settings(0.4, ("ffn",), align=1, steps=1, damping=0.01)  # the text is short: by it the ridge would rule
    fitted, biased = (prune(config, tensors, batches, replace(settings, repair=r))[1] for r in (True, False))
    bare = slice_model(config, tensors.__getitem__, fitted.kept)
    losses = [divergence(m.build(LENGTH), dense, tokens) for m in (fitted, biased, bare)]
    assert losses[0] < 0.2 * min(losses[1:])


def test_later_layers_make_up_for_earlier_ones(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Fitting part of the error of the layers below brings the model nearer to the dense one."""
    config, tensors = make_tiny()
    dense, tokens = build_model(config, tensors, LENGTH), batches[0].tokens
    settings = Settings(0.4, ("ffn",), align=1, steps=2)
    with_pull, without = (
        divergence(prune(config, tensors, batches, replace(settings, pull=p))[1].build(LENGTH), dense, tokens)
        for p in (0.5, 0.0)
    )
    assert with_pull < without


def test_statistics_of_the_cut_model_beat_those_of_the_dense_one(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Fitting behind the layers below as they are by then ends nearer to the dense model than one shot."""
    config, tensors = make_tiny()
    dense, tokens = build_model(config, tensors, LENGTH), windows(8)
    one, two = (
        divergence(
            prune(config, tensors, batches, Settings(0.4, ("ffn",), align=1, steps=s))[1].build(LENGTH), dense, tokens
        )
        for s in (1, 2)
    )
    assert two < one


def test_least_squares_beats_variance(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Ranking by what the repaired layer loses ends closer to the dense model than ranking by fluctuation."""
    config, tensors = make_tiny()
    dense, tokens = build_model(config, tensors, LENGTH), windows(8)
    obs, wifv = (
        divergence(prune(config, tensors, batches, replace(FFN, importance=i))[1].build(LENGTH), dense, tokens)
        for i in ("obs", "wifv")
    )
    assert obs < wifv


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_given_targets_are_met_exactly(make_tiny: MakeTiny, batches: list[Batch], steps: int) -> None:
    """Every layer ends with the counts it was given, however many steps lead there and whatever is left over."""
    config, tensors = make_tiny()
    targets = (LayerDims(0, 4, 96), LayerDims(1, 2, 112), LayerDims(2, 1, 16))
    choice, _ = prune(config, tensors, batches, replace(BOTH, steps=steps, targets=targets))
    assert [LayerDims(k.source_layer, len(k.kv_groups), len(k.ffn_channels)) for k in choice.kept] == list(targets)


@pytest.mark.parametrize("change", [{"use_metric": False}, {"within": True}, {"importance": "wifv"}, {"seed": 1}])
def test_every_switch_has_an_effect(make_tiny: MakeTiny, batches: list[Batch], change: dict[str, Any]) -> None:
    """Other statistics give other units or other columns, of the same cost within a parcel."""
    config, tensors = make_tiny()
    settings = replace(FFN, kinds=("ffn",), align=8)
    plain, other = (prune(config, tensors, batches, s)[0] for s in (settings, replace(settings, **change)))
    assert plain.kept != other.kept or any(not plain.changed[n].equal(t) for n, t in other.changed.items())
    widths = [sum(len(k.ffn_channels) for k in c.kept) for c in (plain, other)]
    assert abs(widths[0] - widths[1]) <= 8


def test_the_model_stays_as_it_was_and_progress_is_told(make_tiny: MakeTiny, batches: list[Batch]) -> None:
    """Nothing of the given model changes; the same settings choose the same again."""
    config, tensors = make_tiny()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    heard: list[tuple[str, int, int]] = []
    first, _ = prune(config, tensors, batches, BOTH, report=lambda *row: heard.append(row))
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    again, _ = prune(config, tensors, batches, BOTH)
    assert again.kept == first.kept
    assert all(torch.equal(again.changed[name], first.changed[name]) for name in first.changed)
    assert [what for what, done, total in heard if done == total == 3][-3:] == ["looking", "step 1/2", "step 2/2"]
