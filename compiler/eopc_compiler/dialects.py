"""What differs between the ONNX dialects eopc writes, and the eager reference, behind one small interface.

* `EagerOps`: PyTorch, the reference for every parity check.
* `NativeOps`: opset 24. RMSNormalization, RotaryEmbedding, Attention with one output and an explicit mask,
  TensorScatter: one node each, fused kernels in ONNX Runtime and in TensorRT >= 10.15.
* `PrimitiveOps`: opset <= 20, plain operators only, for TensorRT 10.3 (JetPack 6) and the widest runtime support.

The rules behind the choices (one output, no past inputs, scatter straight to the output) are TensorRT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.config import LlamaConfig


class Ops(Protocol):
    """The operations that are spelled differently."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate halves of x [B, heads, S, head_dim] by the angles of position_ids [B, S]."""

    def write_cache(self, cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
        """Write new [B, heads, S, head_dim] into cache [B, heads, T, head_dim] from slot write_index[b] on."""

    def write_rows(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """x [1, S, hidden] with rows [1, k, hidden] in the places ids [k]."""

    def attention(self, q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        """softmax(scale q kᵀ + mask) v with grouped heads: [B, q_heads, S, head_dim]."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """A named set of operators with the opset its graphs declare."""

    name: str
    opset: int
    ops: Ops
    block_quantization: bool  # DequantizeLinear with block_size needs opset 21


def rotary_tables(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim / 2] of positions 0..length-1, with llama3 or linear rope scaling applied."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    inv_freq = config.rope_theta**-half
    s = config.rope_scaling
    if s is not None and s.rope_type == "linear":
        inv_freq = inv_freq / s.factor
    elif s is not None:  # llama3: long waves are stretched, short ones kept, a ramp between
        wavelength = 2 * math.pi / inv_freq
        ratio = s.original_max_position_embeddings / wavelength
        smooth = ((ratio - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        inv_freq = (1 - smooth) * inv_freq / s.factor + smooth * inv_freq
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inv_freq)
    return angles.cos().float(), angles.sin().float()


class EagerOps:
    """The PyTorch reference."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()  # squares of outlier activations overflow fp16
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        c = F.embedding(position_ids, cos).unsqueeze(1)  # [B, 1, S, head_dim / 2]
        s = F.embedding(position_ids, sin).unsqueeze(1)
        first, second = x.chunk(2, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    def write_cache(self, cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
        start = int(write_index[0])
        assert start + new.shape[2] <= cache.shape[2], "the cache is full"
        cache[:, :, start : start + new.shape[2]] = new  # in place: the caller owns the buffer
        return cache

    def write_rows(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        return x.index_copy(1, ids, rows)

    def attention(self, q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        return grouped_attention(q, key, value, mask, scale)


class PrimitiveOps:
    """Plain operators only."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scaled = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
        return scaled.to(x.dtype) * weight

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        return EagerOps.rotary(self, x, cos, sin, position_ids)  # type: ignore[arg-type]  # stateless

    def write_cache(self, cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
        heads, length = new.shape[1], new.shape[2]
        slots = write_index + torch.arange(length)  # [S]
        # ScatterND wants one (batch, head, slot) triple per written row
        head = torch.arange(heads)[:, None].expand(heads, length)
        index = torch.stack([torch.zeros_like(head), head, slots[None, :].expand(heads, length)], -1)
        return _symbolic("ScatterND", (cache, index[None], new), 18, cache)

    def write_rows(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        index = torch.stack([torch.zeros_like(ids), ids], -1)  # one (batch, token) pair per row
        return _symbolic("ScatterND", (x, index[None], rows), 18, x)

    def attention(self, q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        # TensorRT fuses this spelling, with one KV head per query head, and no other that was tried: neither groups as
        # a fifth dimension nor groups stacked as rows. On the CPU the expansion costs a copy of keys and values.
        batch, q_heads, _, dim = q.shape
        kv_heads, capacity = key.shape[1], key.shape[2]
        wide = (batch, kv_heads, q_heads // kv_heads, capacity, dim)
        keys = key.unsqueeze(2).expand(wide).reshape(batch, q_heads, capacity, dim)
        values = value.unsqueeze(2).expand(wide).reshape(batch, q_heads, capacity, dim)
        scores = torch.matmul(q, keys.transpose(2, 3))
        if scale != 1.0:
            scores = scores * scale
        return torch.matmul(torch.softmax(scores + mask, -1), values)


class NativeOps:
    """One standard operator each, opset 23 and 24."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _symbolic("RMSNormalization", (x, weight), 23, x, axis=-1, epsilon=eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        return _symbolic("RotaryEmbedding", (x, cos, sin, position_ids), 23, x)

    def write_cache(self, cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
        return _symbolic("TensorScatter", (cache, new, write_index), 24, cache, axis=-2)

    def write_rows(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        return PrimitiveOps.write_rows(self, x, rows, ids)  # type: ignore[arg-type]  # stateless

    def attention(self, q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        return _symbolic("Attention", (q, key, value, mask), 24, q, scale=scale)


def grouped_attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention with the query heads of a KV head stacked as rows, so that K and V are never expanded."""
    batch, q_heads, length, dim = q.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    rows = q.reshape(batch, kv_heads, -1, dim)  # [B, kv, group * S, head_dim]
    scores = torch.matmul(rows, key.transpose(2, 3))
    if scale != 1.0:
        scores = scores * scale
    scores = scores.view(batch, kv_heads, q_heads // kv_heads, length, capacity) + mask.unsqueeze(2)
    weights = torch.softmax(scores, -1).view(batch, kv_heads, -1, capacity)
    return torch.matmul(weights, value).view(batch, q_heads, length, dim)


def _symbolic(op: str, inputs: tuple[Tensor, ...], version: int, like: Tensor, **attrs: int | float) -> Tensor:
    """An ONNX operator by name, for export only: running it in PyTorch computes nothing."""
    shape = tuple(like.shape)
    return torch.onnx.ops.symbolic(op, inputs, attrs=dict(attrs), dtype=like.dtype, shape=shape, version=version)


DIALECTS = {
    "primitive": Dialect("primitive", 20, PrimitiveOps(), block_quantization=False),
    "native": Dialect("native", 24, NativeOps(), block_quantization=True),
}
