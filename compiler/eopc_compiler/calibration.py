"""Calibration text: built-in domains that need no download, user files, and token windows from both."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch

from eopc_runtime.errors import UsageError

Split = Literal["calibration", "selection", "heldout"]

# The n-th document in hash order goes to entry n mod 5: three documents are enough to fill every split.
_DEAL: tuple[Split, ...] = ("calibration", "selection", "heldout", "calibration", "calibration")
_CHARS_PER_TOKEN = 6  # generous, so that a piece of text usually fills at least one window
_CODE_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zoneinfo",
)  # fmt: skip
_MAX_DOCUMENT_CHARS = 40_000  # of one source file, so that no file dominates its split
_MIN_DOCUMENT_CHARS = 400
_ARITHMETIC_DOCUMENTS = 600


class Tokenizer(Protocol):
    """Anything that turns text into token ids without adding special tokens."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Domain:
    """Named documents of one kind of text, without repeats."""

    name: str
    documents: tuple[str, ...]

    def split(self, split: Split) -> tuple[str, ...]:
        """The documents of one split, in hash order; the three splits share no document."""
        if split not in get_args(Split):
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(get_args(Split))}")
        ranked = sorted(set(self.documents), key=_digest)
        return tuple(text for i, text in enumerate(ranked) if _DEAL[i % len(_DEAL)] == split)


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows per domain, all from one split; no special tokens inside the windows."""

    domains: tuple[tuple[str, torch.Tensor], ...]  # (name, int64 [n_seq, seq_len])
    split: str = "calibration"
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in order."""
        return tuple(name for name, _ in self.domains)

    @property
    def tokens(self) -> torch.Tensor:
        """All windows below each other, [sum of n_seq, seq_len]."""
        return torch.cat([windows for _, windows in self.domains])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and token ids."""
        digest = hashlib.sha256()
        for name, windows in self.domains:
            digest.update(f"{name}\0{tuple(windows.shape)}\0".encode())
            digest.update(windows.contiguous().numpy().tobytes())
        return digest.hexdigest()


def build_calibration(
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    n_seq: int,
    seq_len: int,
    seed: int = 0,
    split: Split = "calibration",
    *,
    allow_fewer: bool = False,
) -> CalibrationSet:
    """Cut `n_seq` windows of `seq_len` tokens per domain from one split, without overlap.

    Pieces are taken from the documents in turn, so that few windows already see many documents; a window
    may join the end of one piece to the start of the next. The seed decides the order, never the split.
    Raises UsageError when the text is too short, unless `allow_fewer` and at least one window is there.
    """
    if n_seq < 1 or seq_len < 2 or not domains:
        raise ValueError(f"need domains, n_seq >= 1 and seq_len >= 2, got {len(domains)}, {n_seq}, {seq_len}")
    built = []
    for domain in domains:
        pieces = _shuffled_pieces(domain, split, seq_len * _CHARS_PER_TOKEN, seed)
        stream: list[int] = []
        for piece in pieces:
            stream += tokenizer.encode(piece.strip("\n") + "\n\n")
            if len(stream) >= n_seq * seq_len:
                break
        count = min(n_seq, len(stream) // seq_len)
        if count < n_seq and not (allow_fewer and count):
            raise UsageError(
                f"Domain {domain.name} has {len(stream)} tokens for {split}, but {n_seq} windows of "
                f"{seq_len} need {n_seq * seq_len}. Give a longer text, or ask for fewer or shorter windows."
            )
        windows = torch.tensor(stream[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)
        built.append((domain.name, windows))
    return CalibrationSet(tuple(built), split, seed)


def default_domains() -> tuple[Domain, ...]:
    """Text, code and arithmetic from what every Python installation ships; the same for one Python version.

    Text: the language reference and docstrings. Code: library sources. No file gives both. Arithmetic:
    generated worked sums. Raises UsageError where Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = _reference_topics()
    code = []
    for path in _library_sources(root):
        source = path.read_text(encoding="utf-8", errors="ignore")
        # Every third file gives its documentation only, so that text and code stay disjoint.
        if int(_digest(path.relative_to(root).as_posix()), 16) % 3 == 0:
            text.append(_docstrings(source))
        else:
            code.append(source[:_MAX_DOCUMENT_CHARS])
    if not code:
        raise UsageError(
            f"This Python has no library sources in {root}, so there is no built-in calibration text. Give "
            "your own with --calib NAME=FILE."
        )
    return (
        Domain("text", tuple(doc for doc in text if len(doc) >= _MIN_DOCUMENT_CHARS)),
        Domain("code", tuple(doc for doc in code if len(doc) >= _MIN_DOCUMENT_CHARS)),
        Domain("arithmetic", _worked_sums(_ARITHMETIC_DOCUMENTS, random.Random(20240229))),
    )


