"""Strict reading of JSON records: every key is checked for presence, type and spelling.

The runtime reads JSON records (device profiles, `energy.json`, `manifest.json`, fits, logs). All go through
`Fields`, so that an unknown key, a missing key or a wrong type gives the same kind of sentence everywhere,
with the nearest known name where there is one.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeVar

from eopc_runtime.errors import EopcError

T = TypeVar("T")

MAX_JSON_BYTES = 16 << 20  # of one file; the largest manifest seen has some 100 KB
MAX_INTEGER = 2**53  # beyond it JSON readers disagree; nothing eopc counts comes near
_MAX_NAMES = 1000  # names a misspelled one is compared with; the comparison is slow
_MAX_NAME_CHARS = 100
_SHOWN_CHARS = 200  # of one value in a message


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the nearest known name, or an empty string."""
    names = [x for x in islice(known, _MAX_NAMES) if len(x) <= _MAX_NAME_CHARS]
    near = difflib.get_close_matches(name[:_MAX_NAME_CHARS], names, n=1, cutoff=0.5)
    return f' Did you mean "{shown(near[0])}"?' if near else ""


def shown(text: str) -> str:
    """A foreign text as a message may hold it: on one line, without control characters, and not long."""
    line = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN_CHARS + 1])
    return line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS]}..."


def parse_json(text: str, where: str, error: type[EopcError]) -> object:
    """Parse JSON text; NaN, Infinity, a key that stands twice and malformed text raise `error`, opened by `where`."""

    def no_constant(name: str) -> NoReturn:
        raise error(f"{where} contains {name}, which is not JSON. Write a finite number or null.")

    def no_double(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):  # Python would keep the last without a word
            double = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f'{where} has the key "{shown(double)}" twice in one object. Remove one of them.')
        return found

    try:
        value: object = json.loads(text, parse_constant=no_constant, object_pairs_hook=no_double)
    except (ValueError, RecursionError) as e:  # ValueError: malformed, or an integer of thousands of digits
        raise error(f"{where} is not valid JSON ({shown(str(e))}). Copy or build it again.") from None
    return value


def read_json(path: Path, where: str, error: type[EopcError], max_bytes: int = MAX_JSON_BYTES) -> object:
    """Read and parse a JSON file; one that is unreadable, no UTF-8 or larger than `max_bytes` raises `error`."""
    return parse_json(read_text(path, where, error, max_bytes), where, error)


