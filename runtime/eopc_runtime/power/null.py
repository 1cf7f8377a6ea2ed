"""The null meter: for a machine without any, so that callers need no special case. It never gives a number."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from eopc_runtime.errors import MeterLostError
from eopc_runtime.power.base import Meter, Sensor, Window, finish


class NullMeter(Meter):
    """Windows without joules; `energy_so_far_j` raises MeterLostError at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.sensor, self.idle_w = Sensor("none", ()), None
        self._clock = clock
        self._started_s: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Open a window now."""
        if name in self._started_s:
            raise ValueError(f'the window "{name}" is open already')
        self._started_s[name] = self._clock()

    def end(self, name: str) -> Window:
        """Close a window; it is unverified, and its joules are None."""
        if name not in self._started_s:
            raise ValueError(f'there is no open window "{name}"')
        duration_s = max(self._clock() - self._started_s.pop(name), 0.0)
        faults = {"none": "there is no power meter"}
        return finish(self, name, {}, duration_s=duration_s, covered_s=0.0, samples=0, faults=faults)

    def energy_so_far_j(self, name: str) -> NoReturn:
        """There is no energy to report."""
        raise MeterLostError("there is no power meter. `eopc doctor` says what is missing.")

    def close(self) -> None:
        """Forget open windows."""
        self._started_s.clear()
