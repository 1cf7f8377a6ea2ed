"""Meters that sample power: windows over a stream of readings, and the thread that polls a sensor.

`SampledMeter` integrates what it is fed (see integrate.py) and finds out when that cannot be trusted: too
short, gaps, constant zero, readings that never change, a clock that steps back, refused readings. (One rail
of several may stay still for minutes, a CPU rail at 0 W for instance; only all of them together are stuck.)
`PolledMeter` feeds itself from a function at a fixed rate, and takes a reading of its own at both ends of a
window, so that the ends are sharp.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from eopc_runtime.errors import MeterLostError
from eopc_runtime.power.base import MIN_COVERAGE, MIN_SAMPLES, MIN_WINDOW_S, Meter, Sensor, Window, finish
from eopc_runtime.power.integrate import MAX_GAP_PERIODS, Integral, Sample

RATE_HZ = 20.0  # of sysfs and NVML power; tegrastats has its own

# A sensor under load does not stay still. The longest natural run of unchanged readings in the public logs is
# 4.3 s (39 lines at 9.1 Hz), on an idle board.
STUCK_WINDOW_S = 5.0  # nothing changed in the whole window, and for this long until its end
STUCK_RUN_S = 10.0  # a stretch inside a window that saw changes before or after

LOST_AFTER_S = 1.0  # without a reading, at least; ten periods where that is longer


class SensorError(Exception):
    """One reading failed; the message says why. That reading is missing, nothing more."""


@dataclass(slots=True)
class _Open:
    """An open window."""

    integral: Integral
    refused: dict[str, int] = field(default_factory=dict)  # reason -> readings
    changed: bool = False
    nonzero: bool = False
    run_s: float = 0.0  # longest stretch without a change


class SampledMeter(Meter):
    """Windows over readings that arrive through `feed`, from any thread."""

    def __init__(
        self,
        sensor: Sensor,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
        idle_w: float | None = None,
    ) -> None:
        self.sensor, self.idle_w, self.period_s = sensor, idle_w, period_s
        self.max_gap_s = MAX_GAP_PERIODS * period_s
        self.lost_after_s = max(LOST_AFTER_S, 10 * period_s)
        self._clock = clock
        self._windows: dict[str, _Open] = {}
        self._last: Sample | None = None
        self._run_start_s, self._run_length = math.inf, 0  # since when nothing changed, and how many readings
        self._lost: str | None = None
        self._lock = threading.Condition(threading.RLock())

    def feed(self, t_s: float, watts: Mapping[str, float]) -> None:
        """Take one reading; a rail of the total that is missing or negative refuses it, a sub-rail does not."""
        values = [watts.get(rail, math.nan) for rail in (*self.sensor.rails, *self.sensor.sub_rails)]
        for rail, value in zip(self.sensor.rails, values, strict=False):
            if not (math.isfinite(value) and value >= 0):
                self.refuse(f"{rail} reads {value:.3g} W" if rail in watts else f"{rail} is missing")
                return
        sample = (t_s, tuple(value if value >= 0 else math.nan for value in values))
        with self._lock:
            same = self._last is not None and self._total(self._last) == self._total(sample)
            if not same:
                self._run_start_s, self._run_length = t_s, 0
            self._run_length += 1
            for window in self._windows.values():
                self._count(window, sample, same)
            self._last = sample
            self._lock.notify_all()

    def refuse(self, reason: str, count: int = 1) -> None:
        """Count readings that could not be used."""
        with self._lock:
            for window in self._windows.values():
                window.refused[reason] = window.refused.get(reason, 0) + count

    def lose(self, reason: str) -> None:
        """Say that no more readings will come."""
        with self._lock:
            self._lost = self._lost or reason
            self._lock.notify_all()

    def begin(self, name: str) -> None:
        """Open a window now."""
        with self._lock:
            if name in self._windows:
                raise ValueError(f'the window "{name}" is open already')
            self._windows[name] = _Open(Integral(start_s=self._clock(), last=self._last))

    def end(self, name: str) -> Window:
        """Close a window now; waits for the reading that covers its end, three periods at most."""
        with self._lock:
            window = self._window(name)
            end_s = self._clock()
            window.integral = replace(window.integral, end_s=end_s)
        self._cover(end_s)
        with self._lock:
            del self._windows[name]
            return self._finished(name, window)

    def energy_so_far_j(self, name: str) -> float:
        """Joules until now: integrated to the last reading, whose power is taken to hold until now.

        Raises MeterLostError when readings stopped, have gaps, or do not change: then joules are missing.
        """
        with self._lock:
            window, now = self._window(name), self._clock()
            integral = window.integral
            if self._lost:
                self._raise_lost(self._lost)
            if self._last is None:
                self._raise_lost("there was no reading yet")
            last_s = max(self._last[0], integral.start_s)
            if now - last_s > self.lost_after_s:
                self._raise_lost(f"no reading for {now - last_s:.1f} s")
            open_s = last_s - integral.start_s
            missing_s = open_s - integral.covered_s
            if integral.backsteps:
                self._raise_lost("the clock went backwards")
            if missing_s > max(self.max_gap_s, (1 - MIN_COVERAGE) * open_s):
                self._raise_lost(f"{missing_s:.2f} s of the last {open_s:.2f} s are not covered by readings")
            still_s = last_s - max(self._run_start_s, integral.start_s)
            if still_s >= STUCK_WINDOW_S and self._run_length >= MIN_SAMPLES:
                self._raise_lost(f"no reading changed for {still_s:.1f} s")
            held_w = sum(self._total(self._last))
            return sum(integral.joules[: len(self.sensor.rails)]) + held_w * max(now - last_s, 0.0)

    def close(self) -> None:
        """Forget open windows."""
        with self._lock:
            self._windows.clear()

    def _total(self, sample: Sample) -> tuple[float, ...]:
        """The watts of the rails that are summed."""
        return sample[1][: len(self.sensor.rails)]

    def _count(self, window: _Open, sample: Sample, same: bool) -> None:
        """Add a reading to a window that is open, or waits for the reading after its end."""
        first = window.integral.last is None
        window.integral = window.integral.extended(sample, self.max_gap_s)
        if not window.integral.start_s <= sample[0] <= window.integral.end_s:
            return
        window.nonzero = window.nonzero or any(self._total(sample))
        window.changed = window.changed or not (same or first)
        if self._run_length >= MIN_SAMPLES:
            window.run_s = max(window.run_s, sample[0] - max(self._run_start_s, window.integral.start_s))

    def _cover(self, end_s: float) -> None:
        """Wait until a reading covers `end_s`."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._lost or (self._last is not None and self._last[0] >= end_s), timeout=self.max_gap_s
            )

    def _window(self, name: str) -> _Open:
        if name not in self._windows:
            raise ValueError(f'there is no open window "{name}"')
        return self._windows[name]

    def _raise_lost(self, reason: str) -> NoReturn:
        raise MeterLostError(f"the {self.sensor.name} meter is lost: {reason}. Its joules cannot be relied on.")

    def _finished(self, name: str, window: _Open) -> Window:
        integral = window.integral
        faults = self._faults(window)
        remarks = []
        if window.refused and "refused" not in faults:
            remarks.append(_refusals(window.refused))
        if integral.gaps and "gaps" not in faults:
            remarks.append(f"{integral.gaps} gap(s), {integral.uncovered_s:.2f} s together, are not covered")
        rails = (*self.sensor.rails, *self.sensor.sub_rails)
        return finish(
            self,
            name,
            dict(zip(rails, integral.joules, strict=True)) if integral.joules else {},
            duration_s=max(integral.end_s - integral.start_s, 0.0),
            covered_s=integral.covered_s,
            samples=integral.samples,
            faults=faults,
            remarks=remarks,
        )

    def _faults(self, window: _Open) -> dict[str, str]:
        integral, faults = window.integral, dict[str, str]()
        duration_s = integral.end_s - integral.start_s
        if self._lost:
            faults["lost"] = self._lost
        if duration_s < MIN_WINDOW_S or integral.samples < MIN_SAMPLES:
            faults["short"] = (
                f"{duration_s:.2f} s and {integral.samples} samples; "
                f"at least {MIN_WINDOW_S:.0f} s and {MIN_SAMPLES} samples are needed"
            )
        missing_s = duration_s - integral.covered_s
        if missing_s > max((1 - MIN_COVERAGE) * duration_s, 1e-9):
            faults["gaps"] = f"{missing_s:.2f} s of {duration_s:.2f} s are not covered by readings"
            if window.refused:
                faults["refused"] = _refusals(window.refused)
        if integral.backsteps:
            faults["clock"] = f"the clock went backwards {integral.backsteps} time(s)"
        if integral.samples and not window.nonzero:
            faults["zero"] = "every reading was 0 W"
        elif (still_s := self._still_s(window)) > 0:
            faults["stuck"] = f"no reading changed for {still_s:.1f} s: is the sensor stuck?"
        return faults

    def _still_s(self, window: _Open) -> float:
        """Seconds without a change that are too many, or 0."""
        if not window.changed and window.integral.last and self._run_length >= MIN_SAMPLES:
            still_s = window.integral.last[0] - self._run_start_s
            if still_s >= STUCK_WINDOW_S:
                return still_s
        return window.run_s if window.run_s >= STUCK_RUN_S else 0.0


