"""Measurements from a CSV file: rows n_in, n_out, energy_j, in groups, with what was left out and why.

Nothing is repaired and nothing is dropped in silence: a cell that is no number is an error with its line; a row that
cannot be fitted (no energy, another batch size, a prefix-cache hit) is left out and counted; what makes a group
doubtful (mixed boards, coarse sampling) becomes a warning.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from eopc_runtime.energy_model.folds import Samples
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import did_you_mean, shown

REQUIRED = ("n_in", "n_out", "energy_j")
# Energies of different values here belong to different fits.
IDENTITY = (
    *("source", "device", "module", "rails", "meter", "power_mode", "mode", "clocks", "l4t"),
    *("model", "engine", "quant", "precision", "runner", "tier"),
)
MAX_CSV_BYTES = 64 << 20  # unpacked; some 500,000 rows
SHORT_S = 2.0  # a shorter window cannot be measured well by a sensor of 10 Hz
GOOD_S = 5.0
_TRUE = {"true", "1", "yes"}


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that belong to one fit; `by` are the columns and values that chose them."""

    key: str
    by: Mapping[str, str]
    samples: Samples
    warnings: tuple[str, ...]
    coarse: bool  # sampled too coarsely for its short windows: errors come from the sensor, not from the model


@dataclass(frozen=True, slots=True)
class Measurements:
    """All groups of a file, and how many rows were left out for which reason."""

    groups: tuple[Group, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Row:
    n_in: int
    n_out: int
    energy_j: float
    texts: Mapping[str, str]


def read_measurements(path: Path, by: Sequence[str] = (), min_new_tokens: int = 1) -> Measurements:
    """Read a CSV file, plain or gzipped; UsageError names what is wrong with it and where."""
    left_out: Counter[str] = Counter()
    found: dict[tuple[str, ...], list[_Row]] = {}
    for line, texts in _lines(path, by):
        row = _row(path, line, texts, left_out)
        if row is None:
            continue
        if row.n_out < min_new_tokens:
            left_out[f"fewer than {min_new_tokens} new tokens"] += 1
            continue
        found.setdefault(tuple(texts[column].strip() for column in by), []).append(row)
    if not found:
        why = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items()) or "it has no rows"
        raise UsageError(f"{path} has nothing to fit ({why}). Give rows with {', '.join(REQUIRED)}.")
    groups = tuple(_group(dict(zip(by, key, strict=True)), rows, left_out) for key, rows in found.items())
    return Measurements(groups, dict(left_out))


def _lines(path: Path, by: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the lines with their numbers, after checking the header."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            raw = file.read(MAX_CSV_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (EOFError, UnicodeDecodeError, zlib.error):
        raise UsageError(f"{path} is not a text file. Give a CSV file, plain or gzipped.") from None
    if len(raw) > MAX_CSV_BYTES:
        raise UsageError(f"{path} holds more than {MAX_CSV_BYTES >> 20} MiB of text. Split it, or leave columns out.")
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        for name in (*REQUIRED, *by):
            if name not in columns:
                shown = ", ".join(columns) or "none"
                raise UsageError(f'{path} has no column "{name}".{did_you_mean(name, columns)} Its columns: {shown}.')
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}.") from None
    for line, row in lines:
        if None in row or None in row.values():
            raise UsageError(f"{path}, line {line} does not have {len(columns)} cells, as its header has.")
    return lines


def _row(path: Path, line: int, texts: dict[str, str], left_out: Counter[str]) -> _Row | None:
    """Check one row; None, and a count, if it cannot be fitted."""
    if not texts["energy_j"].strip():
        left_out["no energy"] += 1
        return None
    n_in, n_out, energy_j = (_number(path, line, name, texts[name]) for name in REQUIRED)
    if not (n_in.is_integer() and n_out.is_integer()):  # also refuses nan and inf
        raise UsageError(f"{path}, line {line}: n_in {n_in} and n_out {n_out} must be whole numbers of tokens.")
    if n_in < 1 or n_out < 1:
        left_out["no prompt, or no new token"] += 1
        return None
    if not 0 < energy_j < float("inf"):
        left_out["an energy that is not above 0 J"] += 1
        return None
    return _Row(int(n_in), int(n_out), energy_j, texts)


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        if text.isascii() and "_" not in text:  # Python reads other digits, and 1_0, as well
            return float(text)
    except ValueError:
        pass
    raise UsageError(f'{path}, line {line}: {name} is "{shown(text)}", which is no number.')


