"""The proxy meter: time x an assumed power. It ranks; it measures nothing, and every record says `proxy`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from eopc_runtime.errors import UsageError
from eopc_runtime.power.base import PROXY, Meter, Sensor, Window, finish


class ProxyMeter(Meter):
    """Charges `watts` for every second of a window. UsageError when the watts are no positive number."""

    def __init__(self, watts: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not (math.isfinite(watts) and watts > 0):
            raise UsageError(f"the assumed power is {watts} W; give a positive number of watts.")
        self.watts, self.idle_w = watts, None
        remark = f"time x {watts:g} W, an assumed power: nothing was measured"
        self.sensor = Sensor("proxy", ("time",), source=PROXY, remarks=(remark,), details={"watts": f"{watts:g}"})
        self._clock = clock
        self._started_s: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Open a window now."""
        if name in self._started_s:
            raise ValueError(f'the window "{name}" is open already')
        self._started_s[name] = self._clock()

    def end(self, name: str) -> Window:
        """Close a window now; also a short one is as good as any, since nothing is sampled."""
        duration_s = self._elapsed_s(name)
        del self._started_s[name]
        faults = {} if duration_s >= 0 else {"clock": "the clock went backwards"}
        duration_s = max(duration_s, 0.0)
        joules = {"time": duration_s * self.watts}
        return finish(self, name, joules, duration_s=duration_s, covered_s=duration_s, samples=0, faults=faults)

    def energy_so_far_j(self, name: str) -> float:
        """Seconds since the window began x the assumed watts."""
        return max(self._elapsed_s(name), 0.0) * self.watts

    def close(self) -> None:
        """Forget open windows."""
        self._started_s.clear()

    def _elapsed_s(self, name: str) -> float:
        if name not in self._started_s:
            raise ValueError(f'there is no open window "{name}"')
        return self._clock() - self._started_s[name]
