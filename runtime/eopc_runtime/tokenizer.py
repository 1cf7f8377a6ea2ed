"""The bundle's tokenizer: text to ids, ids to text, and ids to text one token at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopc_runtime.chat import MAX_TEMPLATE_CHARS
from eopc_runtime.errors import BundleError, MissingExtraError, PromptError
from eopc_runtime.jsonfields import parse_json, read_json, read_text, shown
from eopc_runtime.tokenizer_check import MAX_TOKENIZER_BYTES, check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_UNFINISHED = "\ufffd"  # what decoders return for a character whose bytes have not all arrived
_PROBE = "Aa 1,\u00e9\n\U0001f642"  # encoded and decoded once when a tokenizer is opened
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes and decodes with a `tokenizers` backend, and knows the special tokens and the chat template."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool = False,
    ) -> None:
        # tokenizer.json may carry a length limit from training; here it would cut prompts without a word
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_template = chat_template
        self._bos_id = self.token_id(self.special_tokens.get("bos_token", "")) if add_bos else None

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja from a folder.

        Raises BundleError for a missing or damaged file; only tokenizer.json is required.
        """
        folder = Path(folder)
        backend = _load_backend(folder / "tokenizer.json")
        config = _load_config(folder / "tokenizer_config.json")
        return cls(
            backend,
            special_tokens=_special_tokens(config),
            chat_template=_chat_template(folder, config),
            add_bos=config.get("add_bos_token") is True,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its exact name, or None."""
        found = self._backend.token_to_id(token) if token else None
        return None if found is None else int(found)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens such as BOS are added as the model was trained with them.

        Raises PromptError when the text is not valid Unicode (for example bytes of another encoding).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid UTF-8 at character {error.start}; convert it to UTF-8 first."
            ) from error
        with _guarded("the bundle's tokenizer failed on this text"):
            found = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        ids = [int(i) for i in found]
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        with _guarded("the bundle's tokenizer failed on these ids"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental decoder for one sequence."""
        return Detokenizer(self)


class Detokenizer:
    """Turns ids into text one by one; the pieces joined are the text of all ids decoded at once.

    A character whose bytes are spread over several tokens is held back until it is complete. Decoding starts
    a few tokens back each time, as decoders treat the first token of a text differently (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the window that is decoded again
        self._clean = 0  # ids before this one were shown completely
        self._shown = ""  # text of the window that was shown already

    def push(self, token: int) -> str:
        """Add one id and return the text that is now certain."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        certain = text.rstrip(_UNFINISHED)
        # Byte-fallback decoders turn a whole run of bytes into marks while its last character is incomplete,
        # so the certain part may shrink for a moment; wait until it has grown past what was shown.
        if not certain.startswith(self._shown):
            return ""
        piece = certain[len(self._shown) :]
        self._shown = certain
        if certain == text and piece:
            self._start, self._clean = self._clean, len(self._ids)
            self._shown = self._tokenizer.decode(self._ids[self._start : self._clean])
        return piece

    def finish(self) -> str:
        """Return what was held back, with marks for characters that were never completed."""
        text = self._tokenizer.decode(self._ids[self._start :])
        piece = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._ids, self._start, self._clean, self._shown = [], 0, 0, ""
        return piece


def _load_backend(path: Path) -> Backend:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise MissingExtraError("running a bundle", "tokenizers", "ort") from error
    if not path.is_file():
        raise BundleError(f"{path} is missing; a bundle needs its tokenizer. Build the bundle again.")
    text = read_text(path, str(path), BundleError, MAX_TOKENIZER_BYTES)
    check_tokenizer(parse_json(text, str(path), BundleError), str(path))
    with _silent(), _guarded(f"{path} is not a tokenizer this version can read"):
        backend = Backend.from_str(text)
        with suppress(Exception):  # a text it has no tokens for; a panic is none of these
            backend.decode([*backend.encode(_PROBE).ids, 0], skip_special_tokens=False)
    return backend


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Turn what the library raises into a BundleError: bare Exception for damage, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{what} ({shown(str(error))}). Copy the bundle again, or rebuild it.") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to stderr: the library writes a page for a panic that is reported anyhow."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _load_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = read_json(path, str(path), BundleError)
    if not isinstance(config, dict):
        raise BundleError(f"{path} must hold a JSON object, not {type(config).__name__}.")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> text; older configs store a token as an object with `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of chat_template.jinja, else of the config (a text, or a list with a `default`)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, str(path), BundleError, 4 * MAX_TEMPLATE_CHARS)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = [item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[-1] if named else None
    return value if isinstance(value, str) else None
