"""A pruned model as data: what was kept of every layer, and the sliced tensors, really smaller.

Units are cut where they are produced and consumed: a KV group is rows of q, k and v and columns of o; an FFN channel is
a row of gate and up and a column of down. Removing either leaves the hidden size, the rotary tables and a tied
embedding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eopc_compiler.config import LayerDims, LlamaConfig, layer_tensor_shapes
from eopc_compiler.model import Llama, build_model

GetTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """What is kept of one source layer: original indices, ascending; an empty tuple leaves the sub-block out."""

    source_layer: int
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """A sliced model: layers renumbered from 0, per-layer widths, Hugging Face tensor names, fp32."""

    config: LlamaConfig
    tensors: dict[str, Tensor]
    kept: tuple[KeptLayer, ...]

    def build(self, context: int = 2048) -> Llama:
        """The eager model, sharing the tensors."""
        return build_model(self.config, self.tensors, context)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a pruning method decides: the kept units, and tensors that replace sliced ones (see `slice_model`)."""

    kept: tuple[KeptLayer, ...]
    changed: Mapping[str, Tensor] = field(default_factory=dict)


def keep_all(config: LlamaConfig) -> tuple[KeptLayer, ...]:
    """Everything a dense model has."""
    return tuple(
        KeptLayer(d.source_layer, tuple(range(d.num_key_value_heads)), tuple(range(d.intermediate_size)))
        for d in config.layers
    )


def pruned_config(config: LlamaConfig, kept: Sequence[KeptLayer], biased: bool = False) -> LlamaConfig:
    """The config of the sliced model; `biased` where o_proj and down_proj carry compensation."""
    layers = tuple(LayerDims(i, len(k.kv_groups), len(k.ffn_channels)) for i, k in enumerate(kept))
    return replace(
        config,
        layers=layers,
        attention_out_bias=config.attention_out_bias or biased,
        mlp_out_bias=config.mlp_out_bias or biased,
    )


def slice_model(
    config: LlamaConfig,
    get: GetTensor,
    kept: Sequence[KeptLayer],
    changed: Mapping[str, Tensor] | None = None,
) -> PrunedModel:
    """Cut a checkpoint down to what is kept.

    Args:
        config: of the dense model.
        get: dense tensors by Hugging Face name.
        kept: layers in order.
        changed: tensors that replace sliced ones, already in sliced shape, by the *source* layer's name: repaired
            `o_proj.weight` or `down_proj.weight`, and their `.bias`. Where any bias is given, every o_proj and
            down_proj gets one, of zeros where there was none.
    """
    changed = changed or {}
    biased = any(name.endswith(".bias") for name in changed)
    small = pruned_config(config, kept, biased)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    tensors = {n: get(n) for n in (names if config.tie_word_embeddings else [*names, "lm_head.weight"])}
    for dims, layer in zip(small.layers, kept, strict=True):
        old, new = f"model.layers.{layer.source_layer}.", f"model.layers.{dims.source_layer}."
        present = layer_tensor_shapes(config, config.layers[layer.source_layer])
        for name, shape in layer_tensor_shapes(small, dims).items():
            source = old + name.removeprefix(new)
            if source in changed:
                value = changed[source]
            elif source in present:
                value = slice_tensor(config, source, get(source), layer)
            else:
                value = torch.zeros(shape)
            assert value.shape == shape, f"{source}: {tuple(value.shape)}, expected {shape}"
            tensors[name] = value
    return PrunedModel(small, tensors, tuple(kept))


def slice_tensor(config: LlamaConfig, name: str, tensor: Tensor, layer: KeptLayer) -> Tensor:
    """The kept rows or columns of one layer tensor, by Hugging Face name."""
    head, width = config.head_dim, config.query_group_size * config.head_dim
    if "q_proj" in name:
        return tensor[unit_columns(layer.kv_groups, width)]
    if "k_proj" in name or "v_proj" in name:
        return tensor[unit_columns(layer.kv_groups, head)]
    if "gate_proj" in name or "up_proj" in name:
        return tensor[list(layer.ffn_channels)]
    if "o_proj.weight" in name:
        return tensor[:, unit_columns(layer.kv_groups, width)]
    if "down_proj.weight" in name:
        return tensor[:, list(layer.ffn_channels)]
    return tensor


def unit_columns(units: Sequence[int], width: int) -> Tensor:
    """Indices of the `width` neighbouring elements of every unit, in the order given."""
    return (torch.tensor(list(units), dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()
