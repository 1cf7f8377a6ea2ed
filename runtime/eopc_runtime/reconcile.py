"""What a live meter has shown of a running sequence, and the most it can have missed.

A meter lags: at time t it has seen what was spent until t - lag. What came after is bounded by the power it
saw, not by the prices, since a device that slows down spends its watts for longer. Comparing what it saw with
what was predicted gives the drift, an exponentially weighted mean of measured over predicted joules.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass

from eopc_runtime.jsonfields import Fields


@dataclass(frozen=True, slots=True)
class Guard:
    """How a live meter is read; seconds, and the defaults are those of an AGX Orin's INA3221.

    lag_s: what is spent shows this much later (0.35 s over 25 public engine sets). reconcile_s: the longest time
    between two readings, and the shortest window for the drift. settle_s: covered time before power is known.
    surge: the factor by which power may rise unseen. memory_s: time constant of the drift. stuck_s: a reading that
    does not move for so long is no reading.
    """

    lag_s: float = 0.35
    reconcile_s: float = 1.0
    settle_s: float = 0.3
    surge: float = 1.5
    memory_s: float = 2.0
    stuck_s: float = 5.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v >= 0 for v in asdict(self).values()) or self.surge < 1 or not self.memory_s:
            raise ValueError(f"a guard has times of 0 s or more and a surge of 1 or more, not {self}")

    @classmethod
    def from_fields(cls, record: Fields) -> Guard:
        """Read a guard strictly."""
        guard = cls(**{name: record.number(name, minimum=0) for name in asdict(cls())})
        record.done()
        return guard


class MeterWatch:
    """Compares the readings of one sequence with its predictions; `lost` says why it can no longer be trusted."""

    def __init__(self, guard: Guard, start_s: float, drift: float) -> None:
        self.guard = guard
        self.drift = drift
        self.worst_drift = drift
        self.windows = 0  # that the drift was measured over
        self.lost: str | None = None
        self.watts: float | None = None  # an upper estimate of the present power, None before it is known
        self._start_s = self._read_s = self._moved_s = start_s
        self._metered_j = 0.0
        self._covered_s = start_s  # the meter has shown what was spent until here
        self._booked: deque[tuple[float, float]] = deque()  # (time, joules predicted before it)
        self._predicted_j = 0.0
        self._anchor = (start_s, 0.0, 0.0)  # start of the present window: time, metered, predicted

    def book(self, time_s: float, predicted_j: float) -> None:
        """Note that work predicted to cost so much begins now; what was booked before has ended."""
        self._booked.append((time_s, self._predicted_j))
        self._predicted_j += predicted_j

    def wants_reading(self, time_s: float, left_j: float) -> bool:
        """True if a reading is due: the last one is old, power is not yet known, or the budget is nearly spent.

        Nearly: what is left would not last twice as long as the meter can be behind.
        """
        guard = self.guard
        if self.lost is not None or time_s - self._start_s < guard.lag_s:
            return False
        if self.watts is None or time_s - self._read_s >= guard.reconcile_s:
            return True
        return left_j < 2 * self.watts * (guard.lag_s + guard.reconcile_s)

    def read(self, time_s: float, metered_j: float) -> None:
        """Take the energy the meter shows so far; a reading that cannot be ends the trust in it."""
        if not math.isfinite(metered_j):
            self.lose(time_s, f"it reads {metered_j} J")
        elif metered_j < self._metered_j:
            self.lose(time_s, f"it went back from {self._metered_j:.6g} to {metered_j:.6g} J")
        elif metered_j == self._metered_j and time_s - self._moved_s >= self.guard.stuck_s:
            self.lose(time_s, f"it has read {metered_j:.6g} J for {time_s - self._moved_s:.3g} s")
        if self.lost is not None:
            return
        if metered_j > self._metered_j:
            self._moved_s = time_s
        self._read_s, self._metered_j = time_s, metered_j
        self._covered_s = max(time_s - self.guard.lag_s, self._start_s)
        while len(self._booked) > 1 and self._booked[1][0] <= self._covered_s:
            self._booked.popleft()
        self._update()

    def trusted(self, time_s: float) -> bool:
        """True if the meter answers, has seen enough to know the power, and has moved of late."""
        return self.lost is None and self.watts is not None and time_s - self._moved_s < self.guard.stuck_s / 2

    def lose(self, time_s: float, reason: str) -> None:
        """Stop trusting the meter; the first reason stands."""
        self.lost = self.lost or f"{reason}, {time_s - self._start_s:.3g} s into the sequence"

    def likely_j(self) -> float:
        """Joules spent so far: what was seen, and the rest as predicted, raised by the drift."""
        unseen_j = self._predicted_j - self._predicted_at(self._covered_s)
        return self._metered_j + unseen_j * max(self.drift, 1.0)

    def bound_j(self, time_s: float) -> float:
        """Joules that can have been spent by now: what was seen, and the rest at the power seen, with a surge."""
        if self.watts is None or self.lost is not None:
            return 0.0
        return self._metered_j + self.guard.surge * self.watts * (time_s - self._covered_s)

    def _update(self) -> None:
        """Move power and drift on, once enough time is covered for each."""
        covered = self._covered_s - self._start_s
        if covered < self.guard.settle_s or covered <= 0:
            return
        mean_w = self._metered_j / covered
        if mean_w <= 0:
            return  # nothing was seen, which is not the same as nothing spent
        time_s, metered_j, predicted_j = self._anchor
        window = self._covered_s - time_s
        if window < self.guard.reconcile_s:
            self.watts = max(mean_w, self.watts or 0.0)
            return
        predicted = self._predicted_at(self._covered_s)
        spent_j = self._metered_j - metered_j
        self.watts = max(mean_w, spent_j / window)
        if predicted > predicted_j:
            weight = 1 - math.exp(-window / self.guard.memory_s)
            self.drift += weight * (spent_j / (predicted - predicted_j) - self.drift)
            self.worst_drift = max(self.worst_drift, self.drift)
            self.windows += 1
        self._anchor = (self._covered_s, self._metered_j, predicted)

    def _predicted_at(self, time_s: float) -> float:
        """Joules predicted to be spent by a time: linear between bookings, the last of which ended with the reading."""
        if not self._booked:
            return 0.0
        (t0, j0), (t1, j1) = self._booked[0], (self._read_s, self._predicted_j)
        if len(self._booked) > 1:
            t1, j1 = self._booked[1]
        return j0 if time_s <= t0 or t1 <= t0 else j0 + (j1 - j0) * min((time_s - t0) / (t1 - t0), 1.0)
