"""The journal of a calibration: one JSON line per finished visit, so that a killed run goes on where it stopped.

A journal belongs to one bundle's engine, one device identity, one meter and one plan; its name is a hash of these, so
whatever changes starts a new one. Lines are appended and synced. The last line may be cut by a crash: it is dropped,
and that visit is measured again. The file is locked while it is in use; the system drops the lock of a killed run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from eopc_runtime.calibration.plan import Visit
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields, plain

JOURNAL_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished visit: joules per sequence of each of its windows, and what else to know about them.

    A window holds `repeats` sequences in a row; `idle_subtracted_j` is null where idle power is not known.
    """

    turn: int
    tier: str
    n_in: int
    n_out: int
    energy_j: tuple[float, ...]
    idle_subtracted_j: tuple[float, ...] | None
    repeats: int
    seconds: float  # of all its windows
    samples: int
    temperature_c: float | None
    others_share: float | None  # of the CPU, used by other processes meanwhile

    @property
    def visit(self) -> Visit:
        """The visit this is the result of."""
        return Visit(self.turn, self.tier, (self.n_in, self.n_out))

    @classmethod
    def from_fields(cls, fields: Fields) -> Measured:
        """Read one line strictly."""
        measured = cls(
            turn=fields.integer("turn", minimum=0),
            tier=fields.text("tier"),
            n_in=fields.integer("n_in", minimum=1),
            n_out=fields.integer("n_out", minimum=1),
            energy_j=_numbers(fields, "energy_j"),
            idle_subtracted_j=(
                None if fields.raw("idle_subtracted_j") is None else _numbers(fields, "idle_subtracted_j")
            ),
            repeats=fields.integer("repeats", minimum=1),
            seconds=fields.number("seconds", minimum=0),
            samples=fields.integer("samples", minimum=0),
            temperature_c=fields.number_or_none("temperature_c"),
            others_share=fields.number_or_none("others_share", minimum=0),
        )
        fields.done()
        return measured


class Journal:
    """An open journal: `done` are the visits it holds, `idle_w` the idle power it began with."""

    def __init__(self, folder: Path, belongs_to: Mapping[str, object], resume: bool = True) -> None:
        """Open or begin the journal of `belongs_to`; UsageError if it is damaged, or in use by another process."""
        self.path = folder / f"{journal_key(belongs_to)}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        self.done: dict[Visit, Measured] = {}
        self.idle_w: float | None = None
        self.has_idle = False
        if not resume:
            self._file.truncate(0)
        if not self._read():
            self._append({"schema": JOURNAL_SCHEMA, "belongs_to": plain(belongs_to)})

    def set_idle(self, idle_w: float | None) -> None:
        """Note the idle power, or that it cannot be measured here."""
        self.idle_w, self.has_idle = idle_w, True
        self._append({"idle_w": idle_w})

    def add(self, measured: Measured) -> None:
        """Append a finished visit; it is on the disk when this returns."""
        self._append(plain(asdict(measured)))
        self.done[measured.visit] = measured

    def close(self) -> None:
        """Release the journal; its file stays."""
        self._file.close()

    def retire(self) -> Path:
        """Close a journal whose prices are published; the next run of the same command measures anew."""
        kept = self.path.with_suffix(".done.jsonl")
        self.path.replace(kept)
        self.close()
        return kept

    def _locked(self) -> IO[bytes]:
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                f"another eopc calibrate is measuring the same (it holds {self.path}). Wait for it to end."
            ) from None
        return file

    def _read(self) -> bool:
        """Take in what is there, and cut off a torn last line; False if there is nothing."""
        self._file.seek(0)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            self._take(number, line)
        return bool(newline)

    def _take(self, number: int, line: bytes) -> None:
        where = f"{self.path.name}, line {number}"
        try:
            fields = Fields(json.loads(line), where, UsageError)
        except ValueError:
            raise UsageError(f"{where} is damaged. Calibrate with --no-resume to begin anew.") from None
        if number == 1:
            if (schema := fields.integer("schema")) != JOURNAL_SCHEMA:
                fields.fail(f"schema {schema} is of another eopc. Calibrate with --no-resume to begin anew.")
        elif "idle_w" in fields:
            self.idle_w, self.has_idle = fields.number_or_none("idle_w", minimum=0), True
        else:
            measured = Measured.from_fields(fields)
            self.done[measured.visit] = measured

    def _append(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def journal_folder(bundle: Path) -> Path:
    """Return the folder beside a bundle where its journals lie."""
    root = bundle.resolve()
    return root.with_name(f".{root.name}.calibrate")


def journal_key(belongs_to: Mapping[str, object]) -> str:
    """Return a hash of everything a measurement depends on."""
    return hashlib.sha256(json.dumps(plain(belongs_to), sort_keys=True).encode()).hexdigest()[:20]


def _numbers(fields: Fields, key: str) -> tuple[float, ...]:
    """A list of joules with at least one entry."""
    values = fields.raw(key)
    if not isinstance(values, list) or not values:
        fields.fail(f'"{key}" must be a list of numbers.')
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            fields.fail(f'"{key}" holds {value!r}, which is no number.')
    return tuple(float(value) for value in values)
