"""A tier as a view of the whole deployment-form model: what it keeps are prefixes, so nothing is copied but q/k/v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.ladder import Mask, tier_config
from eopc_compiler.model import Block, Llama, Projection


def tier_view(model: Llama, mask: Mask) -> Llama:
    """The eager model of a tier, sharing the tensors of `model`: whole, in deployment form, units sorted.

    Its modules are its own, so that a repaired matrix can be put in without touching `model`.
    """
    config = tier_config(model.config, mask)
    with torch.device("meta"):
        tier = Llama(config, context=1).fuse()
    tier.cos, tier.sin = model.get_buffer("cos"), model.get_buffer("sin")
    tier.model.embed_tokens.weight = model.model.embed_tokens.weight
    tier.model.norm.weight, tier.lm_head.weight = model.model.norm.weight, model.lm_head.weight
    by_source = {d.source_layer: block for d, block in zip(model.config.layers, model.blocks, strict=True)}
    for block, dims in zip(tier.blocks, config.layers, strict=True):
        _narrow(block, by_source[dims.source_layer], dims, config)
    return tier


def _narrow(block: Block, whole: Block, dims: LayerDims, config: LlamaConfig) -> None:
    groups = whole.self_attn.kv_heads
    columns = qkv_columns(config, groups, dims.num_key_value_heads)
    rows = dims.num_key_value_heads * config.query_group_size * config.head_dim
    width = dims.intermediate_size
    block.input_layernorm.weight = whole.input_layernorm.weight
    block.post_attention_layernorm.weight = whole.post_attention_layernorm.weight
    assert block.self_attn.qkv_proj is not None and whole.self_attn.qkv_proj is not None
    every = dims.num_key_value_heads == groups
    _share(block.self_attn.qkv_proj, whole.self_attn.qkv_proj, lambda t: t if every else t[..., columns])
    _share(block.self_attn.o_proj, whole.self_attn.o_proj, lambda t: t[:rows] if t.dim() == 2 else t)
    for name in ("gate_proj", "up_proj"):
        _share(block.mlp.get_submodule(name), whole.mlp.get_submodule(name), lambda t: t[..., :width])
    _share(block.mlp.down_proj, whole.mlp.down_proj, lambda t: t[:width] if t.dim() == 2 else t)


def qkv_columns(config: LlamaConfig, groups: int, kept: int) -> Tensor:
    """Columns of a merged q/k/v matrix of `groups` KV groups that belong to the first `kept`."""
    head, start, parts = config.head_dim, 0, list[Tensor]()
    for width in (config.query_group_size * head, head, head):
        parts.append(torch.arange(start, start + kept * width))
        start += groups * width
    return torch.cat(parts)


def _share(mine: nn.Module, whole: nn.Module, cut: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(mine, Projection) and isinstance(whole, Projection)
    mine.transposed = True
    mine.reads_as(whole)
    mine.weight = nn.Parameter(cut(whole.weight.data), requires_grad=False)
    mine.bias = None if whole.bias is None else nn.Parameter(cut(whole.bias.data), requires_grad=False)