def _refusals(refused: Mapping[str, int]) -> str:
    return "; ".join(f"{n} reading(s) refused: {reason}" for reason, n in refused.items())


class PolledMeter(SampledMeter):
    """Polls `read` (watts by rail; SensorError or OSError when it fails) from a thread of its own."""

    def __init__(
        self,
        sensor: Sensor,
        read: Callable[[], Mapping[str, float]],
        *,
        rate_hz: float = RATE_HZ,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
        idle_w: float | None = None,
    ) -> None:
        super().__init__(sensor, 1 / rate_hz, clock, idle_w)
        self._read = read
        self._reading = threading.Lock()  # one reading at a time, so that they arrive in the order of their times
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._poll_until_closed, name=f"eopc-{sensor.name}", daemon=True)
            self._thread.start()

    def poll(self) -> None:
        """Take one reading now."""
        with self._reading:
            try:
                watts = self._read()
            except SensorError as error:
                self.refuse(str(error))
            except OSError as error:
                self.refuse(f"{error.filename or 'the sensor'}: {error.strerror or error}")
            else:
                self.feed(self._clock(), watts)

    def begin(self, name: str) -> None:
        """Take a reading and open a window."""
        self.poll()
        super().begin(name)

    def close(self) -> None:
        """Stop polling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10 * self.period_s + 1)
        super().close()

    def _cover(self, end_s: float) -> None:
        """Take the reading that covers the end of a window."""
        self.poll()

    def _poll_until_closed(self) -> None:
        due_s = time.monotonic()  # when to poll is not part of the measurement, so this is the real clock
        try:
            while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
                due_s = max(due_s + self.period_s, time.monotonic())
                self.poll()
        except Exception as error:  # whatever it is, the meter must not go silent
            self.lose(f"{type(error).__name__}: {error}")
