"""Calibration text a user names: --calib NAME=FILE[:FIELD][@WEIGHT] or NAME=hf:DATASET[:FIELD][@WEIGHT]."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from eopc_compiler.calibration.builtin import default_domains
from eopc_compiler.calibration.cutting import cut_documents
from eopc_compiler.calibration.domains import Domain, check_weight
from eopc_compiler.calibration.hub import HUB_PREFIX, read_hub
from eopc_runtime.errors import UsageError


def read_mixture(specs: Sequence[str]) -> tuple[Domain, ...]:
    """The built-in domains, each of weight 1, and the given ones; a given one replaces a built-in of its name.

    Raises UsageError for whatever is wrong with the given text, or where there is no text at all.
    """
    given = load_calib(specs)
    names = {domain.name for domain in given}
    try:
        built_in = default_domains()
    except UsageError:  # a Python without its sources; the user's text will do
        if not given:
            raise
        built_in = ()
    return (*(domain for domain in built_in if domain.name not in names), *given)


def load_calib(specs: Sequence[str]) -> tuple[Domain, ...]:
    """Read user text given as NAME=FILE: plain UTF-8 text, or .jsonl with a "text" field.

    NAME=FILE:FIELD reads another field, NAME=hf:DATASET a data set of the Hugging Face Hub (hub.py), and @WEIGHT
    behind either sets the weight relative to other domains, 1 if left out; 0 has the text judged on only. A text
    is cut into documents at blank lines.

    Raises:
        UsageError: whatever is wrong with an argument or its text.
        MissingExtraError: a data set is named and the hf extra is not installed.
    """
    domains: list[Domain] = []
    for name, target in _named_sources(specs, "Calibration text", "--calib manual=notes.txt").items():
        source, weight = _split_weight(name, target)
        documents = read_hub(source) if source.startswith(HUB_PREFIX) else _read_file(source)
        unique = tuple(dict.fromkeys(document for document in documents if document.strip()))
        if len(unique) < 3:
            raise UsageError(
                f"{source} has {len(unique)} separate documents; at least 3 are needed, one each for "
                "calibration, selection and held-out checks. Give a longer text."
            )
        domains.append(Domain(name, unique, weight))
    return tuple(domains)


def load_texts(specs: Sequence[str]) -> dict[str, str]:
    """Read whole texts to measure on, given as NAME=FILE: UTF-8, as they are; UsageError for whatever is wrong."""
    named = _named_sources(specs, "Text", "--text book=book.txt")
    return {name: _read_text(Path(target).expanduser(), "Text") for name, target in named.items()}


def _named_sources(specs: Sequence[str], what: str, example: str) -> dict[str, str]:
    """NAME=SOURCE taken apart, every name once."""
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, target = spec.partition("=")
        if not equals or not target or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(
                f"{what} {spec!r} is not of the form NAME=FILE (NAME: letters, digits, - and _). Example: {example}"
            )
        if name in named:
            kind = "Calibration domain" if what == "Calibration text" else what
            raise UsageError(f"{kind} {name!r} is given twice; use another name for one of them.")
        named[name] = target
    return named


def _split_weight(name: str, target: str) -> tuple[str, float]:
    """(source, weight) of SOURCE or SOURCE@WEIGHT; a file of that very name wins."""
    source, at, number = target.rpartition("@")
    if not at or not source or Path(target).expanduser().exists():
        return target, 1.0
    try:
        weight = float(number)
    except ValueError:
        if not source.startswith(HUB_PREFIX) and not _split_field(source)[0].exists():
            return target, 1.0  # an @ in the name of a file that is missing anyway
        raise UsageError(
            f"The weight {number!r} of calibration domain {name} is not a number. Example: --calib {name}={source}@2"
        ) from None
    check_weight(name, weight)
    return source, weight


def _split_field(target: str) -> tuple[Path, str | None]:
    """(path, JSON field or None for plain text) of FILE or FILE:FIELD; a file of that very name wins."""
    path = Path(target).expanduser()
    if not path.exists() and ":" in target:
        file, _, field = target.rpartition(":")
        if field and Path(file).expanduser().exists():
            return Path(file).expanduser(), field
    return path, "text" if path.suffix.lower() in (".jsonl", ".ndjson") else None


def _read_file(source: str) -> list[str]:
    """The documents of FILE or FILE:FIELD."""
    path, field = _split_field(source)
    text = _read_text(path)
    return _json_lines(path, text, field) if field is not None else cut_documents(text)


def _read_text(path: Path, what: str = "Calibration text") -> str:
    """The file as text, or UsageError saying what is wrong with it."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "is no plain file" if path.exists() else "does not exist"
        raise UsageError(f"{what} {path} {kind}. Give a UTF-8 text or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    if not text.strip():
        raise UsageError(f"{what} {path} is empty. Give a file with text in it.")
    return text


def _json_lines(path: Path, text: str, field: str) -> list[str]:
    """The strings at `field`, one per line of JSON, or UsageError naming the line."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON ({error}). Expected one object per line.") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(
                f"{path} line {number} has no text at {field!r} (found: {keys}). Name the field as NAME=FILE:FIELD."
            )
        documents.append(record[field])
    return documents
