"""Rebuilds the tokenizer that a GGUF file carries in its metadata as Hugging Face tokenizer files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from eopc_compiler.gguf_file import GgufFile
from eopc_runtime.errors import ModelError

# token_type numbers of GGUF
_CONTROL, _USER_DEFINED = 3, 4

# Text is cut into words before byte-pair merges; `tokenizer.ggml.pre` names the rule used in training.
_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_RULES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def save_gguf_tokenizer(gguf: GgufFile, dest: Path) -> None:
    """Write tokenizer.json, its settings, and chat_template.jinja (where there is one) into `dest`.

    Raises ModelError when the file has no tokenizer, or one whose word rule is not known.
    """
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _byte_level_tokenizer(gguf).save(str(dest / "tokenizer.json"))
        _write_settings(gguf, dest)
    elif kind == "llama":
        _save_sentencepiece_tokenizer(gguf, dest)
    else:
        raise ModelError(
            f"{gguf.path} has a tokenizer of kind {kind!r}; gpt2 and llama are read. Use the Hugging Face "
            "folder of this model."
        )


def _byte_level_tokenizer(gguf: GgufFile) -> Any:
    """A `tokenizers.Tokenizer` with the vocabulary, merges, word rule and special tokens of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    meta = gguf.metadata
    rule = str(meta.get("tokenizer.ggml.pre", "gpt-2"))
    if rule not in _PRE_RULES:
        raise ModelError(
            f"{gguf.path} cuts words by the rule {rule!r}; known are {', '.join(_PRE_RULES)}. Use the "
            "Hugging Face folder of this model."
        )
    try:
        tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=rule == "llama-bpe",
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a bad merge
        raise ModelError(f"{gguf.path} has no usable tokenizer ({error}); convert the model again.") from error
    tokenizer = Tokenizer(model)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _word_rule(rule)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    types = meta.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if _adds_bos(gguf) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _word_rule(rule: str) -> Any:
    """The `tokenizers` pre-tokenizer of one known rule."""
    from tokenizers import Regex, pre_tokenizers

    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "smollm":  # every digit is a word of its own
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    words = _WORDS_LLAMA3 if rule == "llama-bpe" else _WORDS_QWEN2
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _adds_bos(gguf: GgufFile) -> bool:
    """Whether raw text starts with BOS; SentencePiece and LLaMA 3 files that leave the flag out mean yes."""
    sentencepiece = gguf.metadata.get("tokenizer.ggml.model") == "llama"
    default = sentencepiece or gguf.metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(gguf.metadata.get("tokenizer.ggml.add_bos_token", default))


def _write_settings(gguf: GgufFile, dest: Path) -> None:
    """Write the special tokens and the chat template beside tokenizer.json."""
    meta, tokens = gguf.metadata, gguf.metadata["tokenizer.ggml.tokens"]
    special = {}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            special[f"{field}_token"] = tokens[token_id]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(gguf),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get(f"{gguf.architecture}.context_length"),
        **special,
    }
    _write_json(dest / "tokenizer_config.json", config)
    _write_json(dest / "special_tokens_map.json", special)
    if meta.get("tokenizer.chat_template"):
        (dest / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


def _save_sentencepiece_tokenizer(gguf: GgufFile, dest: Path) -> None:
    """Let transformers rebuild merges from SentencePiece scores (seconds); its progress is hidden."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(gguf.path.parent), gguf_file=gguf.path.name)
            tokenizer.save_pretrained(str(dest))
        except Exception as error:  # whatever it was, the user can act only on the file
            raise ModelError(
                f"The tokenizer inside {gguf.path} could not be read ({error}). Use the Hugging Face folder "
                "of this model."
            ) from error
    settings = dest / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    _write_json(settings, {**config, "add_bos_token": _adds_bos(gguf)})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
