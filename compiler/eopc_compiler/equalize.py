"""Move the difficulty of quantisation from activations into weights, without changing what a layer computes.

Kernels for int8 weights quantise activations to 8 bits as well, one scale per block of channels; one outlier channel
then costs its whole block its precision. SmoothQuant (Xiao et al., arXiv 2211.10438) divides each input channel by
s_j = peak(x_j)^a / peak(w_j)^(1 - a) and multiplies the matching weight row by it. The division is free: it goes into
what produces the channel, the up projection or the value projection. Inputs that come from a norm are evened out by
rotation instead (rotate.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import InputPeaks
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.model import Block

MIGRATION = 0.5  # a in the formula above; the paper's default


def smoothing(peaks: Tensor, weight: Tensor) -> Tensor:
    """The factors s [in] for a matrix [in, out], normalised to geometric mean 1; dead channels keep 1."""
    rows = weight.abs().amax(1)
    alive = (peaks > 0) & (rows > 0)
    raw = torch.where(alive, peaks.clamp_min(1e-6) ** MIGRATION / rows.clamp_min(1e-6) ** (1 - MIGRATION), 1.0)
    return raw / raw[alive].log().mean().exp() if alive.any() else torch.ones_like(raw)


def equalize_layer(block: Block, peaks: InputPeaks, order: UnitOrder, config: LlamaConfig) -> None:
    """Equalise a deployment-form layer in place; `peaks` are in original unit order, the layer in sorted order."""
    attention, mlp = block.self_attn, block.mlp
    assert attention.qkv_proj is not None, "equalisation needs deployment form"

    # up feeds down channel by channel: silu(gate) * up / s
    s = smoothing(peaks.down[torch.tensor(order.ffn_channels)], mlp.down_proj.weight.data)
    _divide_columns(mlp.up_proj.weight.data, mlp.up_proj.bias, slice(None), s)
    mlp.down_proj.weight.data *= s[:, None]

    # a value channel feeds the same channel of every query head of its group: they share one factor
    shape = (len(order.kv_groups), config.query_group_size, config.head_dim)
    peak = peaks.o.view(shape)[torch.tensor(order.kv_groups)].amax(1).flatten()  # [kv_heads * head_dim]
    rows = attention.o_proj.weight.data.abs().amax(1).view(shape).amax(1).flatten()
    s = smoothing(peak, rows[:, None])
    first_value = attention.qkv_proj.weight.shape[1] - len(s)
    _divide_columns(attention.qkv_proj.weight.data, attention.qkv_proj.bias, slice(first_value, None), s)
    spread = s.view(shape[0], 1, shape[2]).expand(shape).flatten()
    attention.o_proj.weight.data *= spread[:, None]


def _divide_columns(weight: Tensor, bias: nn.Parameter | None, columns: slice, s: Tensor) -> None:
    weight[:, columns] /= s
    if bias is not None:
        bias.data[columns] /= s
