"""The tokenizer of a bundle, on tiny tokenizers made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from eopc_runtime.errors import BundleError, PromptError
from eopc_runtime.tokenizer import Tokenizer

TEXT = "naïve 日本語 — 🦙🚀 end. "


def byte_level(post: bool = False) -> Backend:
    """One token per byte, with <s> and </s>; `post` adds <s> in front as Llama 3 does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if post:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return backend


def byte_fallback() -> Backend:
    """A SentencePiece-like tokenizer: words with a leading mark, everything else as <0xNN> bytes."""
    pieces = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "▁hello", "▁world"]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def saved(folder: Path, backend: Backend, config: object = None, jinja: str | None = None) -> Path:
    """A tokenizer folder as a bundle has it."""
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces an incremental decoder lets out, the rest last."""
    decoder = tokenizer.detokenizer()
    return [*[decoder.push(i) for i in ids], decoder.finish()]


def test_round_trip_and_special_tokens(tmp_path: Path) -> None:
    """Text survives encode and decode; special tokens are read in both forms and skipped in decoding."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    tokenizer = Tokenizer.open(saved(tmp_path, byte_level(), config))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.token_id("</s>") == 257
    assert tokenizer.token_id("nope") is None
    assert tokenizer.decode([*ids, 257]) == TEXT
    assert tokenizer.decode([257], skip_special_tokens=False) == "</s>"
    assert tokenizer.vocab_size == 258


@pytest.mark.parametrize("post", [True, False])
def test_bos_is_added_once(tmp_path: Path, post: bool) -> None:
    """BOS comes from the post-processor or from add_bos_token, never from both, and not when switched off."""
    config = {"bos_token": "<s>", "add_bos_token": True}
    tokenizer = Tokenizer.open(saved(tmp_path, byte_level(post), config))
    assert tokenizer.encode("a")[:2] == [256, tokenizer.encode("a", add_special_tokens=False)[0]]
    assert 256 not in tokenizer.encode("a", add_special_tokens=False)


def test_length_limits_stored_in_the_file_are_ignored(tmp_path: Path) -> None:
    """Truncation and padding left over from training do not touch prompts."""
    backend = byte_level()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    assert len(Tokenizer.open(saved(tmp_path, backend)).encode("x" * 20)) == 20


def test_chat_template_sources(tmp_path: Path) -> None:
    """The jinja file wins over the config; a list of templates gives its default; none gives None."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for name, config, jinja, want in [
        ("a", {"chat_template": "C"}, "J", "J"),
        ("b", {"chat_template": "C"}, None, "C"),
        ("c", {"chat_template": named}, None, "D"),
        ("d", {}, None, None),
        ("e", None, None, None),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        assert Tokenizer.open(saved(folder, byte_level(), config, jinja)).chat_template == want


@given(st.text(max_size=40))
def test_streamed_bytes_join_to_the_text(text: str) -> None:
    """One byte per token: the pieces join to the text, and no piece shows half a character."""
    tokenizer = Tokenizer(byte_level())
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=30))
def test_streamed_invalid_bytes_join_to_the_decoded_text(ids: list[int]) -> None:
    """Also for bytes that are not UTF-8 the pieces join to what decoding at once gives."""
    tokenizer = Tokenizer(byte_level())
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_characters_come_out_as_soon_as_they_are_complete() -> None:
    """A character of four byte tokens appears with its fourth."""
    tokenizer = Tokenizer(byte_level())
    assert streamed(tokenizer, tokenizer.encode("a🦙b")) == ["a", "", "", "", "🦙", "b", ""]


def test_unfinished_character_is_shown_at_the_end_as_a_mark() -> None:
    """A sequence cut inside a character ends with one replacement mark, in the last piece only."""
    tokenizer = Tokenizer(byte_level())
    assert streamed(tokenizer, tokenizer.encode("a🦙")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_byte_fallback_decoder_keeps_spaces_and_characters() -> None:
    """SentencePiece-like decoding: the first space is stripped, later ones stay, bytes join to characters."""
    backend = byte_fallback()
    tokenizer = Tokenizer(backend)
    hello, world, space = (int(backend.token_to_id(p) or 0) for p in ("▁hello", "▁world", "▁"))
    raw = [1 + b for b in "日本".encode()]
    ids = [hello, world, space, *raw, hello]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "hello world 日本 hello"
    assert pieces[:3] == ["hello", " world", " "]


def test_text_that_is_not_utf8_is_a_prompt_error() -> None:
    """Undecodable command-line bytes (lone surrogates) give a clear error."""
    with pytest.raises(PromptError, match="UTF-8 at character 1"):
        Tokenizer(byte_level()).encode("a\udcff")


def test_missing_and_damaged_files_are_bundle_errors(tmp_path: Path) -> None:
    """A missing tokenizer, a broken one and a broken config each say which file it is."""
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.open(tmp_path)
    saved(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BundleError, match="JSON object"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Tokenizer.open(tmp_path)
