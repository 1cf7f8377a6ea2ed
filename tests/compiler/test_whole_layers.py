"""Removing whole layers: how many, which text the search sees, and what comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eopc_compiler.baselines import Method
from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama, build_model
from eopc_compiler.prune_request import PruneRequest
from eopc_compiler.pruned import Choice, keep_all, slice_model
from eopc_compiler.sequences import mean_loss, next_token_losses, run_blocks, run_layer
from eopc_compiler.whole_layers import evop, layers_to_remove, shortgpt, sleb, stages
from eopc_runtime.errors import UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
METHODS: list[Method] = [evop, shortgpt, sleb]


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    """Two domains of random tokens: 1 x 16 and 5 x 16."""
    generator = torch.Generator().manual_seed(5)
    return CalibrationSet(
        tuple((name, torch.randint(0, 160, (n, 16), generator=generator)) for name, n in (("a", 1), ("b", 5)))
    )


def loss(model: Llama, kept: list[int], calibration: CalibrationSet) -> float:
    """Mean loss of some layers on the windows that a search sees."""
    tokens = torch.cat(stages(calibration))
    x = model.model.embed_tokens(tokens)
    for index in kept:
        x = run_layer(model, model.blocks[index], x)
    return float(next_token_losses(model, x, tokens).mean())


@pytest.mark.parametrize("method", METHODS)
def test_the_layer_that_adds_nothing_goes(make_tiny: MakeTiny, calibration: CalibrationSet, method: Method) -> None:
    """A planted idle layer is found, and the sliced model computes what skipping it does."""
    pytest.importorskip("eopc_compiler.evop", reason="the layer search is not there")
    config, tensors = make_tiny(num_hidden_layers=5)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"] *= 1e-4
    model = build_model(config, tensors, 64)
    choice = method(model, calibration, PruneRequest(0.2))
    kept = [k.source_layer for k in choice.kept]
    if method is shortgpt:
        assert kept == [0, 1, 3, 4]
    else:  # a random model may miss another layer even less
        assert loss(model, kept, calibration) <= loss(model, [0, 1, 3, 4], calibration) + 1e-6
    x = model.model.embed_tokens(calibration.tokens)
    for layer in choice.kept:
        x = run_layer(model, model.blocks[layer.source_layer], x)
    sliced = slice_model(config, tensors.__getitem__, choice.kept, choice.changed)
    torch.testing.assert_close(run_blocks(sliced.build(64), calibration.tokens), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_zero_keeps_every_layer_without_a_search(
    make_tiny: MakeTiny, calibration: CalibrationSet, method: Method
) -> None:
    """Nothing is chosen, nothing is changed."""
    config, tensors = make_tiny()
    assert method(build_model(config, tensors, 64), calibration, PruneRequest(0.0)) == Choice(keep_all(config))


@pytest.mark.parametrize("method", [evop, sleb])
def test_sub_blocks_go_apart(make_tiny: MakeTiny, calibration: CalibrationSet, method: Method) -> None:
    """The attention of one layer and the FFN of another, which add nothing, go; the sliced model computes the same."""
    config, tensors = make_tiny(num_hidden_layers=5)
    tensors["model.layers.3.self_attn.o_proj.weight"] *= 0
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0
    model, said = build_model(config, tensors, 64), list[str]()
    choice = method(model, calibration, PruneRequest(0.2, sub_blocks=True, say=said.append))
    gone = [(k.source_layer, not k.kv_groups, not k.ffn_channels) for k in choice.kept]
    assert [sum(g[i] for g in gone) for i in (1, 2)] == [1, 1] and "attentions" in said[-1]
    sliced = slice_model(config, tensors.__getitem__, choice.kept, choice.changed).build(64)
    tokens = torch.cat(stages(calibration))
    assert mean_loss(sliced, tokens) <= mean_loss(model, tokens) + 1e-5


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.4, 1), (0.5, 2), (0.8, 2)])
def test_the_ratio_rounds_to_whole_layers(make_tiny: MakeTiny, ratio: float, count: int) -> None:
    """Of three layers."""
    assert layers_to_remove(make_tiny()[0], PruneRequest(ratio)) == count


@pytest.mark.parametrize("request_", [PruneRequest(0.1), PruneRequest(0.9), PruneRequest(0.4, "ffn")])
def test_no_layer_all_layers_and_ffn_alone_are_refused(make_tiny: MakeTiny, request_: PruneRequest) -> None:
    """A ratio that rounds to 0 or to all three, and units that a layer is not made of."""
    with pytest.raises(UsageError, match=r"Choose another --ratio|Leave --units out"):
        layers_to_remove(make_tiny()[0], request_)


def test_stages_take_the_next_windows_of_every_domain(calibration: CalibrationSet) -> None:
    """A domain that has run out adds nothing; a stage with no windows is left out."""
    (_, a), (_, b) = calibration.domains
    first, second = stages(calibration)
    assert torch.equal(first, torch.cat([a[:1], b[:1]])) and torch.equal(second, b[1:2])
    assert len(stages(CalibrationSet((("a", a),)))) == 1
