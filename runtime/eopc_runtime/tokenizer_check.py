"""Looks at tokenizer.json before the `tokenizers` library does, which trusts it: sizes that would end the process.

The library is native code: a capacity out of all proportion aborts the whole process, a chain of replacements
multiplies a prompt at every link, and a regular expression with a repeated repetition takes time exponential in the
prompt. Such files are refused here; the rest is read under the library's own checks, and a panic in it is an error.

Not covered: a regular expression that is merely slow (a power of the prompt's length). It runs beside other threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import shown

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENS = 2_000_000
MAX_CACHE = 1_000_000  # entries; the library's default is 10,000
MAX_STEPS = 256  # objects in all normalizers, pre-tokenizers, post-processors and decoders
MAX_PARTS = 64  # of one list in them
MAX_STEP_CHARS = 10_000  # of one text of a step; the longest pattern in use has some 500
MAX_GROWTH = 4096  # of a text by all replacements
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
CHARSMAP = "precompiled_charsmap"  # a table of some 300 KB, in base64
_PLAIN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # an escape or a class: one character of any kind
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|[a-z]+:))?([^()]*)\)")
_REPEATED = re.compile(r"V(?:[*+]|\{\d*,)")
_BACK_REFERENCE = re.compile(r"\\[1-9kg]|\(\?[PR&0-9]")


def check_tokenizer(content: object, where: str) -> None:
    """Raise BundleError unless the content of a tokenizer.json is of sizes that the library can bear."""
    if reason := _refusal(content):
        raise BundleError(f"{where} is refused: {reason}. Use only bundles from a source you trust; build it again.")


def _refusal(content: object) -> str | None:
    if not isinstance(content, dict) or not isinstance(model := content.get("model"), dict):
        return 'it has no "model"'
    kind = model.get("type", "BPE")
    if kind not in MODELS:
        return f'its model is of the type "{shown(str(kind))}", not one of {", ".join(MODELS)}'
    vocab, added = model.get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocab, (dict, list)) or not isinstance(added, list) or not vocab:
        return "it has no vocabulary"
    if len(vocab) + len(added) > MAX_TOKENS:
        return f"it has more than {MAX_TOKENS} tokens"
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(t.get("id") for t in added if isinstance(t, dict))]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 4 * MAX_TOKENS for i in ids):
        return f"the id of a token is no number from 0 to {4 * MAX_TOKENS}"
    if not _at_most(model.get("cache_capacity"), MAX_CACHE):
        return f"its cache holds more than {MAX_CACHE} entries"
    for key in ("truncation", "padding"):
        if content.get(key) is not None and not isinstance(content[key], dict):
            return f'"{key}" is no object'
    steps = [step for key in STEPS for step in _objects(content.get(key))]
    if len(steps) > MAX_STEPS:
        return f"it takes more than {MAX_STEPS} steps"
    return next((reason for step in steps if (reason := _step_refusal(step))), None) or _growth_refusal(steps)


def _step_refusal(step: dict[str, object]) -> str | None:
    """Why one step is refused."""
    for key, value in step.items():
        if isinstance(value, str) and len(value) > MAX_STEP_CHARS and key != CHARSMAP:
            return f'"{shown(key)}" of a step has more than {MAX_STEP_CHARS} characters'
        if isinstance(value, list) and len(value) > MAX_PARTS:
            return f'"{shown(key)}" of a step has more than {MAX_PARTS} parts'
        if isinstance(value, int) and not _at_most(value, MAX_STEP_CHARS):
            return f'"{shown(key)}" of a step is above {MAX_STEP_CHARS}'
    pattern = step.get("Regex")
    if isinstance(pattern, str) and (_BACK_REFERENCE.search(pattern) or repeats_a_choice(pattern)):
        return "a regular expression repeats a group that matches in several ways, which can take time without end"
    return None


def repeats_a_choice(pattern: str) -> bool:
    """Whether a regular expression repeats a group that can match a text in several ways, as (a+)* or (a|aa)+ do.

    Groups are taken from the inside out; V stands for one with a choice in it, an x for anything else.
    """
    left = _PLAIN.sub("x", pattern).replace("V", "x")
    while True:
        if _REPEATED.search(left):
            return True
        fewer = _GROUP.sub(lambda m: "V" if re.search(r"[*+?|V]|\{\d*,", m[1]) else "x", left)
        if fewer == left:
            return False
        left = fewer


def _growth_refusal(steps: list[dict[str, object]]) -> str | None:
    """Why the steps together are refused: every replacement can multiply a text by the length of what it puts in."""
    texts = [step[key] for step in steps for key in ("content", "prepend", "replacement") if key in step]
    if math.prod(max(len(text), 1) for text in texts if isinstance(text, str)) > MAX_GROWTH:
        return f"its replacements can make a text more than {MAX_GROWTH} times as long"
    return None


def _objects(value: object) -> Iterator[dict[str, object]]:
    """All objects in a value, itself included; without recursion, as it may be deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _at_most(value: object, limit: int) -> bool:
    """Whether a number, if it is one, is within 0 and a limit."""
    return not isinstance(value, (int, float)) or 0 <= value <= limit
