"""Turn the residual stream by an orthogonal matrix before quantising, without changing what a model computes.

A few channels of a LLaMA's residual stream are far larger than the rest, and one scale that has to hold them rounds
all others coarsely. Whatever writes to the stream may write x R instead of x, if whatever reads it undoes that: R is
folded into the embedding, o_proj and down_proj on the writing side, and its transpose into qkv_proj, gate_proj,
up_proj and the LM head on the reading side, norm weights first, because RMSNorm commutes with R only without one
(SliceGPT, Ashkboos et al., arXiv 2401.15024; QuaRot, Ashkboos et al., arXiv 2404.00456). It costs nothing at run time.
Afterwards a normed input looks Gaussian in every channel, whatever the token: one constant scale serves all tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eopc_compiler.hadamard import hadamard
from eopc_compiler.model import Block, Projection
from eopc_compiler.quantize import InputRounding

LARGEST_FACTOR = 64  # Hadamard factors: small ones make a large rotation cheap to apply


class Rotation:
    """An orthogonal R [width, width]: random signs, then a Kronecker product of Hadamard matrices and a cosine matrix.

    The odd part of the width, for which there is no Hadamard matrix, takes the orthonormal DCT-II of its size.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self._signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        power = width & -width  # the largest power of two that divides the width
        odd = width // power
        self._factors = [] if odd == 1 else [_cosine(odd)]
        while power > 1:
            size = min(power, LARGEST_FACTOR)
            self._factors.append(hadamard(size))
            power //= size

    def columns(self, x: Tensor) -> Tensor:
        """x R for x [..., width]."""
        y = (x.float() * self._signs).reshape(-1, *(f.shape[0] for f in self._factors))
        for factor in self._factors:  # each contraction moves its axis to the end, so all of them restore the order
            y = torch.tensordot(y, factor, dims=([1], [0]))
        return y.reshape(x.shape)

    def rows(self, weight: Tensor) -> Tensor:
        """Rᵀ W for W [width, out]."""
        return self.columns(weight.t()).t().contiguous()


def rotate_layer(block: Block, rotation: Rotation) -> None:
    """Make a deployment-form layer read and write the rotated stream, in place; its norms lose their weights."""
    attention, mlp = block.self_attn, block.mlp
    assert attention.qkv_proj is not None, "rotation needs deployment form"
    for norm, readers in (
        (block.input_layernorm, [attention.qkv_proj]),
        (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ):
        for reader in readers:
            reader.weight.data = rotation.rows(norm.weight.data[:, None] * reader.weight.data)
        norm.weight.data = torch.ones_like(norm.weight.data)
    for writer in (attention.o_proj, mlp.down_proj):
        _rotate_outputs(writer, rotation)


def rotate_values(block: Block, head_dim: int) -> None:
    """Turn every head's values, in place, so that what o_proj reads is even over a head: it undoes that, for free."""
    attention, turn = block.self_attn, Rotation(head_dim)
    assert attention.qkv_proj is not None, "rotation needs deployment form"

    def heads(x: Tensor) -> Tensor:
        return turn.columns(x.reshape(*x.shape[:-1], -1, head_dim)).reshape(x.shape)

    width = attention.kv_heads * head_dim
    for values in (attention.qkv_proj.weight, attention.qkv_proj.bias):
        if values is not None:
            values.data[..., -width:] = heads(values.data[..., -width:])
    attention.o_proj.weight.data = heads(attention.o_proj.weight.data.t()).t().contiguous()


def rotate_channels(block: Block, inputs: InputRounding) -> None:
    """Have down_proj read its channels turned in groups, in place: `FeedForward.hidden` turns them from now on."""
    output = block.mlp.down_proj
    output.weight.data = inputs.turned(output.weight.data.t()).t().contiguous()
    output.inputs = inputs


def rotate_head(norm: Tensor, head: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The final norm's weight [hidden] and the LM head [hidden, vocab] for the rotated stream."""
    return torch.ones_like(norm), rotation.rows(norm[:, None] * head)


def _rotate_outputs(projection: Projection, rotation: Rotation) -> None:
    projection.weight.data = rotation.columns(projection.weight.data)
    if projection.bias is not None:
        projection.bias.data = rotation.columns(projection.bias.data)


def _cosine(size: int) -> Tensor:
    """The orthonormal DCT-II matrix."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
