"""One visit: a cell on a tier, repeated until its windows are long enough, and joules per sequence out of each.

A meter that samples gets one window around several sequences in a row, after an unmeasured lead-in of the same work:
a sensor that lags then shows this cell's power from the first sample on, and what it misses at the end it has taken
at the start. A meter that only counts time (the proxy) gets a window per sequence, so that the median over them can
leave a disturbed one out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from eopc_runtime.calibration.workload import Workload
from eopc_runtime.energy_model.folds import Cell
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.power.base import MEASURED, MIN_WINDOW_S, Meter, Window

METER_WINDOW_S, PROXY_WINDOW_S = 3.0, 1.0
LEAD_IN_S = 1.0  # about three times the lag of an Orin's sensor
ATTEMPTS = 3  # at a window that turns out unverified
LONGER = 1.5  # a window found too short is repeated with so many times the sequences
WINDOW = "visit"


@dataclass(frozen=True, slots=True)
class Windowing:
    """How to measure: seconds a visit lasts at least, seconds of lead-in, one window for all or one per sequence."""

    seconds: float
    lead_in_s: float
    each: bool

    @classmethod
    def of(cls, meter: Meter, seconds: float | None = None) -> Windowing:
        """Return what suits a meter; UsageError for windows shorter than it can resolve."""
        if meter.sensor.source != MEASURED:
            return cls(PROXY_WINDOW_S if seconds is None else seconds, 0.0, True)
        if seconds is not None and seconds < MIN_WINDOW_S:
            raise UsageError(
                f"--seconds-per-window is {seconds:g}, but {meter.sensor.name} resolves no window below "
                f"{MIN_WINDOW_S:g} s. Give {MIN_WINDOW_S:g} or more; 3 and more are better."
            )
        return cls(METER_WINDOW_S if seconds is None else seconds, LEAD_IN_S, False)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the windows of one visit gave: joules per sequence each, sequences per window, total time and samples."""

    energy_j: tuple[float, ...]
    idle_subtracted_j: tuple[float, ...] | None
    repeats: int
    seconds: float
    samples: int


def measure_cell(
    meter: Meter, work: Workload, cell: Cell, how: Windowing, clock: Callable[[], float] = time.monotonic
) -> Reading:
    """Return the joules of one sequence of a cell; DeviceError when the meter cannot tell them in three attempts."""
    reading, window = attempt_cell(meter, work, cell, how, clock)
    for _ in range(ATTEMPTS - 1):
        if reading is not None:
            break
        if "lost" in window.faults:
            break
        if "short" in window.faults:
            how = replace(how, seconds=how.seconds * LONGER)
        reading, window = attempt_cell(meter, work, cell, how, clock)
    if reading is None:
        raise DeviceError(
            f"The {meter.sensor.name} meter gave no usable window for {cell[0]} + {cell[1]} tokens: "
            f"{'; '.join(window.notes)}. What was measured before is kept: mend the meter, or choose another with "
            "--meter, and run the command again."
        )
    return reading


def attempt_cell(
    meter: Meter, work: Workload, cell: Cell, how: Windowing, clock: Callable[[], float]
) -> tuple[Reading | None, Window]:
    """Measure once; without a reading the window says why."""
    work.lead_in(cell, how.lead_in_s, clock)
    start_s = clock()
    windows: list[Window] = []
    repeats = 0
    while True:
        if how.each or repeats == 0:
            meter.begin(WINDOW)
        work.sequence(cell)
        repeats += 1
        enough = clock() - start_s >= how.seconds
        if how.each or enough:
            windows.append(meter.end(WINDOW))
        if enough:
            break
    for window in windows:
        if window.energy_j is None or not (math.isfinite(window.energy_j) and window.energy_j > 0):
            return None, window
    return _reading(windows, 1 if how.each else repeats), windows[-1]


def _reading(windows: list[Window], repeats: int) -> Reading:
    subtracted = [w.energy_idle_subtracted_j for w in windows]
    known = [j / repeats for j in subtracted if j is not None]
    return Reading(
        energy_j=tuple(w.energy_j / repeats for w in windows if w.energy_j is not None),
        idle_subtracted_j=tuple(known) if len(known) == len(windows) else None,
        repeats=repeats,
        seconds=sum(w.duration_s for w in windows),
        samples=sum(w.samples for w in windows),
    )