def _group(by: dict[str, str], rows: list[_Row], left_out: Counter[str]) -> Group:
    """Make a group of rows: unsuitable ones are left out where others remain, and doubts become warnings."""
    warnings: list[str] = []
    rows = _without_cache_hits(rows, left_out, warnings)
    if "batch" not in by:
        rows = _of_one_batch(rows, left_out, warnings)
    for column in IDENTITY:
        values = {row.texts[column].strip() for row in rows if column in row.texts}
        if column not in by and len(values) > 1:
            some = ", ".join([*sorted(values)[:3], *(["..."] if len(values) > 3 else [])])
            warnings.append(f"mixes {len(values)} values of {column} ({some}); fit them apart with --by {column}")
    coarse = _coarse_sampling(rows)
    if coarse:
        warnings.append(coarse)
    elif short := sum(1 for row in rows if (_seconds(row) or SHORT_S) < SHORT_S):
        warnings.append(
            f"{short} of {len(rows)} rows lasted less than {SHORT_S:g} s; repeat short requests back to back"
        )
    samples = Samples.of((row.n_in, row.n_out, row.energy_j) for row in rows)
    return Group("/".join(by.values()) or "all", by, samples, tuple(warnings), bool(coarse))


def _without_cache_hits(rows: list[_Row], left_out: Counter[str], warnings: list[str]) -> list[_Row]:
    """Leave out rows marked as prefix-cache hits, whose prompts cost too little."""
    clean = [row for row in rows if row.texts.get("prefix_cache_suspect", "").strip().lower() not in _TRUE]
    if not clean:
        warnings.append(
            "every row is marked as a prefix-cache hit: prompt prices are too low; measure with caching off"
        )
        return rows
    if len(clean) < len(rows):
        left_out["a prefix-cache hit"] += len(rows) - len(clean)
    return clean


def _of_one_batch(rows: list[_Row], left_out: Counter[str], warnings: list[str]) -> list[_Row]:
    """Keep one batch size, 1 where there is one; sequences of a batch share the weights' energy."""
    sizes = Counter(_batch(row) for row in rows)
    kept = "1" if "1" in sizes else sizes.most_common(1)[0][0]
    if kept not in ("", "1"):
        warnings.append(f"holds for batch {kept} only")
    if len(sizes) > 1:
        dropped = len(rows) - sizes[kept]
        left_out[f"a batch size other than {kept or 'none'}"] += dropped
        warnings.append(f"{dropped} rows of other batch sizes were left out; fit them apart with --by batch")
    return [row for row in rows if _batch(row) == kept]


def _batch(row: _Row) -> str:
    text = row.texts.get("batch", "").strip()
    return text[:-2] if text.endswith(".0") else text


def _coarse_sampling(rows: list[_Row]) -> str:
    """Return a warning if longer answers read exactly the same energy, as they do under a slow sensor."""
    energies: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        energies.setdefault(row.n_in, {}).setdefault(row.n_out, []).append(row.energy_j)
    tied = [
        (n, a, b, of_prompt[a][0])
        for n, of_prompt in energies.items()
        for a, b in pairwise(sorted(of_prompt))
        if set(of_prompt[a]) == set(of_prompt[b])
    ]
    if len(tied) < 2:
        return ""
    n, a, b, energy_j = min(tied)
    longer = [row.n_out for row in rows if (_seconds(row) or 0.0) >= GOOD_S]
    enough = min(longer) if longer else 8 * max(t[2] for t in tied)
    return (
        f"sampled too coarsely: at n_in {n}, answers of {a} and of {b} tokens both read {energy_j:g} J "
        f"({len(tied)} such pairs); keep to long windows, for example --min-new-tokens {enough}"
    )


def _seconds(row: _Row) -> float | None:
    """The length of a row's window, where the file has it."""
    try:
        return float(row.texts.get("time_s", ""))
    except ValueError:
        return None
