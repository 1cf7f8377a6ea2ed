"""Power samples to joules: the trapezoid rule over (t, W) samples, with gaps left out and named.

For samples (t0, w0), (t1, w1) the interval contributes (t1 - t0) (w0 + w1) / 2 joules, clipped to the window
by linear interpolation. An interval longer than `max_gap_s` contributes nothing and counts as uncovered:
nobody knows what happened in it. A clock that steps backwards contributes nothing either, and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

# A time in s and the watts of each rail, always in the same order; nan where a rail was not read.
Sample = tuple[float, tuple[float, ...]]

# An interval longer than this many sampling periods is not integrated over.
MAX_GAP_PERIODS = 3


@dataclass(frozen=True, slots=True)
class Integral:
    """Joules per rail over the covered seconds between `start_s` and `end_s`."""

    start_s: float = -math.inf
    end_s: float = math.inf
    joules: tuple[float, ...] = ()
    covered_s: float = 0.0
    uncovered_s: float = 0.0  # in intervals that were too long
    gaps: int = 0
    backsteps: int = 0  # times the clock went backwards
    samples: int = 0  # inside the window
    last: Sample | None = None

    def extended(self, sample: Sample, max_gap_s: float) -> Integral:
        """Return the integral with one more sample; the time of a sample that repeats a time is ignored."""
        t1, watts1 = sample
        inside = self.start_s <= t1 <= self.end_s
        if self.last is None:
            return replace(self, joules=(0.0,) * len(watts1), samples=self.samples + inside, last=sample)
        t0, watts0 = self.last
        joules = self.joules or (0.0,) * len(watts1)
        if t1 == t0:
            return self
        if t1 < t0:
            return replace(self, backsteps=self.backsteps + 1, last=sample)
        low, high = max(t0, self.start_s), min(t1, self.end_s)
        counted = replace(self, samples=self.samples + inside, last=sample)
        if high <= low:
            return counted
        if t1 - t0 > max_gap_s:
            return replace(counted, uncovered_s=self.uncovered_s + (high - low), gaps=self.gaps + 1)
        middle = ((low + high) / 2 - t0) / (t1 - t0)  # the mean of a line over an interval is its middle
        parts = ((high - low) * (w0 + (w1 - w0) * middle) for w0, w1 in zip(watts0, watts1, strict=True))
        return replace(
            counted,
            joules=tuple(total + part for total, part in zip(joules, parts, strict=True)),
            covered_s=self.covered_s + (high - low),
        )


def integrate(
    samples: Iterable[Sample], max_gap_s: float, start_s: float = -math.inf, end_s: float = math.inf
) -> Integral:
    """Return the joules of samples between two times; give one sample before and after to cover the edges."""
    result = Integral(start_s, end_s)
    for sample in samples:
        result = result.extended(sample, max_gap_s)
    return result
