"""Whole sequences through eager blocks, without a cache to keep: what calibration, search and recovery run on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.model import Block, Llama, Rotary

LOSS_ROWS = 1024  # positions whose logits are held at a time


def run_layer(model: Llama, layer: Block, x: Tensor) -> Tensor:
    """One block over whole sequences x [n, S, hidden], causal, from position 0."""
    return run_ffn(layer, run_attention(model, layer, x))


def run_attention(model: Llama, layer: Block, x: Tensor) -> Tensor:
    """x [n, S, hidden] with the block's attention added, if it has one."""
    attention = layer.self_attn
    if not attention.kv_heads:
        return x
    return x + attention.o_proj(attend(model, layer, layer.input_layernorm(x)))  # type: ignore[no-any-return]


def run_ffn(layer: Block, x: Tensor) -> Tensor:
    """x [n, S, hidden] with the block's FFN added, if it has one."""
    return x + layer.mlp(layer.post_attention_layernorm(x)) if layer.mlp.width else x


def attend(model: Llama, layer: Block, normed: Tensor) -> Tensor:
    """What o_proj of a block reads: attention outputs [n, S, q_heads * head_dim] of normed inputs [n, S, hidden]."""
    batch, length, _ = normed.shape
    attention = layer.self_attn
    positions = torch.arange(length)[None].expand(batch, -1)
    rotary = Rotary(model.get_buffer("cos"), model.get_buffer("sin"), positions)
    q, k, v, scale = attention.project(normed, rotary)
    group = attention.q_heads // attention.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, -1)


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