def read_text(path: Path, where: str, error: type[EopcError], max_bytes: int) -> str:
    """Read a text file in UTF-8; one that is unreadable, no UTF-8 or larger than `max_bytes` raises `error`."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as e:
        raise error(f"{where} cannot be read ({e.strerror}).") from None
    if len(content) > max_bytes:
        raise error(f"{where} is larger than {max_bytes >> 20} MiB, which no file of this kind is. Copy it again.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{where} is not a text file. Copy or build it again.") from None


def plain(obj: object) -> dict[str, object]:
    """Return an object as `read_json` would give it back: tuples become lists; ValueError on NaN."""
    copy: dict[str, object] = json.loads(json.dumps(obj, allow_nan=False))
    return copy


class Fields:
    """One JSON object under strict reading; call `done()` last, so that unread keys become errors.

    A key is required unless the reader names a default. `where` opens every message, for example
    `manifest.json: tiers[0]`.
    """

    def __init__(self, obj: object, where: str, error: type[EopcError]) -> None:
        if not isinstance(obj, dict):
            raise error(f"{where} must be a JSON object, not {_kind(obj)}.")
        self._obj: dict[str, object] = obj
        self.where = where
        self.error = error
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._obj

    def fail(self, message: str) -> NoReturn:
        """Raise the reader's error, opened by where in the file this record is."""
        raise self.error(f"{self.where}: {message}")

    def raw(self, key: str) -> object:
        """The value of a required key, unchecked."""
        self._read.add(key)
        if key not in self._obj:
            near = did_you_mean(key, set(self._obj) - self._read)
            self.fail(f'the key "{key}" is missing.{near.replace("Did you mean", "Is it misspelled as")}')
        return self._obj[key]

    def text(self, key: str, default: str | None = None, choices: Iterable[str] | None = None) -> str:
        """A string, optionally one of `choices`."""
        if default is not None and key not in self._obj:
            self._read.add(key)
            return default
        value = self._typed(key, str, "a string")
        if choices is not None and value not in (known := list(choices)):
            near = did_you_mean(value, known)
            self.fail(f'"{key}" is "{shown(value)}", but must be one of {", ".join(known)}.{near}')
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is missing."""
        self._read.add(key)
        return self._typed(key, bool, "true or false") if key in self._obj else default

    def integer(self, key: str, minimum: int | None = None) -> int:
        """An integer (a boolean is not one), at least `minimum`."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f'"{key}" must be an integer, not {_kind(value)}.')
        self._check_size(key, value)
        if minimum is not None and value < minimum:
            self.fail(f'"{key}" is {value}, but must be at least {minimum}.')
        return value

    def number(self, key: str, minimum: float | None = None) -> float:
        """A finite number (an integer counts), at least `minimum`."""
        value = self._number(key, self.raw(key))
        if minimum is not None and value < minimum:
            self.fail(f'"{key}" is {value}, but must be at least {minimum}.')
        return value

    def integer_or_none(self, key: str, minimum: int | None = None) -> int | None:
        """An integer or null."""
        return None if self.raw(key) is None else self.integer(key, minimum)

    def number_or_none(self, key: str, minimum: float | None = None) -> float | None:
        """A finite number or null."""
        return None if self.raw(key) is None else self.number(key, minimum)

    def text_or_none(self, key: str) -> str | None:
        """A string or null."""
        return None if self.raw(key) is None else self.text(key)

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of strings."""
        if default is not None and key not in self._obj:
            self._read.add(key)
            return default
        values = self._typed(key, list, "a list")
        for value in values:
            if not isinstance(value, str):
                self.fail(f'"{key}" must hold strings, not {_kind(value)}.')
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers."""
        values = self._typed(key, list, "a list")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                self.fail(f'"{key}" must hold integers, not {_kind(value)}.')
            self._check_size(key, value)
        return tuple(values)

    def mapping(self, key: str) -> dict[str, object]:
        """An object of free content."""
        return dict(self._typed(key, dict, "an object"))

    def numbers_by_name(self, key: str) -> dict[str, float]:
        """An object whose values are all finite numbers."""
        return {name: self._number(f"{key}.{shown(name)}", value) for name, value in self.mapping(key).items()}

    def texts_by_name(self, key: str) -> dict[str, str]:
        """An object whose values are all strings."""
        found = self.mapping(key)
        texts = {name: value for name, value in found.items() if isinstance(value, str)}
        for name in found.keys() - texts.keys():
            self.fail(f'"{key}.{shown(name)}" must be a string, not {_kind(found[name])}.')
        return texts

    def child(self, key: str) -> Fields:
        """A nested record."""
        return Fields(self.raw(key), f"{self.where}: {key}", self.error)

    def children(self, key: str) -> list[Fields]:
        """A list of nested records."""
        values = self._typed(key, list, "a list")
        return [Fields(value, f"{self.where}: {key}[{i}]", self.error) for i, value in enumerate(values)]

    def children_by_name(self, key: str) -> dict[str, Fields]:
        """An object whose values are all nested records."""
        found = self.mapping(key)
        return {name: Fields(obj, f"{self.where}: {key}.{shown(name)}", self.error) for name, obj in found.items()}

    def done(self) -> None:
        """Refuse keys nobody asked for, naming the nearest one that exists."""
        for key in self._obj.keys() - self._read:
            self.fail(f'unknown key "{shown(key)}".{did_you_mean(key, self._read)}')

    def _check_size(self, key: str, value: int) -> None:
        if abs(value) > MAX_INTEGER:
            self.fail(f'"{key}" is beyond {MAX_INTEGER}, the largest integer allowed.')

    def _typed(self, key: str, kind: type[T], name: str) -> T:
        value = self.raw(key)
        if not isinstance(value, kind):
            self.fail(f'"{key}" must be {name}, not {_kind(value)}.')
        return value

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(f'"{key}" must be a number, not {_kind(value)}.')
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):  # 1e999 is valid JSON and reads as infinity
            self.fail(f'"{key}" must be a finite number.')
        return number


def _kind(value: object) -> str:
    """Name the JSON type of a value in a sentence."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
