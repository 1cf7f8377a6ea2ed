"""Calibration and evaluation text of the experiments, from one folder of public corpora.

    FOLDER/wikitext2/*.raw              encyclopaedia: one document per article
    FOLDER/web/*.jsonl                  web pages: field "text"
    FOLDER/mbpp/*.jsonl                 code: "text" (the task) and "code"
    FOLDER/gsm8k/*.jsonl                mathematics: "question" and "answer", calculator marks kept
    FOLDER/sgd_dialogue/*.json          task dialogues of the schema-guided dialogue data

A document belongs to one split by the order of its hash, as in eopc_compiler.calibration: three in five are for
calibration, one for selection, one held out. Evaluation reads held-out documents only, and checks that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from eopc_compiler.calibration import CalibrationSet, Domain, Split, Tokenizer, build_calibration
from eopc_runtime.errors import UsageError

WINDOWS, LENGTH = 24, 512  # of the evaluation preset, per domain


def add_corpora_option(parser: argparse.ArgumentParser) -> None:
    """Add --corpora FOLDER to a benchmark script."""
    parser.add_argument("--corpora", type=Path, required=True, help="folder with wikitext2/, web/, mbpp/, gsm8k/, ...")


def read_domains(folder: Path, names: Sequence[str] = ()) -> tuple[Domain, ...]:
    """The named domains (all five when none is named), documents without repeats, in the order of `names`.

    Raises UsageError for an unknown name or a missing corpus.
    """
    unknown = [name for name in names if name not in READERS]
    if unknown:
        raise UsageError(f"No corpus is called {unknown[0]!r}; there are {', '.join(READERS)}.")
    return tuple(Domain(name, tuple(dict.fromkeys(_documents(folder, name)))) for name in names or READERS)


def calibration_set(
    tokenizer: Tokenizer,
    folder: Path,
    names: Sequence[str],
    tokens_per_domain: int,
    length: int = 256,
    seed: int = 0,
    split: Split = "calibration",
    *,
    allow_fewer: bool = False,
) -> CalibrationSet:
    """Windows of `length` tokens, tokens_per_domain // length of each named domain, from one split.

    Raises UsageError where a corpus is too short (dialogue has some 14,800 tokens for calibration), unless
    `allow_fewer`: then its windows are fewer, and its weight in the mixture stays the same.
    """
    domains, count = read_domains(folder, names), tokens_per_domain // length
    return build_calibration(tokenizer, domains, count, length, seed, split, allow_fewer=allow_fewer)


def evaluation_windows(
    tokenizer: Tokenizer, folder: Path, names: Sequence[str] = (), windows: int = WINDOWS, length: int = LENGTH
) -> CalibrationSet:
    """Held-out windows [at most `windows`, length] per domain, no special tokens inside, the same on every call.

    A document longer than a window is read from its head and shares its windows with no other; shorter ones are
    joined by blank lines. A small corpus gives fewer windows: publish how many.
    """
    domains = read_domains(folder, names)
    check_disjoint(domains)
    rows = [(d.name, spread_windows(tokenizer, d.split("heldout"), windows, length)) for d in domains]
    for name, cut in rows:
        if not len(cut):
            raise UsageError(f"The held-out text of {name} does not fill one window of {length} tokens; ask for less.")
    return CalibrationSet(tuple(rows), "heldout")


def spread_windows(tokenizer: Tokenizer, documents: Sequence[str], windows: int, length: int) -> torch.Tensor:
    """At most `windows` windows [n, length]: the first of every document, then the second of every document, ..."""
    queues, short = [], list[int]()
    for document in documents:
        ids = tokenizer.encode(document.strip() + "\n\n")
        if len(ids) < length:
            short += ids
        else:
            queues.append(torch.tensor(ids[: len(ids) // length * length]).view(-1, length))
    if len(short) >= length:
        queues.append(torch.tensor(short[: len(short) // length * length]).view(-1, length))
    depth = max(map(len, queues), default=0)
    rows = [queue[i] for i in range(depth) for queue in queues if i < len(queue)][:windows]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)


def check_disjoint(domains: Sequence[Domain]) -> None:
    """Assert by hash that no document of any domain is in two splits, not even under another domain's name."""
    owner: dict[str, Split] = {}
    for domain in domains:
        for split in get_args(Split):
            for document in domain.split(split):
                key = hashlib.sha256(" ".join(document.split()).encode()).hexdigest()
                assert owner.setdefault(key, split) == split, (
                    f"a document of {domain.name} is in {split} and {owner[key]}: {document[:60]!r}"
                )


def _documents(folder: Path, name: str) -> list[str]:
    pattern, read = READERS[name]
    files = sorted(folder.glob(pattern))
    if not files:
        raise UsageError(f"There is no {pattern} in {folder}. Give the folder of corpora with --corpora.")
    return [text for file in files for document in read(file) if (text := _tidy(document))]


def _tidy(document: str) -> str:
    """A document with plain line ends and no blank space around it."""
    return document.replace("\r\n", "\n").strip()


def _articles(file: Path) -> list[str]:
    """WikiText cut at article headings ` = Title = `; section headings have two or more signs a side."""
    return re.split(r"(?m)^(?= = [^=\n]+ = *$)", file.read_text(encoding="utf-8"))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip())


def _pages(file: Path) -> list[str]:
    return [row["text"] for row in _rows(file)]


def _tasks(file: Path) -> list[str]:
    return [f"{row['text']}\n{row['code']}" for row in _rows(file)]


def _problems(file: Path) -> list[str]:
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in _rows(file)]


def _dialogues(file: Path) -> list[str]:
    speakers = {"USER": "User", "SYSTEM": "Assistant"}
    return [
        "\n".join(f"{speakers[turn['speaker']]}: {turn['utterance']}" for turn in dialogue["turns"])
        for dialogue in json.loads(file.read_text(encoding="utf-8"))
    ]


READERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "wiki": ("wikitext2/*.raw", _articles),
    "web": ("web/*.jsonl", _pages),
    "code": ("mbpp/*.jsonl", _tasks),
    "maths": ("gsm8k/*.jsonl", _problems),
    "dialogue": ("sgd_dialogue/*.json", _dialogues),
}
