"""Reads a GGUF file without loading it: metadata, tensor table, and one dequantised tensor at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import MissingExtraError, ModelError

Float32 = npt.NDArray[np.float32]

# GGUF scalar type number -> struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_ARCHITECTURES = ("llama", "qwen2")  # llama.cpp files Mistral under "llama"
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SLICE_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies: `shape` in PyTorch order, `offset` and `num_bytes` in the file."""

    name: str
    shape: tuple[int, ...]
    quant_type: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensor table of one GGUF file, keyed by GGUF names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`, for example "llama"."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def read(self, name: str) -> Float32:
        """One tensor by its GGUF name, dequantised to fp32 in PyTorch order."""
        quants, entry = _quants(), self.tensors[name]
        quant_type = quants.GGMLQuantizationType(entry.quant_type)
        out = np.empty((math.prod(entry.shape[:-1]), entry.shape[-1]), np.float32)
        row_bytes = entry.num_bytes // len(out)
        # In slices, because dequantising needs several times the memory of its result.
        step = max(1, _SLICE_BYTES // (4 * entry.shape[-1]))
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            for first in range(0, len(out), step):
                rows = min(step, len(out) - first)
                data = np.fromfile(file, dtype=np.uint8, count=rows * row_bytes)
                if data.size != rows * row_bytes:
                    raise ModelError(f"{self.path} ended inside tensor {name}; get the file again.")
                out[first : first + rows] = quants.dequantize(data.reshape(rows, row_bytes), quant_type)
        return out.reshape(entry.shape)


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file and prove that every tensor lies inside the file.

    Raises ModelError for a bad magic, another version, a truncated file, or an unreadable quantisation.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file: it starts with {magic!r} where GGUF was expected. Get the file again."
            )
        try:
            version, tensor_count, kv_count = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise ModelError(f"{path} has GGUF version {version}; versions 2 and 3 are read. Convert it again.")
            metadata: dict[str, Any] = {}
            for _ in range(kv_count):
                key = _read_string(file, size)
                metadata[key] = _read_value(file, _read_scalar(file, "I"), size)
            table = [_read_tensor_info(file, size) for _ in range(tensor_count)]
        except (struct.error, UnicodeDecodeError, KeyError, EOFError) as error:
            raise ModelError(
                f"{path} is truncated or damaged: its header could not be read to the end ({size} bytes in "
                "the file). Get the file again."
            ) from error
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-file.tell() // alignment) * alignment
    tensors = {info[0]: _locate(path, info, start, size) for info in table}
    return GgufFile(path, metadata, tensors)


def gguf_config(gguf: GgufFile) -> dict[str, Any]:
    """The metadata of a LLaMA-like GGUF in the layout of a Hugging Face config.json.

    Raises ModelError for other architectures and for options that would be computed wrongly.
    """
    architecture, meta = gguf.architecture, gguf.metadata
    experts = meta.get(f"{architecture}.expert_count", 0)
    if architecture not in _ARCHITECTURES or experts:
        kind = f"{architecture} with {experts} experts" if experts else architecture
        raise ModelError(
            f"{gguf.path} holds a model of architecture {kind!r}. Supported GGUF architectures are dense "
            f"{' and '.join(_ARCHITECTURES)} (Mistral included); choose such a model."
        )
    if meta.get("split.count", 1) > 1:
        raise ModelError(
            f"{gguf.path} is one of {meta['split.count']} parts. Join them first: llama-gguf-split --merge."
        )

    def field(key: str, default: Any = None) -> Any:
        value = meta.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{gguf.path} has no metadata key {architecture}.{key}; convert the model again.")
        return value

    if "token_embd.weight" not in gguf.tensors:
        raise ModelError(f"{gguf.path} has no tensor token_embd.weight; convert the model again.")
    hidden, heads = field("embedding_length"), field("attention.head_count")
    first_heads = heads[0] if isinstance(heads, list) else heads
    head_dim = field("attention.key_length", hidden // max(first_heads, 1))
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{gguf.path} turns only a part of each head by rope, which is not supported.")
    eos = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "model_type": architecture,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "sliding_window": meta.get(f"{architecture}.attention.sliding_window"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, head_dim, field("rope.freq_base", 10000.0)),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [token for token in eos if token is not None],
    }


def hugging_face_name(gguf_name: str) -> str | None:
    """The checkpoint name of a GGUF tensor, or None for one that is no weight (rope factors)."""
    if gguf_name == _ROPE_FACTORS:
        return None
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk":
        stem = _LINEAR.get(parts[2]) or _NORM.get(parts[2])
        if stem:
            return f"model.layers.{parts[1]}.{stem}.{parts[3]}"
    return gguf_name  # unknown: kept, so that the caller can refuse it by name


def undo_rope_order(weights: Float32, num_heads: int) -> Float32:
    """Rows of q or k from llama.cpp's interleaved rope order back to the split halves of a checkpoint.

    llama.cpp stores (x0, y0, x1, y1, ...) per head for architecture "llama"; checkpoints keep (x..., y...).
    """
    pairs = weights.reshape(num_heads, weights.shape[0] // num_heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weights.shape))


def _rope_scaling(gguf: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Rope scaling from the metadata, or the llama3 kind recognised by its stored frequency factors."""
    kind = gguf.metadata.get(f"{gguf.architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        return {"rope_type": kind}  # normalize_config refuses it by name
    if kind == "linear":
        return {
            "rope_type": "linear",
            "factor": gguf.metadata.get(f"{gguf.architecture}.rope.scaling.factor"),
        }
    if _ROPE_FACTORS not in gguf.tensors:
        return None
    stored = gguf.read(_ROPE_FACTORS)
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    if factor == 1.0:
        return None
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    # The GGUF keeps only the resulting factors; all published LLaMA 3.x models share these three settings.
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(
            f"{gguf.path} stores rope factors that are not those of LLaMA 3.x, so its scaling is unknown. "
            "Use the Hugging Face folder of this model."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _locate(path: Path, info: tuple[str, tuple[int, ...], int, int], start: int, size: int) -> GgufTensor:
    """Turn one table entry into a place in the file, or raise ModelError where that cannot be read."""
    quants = _quants()
    name, shape, type_number, offset = info
    try:
        quant_type = quants.GGMLQuantizationType(type_number)
        block, block_bytes = quants.GGML_QUANT_SIZES[quant_type]
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), quant_type)  # says now whether it can be undone
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{path}: tensor {name} has GGUF type {type_number}, which cannot be dequantised here. Use a "
            "file in Q4, Q5, Q8, K-quants, F16 or F32."
        ) from error
    if not shape or 0 in shape or shape[-1] % block:
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, no multiple of its block of {block}.")
    num_bytes = math.prod(shape) // block * block_bytes
    end = start + offset + num_bytes
    if end > size:
        raise ModelError(
            f"{path} is truncated: tensor {name} ends at byte {end}, but the file has {size}. Get the file again."
        )
    return GgufTensor(name, shape, type_number, start + offset, num_bytes)


def _quants() -> Any:
    """The `gguf.quants` module, imported late because only GGUF sources need it."""
    try:
        from gguf import quants
    except ImportError as error:
        raise MissingExtraError("Reading a .gguf file", "gguf", "compiler") from error
    return quants


def _read_tensor_info(file: BinaryIO, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in PyTorch order, type number, offset after the header) of the next table entry."""
    name = _read_string(file, size)
    dims = [_read_scalar(file, "Q") for _ in range(min(_read_scalar(file, "I"), 8))]
    return name, tuple(reversed(dims)), _read_scalar(file, "I"), _read_scalar(file, "Q")


def _read_value(file: BinaryIO, kind: int, size: int) -> Any:
    """One metadata value: a scalar, a string, or a list of either."""
    if kind == _STRING:
        return _read_string(file, size)
    if kind != _ARRAY:
        return _read_scalar(file, _SCALARS[kind])
    item_kind, count = _read_scalar(file, "I"), _read_scalar(file, "Q")
    if count > size:  # each item takes at least a byte, so this length is damage
        raise EOFError
    if item_kind in _SCALARS:
        code = f"<{count}{_SCALARS[item_kind]}"
        return list(struct.unpack(code, file.read(struct.calcsize(code))))
    return [_read_value(file, item_kind, size) for _ in range(count)]


def _read_scalar(file: BinaryIO, code: str) -> Any:
    """One little-endian number."""
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def _read_string(file: BinaryIO, size: int) -> str:
    """One length-prefixed UTF-8 string."""
    length = _read_scalar(file, "Q")
    data = file.read(length) if length <= size else b""
    if len(data) != length:
        raise EOFError
    return data.decode("utf-8")
