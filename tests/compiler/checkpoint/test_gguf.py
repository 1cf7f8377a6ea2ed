"""GGUF files: weights and tokenizer come back in the form of Hugging Face; damaged and unknown ones are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import RopeScaling
from eopc_runtime.errors import ModelError

RandomModel = Callable[..., Any]
AssertSame = Callable[[Path, Any], None]
WriteGguf = Callable[..., None]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
SENTENCEPIECE += ["▁", "h", "e", "l", "o", "he", "ll", "▁he"]


@pytest.fixture
def write_gguf(byte_level_tokenizer: Callable[[], Any]) -> WriteGguf:
    """Writes a model with the tiny tokenizer: (path, model, ...) as in `write_model`."""
    vocab = byte_level_tokenizer().get_vocab()
    return partial(write_model, sorted(vocab, key=lambda token: vocab[token]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_gguf_gives_back_the_checkpoint_order(
    random_model: RandomModel, assert_same_tensors: AssertSame, write_gguf: WriteGguf, tmp_path: Path, tied: bool
) -> None:
    """q and k rows return from llama.cpp's order, and names and config to Hugging Face's."""
    model = random_model(tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    assert_same_tensors(tmp_path / "tiny.gguf", model)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.name == "tiny"
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_ids) == (1, (2,))


def test_a_gguf_agrees_with_transformers_own_loader(
    random_model: RandomModel, assert_same_tensors: AssertSame, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """An independent reader of the same file gives the same weights."""
    from transformers import LlamaForCausalLM

    write_gguf(tmp_path / "tiny.gguf", random_model(vocab_size=260))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert_same_tensors(tmp_path / "tiny.gguf", loaded)


def test_a_qwen2_gguf_keeps_its_rows_and_biases(
    random_model: RandomModel, assert_same_tensors: AssertSame, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """llama.cpp does not reorder architecture qwen2."""
    model = random_model("Qwen2")
    write_gguf(tmp_path / "q.gguf", model, architecture="qwen2")
    assert_same_tensors(tmp_path / "q.gguf", model)


def test_a_quantised_gguf_is_dequantised_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading in many slices equals dequantising the tensor at once."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    from eopc_compiler import gguf_file

    values = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    writer.add_tensor("w", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "_SLICE_BYTES", 7 * 64 * 4)
    got = gguf_file.read_gguf(tmp_path / "q.gguf").read("w")
    np.testing.assert_array_equal(got, quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    assert np.abs(got - values).max() < 0.02  # half a step of 127 in blocks with |x| below 4


def test_llama3_scaling_is_recognised_in_stored_factors(
    random_model: RandomModel, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """GGUF keeps only the factors; those of transformers' llama3 rule are recognised, others refused."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model(rope_parameters=scaling, head_dim=64, hidden_size=256)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / scaled).numpy().astype(np.float32)
    write_gguf(tmp_path / "l3.gguf", model, rope_freqs=factors)
    config = open_checkpoint(str(tmp_path / "l3.gguf")).config
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == pytest.approx(32.0, rel=1e-5)  # fp32 division
    assert replace(config.rope_scaling, factor=32.0) == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    write_gguf(tmp_path / "odd.gguf", model, rope_freqs=factors[::-1].copy())
    with pytest.raises(ModelError, match="rope factors"):
        open_checkpoint(str(tmp_path / "odd.gguf"))


