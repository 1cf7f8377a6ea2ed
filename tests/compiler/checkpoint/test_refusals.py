"""Folders that are no sound checkpoint are refused, most of them on opening."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eopc_compiler.checkpoint import open_checkpoint
from eopc_runtime.errors import ModelError

RandomModel = Callable[..., Any]


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite some keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def test_a_missing_shard_is_named(random_model: RandomModel, tmp_path: Path) -> None:
    """The message names the file and how many there are."""
    random_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}.*missing"):
        open_checkpoint(str(tmp_path))


def test_an_index_cannot_lead_out_of_the_folder(random_model: RandomModel, tmp_path: Path) -> None:
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


def test_a_tied_head_stored_twice_is_accepted(random_model: RandomModel, tmp_path: Path) -> None:
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


def test_integer_weights_are_refused(random_model: RandomModel, tmp_path: Path) -> None:
    """A quantised tensor under a float name is not taken for numbers."""
    from safetensors.torch import load_file, save_file

    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="stored as I8"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_when_read(random_model: RandomModel, tmp_path: Path, value: float) -> None:
    """The tensor and the count are named; other tensors still read."""
    model = random_model()
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.tensor("model.norm.weight")
    with pytest.raises(ModelError, match=r"up_proj\.weight.* 1 NaN or infinite"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