def load_calib(specs: Sequence[str]) -> tuple[Domain, ...]:
    """Read user text given as NAME=FILE: plain UTF-8 text, or .jsonl with a "text" field.

    NAME=FILE:FIELD reads another field. A text is cut into documents at blank lines. Raises UsageError for
    whatever is wrong.
    """
    domains: list[Domain] = []
    for name, target in _named_files(specs, "Calibration text", "--calib manual=notes.txt").items():
        path, field = _split_field(target)
        text = _read_text(path)
        documents = _json_lines(path, text, field) if field is not None else _cut_documents(text)
        unique = tuple(dict.fromkeys(document for document in documents if document.strip()))
        if len(unique) < 3:
            raise UsageError(
                f"{path} has {len(unique)} separate documents; at least 3 are needed, one each for "
                "calibration, selection and held-out checks. Give a longer text."
            )
        domains.append(Domain(name, unique))
    return tuple(domains)


def load_texts(specs: Sequence[str]) -> dict[str, str]:
    """Read whole texts to measure on, given as NAME=FILE: UTF-8, as they are; UsageError for whatever is wrong."""
    named = _named_files(specs, "Text", "--text book=book.txt")
    return {name: _read_text(Path(target).expanduser(), "Text") for name, target in named.items()}


def _named_files(specs: Sequence[str], what: str, example: str) -> dict[str, str]:
    """NAME=FILE taken apart, every name once."""
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, target = spec.partition("=")
        if not equals or not target or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(
                f"{what} {spec!r} is not of the form NAME=FILE (NAME: letters, digits, - and _). Example: {example}"
            )
        if name in named:
            raise UsageError(f"{what} {name!r} is given twice; use another name for one of them.")
        named[name] = target
    return named


def _shuffled_pieces(domain: Domain, split: Split, piece_chars: int, seed: int) -> list[str]:
    """Pieces of about `piece_chars` of all documents in a split: one of each, then a second of each, ..."""
    documents = list(domain.split(split))
    rng = random.Random(f"{domain.name}:{split}:{seed}")
    rng.shuffle(documents)
    queues = []
    for document in documents:
        pieces = _cut_lines(document, piece_chars)
        start = rng.randrange(len(pieces))  # not always the head of a file: licences and imports
        queues.append(pieces[start:] + pieces[:start])
    depth = max((len(queue) for queue in queues), default=0)
    return [queue[i] for i in range(depth) for queue in queues if i < len(queue)]


def _cut_lines(text: str, size: int) -> list[str]:
    """Cut text behind line ends into pieces of at most `size` characters; longer lines are cut anywhere."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if current and len(current) + len(part) > size:
                pieces.append(current)
                current = ""
            current += part
    return [*pieces, current] if current or not pieces else pieces


def _cut_documents(text: str) -> list[str]:
    """Cut one text into at least some twenty documents where possible, at blank lines."""
    size = min(max(len(text) // 20, 200), 8000)
    documents, current = [], ""
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        current += paragraph + "\n"
        if len(current) >= size:
            documents += _cut_lines(current, 2 * size)
            current = ""
    return [*documents, *_cut_lines(current, 2 * size)] if current.strip() else documents


def _split_field(target: str) -> tuple[Path, str | None]:
    """(path, JSON field or None for plain text) of FILE or FILE:FIELD; a file of that very name wins."""
    path = Path(target).expanduser()
    if not path.exists() and ":" in target:
        file, _, field = target.rpartition(":")
        if field and Path(file).expanduser().exists():
            return Path(file).expanduser(), field
    return path, "text" if path.suffix.lower() in (".jsonl", ".ndjson") else None


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


def _reference_topics() -> list[str]:
    """The language reference that `help()` shows; empty where a distribution packages it apart."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [_plain_rest(topic) for _, topic in sorted(topics.items())]


