"""A Hugging Face ``config.json`` normalised once into frozen fields that later code can rely on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eopc_runtime.errors import ModelError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
_SUPPORTED_TEXT = (
    "Supported are dense LLaMA-family checkpoints: llama (LLaMA 2/3, TinyLlama, SmolLM2), "
    "mistral without a sliding window, and qwen2"
)

# What transformers assumes for a key that config.json leaves out; it differs between the three classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 32},
}
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class LayerDims:
    """The widths of one decoder layer; `source_layer` is its index in the original checkpoint."""

    source_layer: int
    num_key_value_heads: int  # 0: the layer has no attention
    intermediate_size: int  # 0: the layer has no FFN
    compensated: bool = False  # down_proj has a bias that makes up for what was removed


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of rotary frequencies: `rope_type` is "linear" (factor only) or "llama3" (all fields)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Everything that fixes the shapes and the arithmetic of a supported decoder."""

    model_type: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    query_group_size: int  # query heads per KV head, the same in every layer
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # q, k and v
    attention_out_bias: bool  # o
    mlp_bias: bool  # gate and up
    mlp_out_bias: bool  # down
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerDims, ...]

    @property
    def num_hidden_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    def num_attention_heads(self, layer: int) -> int:
        """Query heads of the layer at this position (not its source index)."""
        return self.layers[layer].num_key_value_heads * self.query_group_size

    @property
    def param_count(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in tensor_shapes(self).values())

    @property
    def block_param_count(self) -> int:
        """Parameters inside the decoder layers, without embedding, head and final norm."""
        return sum(math.prod(shape) for layer in self.layers for shape in layer_tensor_shapes(self, layer).values())


