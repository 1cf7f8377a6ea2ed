"""Where tensors and tokenizer files of a checkpoint come from: a folder, a GGUF file, or those with replacements."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from eopc_compiler.config import LlamaConfig
from eopc_compiler.gguf_file import GgufFile, undo_rope_order
from eopc_compiler.gguf_tokenizer import save_gguf_tokenizer
from eopc_compiler.safetensors_file import SafetensorsEntry
from eopc_runtime.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


class Store(Protocol):
    """Where tensors and tokenizer files come from; names are checkpoint names."""

    files: Sequence[Path]

    def read(self, name: str) -> torch.Tensor: ...

    def save_tokenizer(self, dest: Path) -> None: ...


class FolderStore:
    """A Hugging Face folder."""

    def __init__(self, folder: Path, entries: dict[str, SafetensorsEntry]) -> None:
        self.folder = folder
        self.entries = entries
        weights = {entry.path for entry in entries.values()}
        beside = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        present = {folder / name for name in beside if (folder / name).is_file()}
        self.files: Sequence[Path] = sorted(weights | present)

    def read(self, name: str) -> torch.Tensor:
        return self.entries[name].read().to(torch.float32)

    def save_tokenizer(self, dest: Path) -> None:
        present = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        for name in present:
            shutil.copyfile(self.folder / name, dest / name)
        if "tokenizer.json" in present:
            for name in ("tokenizer.model", "vocab.json", "merges.txt"):  # tokenizer.json says it all
                (dest / name).unlink(missing_ok=True)
        elif {"tokenizer.model", "vocab.json"} & set(present):
            _convert_slow_tokenizer(self.folder, dest)
        else:
            raise ModelError(
                f"{self.folder} has no tokenizer.json. Add the tokenizer files of this model to the folder."
            )


class OverlayStore:
    """Another store with some of its tensors replaced."""

    def __init__(self, base: Store, path: Path) -> None:
        from safetensors import safe_open

        self._base = base
        open_file: Any = safe_open  # untyped
        self._file = open_file(path, framework="pt")
        self._names = set(self._file.keys())
        self.files: Sequence[Path] = [*base.files, path]

    def read(self, name: str) -> torch.Tensor:
        if name not in self._names:
            return self._base.read(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor.to(torch.float32)

    def save_tokenizer(self, dest: Path) -> None:
        self._base.save_tokenizer(dest)


class GgufStore:
    """A GGUF file; tensors are dequantised and brought into checkpoint order when read."""

    def __init__(self, gguf: GgufFile, config: LlamaConfig, names: dict[str, str]) -> None:
        self.gguf = gguf
        self.files: Sequence[Path] = [gguf.path]
        self._names = names
        self._rope_heads = {}  # q and k of architecture "llama" are stored in another row order
        if gguf.architecture == "llama":
            for i, layer in enumerate(config.layers):
                for kind in ("weight", "bias"):
                    prefix = f"model.layers.{i}.self_attn"
                    self._rope_heads[f"{prefix}.q_proj.{kind}"] = config.num_attention_heads(i)
                    self._rope_heads[f"{prefix}.k_proj.{kind}"] = layer.num_key_value_heads

    def read(self, name: str) -> torch.Tensor:
        weights = self.gguf.read(self._names[name])
        if name in self._rope_heads:
            weights = undo_rope_order(weights, self._rope_heads[name])
        return torch.from_numpy(weights)

    def save_tokenizer(self, dest: Path) -> None:
        save_gguf_tokenizer(self.gguf, dest)


def _convert_slow_tokenizer(folder: Path, dest: Path) -> None:
    """Let transformers turn a SentencePiece or vocab/merges tokenizer into tokenizer.json."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.save_pretrained(str(dest))
    except Exception as error:  # whatever it was, the user can act only on the folder
        raise ModelError(
            f"{folder} has no tokenizer.json and its tokenizer could not be converted ({error}). Add tokenizer.json."
        ) from error
