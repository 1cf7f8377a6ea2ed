"""The log of sequences that `eopc run --log` appends to: one JSON line each, with times and joules to check later.

Times are given by the wall clock, with the offset of local time from UTC, since a power log of the board is written
in local time; and by a monotonic clock, which shows whether the wall clock was set meanwhile. `predicted_j` is what a
meter should show, `price_j` what was charged for it by the model: with margin, safety and drift, but without what a
meter added.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields, plain
from eopc_runtime.sequence_log import SequenceLog

if TYPE_CHECKING:
    from eopc_runtime.generation import Generation

RECORD_SCHEMA = 1
KIND = "eopc sequence"


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """One finished sequence; the fields are the keys of a line."""

    engine: str  # fingerprint of the tiers' graphs and weights
    start_wall_s: float  # since 1970, UTC
    end_wall_s: float
    utc_offset_s: float  # local time minus UTC
    start_s: float  # monotonic
    end_s: float
    plan: str
    tiers_used: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    predicted_j: float
    price_j: float
    budget_j: float | None
    energy_j: float  # the ledger's, at the end
    energy_source: str
    power_mode: str | None
    finish_reason: str
    enforced_by: str | None
    decisions: SequenceLog | None = None

    @classmethod
    def of(
        cls, generation: Generation, table: EnergyTable, engine: str, offset: Callable[[float], float] | None = None
    ) -> SequenceRecord:
        """Return the record of a finished generation with these prices; `offset` gives local minus UTC at a time."""
        result, span, log = generation.result, generation.span, generation.log
        return cls(
            engine=engine,
            start_wall_s=span.start_wall_s,
            end_wall_s=span.end_wall_s,
            utc_offset_s=(offset or local_offset_s)(span.start_wall_s),
            start_s=span.start_s,
            end_s=span.end_s,
            plan=result.plan,
            tiers_used=result.tiers_used,
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            predicted_j=predicted_j(table, log),
            price_j=sum(decision.price_j for decision in log.decisions),
            budget_j=result.budget_j,
            energy_j=result.energy_j,
            energy_source=result.energy_source,
            power_mode=table.mode,
            finish_reason=result.finish_reason,
            enforced_by=result.enforced_by,
            decisions=log,
        )

    def to_json(self) -> dict[str, object]:
        """Return the record as a JSON object; `from_json` gives it back."""
        decisions = None if self.decisions is None else self.decisions.to_json()
        fields = {name: getattr(self, name) for name in self.__slots__}
        return plain({"schema": RECORD_SCHEMA, "kind": KIND, **fields, "decisions": decisions})

    @classmethod
    def from_json(cls, obj: object, where: str) -> SequenceRecord:
        """Read a record strictly; UsageError on unknown keys, wrong types or another schema."""
        fields = Fields(obj, where, UsageError)
        fields.text("kind", choices=[KIND])
        if (schema := fields.integer("schema")) != RECORD_SCHEMA:
            fields.fail(f"schema {schema} is not known; this eopc reads schema {RECORD_SCHEMA}.")
        raw = fields.raw("decisions")
        record = cls(
            engine=fields.text("engine"),
            start_wall_s=fields.number("start_wall_s"),
            end_wall_s=fields.number("end_wall_s"),
            utc_offset_s=fields.number("utc_offset_s"),
            start_s=fields.number("start_s"),
            end_s=fields.number("end_s"),
            plan=fields.text("plan"),
            tiers_used=fields.texts("tiers_used"),
            prompt_tokens=fields.integer("prompt_tokens", minimum=1),
            completion_tokens=fields.integer("completion_tokens", minimum=1),
            predicted_j=fields.number("predicted_j", minimum=0),
            price_j=fields.number("price_j", minimum=0),
            budget_j=fields.number_or_none("budget_j", minimum=0),
            energy_j=fields.number("energy_j", minimum=0),
            energy_source=fields.text("energy_source"),
            power_mode=fields.text_or_none("power_mode"),
            finish_reason=fields.text("finish_reason"),
            enforced_by=fields.text_or_none("enforced_by"),
            decisions=None if raw is None else SequenceLog.from_json(raw, f"{where}: decisions"),
        )
        fields.done()
        return record


def predicted_j(table: EnergyTable, log: SequenceLog) -> float:
    """Return the joules a meter should show for a sequence: every phase on the tier it ran on, without margin.

    For a sequence on one tier this is `TierEnergy.expected_j`.
    """
    n = log.start.request.prompt_tokens
    charged_j, done, last = 0.0, 0, table.tiers[0]
    for decision in log.decisions:
        if decision.action == "prefill":
            last = table.tiers[decision.tier]
            charged_j += last.prefill_j(n)
        elif decision.action == "step":
            last = table.tiers[decision.tier]
            charged_j += last.steps_j(n, done, decision.steps)
            done += decision.steps
    hull = table.calibration.hull if table.calibration else None
    inside = hull is None or hull.holds(n, done + 1)
    least_j = 0.0 if inside else min(charged_j, last.steps_j(n, 0, done + 1))
    return max(charged_j + last.uncredited_j, least_j)


def local_offset_s(wall_s: float) -> float:
    """Return local time minus UTC at a time, in s."""
    return float(time.localtime(wall_s).tm_gmtoff)


def append_record(path: Path, record: SequenceRecord) -> None:
    """Append one line, or none; other processes may append to the same file.

    Raises:
        UsageError: the file cannot be written, for example since the disk is full.
    """
    line = json.dumps(record.to_json()).encode() + b"\n"
    with appending(path) as descriptor:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full; half a line would spoil the next one
            os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def appending(path: Path) -> Iterator[int]:
    """Open a log to append to; with nothing done, this says before a sequence runs whether its record can be kept.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UsageError(f"the log {path} cannot be written ({error.strerror}). Free space, or give another.") from None


def read_records(lines: Iterable[str], where: str) -> tuple[SequenceRecord, ...]:
    """Read the lines of a log; UsageError names the line that is none. A torn last line is left out."""
    found = []
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in kept:
        try:
            obj = json.loads(line)
        except (ValueError, RecursionError):
            if number == kept[-1][0] and not line.endswith("\n"):
                break
            raise UsageError(f"{where}, line {number} is no JSON. Give the file that `eopc run --log` wrote.") from None
        found.append(SequenceRecord.from_json(obj, f"{where}, line {number}"))
    if not found:
        raise UsageError(f"{where} holds no sequence. Run some with `eopc run --log {where}`.")
    return tuple(found)
