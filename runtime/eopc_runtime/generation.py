"""A sequence while it runs: its events, and its result at the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from eopc_runtime.controller import Controller
from eopc_runtime.logprobs import TokenLogprobs
from eopc_runtime.sequence_log import SequenceLog

E_co = TypeVar("E_co", covariant=True)
R = TypeVar("R")


class Stepped(Iterator[E_co], Generic[E_co, R]):
    """Work in steps, from a generator that returns its result: iterate, then read `result`, or `close` it before."""

    def __init__(self, what: str, steps: Generator[E_co, None, R]) -> None:
        self._what = what  # it is called in errors
        self._steps = steps
        self._result: R | None = None

    def __next__(self) -> E_co:
        try:
            return next(self._steps)
        except StopIteration as stop:
            if stop.value is not None:
                self._result = stop.value
            raise

    @property
    def result(self) -> R:
        """What came of it, the rest run before; RuntimeError after `close`, or after an error ended it early."""
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError(f"the {self._what} was closed before it finished")
        return self._result

    def close(self) -> None:
        """End it now."""
        self._steps.close()


@dataclass(frozen=True, slots=True)
class Span:
    """When a sequence ran: by the session's monotonic clock, and by the wall clock in s since 1970 (UTC)."""

    start_s: float
    end_s: float
    start_wall_s: float
    end_wall_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token: the text that became certain with it, and the joules spent so far."""

    text: str
    token: int
    energy_j: float
    tier: str  # the tier that computed the token
    logprobs: TokenLogprobs | None = None  # where they were asked for


@dataclass(frozen=True, slots=True)
class Result:
    """A finished sequence; the fields are the keys of `eopc run --json`."""

    text: str
    tier: str  # the tier the decode began on
    plan: str
    tiers_used: tuple[str, ...]
    budget_j: float | None
    energy_j: float
    energy_source: str
    finish_reason: str  # stop | length | budget
    prompt_tokens: int
    completion_tokens: int  # an end-of-sequence token counts: it costs as much as any other
    ttft_s: float
    decode_tokens_per_s: float | None  # None when there was no decode step
    enforced_by: str | None  # meter | model: who kept the budget; None without one
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `eopc run --json`."""
        return {**asdict(self), "tiers_used": list(self.tiers_used), "warnings": list(self.warnings)}


class Generation(Stepped[Event, Result]):
    """The running sequence: iterate for events, then read `result` (which runs the rest if there is any)."""

    def __init__(
        self, steps: Generator[Event, None, Result], controller: Controller, times: Sequence[tuple[float, float]]
    ) -> None:
        super().__init__("sequence", steps)
        self._controller = controller
        self._times = times

    @property
    def next_tier(self) -> str:
        """The tier that the next step runs on; that of the last one when there is no next."""
        begun = bool(self._controller.decisions)
        return f"t{self._controller.tier if begun else self._controller.plan.prefill}"

    @property
    def spent_j(self) -> float:
        """Joules booked so far, those of a step that was granted and not yet run included."""
        return self._controller.ledger.spent_j

    @property
    def spent_by_phase_j(self) -> dict[str, float]:
        """The same by phase: prefill, decode, and metered for what a meter saw beyond the two."""
        return self._controller.ledger.by_phase

    @property
    def span(self) -> Span:
        """When the finished sequence ran; RuntimeError before its end."""
        if len(self._times) < 2:
            raise RuntimeError("the sequence has not ended")
        (start_s, start_wall_s), (end_s, end_wall_s) = self._times
        return Span(start_s, end_s, start_wall_s, end_wall_s)

    @property
    def log(self) -> SequenceLog:
        """What was seen and decided so far; the decisions follow from it (`SequenceLog.replay`)."""
        return SequenceLog.of(self._controller)
