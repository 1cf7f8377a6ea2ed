"""Whole sequences through eager blocks, without a cache to keep: what calibration, search and recovery run on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.model import Block, Llama, Projection, Rotary

LOSS_ROWS = 256  # positions whose logits are held at a time
LOSS_TOKENS = 1024  # per forward pass, where only the loss is wanted

Past = tuple[Tensor, Tensor]  # keys and values [n, kv_heads, P, head_dim] of positions 0..P-1


def run_layer(model: Llama, layer: Block, x: Tensor, past: Past | None = None) -> Tensor:
    """One block over whole sequences x [n, S, hidden], causal; behind `past`, or from position 0."""
    return run_ffn(layer, run_attention(model, layer, x, past))


def run_attention(model: Llama, layer: Block, x: Tensor, past: Past | None = None) -> Tensor:
    """x [n, S, hidden] with the block's attention added, if it has one."""
    if not layer.self_attn.kv_heads:
        return x
    added: Tensor = layer.self_attn.o_proj(attend(model, layer, layer.input_layernorm(x), past))
    return x + added


def run_ffn(layer: Block, x: Tensor) -> Tensor:
    """x [n, S, hidden] with the block's FFN added, if it has one."""
    return x + layer.mlp(layer.post_attention_layernorm(x)) if layer.mlp.width else x


def attend(model: Llama, layer: Block, normed: Tensor, past: Past | None = None) -> Tensor:
    """What o_proj of a block reads: attention outputs [n, S, q_heads * head_dim] of normed inputs [n, S, hidden]."""
    batch, length, _ = normed.shape
    attention = layer.self_attn
    start = past[0].shape[2] if past else 0
    q, k, v, scale = attention.project(normed, _rotary(model, batch, start, length))
    if past:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    group = attention.q_heads // attention.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = torch.ones(length, start + length, dtype=torch.bool).tril(start) if past else None
    out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=not past, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, -1)


def attention_received(model: Llama, layer: Block, x: Tensor, observers: int) -> Tensor:
    """Mean attention [n, S] that the last `observers` positions of x [n, S, hidden] give to every position."""
    batch, length, _ = x.shape
    attention, last = layer.self_attn, min(observers, length)
    q, k, _, scale = attention.project(layer.input_layernorm(x), _rotary(model, batch, 0, length))
    k = k.repeat_interleave(attention.q_heads // attention.kv_heads, 1)
    scores = torch.matmul(q[:, :, length - last :], k.transpose(2, 3)) * scale
    hidden = torch.ones(last, length, dtype=torch.bool).triu(length - last + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2))


def keys_and_values(model: Llama, layer: Block, x: Tensor, start: int = 0) -> Past:
    """What a block puts into the cache for inputs x [n, S, hidden] at positions start..start+S-1; S may be 0."""
    batch, length, _ = x.shape
    if not length:
        return (x.new_zeros(batch, layer.self_attn.kv_heads, 0, layer.self_attn.head_dim),) * 2
    _, k, v, _ = layer.self_attn.project(layer.input_layernorm(x), _rotary(model, batch, start, length))
    return k.contiguous(), v.contiguous()  # not views that would keep the queries too


def _rotary(model: Llama, batch: int, start: int, length: int) -> Rotary:
    positions = torch.arange(start, start + length)[None].expand(batch, -1)
    return Rotary(model.get_buffer("cos"), model.get_buffer("sin"), positions)


def run_blocks(model: Llama, tokens: Tensor) -> Tensor:
    """Hidden states [n, S, hidden] behind the last block for token ids [n, S]."""
    x: Tensor = model.model.embed_tokens(tokens)
    for layer in model.blocks:
        x = run_layer(model, layer, x)
    return x


def next_token_losses(model: Llama, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy [n, S-1] in nats of every next token, from the last block's hidden states [n, S, hidden]."""
    rows = model.model.norm(hidden[:, :-1]).flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    parts = [
        F.cross_entropy(model.lm_head(rows[i : i + LOSS_ROWS]).float(), targets[i : i + LOSS_ROWS], reduction="none")
        for i in range(0, len(rows), LOSS_ROWS)
    ]
    return torch.cat(parts).view(tokens.shape[0], -1)


@torch.no_grad()
def mean_loss(model: Llama, windows: Tensor, report: Callable[[int, int], None] | None = None) -> float:
    """Mean next-token loss in nats over token windows [n, S], n >= 1, each on its own; summed in fp64.

    Args:
        report: called with (done, total) windows.
    """
    total, done = 0.0, 0
    for tokens in torch.split(windows, max(1, LOSS_TOKENS // windows.shape[1])):
        total += float(next_token_losses(model, run_blocks(model, tokens), tokens).double().sum())
        done += len(tokens)
        if report:
            report(done, len(windows))
    return total / windows[:, 1:].numel()


def cosine_sum(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of the cosine between hidden states [n, S, hidden]; fp64.

    Block influence of a layer (ShortGPT, arXiv 2403.03853) is 1 - E[cos(h_l, h_(l+1))].
    """
    return float(F.cosine_similarity(before.float(), after.float(), dim=-1).double().sum())


def attention_inputs(model: Llama, layer: Block, x: Tensor) -> Tensor:
    """What o_proj of a block reads for hidden states x [n, S, hidden], in fp32, for statistics (`fast_math`)."""
    with fast_math():
        return attend(model, layer, layer.input_layernorm(x)).float()


def ffn_inputs(layer: Block, x: Tensor) -> Tensor:
    """What down_proj of a block reads for hidden states x [n, S, hidden], in fp32, for statistics (`fast_math`)."""
    with fast_math():
        return layer.mlp.hidden(layer.post_attention_layernorm(x)).float()


def add_attention(model: Llama, layer: Block, x: Tensor, past: Past | None = None) -> Tensor:
    """`run_attention` in `fast_math`."""
    with fast_math():
        return run_attention(model, layer, x, past)


def add_output(x: Tensor, output: Projection, inputs: Tensor) -> Tensor:
    """The residual stream x [n, S, hidden] with an output map of these inputs added (`fast_math`)."""
    with fast_math():
        added: Tensor = output(inputs)
    return x + added.float()


def fast_math() -> AbstractContextManager[None]:
    """Products in bfloat16 where the processor multiplies it natively, sums and the residual stream in fp32.

    For statistics and searches, which bear rounding of 2^-9; never for a figure that is published.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16())


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
