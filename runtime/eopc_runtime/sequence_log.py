"""The log of one sequence: what its controller was told and what it decided, enough to decide it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from eopc_runtime.admission import Terms
from eopc_runtime.controller import Controller, Decision, Seen, Start, replay
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields, plain
from eopc_runtime.policy import Request
from eopc_runtime.reconcile import Guard

LOG_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """Start, observations and decisions of one sequence; times are those of the session's monotonic clock."""

    start: Start
    seen: tuple[Seen, ...]
    decisions: tuple[Decision, ...]

    @classmethod
    def of(cls, controller: Controller) -> SequenceLog:
        """Return the log of a controller so far."""
        return cls(controller.start, tuple(controller.seen), tuple(controller.decisions))

    def replay(self, table: EnergyTable) -> tuple[Decision, ...]:
        """Decide the sequence again with these prices; with those it ran on, the decisions are the logged ones."""
        return replay(table, self.start, self.seen)

    def to_json(self) -> dict[str, object]:
        """Return the log as a JSON object; `from_json` gives the same log back."""
        return plain({"schema": LOG_SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, obj: object, where: str = "sequence log") -> SequenceLog:
        """Read a log strictly; UsageError on unknown keys, wrong types or another schema."""
        fields = Fields(obj, where, UsageError)
        if (schema := fields.integer("schema")) != LOG_SCHEMA:
            fields.fail(f"schema {schema} is not known; this eopc reads schema {LOG_SCHEMA}.")
        log = cls(
            start=_read_start(fields.child("start")),
            seen=tuple(Seen(*row) for row in _rows(fields, "seen", (_number, _number_or_none, _text_or_none, _count))),
            decisions=tuple(
                Decision(*row) for row in _rows(fields, "decisions", (_text, _count, _count, _number, _number))
            ),
        )
        fields.done()
        return log


def _read_start(fields: Fields) -> Start:
    request, terms = fields.child("request"), fields.child("terms")
    start = Start(
        request=Request(request.integer("prompt_tokens"), request.integer("max_new_tokens")),
        budget_j=fields.number_or_none("budget_j", minimum=0),
        terms=Terms(_flag(terms, "strict"), terms.number("safety"), terms.number("drift")),
        tier=fields.integer_or_none("tier", minimum=0),
        metered=_flag(fields, "metered"),
        guard=Guard.from_fields(fields.child("guard")),
    )
    for record in (request, terms, fields):
        record.done()
    return start


def _flag(fields: Fields, key: str) -> bool:
    value = fields.raw(key)
    if not isinstance(value, bool):
        fields.fail(f'"{key}" must be true or false.')
    return value


def _rows(fields: Fields, key: str, checks: tuple[Callable[[object], bool], ...]) -> list[list[Any]]:
    """Return the rows of a list whose columns pass these checks."""
    rows = fields.raw(key)
    if not isinstance(rows, list):
        fields.fail(f'"{key}" must be a list.')
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(checks):
            fields.fail(f'"{key}[{i}]" must be a list of {len(checks)} values.')
        for j, (check, value) in enumerate(zip(checks, row, strict=True)):
            if not check(value):
                fields.fail(f'"{key}[{i}][{j}]" cannot be {value!r}.')
    return rows


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number_or_none(value: object) -> bool:
    return value is None or _number(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: object) -> bool:
    return isinstance(value, str)


def _text_or_none(value: object) -> bool:
    return value is None or _text(value)