def _library_sources(root: Path) -> list[Path]:
    """Top-level modules and a few packages of the standard library, sorted by name."""
    files = [path for path in root.glob("*.py") if not path.name.startswith("_sysconfigdata")]
    for package in _CODE_PACKAGES:
        files += [path for path in (root / package).rglob("*.py") if "test" not in path.parts]
    return sorted(files)


def _docstrings(source: str) -> str:
    """The longer docstrings of a module, joined; empty where the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 120)


def _plain_rest(text: str) -> str:
    """A reference topic without heading rules, so that the text is mostly prose."""
    return re.sub(r"(?m)^[*=~\-^]{3,}\n", "", text).strip()


def _worked_sums(count: int, rng: random.Random) -> tuple[str, ...]:
    """Documents of five short problems with worked answers each."""
    kinds = (_chain, _column_addition, _purchase, _sharing, _journey, _percentage)
    return tuple("\n\n".join(rng.choice(kinds)(rng) for _ in range(5)) + "\n\n" for _ in range(count))


_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lucy")
_THINGS = (
    "apples",
    "pencils",
    "stickers",
    "books",
    "marbles",
    "eggs",
    "tickets",
    "cookies",
    "stamps",
    "shells",
)


def _chain(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 12)
    return (
        f"Question: What is ({a} + {b}) * {c}?\n"
        f"First add: {a} + {b} = {a + b}. Then multiply: {a + b} * {c} = {(a + b) * c}.\nAnswer: "
        f"{(a + b) * c}"
    )


def _column_addition(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    steps, carry, place = [], 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry, place = total // 10, place * 10
    return f"Question: Add {a} and {b} digit by digit.\n" + "\n".join(steps) + f"\nAnswer: {a + b}"


def _purchase(rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    n, price, extra = rng.randint(2, 20), rng.randint(2, 15), rng.randint(1, 60)
    paid = n * price + extra
    return (
        f"Question: {name} buys {n} {thing} for ${price} each and pays with ${paid}. How much change is "
        f"due?\nThe {thing} cost {n} * {price} = ${n * price}. The change is {paid} - {n * price} = "
        f"${extra}.\nAnswer: {extra}"
    )


def _sharing(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    thing, each, people, left = rng.choice(_THINGS), rng.randint(3, 25), rng.randint(2, 9), rng.randint(0, 1)
    total = each * people + left
    rest = f" with {left} left over" if left else ""
    return (
        f"Question: {first} and {second} share {total} {thing} equally among {people} children. How many "
        f"does each get?\n{total} divided by {people} is {each}{rest}, because {people} * {each} = "
        f"{each * people}.\nAnswer: {each}"
    )


def _journey(rng: random.Random) -> str:
    name, speed, hours, stop = rng.choice(_NAMES), rng.randint(4, 90), rng.randint(2, 9), rng.randint(1, 3)
    return (
        f"Question: {name} travels {hours} hours at {speed} km per hour and rests {stop} hours in between. "
        f"How far is the journey, and how long does it take?\nThe distance is {speed} * {hours} = "
        f"{speed * hours} km. The time is {hours} + {stop} = {hours + stop} hours.\nAnswer: {speed * hours} "
        f"km in {hours + stop} hours"
    )


def _percentage(rng: random.Random) -> str:
    percent, hundreds = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), rng.randint(1, 40)
    base = hundreds * 20
    part = percent * base // 100  # exact: base is a multiple of 20 and percent of 5
    return (
        f"Question: A price of ${base} falls by {percent} percent. What is the new price?\n"
        f"{percent} percent of {base} is {base} * {percent} / 100 = {part}. The new price is {base} - {part} "
        f"= {base - part}.\nAnswer: {base - part}"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
