"""How much of the CPU others used, from the kernel's counters."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eopc_runtime.calibration.contention import (
    QUIET_SHARE,
    CpuTimes,
    others_share,
    read_cpu_times,
    wait_until_quiet,
)

STAT = "cpu  200 100 50 900 40 5 5 40 0 0\ncpu0 100 50 25 450 20 2 3 20 0 0\ncpu1 100 50 25 450 20 3 2 20 0 0\nintr 5\n"


def test_busy_time_is_all_but_idle_and_waiting(tmp_path: Path) -> None:
    """user + nice + system + irq + softirq + steal in ticks of 10 ms, on two cores."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text(STAT)
    found = read_cpu_times(tmp_path, clock=lambda: 7.0)
    assert found is not None
    assert (found.clock_s, found.busy_s, found.cores) == (7.0, pytest.approx(4.0), 2)


def test_what_this_process_did_not_use_others_did() -> None:
    """In 2 s two cores have 4 s; 3.6 s were busy, 3.2 s of them ours: others used 10 %."""
    before, after = CpuTimes(10.0, 100.0, 50.0, 2), CpuTimes(12.0, 103.6, 53.2, 2)
    assert others_share(before, after) == pytest.approx(0.1)
    assert others_share(before, CpuTimes(12.0, 103.0, 53.1, 2)) == 0.0  # rounding of the counters is no negative share
    assert others_share(None, after) is None
    assert others_share(after, after) is None


def test_without_counters_nothing_is_said(tmp_path: Path) -> None:
    """No /proc/stat, or one that is cut."""
    assert read_cpu_times(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu 1 2")
    assert read_cpu_times(tmp_path) is None


def test_the_real_counters_see_our_own_work_as_ours() -> None:
    """Half a second of our own work is counted as ours, whatever else the machine does."""
    before = read_cpu_times()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    after = read_cpu_times()
    assert after is not None
    assert after.own_s - before.own_s == pytest.approx(0.5, abs=0.1)
    assert after.busy_s - before.busy_s > 0.4  # ticks of 10 ms


def test_a_pause_ends_with_the_first_quiet_second_or_after_half_a_minute() -> None:
    """Others leave after three looks; those who never leave are waited for 30 s."""

    def machine(busy_for: int) -> tuple[list[float], list[CpuTimes]]:
        slept: list[float] = []
        times = [CpuTimes(0.0, 0.0, 0.0, 2)]

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            share = 0.5 if len(slept) <= busy_for else QUIET_SHARE / 2
            last = times[-1]
            times.append(CpuTimes(last.clock_s + seconds, last.busy_s + 2 * seconds * share, 0.0, 2))

        wait_until_quiet(lambda: times[-1], sleep)
        return slept, times

    assert len(machine(3)[0]) == 4
    assert len(machine(1000)[0]) == 30