def test_a_gguf_tokenizer_equals_the_one_it_was_written_from(
    random_model: RandomModel, byte_level_tokenizer: Callable[[], Any], write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """Same ids, special tokens recognised, template and special names written beside it."""
    write_gguf(tmp_path / "tiny.gguf", random_model())
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    text = "hello the <s>wörld\n\n  12 </s>"
    assert checkpoint.tokenizer().encode(text) == byte_level_tokenizer().encode(text).ids
    checkpoint.save_tokenizer(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_sentencepiece_gguf_tokenises_with_scores_and_byte_fallback(
    random_model: RandomModel, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """LLaMA 2 files carry scores instead of merges; unknown letters become bytes, and BOS is asked for."""
    write_gguf(tmp_path / "s.gguf", random_model(), sentencepiece=True)
    checkpoint = open_checkpoint(str(tmp_path / "s.gguf"))
    tokens = [SENTENCEPIECE[i] for i in checkpoint.tokenizer().encode("hello hé")]
    assert tokens == ["▁he", "ll", "o", "▁", "h", "<0xC3>", "<0xA9>"]
    checkpoint.save_tokenizer(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True
    assert (tmp_path / "out" / "chat_template.jinja").exists()


def test_an_unknown_word_rule_is_refused_not_guessed(
    random_model: RandomModel, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """A wrong rule would change tokens silently."""
    write_gguf(tmp_path / "t.gguf", random_model(), pre="tekken")
    with pytest.raises(ModelError, match="tekken"):
        open_checkpoint(str(tmp_path / "t.gguf")).tokenizer()


def test_truncated_ggufs_are_refused_on_opening(
    random_model: RandomModel, write_gguf: WriteGguf, tmp_path: Path
) -> None:
    """Cut at several places of the header and one byte before the end."""
    write_gguf(tmp_path / "good.gguf", random_model())
    data = (tmp_path / "good.gguf").read_bytes()
    for kept in (6, 24, 60, 700, 4000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:kept])
        with pytest.raises(ModelError, match="truncated"):
            open_checkpoint(str(tmp_path / "cut.gguf"))


def test_a_gguf_with_absurd_counts_is_refused_at_once(tmp_path: Path) -> None:
    """A damaged length neither allocates nor loops for long."""
    string = struct.pack("<Q", 1) + b"k"
    array = struct.pack("<IIQ", 9, 4, 2**60)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string + array)
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))
    for name in ("a.gguf", "b.gguf"):
        with pytest.raises(ModelError, match="damaged"):
            open_checkpoint(str(tmp_path / name))


def test_other_files_named_gguf_are_refused(tmp_path: Path) -> None:
    """Bad magic, an empty file, and an unknown version."""
    for content, said in (
        (b"PK\x03\x04abc", "not a GGUF"),
        (b"", "not a GGUF"),
        (b"GGUF" + b"\x63" * 40, "version"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=said):
            open_checkpoint(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("architecture", "extra", "said"),
    [
        ("bert", {}, "'bert'"),
        ("llama", {"expert_count": 8}, "8 experts"),
        ("llama", {"rope.dimension_count": 4}, "part of each head"),
    ],
)
def test_other_gguf_models_are_refused_by_name(
    random_model: RandomModel,
    write_gguf: WriteGguf,
    tmp_path: Path,
    architecture: str,
    extra: dict[str, Any],
    said: str,
) -> None:
    """Another architecture, a mixture of experts, partial rope."""
    write_gguf(tmp_path / "x.gguf", random_model(), architecture=architecture, **extra)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(str(tmp_path / "x.gguf"))


def write_model(
    tokens: list[str],
    path: Path,
    model: Any,
    architecture: str = "llama",
    rope_freqs: np.ndarray[Any, Any] | None = None,
    **extra: Any,
) -> None:
    """Write an fp32 GGUF with the names and row order of llama.cpp, and a tokenizer of `tokens`, or SentencePiece."""
    from gguf import GGUFWriter

    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if extra.pop("sentencepiece", False):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SENTENCEPIECE)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(SENTENCEPIECE) - 259))
        writer.add_token_scores([0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -14.0, -1.0, -2.0, -3.0])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(extra.pop("pre", "gpt-2"))
        writer.add_token_list(tokens)
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
        writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in extra.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, value in state.items():
        stem, kind = name.rsplit(".", 1)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if stem in top:
            writer.add_tensor(f"{top[stem]}.{kind}", value)
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in heads and architecture == "llama":
            value = interleave(value, heads[part])
        writer.add_tensor(f"blk.{layer}.{names[part]}.{kind}", value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k as llama.cpp's converter stores them: halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
