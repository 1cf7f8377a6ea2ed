"""Meters that read an energy counter: the joules of a window are a difference of two readings.

A thread reads the counter about once a second, so that a counter that wraps is followed through long windows.
A counter that goes backwards without a known range, jumps, or does not move makes its windows unverified.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from eopc_runtime.errors import MeterLostError
from eopc_runtime.power.base import MIN_WINDOW_S, Meter, Sensor, Window, finish
from eopc_runtime.power.sampling import SensorError

TICK_S = 1.0
STILL_S = 2.0  # counters are updated every 1 ms (RAPL) to 100 ms (NVML): this long without a change is a fault

# Nothing that has such a counter draws more (largest module today about 2.7 kW); above it, it was reset.
CEILING_W = 5000.0


@dataclass(slots=True)
class _Open:
    """An open window: its start, and what the counters stood at then."""

    start_s: float
    start_j: Mapping[str, float]
    faults: dict[str, str] = field(default_factory=dict)
    reads: int = 1


class CounterMeter(Meter):
    """Windows over `read`, which returns a counter in J per rail (SensorError or OSError when it fails).

    `ranges_j` says where a counter wraps; a rail without one never does. `suspicion` is a reason to trust no
    window of this counter.
    """

    def __init__(
        self,
        sensor: Sensor,
        read: Callable[[], Mapping[str, float]],
        *,
        ranges_j: Mapping[str, float] | None = None,
        suspicion: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
        idle_w: float | None = None,
    ) -> None:
        self.sensor, self.idle_w = sensor, idle_w
        self._read, self._clock = read, clock
        self._ranges_j = dict(ranges_j or {})
        self._suspicion = suspicion
        self._windows: dict[str, _Open] = {}
        self._raw: Mapping[str, float] | None = None
        self._read_s = self._moved_s = -math.inf
        self._sum_j: dict[str, float] = dict.fromkeys((*sensor.rails, *sensor.sub_rails), 0.0)
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._tick_until_closed, name=f"eopc-{sensor.name}", daemon=True)
            self._thread.start()

    def tick(self) -> str | None:
        """Read the counters now; return why that failed, or None."""
        with self._lock:
            try:
                raw = self._read()
            except SensorError as error:
                return str(error)
            except OSError as error:
                return f"{error.filename or 'the counter'}: {error.strerror or error}"
            now = self._clock()
            if self._raw is not None:
                self._add(raw, self._raw, now - self._read_s)
            if raw != self._raw:
                self._moved_s = now
            for window in self._windows.values():
                still_s = now - max(self._moved_s, window.start_s)
                if still_s > STILL_S:
                    window.faults.setdefault("stuck", f"the energy counter did not move for more than {STILL_S:.0f} s")
            self._raw, self._read_s = raw, now
            for window in self._windows.values():
                window.reads += 1
            return None

    def begin(self, name: str) -> None:
        """Read the counters and open a window; it is unverified when they cannot be read."""
        with self._lock:
            if name in self._windows:
                raise ValueError(f'the window "{name}" is open already')
            failed = self.tick()
            window = _Open(self._clock() if failed else self._read_s, dict(self._sum_j))
            if failed:
                window.faults["lost"] = f"not read at its start: {failed}"
            self._windows[name] = window

    def end(self, name: str) -> Window:
        """Read the counters and close a window."""
        with self._lock:
            window = self._window(name)
            failed = self.tick()
            end_s = self._clock() if failed else self._read_s
            del self._windows[name]
            faults = dict(window.faults)
            if failed:
                faults["lost"] = f"not read at its end: {failed}"
            duration_s = end_s - window.start_s
            joules = {rail: self._sum_j[rail] - start for rail, start in window.start_j.items()}
            if duration_s < MIN_WINDOW_S:
                faults["short"] = f"{duration_s:.2f} s; a counter needs at least {MIN_WINDOW_S:.0f} s"
            if not any(joules[rail] for rail in self.sensor.rails):
                faults.setdefault("zero", "the energy counter did not move")
            if self._suspicion:
                faults["suspect"] = self._suspicion
            return finish(
                self,
                name,
                joules,
                duration_s=max(duration_s, 0.0),
                covered_s=0.0 if "lost" in faults else max(duration_s, 0.0),
                samples=window.reads,
                faults=faults,
            )

    def energy_so_far_j(self, name: str) -> float:
        """Joules of an open window until now.

        Raises MeterLostError when the counter cannot be read, jumped, or has not moved for two seconds.
        """
        with self._lock:
            window = self._window(name)
            failed = self.tick()
            reason = failed or next(iter(window.faults.values()), None) or self._suspicion
            if reason is not None:
                raise MeterLostError(f"the {self.sensor.name} meter is lost: {reason}. Its joules cannot be relied on.")
            return sum(self._sum_j[rail] - window.start_j[rail] for rail in self.sensor.rails)

    def close(self) -> None:
        """Stop reading and forget open windows."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * TICK_S)
        with self._lock:
            self._windows.clear()

    def _add(self, raw: Mapping[str, float], before: Mapping[str, float], elapsed_s: float) -> None:
        """Add what each counter gained; a gain that cannot be is a fault of every open window."""
        if elapsed_s < 0:
            self._fault("clock", "the clock went backwards")
        for rail, value in raw.items():
            gain_j, range_j = value - before[rail], self._ranges_j.get(rail)
            if gain_j < 0 and range_j is None:
                self._fault("refused", f"the counter of {rail} went backwards by {-gain_j:.3g} J")
                continue
            if gain_j < 0 and range_j is not None:
                gain_j += range_j
            if range_j is not None and elapsed_s * CEILING_W >= range_j:
                self._fault("gaps", f"{rail} was not read for {elapsed_s:.0f} s; it may have wrapped more than once")
            # the second allows for a counter that is updated later than it is read
            if gain_j < 0 or gain_j > CEILING_W * (max(elapsed_s, 0.0) + 1):
                self._fault("refused", f"the counter of {rail} jumped by {gain_j:.3g} J in {elapsed_s:.2f} s")
                continue
            self._sum_j[rail] += gain_j

    def _fault(self, name: str, text: str) -> None:
        for window in self._windows.values():
            window.faults.setdefault(name, text)

    def _window(self, name: str) -> _Open:
        if name not in self._windows:
            raise ValueError(f'there is no open window "{name}"')
        return self._windows[name]

    def _tick_until_closed(self) -> None:
        try:
            while not self._stop.wait(TICK_S):
                self.tick()
        except Exception as error:  # whatever it is, the meter must not go silent
            with self._lock:
                self._fault("lost", f"{type(error).__name__}: {error}")