def layer_tensor_shapes(config: LlamaConfig, layer: LayerDims) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of one layer, biases included where the model has them."""
    hidden, ffn = config.hidden_size, layer.intermediate_size
    kv = layer.num_key_value_heads * config.head_dim
    q = kv * config.query_group_size
    # name: (weight shape [out, in], has bias)
    linear = {
        "self_attn.q_proj": ((q, hidden), config.attention_bias),
        "self_attn.k_proj": ((kv, hidden), config.attention_bias),
        "self_attn.v_proj": ((kv, hidden), config.attention_bias),
        "self_attn.o_proj": ((hidden, q), config.attention_out_bias),
        "mlp.gate_proj": ((ffn, hidden), config.mlp_bias),
        "mlp.up_proj": ((ffn, hidden), config.mlp_bias),
        "mlp.down_proj": ((hidden, ffn), config.mlp_out_bias or layer.compensated),
    }
    prefix = f"model.layers.{layer.source_layer}."
    shapes: dict[str, tuple[int, ...]] = {prefix + "input_layernorm.weight": (hidden,)}
    for name, (shape, bias) in linear.items():
        shapes[f"{prefix}{name}.weight"] = shape
        if bias:
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    return shapes


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of all tensors, in model order; a tied head is not listed."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in config.layers:
        shapes.update(layer_tensor_shapes(config, layer))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def normalize_config(raw: Mapping[str, Any]) -> LlamaConfig:
    """Turn a config.json (old or new layout) into a `LlamaConfig`, or refuse it by name.

    `num_key_value_heads`, `num_attention_heads` and `intermediate_size` may be lists with one entry
    per layer. Raises ModelError for every architecture or option that would be computed wrongly.
    """
    model_type = raw.get("model_type")
    _refuse_unsupported(raw, model_type)
    assert isinstance(model_type, str)
    defaults = _DEFAULTS[model_type]

    depth = _positive_int(raw, "num_hidden_layers")
    hidden_size = _positive_int(raw, "hidden_size")
    q_heads = _per_layer(raw, "num_attention_heads", depth)
    if raw.get("num_key_value_heads", defaults.get("num_key_value_heads")) is None:
        kv_heads = q_heads  # plain multi-head attention
    else:
        kv_heads = _per_layer({**defaults, **raw}, "num_key_value_heads", depth)
    pairs = [(q, kv) for q, kv in zip(q_heads, kv_heads, strict=True) if q or kv]  # a layer may have no attention
    groups = {q // kv if kv and q % kv == 0 else 0 for q, kv in pairs}
    if len(groups) != 1 or 0 in groups:
        raise ModelError(
            f"num_attention_heads {_short(q_heads)} must be the same multiple of num_key_value_heads "
            f"{_short(kv_heads)} in every layer; fix config.json."
        )
    ffn = _per_layer(raw, "intermediate_size", depth)
    max_positions = _positive_int(raw, "max_position_embeddings", defaults["max_position_embeddings"])
    _refuse_sliding_window(raw, model_type, max_positions, defaults["sliding_window"])
    rope_theta, rope_scaling = _rope(raw)
    llama = model_type == "llama"  # the only class whose biases config.json decides
    return LlamaConfig(
        model_type=model_type,
        vocab_size=_positive_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        head_dim=_head_dim(raw, hidden_size, q_heads),
        query_group_size=groups.pop(),
        rms_norm_eps=_positive_float(raw, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=model_type == "qwen2" or (llama and bool(raw.get("attention_bias", False))),
        attention_out_bias=llama and bool(raw.get("attention_bias", False)),
        mlp_bias=llama and bool(raw.get("mlp_bias", False)),
        mlp_out_bias=llama and bool(raw.get("mlp_bias", False)),
        bos_token_id=_token_ids(raw, "bos_token_id")[0] if _token_ids(raw, "bos_token_id") else None,
        eos_token_ids=_token_ids(raw, "eos_token_id"),
        layers=tuple(LayerDims(i, kv_heads[i], ffn[i]) for i in range(depth)),
    )


def _refuse_unsupported(raw: Mapping[str, Any], model_type: object) -> None:
    """Raise ModelError for a model that this compiler would compute wrongly."""
    if not isinstance(model_type, str):
        raise ModelError(
            f"config.json has no model_type, so the architecture is unknown. {_SUPPORTED_TEXT}; add "
            'the key, for example "model_type": "llama".'
        )
    experts = next((key for key in _EXPERT_KEYS if (raw.get(key) or 0) > 1), None)
    if experts:
        raise ModelError(
            f"{model_type!r} is a mixture of experts ({experts} = {raw[experts]}). {_SUPPORTED_TEXT}; "
            "use the dense model of that family."
        )
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(f"Model type {model_type!r} is not supported. {_SUPPORTED_TEXT}; choose one of those.")
    architectures = raw.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"{architectures[0]} has no language-model head. eopc compiles ...ForCausalLM checkpoints; "
            "use the generative checkpoint of this model."
        )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelError(
            f"The checkpoint is already quantised ({method}). eopc quantises by itself and needs float "
            "weights; give the original checkpoint, or a .gguf."
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"hidden_act {activation!r} is not supported. eopc computes silu-gated feed-forward layers; "
            "use a checkpoint with hidden_act silu."
        )
    if (raw.get("pretraining_tp") or 1) > 1:
        raise ModelError(
            f"pretraining_tp = {raw['pretraining_tp']} asks for a split computation that is not supported. "
            "Set pretraining_tp to 1 in config.json; the result is the same up to rounding."
        )


def _refuse_sliding_window(raw: Mapping[str, Any], model_type: str, max_positions: int, default: int | None) -> None:
    """Raise ModelError where some layer would not see the whole context."""
    window = raw.get("sliding_window", default)
    if model_type == "qwen2" and not raw.get("use_sliding_window", False):
        window = None  # qwen2 keeps a number here that it does not use
    local = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if model_type == "llama":
        window = raw.get("sliding_window") if local else None
    if (window is not None and window < max_positions) or (local and window is None):
        raise ModelError(
            f"This {model_type} checkpoint uses sliding-window attention (window {window} of {max_positions} "
            "positions). eopc needs full attention in every layer; lower max_position_embeddings to the "
            "window in config.json, or choose a model without one."
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read rope_theta and the scaling from rope_parameters (new layout) or the top level (old layout)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise ModelError("Rope settings that differ between layers are not supported; choose another model.")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"partial_rotary_factor {partial} is not supported: rope must turn the whole head. Choose another model."
        )
    merged = {"rope_theta": raw.get("rope_theta"), **{k: v for k, v in scaling.items() if v is not None}}
    theta = _positive_float(merged, "rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _positive_float(scaling, "factor"))
    if kind != "llama3":
        raise ModelError(
            f"Rope scaling {kind!r} is not supported. Supported are default, linear and llama3; use the "
            "checkpoint before its context was extended, or remove rope_scaling from config.json."
        )
    low, high = _positive_float(scaling, "low_freq_factor"), _positive_float(scaling, "high_freq_factor")
    if high <= low:
        raise ModelError(f"high_freq_factor {high} must be above low_freq_factor {low}; fix rope_scaling.")
    original = _positive_int(scaling, "original_max_position_embeddings")
    return theta, RopeScaling("llama3", _positive_float(scaling, "factor"), low, high, original)


def _head_dim(raw: Mapping[str, Any], hidden_size: int, q_heads: Sequence[int]) -> int:
    """head_dim as given, or hidden_size / num_attention_heads where it is left out."""
    if raw.get("head_dim") is not None:
        head_dim = _positive_int(raw, "head_dim")
    else:
        if len(set(q_heads)) != 1 or hidden_size % q_heads[0]:
            raise ModelError(
                f"head_dim is not given and hidden_size {hidden_size} is no multiple of num_attention_heads "
                f"{_short(q_heads)}; add head_dim to config.json."
            )
        head_dim = hidden_size // q_heads[0]
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd, but rope turns pairs; fix head_dim in config.json.")
    return head_dim


def _positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The integer at `key`, or ModelError naming the key."""
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive integer, found {value!r}; fix that key.")
    return value


def _positive_float(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite positive number at `key`, or ModelError naming the key."""
    value = raw.get(key)
    value = default if value is None else value
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    if not math.isfinite(number) or number <= 0:
        raise ModelError(f"config.json: {key} must be a positive number, found {value!r}; fix that key.")
    return number


def _per_layer(raw: Mapping[str, Any], key: str, depth: int) -> list[int]:
    """One width per layer from a single number, or from a list of `depth` numbers in which 0 means left out."""
    value = raw.get(key)
    if not isinstance(value, list | tuple):
        return [_positive_int(raw, key)] * depth
    if len(value) != depth:
        raise ModelError(f"config.json: {key} lists {len(value)} layers, num_hidden_layers is {depth}; fix one.")
    return [0 if item == 0 and item is not False else _positive_int({key: item}, key) for item in value]


def _token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids given as null, a number or a list; order kept, repeats dropped."""
    value = raw.get(key)
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        raise ModelError(f"config.json: {key} must be a token id or a list of them, found {value!r}.")
    return tuple(dict.fromkeys(values))


def _short(values: Sequence[int]) -> str:
    """One number where all layers agree, else the list."""
    return str(values[0]) if len(set(values)) == 1 else str(list(values))
