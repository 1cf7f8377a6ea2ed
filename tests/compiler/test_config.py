"""normalize_config: what is read, what is assumed, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from eopc_compiler.config import LayerDims, RopeScaling, normalize_config, tensor_shapes
from eopc_runtime.errors import ModelError


def raw_config(**changes: Any) -> dict[str, Any]:
    """A small valid llama config.json with the given keys changed; a value of `...` removes the key."""
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    raw.update(changes)
    return {key: value for key, value in raw.items() if value is not ...}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_plain_llama_fields_are_read() -> None:
    """Every field of a plain config arrives, and widths are per layer."""
    config = normalize_config(raw_config())
    assert config.layers == (LayerDims(0, 2, 40), LayerDims(1, 2, 40))
    assert (config.head_dim, config.query_group_size, config.num_attention_heads(1)) == (4, 3, 6)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.rope_scaling is None and config.tie_word_embeddings
    assert not (config.attention_bias or config.attention_out_bias or config.mlp_bias)


def test_explicit_head_dim_wins_over_the_quotient() -> None:
    """head_dim need not be hidden_size / heads."""
    config = normalize_config(raw_config(head_dim=16))
    assert config.head_dim == 16
    assert tensor_shapes(config)["model.layers.0.self_attn.o_proj.weight"] == (24, 96)


def test_missing_kv_heads_mean_plain_attention() -> None:
    """LLaMA 2 leaves num_key_value_heads out or null: as many as query heads."""
    for value in (..., None):
        assert normalize_config(raw_config(num_key_value_heads=value)).query_group_size == 1


def test_per_layer_lists_are_accepted() -> None:
    """Pruned checkpoints give one width per layer."""
    config = normalize_config(
        raw_config(num_attention_heads=[6, 3], num_key_value_heads=[2, 1], intermediate_size=[40, 8], head_dim=4)
    )
    assert config.layers == (LayerDims(0, 2, 40), LayerDims(1, 1, 8))
    assert config.num_attention_heads(1) == 3


def test_rope_theta_is_found_in_both_layouts() -> None:
    """Top level in old files, inside rope_parameters in new ones; 10000 where it is left out."""
    new = raw_config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert normalize_config(new).rope_theta == 5e5
    assert normalize_config(raw_config(rope_theta=5e5)).rope_theta == 5e5
    assert normalize_config(raw_config(rope_theta=...)).rope_theta == 10000.0


@pytest.mark.parametrize("layout", ["old", "new"])
def test_llama3_rope_scaling_is_read_in_both_layouts(layout: str) -> None:
    """rope_scaling (old) and rope_parameters (new) give the same scaling and theta."""
    if layout == "old":
        raw = raw_config(rope_theta=5e5, rope_scaling=LLAMA3)
    else:
        raw = raw_config(rope_theta=..., rope_parameters={**LLAMA3, "rope_theta": 5e5})
    config = normalize_config(raw)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_linear_scaling_accepts_the_old_key_type() -> None:
    """Older files say "type" instead of "rope_type"."""
    config = normalize_config(raw_config(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_biases_follow_the_model_type() -> None:
    """qwen2 always has q, k, v biases; llama has all four or none; mistral ignores the key."""
    qwen = normalize_config(raw_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"], sliding_window=8))
    assert (qwen.attention_bias, qwen.attention_out_bias, qwen.mlp_bias) == (True, False, False)
    llama = normalize_config(raw_config(attention_bias=True, mlp_bias=True))
    assert (llama.attention_bias, llama.attention_out_bias, llama.mlp_bias) == (True, True, True)
    mistral = normalize_config(raw_config(model_type="mistral", sliding_window=None, attention_bias=True))
    assert not mistral.attention_bias


def test_params_count_a_tied_embedding_once() -> None:
    """The count equals the sum written out by hand, and untying adds one more table."""
    block = 24 * (24 + 8 + 8 + 24) + 3 * 24 * 40 + 2 * 24
    tied = normalize_config(raw_config())
    assert tied.block_param_count == 2 * block
    assert tied.param_count == 100 * 24 + 2 * block + 24
    untied = normalize_config(raw_config(tie_word_embeddings=False))
    assert untied.param_count - tied.param_count == 100 * 24
    assert sum(math.prod(s) for s in tensor_shapes(untied).values()) == untied.param_count


def test_several_stop_tokens_are_kept_in_order() -> None:
    """LLaMA 3 lists its stop tokens; repeats are dropped."""
    assert normalize_config(raw_config(eos_token_id=[7, 3, 7])).eos_token_ids == (7, 3)
    assert normalize_config(raw_config(eos_token_id=None, bos_token_id=None)).eos_token_ids == ()


def test_a_mistral_window_as_wide_as_the_context_is_accepted() -> None:
    """A window that never bites is full attention."""
    assert normalize_config(raw_config(model_type="mistral", sliding_window=64)).model_type == "mistral"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' is not supported"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": ...}, "no model_type"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 4}, "mixture of experts"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 32}, "window 32"),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "window 4096"),  # the class default
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "window 16"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"num_attention_heads": [6, 2], "num_key_value_heads": [2, 2], "head_dim": 4}, "multiple"),
        ({"intermediate_size": [40]}, "intermediate_size"),
        ({"hidden_size": 25}, "head_dim"),
        ({"head_dim": 5}, "odd"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    """Each refusal is a ModelError that names the culprit."""
    with pytest.raises(ModelError, match=said):
        normalize_config(raw_config(**changes))
