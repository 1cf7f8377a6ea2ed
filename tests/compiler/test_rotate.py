"""Rotation of the residual stream: orthogonal for any width, invisible in logits, and it evens channels out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import deployment_layer
from eopc_compiler.config import LlamaConfig
from eopc_compiler.hadamard import hadamard, turned
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.model import Block, build_model
from eopc_compiler.quantize import InputRounding
from eopc_compiler.rotate import Rotation, rotate_channels, rotate_head, rotate_layer, rotate_values
from eopc_compiler.sequences import run_layer

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@pytest.mark.parametrize("width", [1, 2, 7, 64, 96, 576, 896, 2048, 5120])
def test_a_rotation_is_orthogonal(width: int) -> None:
    """Lengths and angles stay: R Rᵀ is the identity to fp32 rounding, for powers of two, odd and mixed widths."""
    rotation = Rotation(width)
    probe = torch.eye(width) if width <= 1024 else torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    turned = rotation.columns(probe)
    torch.testing.assert_close(turned @ turned.t(), probe @ probe.t(), atol=2e-3 if width > 1024 else 1e-5, rtol=1e-5)


def test_rows_undo_columns() -> None:
    """(x R)(Rᵀ W) is x W, for inputs with batch and sequence axes."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 5, 96, generator=generator), torch.randn(96, 7, generator=generator)
    rotation = Rotation(96, seed=3)
    torch.testing.assert_close(rotation.columns(x) @ rotation.rows(weight), x @ weight, atol=1e-4, rtol=1e-4)


def test_equal_seeds_rotate_equally_and_different_ones_do_not() -> None:
    """A build is reproducible."""
    x = torch.eye(64)
    assert torch.equal(Rotation(64).columns(x), Rotation(64, seed=0).columns(x))
    assert not torch.equal(Rotation(64, seed=1).columns(x), Rotation(64).columns(x))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_a_rotated_model_computes_the_same(make_tiny: MakeTiny, changes: dict[str, Any]) -> None:
    """Embedding, two layers with their norms and biases, and head, all rotated: the logits are the checkpoint's."""
    config, tensors = make_tiny(num_hidden_layers=2, **changes)
    tokens = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    plain = build_model(config, tensors)
    rotation = Rotation(config.hidden_size)
    hidden = rotation.columns(tensors["model.embed_tokens.weight"][tokens])
    for source, dims in enumerate(config.layers):
        order = UnitOrder(tuple(range(dims.num_key_value_heads)), tuple(range(dims.intermediate_size)))
        layer = deployment_layer(config, source, tensors.__getitem__, order)
        rotate_layer(layer, rotation)
        assert bool((layer.input_layernorm.weight == 1).all())
        hidden = run_layer(plain, layer, hidden)
    norm, head = rotate_head(tensors["model.norm.weight"], tensors["lm_head.weight"].t(), rotation)
    scaled = hidden / (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm
    want = plain.score(tokens)
    torch.testing.assert_close(scaled @ head, want, atol=2e-5 * float(want.abs().max()), rtol=0)  # fp32 sums


def test_rotation_spreads_an_outlier_channel_over_all() -> None:
    """A stream with one channel a hundred times the others peaks below 6 of its root mean square afterwards."""
    x = torch.randn(50, 576, generator=torch.Generator().manual_seed(4))
    x[:, 17] *= 100
    turned = Rotation(576).columns(x)

    def peak(y: Tensor) -> float:
        return float((y.abs().amax(1) / y.square().mean(1).sqrt()).max())

    assert peak(x) > 20
    assert peak(turned) < 6


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}], ids=["plain", "biases"])
def test_turned_values_and_channels_compute_the_same(make_tiny: MakeTiny, changes: dict[str, Any]) -> None:
    """What o_proj and down_proj read is another, and even: the layer's output is not, whole or with fewer units."""
    config, tensors = make_tiny(num_hidden_layers=1, **changes)
    plain, dims = build_model(config, tensors), config.layers[0]
    order = UnitOrder(tuple(range(dims.num_key_value_heads)), tuple(range(dims.intermediate_size)))

    def layer() -> Block:
        return deployment_layer(config, 0, tensors.__getitem__, order)

    whole, turned = layer(), layer()
    rotate_values(turned, config.head_dim)
    rotate_channels(turned, InputRounding(group=32))
    assert turned.mlp.down_proj.inputs == InputRounding(group=32)
    turned.mlp.down_proj.rounds = False
    x = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(5))
    want = run_layer(plain, whole, x)
    torch.testing.assert_close(run_layer(plain, turned, x), want, atol=1e-5 * float(want.abs().max()), rtol=0)
    assert not torch.allclose(turned.self_attn.o_proj.weight, whole.self_attn.o_proj.weight)
    for block in (whole, turned):  # 64 of the channels
        for name in ("gate_proj", "up_proj"):
            projection = block.mlp.get_submodule(name)
            projection.weight = torch.nn.Parameter(projection.weight[:, :64], requires_grad=False)
        block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight[:64], requires_grad=False)
    want = run_layer(plain, whole, x)
    torch.testing.assert_close(run_layer(plain, turned, x), want, atol=1e-5 * float(want.abs().max()), rtol=0)


def test_a_hadamard_matrix_that_a_meta_model_asked_for_first_has_values() -> None:
    """It is kept for all that ask later, wherever the first one lay."""
    hadamard.cache_clear()
    with torch.device("meta"):
        assert turned(torch.zeros(3, 16), 16).is_meta
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turned(turned(x, 16), 16), x)
