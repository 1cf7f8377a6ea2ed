"""Whether other processes used the device while something was measured: their time and watts would be in the figure.

Linux counts the busy time of all cores in /proc/stat; what this process did not use itself, others did. Time that a
hypervisor took away counts as theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUIET_SHARE = 0.05  # of all cores; the counters' steps of 10 ms are 0.5 % of a second on two cores
PATIENCE_S = 1800.0  # to spend on waiting for others and on making disturbed visits again, all together
PAUSE_S, LOOK_S = 30.0, 1.0  # after a disturbed visit: the longest pause, and how long to look for others

_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; not idle and iowait


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some time in the past: of the clock, of all cores while busy, and of this process."""

    clock_s: float
    busy_s: float
    own_s: float
    cores: int


def read_cpu_times(root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> CpuTimes | None:
    """Read the counters; None where there are none."""
    try:
        lines = (root / "proc/stat").read_text(encoding="utf-8").splitlines()
        ticks = [int(word) for word in lines[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    if len(ticks) <= max(_BUSY):
        return None
    cores = sum(line.startswith("cpu") for line in lines) - 1
    busy_s = sum(ticks[i] for i in _BUSY) / os.sysconf("SC_CLK_TCK")
    return CpuTimes(clock(), busy_s, time.process_time(), max(cores, 1))


def wait_until_quiet(read: Callable[[], CpuTimes | None], sleep: Callable[[float], None]) -> None:
    """Return once others leave the CPU alone for a second, or after half a minute."""
    for _ in range(round(PAUSE_S / LOOK_S)):
        before = read()
        sleep(LOOK_S)
        share = others_share(before, read())
        if share is None or share <= QUIET_SHARE:
            return


def others_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Return the share of all cores that other processes used in between, None where it is not known."""
    if before is None or after is None or after.clock_s <= before.clock_s:
        return None
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(max(others_s / ((after.clock_s - before.clock_s) * after.cores), 0.0), 1.0)
