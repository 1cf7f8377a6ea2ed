"""A pruned model as a Hugging Face folder: config.json, model.safetensors, tokenizer, and mask.json with what was kept.

Widths that differ between layers are written as lists (`num_attention_heads`, `num_key_value_heads`,
`intermediate_size`), which `open_checkpoint` reads and stock transformers refuses. The same width everywhere gives
plain numbers, and a checkpoint that stock `from_pretrained` loads.

Stock LLaMA configs have one flag for the biases of q, k, v and o, and one for gate, up and down. A compensation on
o_proj and down_proj therefore sets both and brings zeros for the others. Mistral and Qwen2 have no such flags; with
full attention both compute what LLaMA computes, so a compensated model of theirs is written as `llama`, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eopc_compiler.config import LlamaConfig, RopeScaling, tensor_shapes
from eopc_compiler.ladder import MASK_SCHEMA
from eopc_compiler.pruned import KeptLayer, PrunedModel
from eopc_runtime.errors import ModelError

MASK_FILE = "mask.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def is_stock(config: LlamaConfig) -> bool:
    """Whether stock transformers loads it: layers alike, none without a sub-block, query heads that divide hidden."""
    widths = {(d.num_key_value_heads, d.intermediate_size) for d in config.layers}
    if len(widths) != 1 or 0 in next(iter(widths)):
        return False
    return config.hidden_size % config.num_attention_heads(0) == 0


def expressible(pruned: PrunedModel) -> PrunedModel:
    """The same model as a stock config can describe it: zero biases added, model type llama where it must be."""
    old = pruned.config
    if not (old.attention_out_bias or old.mlp_out_bias):
        return pruned
    attention, mlp = old.attention_bias or old.attention_out_bias, old.mlp_bias or old.mlp_out_bias
    config = replace(
        old,
        model_type="llama",
        attention_bias=attention,
        attention_out_bias=attention,
        mlp_bias=mlp,
        mlp_out_bias=mlp,
    )
    missing = [(n, s) for n, s in tensor_shapes(config).items() if n not in pruned.tensors]
    assert all(name.endswith(".bias") for name, _ in missing), missing
    return replace(pruned, config=config, tensors={**pruned.tensors, **{n: torch.zeros(s) for n, s in missing}})


def write_checkpoint(pruned: PrunedModel, folder: Path, dtype: str = "float32") -> None:
    """Write config.json, model.safetensors and mask.json of an expressible model into an existing folder.

    Raises:
        ModelError: a value is not finite in `dtype`.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name in tensor_shapes(pruned.config):
        tensors[name] = pruned.tensors[name].to(DTYPES[dtype]).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise ModelError(f"{name} holds values that {dtype} cannot represent. Write --dtype float32 or bfloat16.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {**config_json(pruned.config, dtype), "eopc_pruned": True}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    mode = (folder / "config.json").stat().st_mode  # safetensors writes files that only their owner may read
    (folder / "model.safetensors").chmod(mode & 0o777)
    (folder / MASK_FILE).write_text(json.dumps(mask_json(pruned.kept)), encoding="utf-8")


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of an expressible config: lists where layers differ, with 0 for a sub-block that is left out."""
    content: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "head_dim": config.head_dim,  # explicit: hidden_size / heads is wrong once heads are gone
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": _one_or_list([config.num_attention_heads(i) for i in range(len(config.layers))]),
        "num_key_value_heads": _one_or_list([d.num_key_value_heads for d in config.layers]),
        "intermediate_size": _one_or_list([d.intermediate_size for d in config.layers]),
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,  # top level: older loaders look nowhere else, newer ones still do
        "rope_scaling": None if config.rope_scaling is None else _rope_json(config.rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids) if config.eos_token_ids else None,
        "torch_dtype": dtype,
    }
    if config.model_type == "llama":
        content |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:  # full attention was a condition of opening the model; the default of these classes is a window
        content |= {"sliding_window": None} | ({"use_sliding_window": False} if config.model_type == "qwen2" else {})
    return content


def mask_json(kept: Sequence[KeptLayer]) -> dict[str, Any]:
    """What was kept, by source layer, original indices: the form that `eopc build --mask` reads."""
    return {
        "schema": MASK_SCHEMA,
        "layers": [
            {"source_layer": k.source_layer, "kv_groups": list(k.kv_groups), "ffn_channels": list(k.ffn_channels)}
            for k in kept
        ],
    }


def _rope_json(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.rope_type,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _one_or_list(values: Sequence[int]) -> int | list[int]:
    """One number where all agree on a positive one, else the list."""
    return values[0] if len(set(values)) == 1 and values[0] else list(values)
