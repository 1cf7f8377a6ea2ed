"""Sequences against a tegrastats log: which part of the log belongs to which sequence, and its joules.

The log is in local time and, without an interval, as coarse as its printed clock: lines of one printed second are taken
as evenly spread over it, which may be wrong by up to a second, and so may both edges of every window. A sensor that
lags shows a sequence later than it ran; its window is moved by that lag. Windows go through the same checks as those of
a live meter: too short, gaps, all zero, stuck are reasons not to give a figure.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from eopc_runtime.errors import UsageError
from eopc_runtime.power.base import Sensor, Window
from eopc_runtime.power.integrate import Sample
from eopc_runtime.power.sampling import SampledMeter
from eopc_runtime.power.tegrastats_log import PowerLog
from eopc_runtime.sequence_record import SequenceRecord
from eopc_runtime.validation.compare import Checked

CLOCK_STEP_S = 0.5  # wall and monotonic clock may differ by so much over a sequence


@dataclass(frozen=True, slots=True)
class Timeline:
    """The total power of a log over wall-clock time (s since 1970, UTC), and what was assumed for it."""

    samples: tuple[Sample, ...]
    period_s: float
    rails: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def span_s(self) -> tuple[float, float]:
        """First and last time."""
        return self.samples[0][0], self.samples[-1][0]


def place_in_time(log: PowerLog, utc_offset_s: float, start_wall_s: float | None = None) -> Timeline:
    """Return the log's power over wall-clock time; UsageError when nothing tells the time of its lines.

    Args:
        utc_offset_s: local time minus UTC on the board that wrote the log.
        start_wall_s: when the first line was written (s since 1970, UTC); None takes the printed clock.
    """
    series = [(t, (sum(watts),)) for t, watts in log.series()]
    if log.time_source is None:
        raise UsageError("The log has no times: give --interval with the seconds between its lines.")
    if len(series) < 2:
        why = next((line.reason for line in log.lines if line.reason), "the lines come from different boards")
        raise UsageError(f"The log has {len(series)} usable lines of power, and no energy: {why}.")
    assumptions = []
    if start_wall_s is not None:
        origin_s = start_wall_s
        assumptions.append("the first line was written at --start")
    elif log.clock_first_s is not None:
        origin_s = log.clock_first_s - utc_offset_s
        assumptions.append(
            "the log and the sequences are of the same board: local time is "
            f"UTC{'+' if utc_offset_s >= 0 else '-'}{abs(utc_offset_s) / 3600:g} h"
        )
    else:
        raise UsageError(
            "The log's lines carry no clock: give --start with the time of the first line, and --interval."
        )
    if log.time_source == "clock":
        assumptions.append("the printed clock is 1 s coarse: the lines of a second are taken as evenly spread over it")
    steps = [b[0] - a[0] for a, b in pairwise(series) if b[0] > a[0]]
    if not steps:
        raise UsageError("All lines of the log have the same time.")
    samples = tuple((t + origin_s, watts) for t, watts in series)
    return Timeline(samples, statistics.median(steps), log.rails, tuple(assumptions))


def check_sequences(timeline: Timeline, records: Sequence[SequenceRecord], lag_s: float = 0.0) -> list[Checked]:
    """Return every sequence with its measured joules; one the log cannot tell is unverified."""
    return [_check(timeline, record, i, lag_s) for i, record in enumerate(records, start=1)]


def measure_span(timeline: Timeline, start_s: float, end_s: float) -> Window:
    """Return the log's window between two times, checked like a live meter's."""
    times = [t for t, _ in timeline.samples]
    first = max(bisect_right(times, start_s) - 1, 0)
    last = min(bisect_left(times, end_s) + 1, len(times))
    return _LogMeter(timeline, timeline.samples[first:last]).window(start_s, end_s)


def _check(timeline: Timeline, record: SequenceRecord, number: int, lag_s: float) -> Checked:
    window = measure_span(timeline, record.start_wall_s + lag_s, record.end_wall_s + lag_s)
    notes = list(window.notes)
    first_s, last_s = timeline.span_s
    if record.end_wall_s + lag_s < first_s or record.start_wall_s + lag_s > last_s:
        notes = ["it ran outside the time of the log"]
    step_s = (record.end_wall_s - record.start_wall_s) - (record.end_s - record.start_s)
    stepped = abs(step_s) > CLOCK_STEP_S
    if stepped:
        notes.append(f"the wall clock was set by {step_s:+.1f} s meanwhile")
    verified = window.verified and not stepped
    return Checked(
        name=str(number),
        plan=record.plan,
        prompt_tokens=record.prompt_tokens,
        new_tokens=record.completion_tokens,
        predicted_j=record.predicted_j,
        price_j=record.price_j,
        budget_j=record.budget_j,
        measured_j=window.energy_j if verified else None,
        seconds=window.duration_s,
        samples=window.samples,
        verified=verified,
        others_share=None,
        notes=tuple(notes),
    )


class _LogMeter(SampledMeter):
    """A meter that is fed from a log, so that its windows are judged by the same rules."""

    def __init__(self, timeline: Timeline, samples: Sequence[Sample]) -> None:
        self._now_s = 0.0
        super().__init__(Sensor("tegrastats log", ("total",)), timeline.period_s, clock=lambda: self._now_s)
        self._samples = list(samples)

    def window(self, start_s: float, end_s: float) -> Window:
        """Return the window between two times."""
        self._feed_until(start_s)
        self._now_s = start_s
        self.begin("log")
        self._feed_until(end_s)
        self._now_s = end_s
        return self.end("log")

    def _feed_until(self, time_s: float) -> None:
        """Feed the samples up to a time."""
        while self._samples and self._samples[0][0] <= time_s:
            t, watts = self._samples.pop(0)
            self.feed(t, {"total": watts[0]})

    def _cover(self, end_s: float) -> None:
        """Feed the sample after the end, where there is one."""
        if self._samples:
            t, watts = self._samples.pop(0)
            self.feed(t, {"total": watts[0]})
