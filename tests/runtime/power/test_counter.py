"""Energy counters: differences, wraps, resets and counters that do not move; and RAPL's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eopc_runtime.errors import DeviceError, MeterLostError
from eopc_runtime.power.base import Sensor, Window
from eopc_runtime.power.counter import CounterMeter
from eopc_runtime.power.rapl import find_domains, open_rapl
from eopc_runtime.power.sampling import SensorError


class Bench:
    """A counter that gains `watts` x time, on a clock that the test moves."""

    def __init__(self, watts: float = 50.0, **options: object) -> None:
        self.now, self.joules, self.watts = 0.0, 1000.0, watts
        self.fail: str | None = None
        self.meter = CounterMeter(
            Sensor("bench", ("A",)),
            self.read,
            clock=lambda: self.now,
            threaded=False,
            **options,  # type: ignore[arg-type]
        )

    def read(self) -> dict[str, float]:
        if self.fail:
            raise SensorError(self.fail)
        return {"A": self.joules}

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.joules += self.watts
            self.meter.tick()

    def window(self, seconds: int) -> Window:
        self.meter.begin("w")
        self.run(seconds)
        return self.meter.end("w")


def unverified(window: Window, fault: str) -> None:
    assert fault in window.faults, window
    assert (window.verified, window.energy_j) == (False, None)


def test_a_window_is_the_difference_of_two_readings() -> None:
    """50 W over 10 s are 500 J, all covered, and the live reading says the same."""
    bench = Bench()
    bench.meter.begin("w")
    bench.run(10)
    assert bench.meter.energy_so_far_j("w") == 500.0
    window = bench.meter.end("w")
    assert (window.energy_j, window.duration_s, window.covered_s, window.verified) == (500.0, 10.0, 10.0, True)
    assert window.samples > 10


def test_windows_overlap() -> None:
    """Each has its own start."""
    bench = Bench()
    bench.meter.begin("outer")
    bench.run(3)
    bench.meter.begin("inner")
    bench.run(4)
    inner, outer = bench.meter.end("inner"), bench.meter.end("outer")
    assert (inner.energy_j, outer.energy_j) == (200.0, 350.0)


def test_a_counter_that_wraps_is_followed() -> None:
    """Three wraps within one window, each between two readings."""
    bench = Bench(watts=400.0, ranges_j={"A": 10000.0})
    bench.meter.begin("w")
    for _ in range(80):
        bench.now += 1
        bench.joules = (bench.joules + bench.watts) % 10000.0
        bench.meter.tick()
    assert bench.meter.end("w").energy_j == pytest.approx(32000.0)


def test_a_counter_left_alone_for_too_long_may_have_wrapped_twice() -> None:
    """Without readings in between, the number of wraps is not known: unverified."""
    bench = Bench(ranges_j={"A": 10000.0})
    bench.meter.begin("w")
    bench.now, bench.joules = 600.0, 5000.0
    unverified(bench.meter.end("w"), "gaps")


def test_a_counter_that_goes_backwards_is_no_negative_energy() -> None:
    """A reset without a known range: the joules around it are lost."""
    bench = Bench()
    bench.meter.begin("w")
    bench.run(3)
    bench.joules = 10.0
    bench.run(3)
    with pytest.raises(MeterLostError, match="went backwards"):
        bench.meter.energy_so_far_j("w")
    unverified(bench.meter.end("w"), "refused")
    assert bench.window(3).energy_j == 150.0  # the next window is sound


def test_a_reset_is_not_taken_for_a_wrap() -> None:
    """A counter of 262 kJ that restarts at 0 would gain 261 kJ in a second."""
    bench = Bench(ranges_j={"A": 262144.0})
    bench.meter.begin("w")
    bench.run(3)
    bench.joules = 0.0
    bench.run(3)
    unverified(bench.meter.end("w"), "refused")


@pytest.mark.parametrize("seconds", [1, 10])
def test_a_counter_that_does_not_move_is_a_fault(seconds: int) -> None:
    """No joules in no time or in ten seconds: not 0 J."""
    bench = Bench(watts=0.0)
    bench.run(1)
    unverified(bench.window(seconds), "zero")
    bench.meter.begin("w")
    bench.run(10)
    with pytest.raises(MeterLostError, match="did not move for more than 2 s"):
        bench.meter.energy_so_far_j("w")


def test_a_counter_that_stops_in_the_middle_is_a_fault() -> None:
    """Ten good seconds and ten of a dead driver are not the joules of ten seconds."""
    bench = Bench()
    bench.meter.begin("w")
    bench.run(10)
    bench.watts = 0.0
    bench.run(10)
    with pytest.raises(MeterLostError, match="did not move"):
        bench.meter.energy_so_far_j("w")
    unverified(bench.meter.end("w"), "stuck")


def test_a_short_window_of_a_counter_is_unverified() -> None:
    """It may have been updated once, or not at all."""
    unverified(Bench().window(1), "short")
    assert Bench().window(2).verified


def test_a_counter_that_cannot_be_read_is_lost() -> None:
    """At the beginning, at the end, or now; a failure in between does no harm."""
    bench = Bench()
    bench.fail = "gone"
    bench.meter.begin("w")
    bench.fail = None
    bench.run(5)
    unverified(bench.meter.end("w"), "lost")
    bench.meter.begin("w")
    bench.fail = "gone"
    bench.run(2)
    with pytest.raises(MeterLostError, match="gone"):
        bench.meter.energy_so_far_j("w")
    bench.fail = None
    bench.run(2)
    assert bench.meter.energy_so_far_j("w") == 200.0
    bench.fail = "gone"
    unverified(bench.meter.end("w"), "lost")


def test_a_suspicion_hangs_over_every_window() -> None:
    """A counter that disagreed with polled power is not believed, now or later."""
    bench = Bench(suspicion="counter 187 J, polled 327 J")
    window = bench.window(5)
    unverified(window, "suspect")
    assert "counter 187 J, polled 327 J" in window.notes
    bench.meter.begin("w")
    with pytest.raises(MeterLostError, match="187 J"):
        bench.meter.energy_so_far_j("w")


def test_a_clock_that_goes_backwards_is_a_fault_of_a_counter_too() -> None:
    """The joules may be right, the seconds are not."""
    bench = Bench()
    bench.run(20)
    bench.meter.begin("w")
    bench.run(5)
    bench.now -= 3
    bench.run(5)
    unverified(bench.meter.end("w"), "clock")


def test_window_names_are_checked() -> None:
    """As with every meter."""
    meter = Bench().meter
    meter.begin("w")
    with pytest.raises(ValueError, match="open already"):
        meter.begin("w")
    meter.close()
    with pytest.raises(ValueError, match="no open window"):
        meter.end("w")


# RAPL

Write = Callable[..., Path]


@pytest.fixture
def powercap(tmp_path: Path) -> Write:
    """Write a domain: its folder, name, counter in uJ and range in uJ."""

    def write(domain: str, name: str, energy_uj: int = 0, range_uj: int = 262143328850) -> Path:
        folder = tmp_path / "sys/class/powercap" / domain
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        return folder / "energy_uj"

    return write


def test_rapl_counts_packages_and_dram_and_nothing_inside_them(powercap: Write, tmp_path: Path) -> None:
    """Core and uncore lie inside the package, psys around it, and mmio shows a package a second time."""
    counters = {
        "package-0": powercap("intel-rapl:0", "package-0"),
        "core": powercap("intel-rapl:0:0", "core"),
        "uncore": powercap("intel-rapl:0:1", "uncore"),
        "package-0 dram": powercap("intel-rapl:0:2", "dram"),
        "package-1": powercap("intel-rapl:1", "package-1"),
        "psys": powercap("intel-rapl:2", "psys"),
        "mmio": powercap("intel-rapl-mmio:0", "package-0"),
    }
    now = [0.0]
    with open_rapl(tmp_path, clock=lambda: now[0], threaded=False) as meter:
        meter.begin("w")
        now[0] = 5.0
        for counter in counters.values():
            counter.write_text("100000000\n")
        window = meter.end("w")
    assert meter.sensor.rails == ("package-0", "package-0 dram", "package-1")
    assert window.energy_j == 300.0
    assert window.rails_j == dict.fromkeys(meter.sensor.rails, 100.0)


def test_rapl_wraps_at_the_range_of_its_file(powercap: Write, tmp_path: Path) -> None:
    """From 262143 J over 262143.32885 J to 49.67115 J are 50 J."""
    counter, now = powercap("intel-rapl:0", "package-0", 262143000000), [0.0]
    with open_rapl(tmp_path, clock=lambda: now[0], threaded=False) as meter:
        meter.begin("w")
        now[0] = 5.0
        counter.write_text("49671150\n")
        assert meter.end("w").energy_j == pytest.approx(50.0, abs=1e-6)  # counters are in uJ


def test_rapl_that_is_not_there_or_not_text_is_said(powercap: Write, tmp_path: Path) -> None:
    """No package, and a counter that holds no number."""
    with pytest.raises(DeviceError, match="no RAPL package"):
        open_rapl(tmp_path)
    powercap("intel-rapl:0", "package-0").write_text("\n")
    with pytest.raises(DeviceError, match="cannot be read"):
        open_rapl(tmp_path)


def test_rapl_without_a_readable_dram_counts_packages_and_says_so(
    powercap: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package only is a smaller total, so it is a remark in every window; a locked package is an error."""
    powercap("intel-rapl:0", "package-0")
    dram = powercap("intel-rapl:0:0", "dram")
    assert [domain.rail for domain in find_domains(tmp_path)] == ["package-0", "package-0 dram"]
    read_text, locked = Path.read_text, {dram}

    def denied(path: Path, *args: object, **options: object) -> str:
        if path in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", denied)
    with open_rapl(tmp_path, threaded=False) as meter:
        assert meter.sensor.rails == ("package-0",)
        assert meter.sensor.remarks == ("package-0 dram cannot be read and is left out",)
    locked.add(tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj")
    with pytest.raises(DeviceError, match="sudo chmod a"):
        open_rapl(tmp_path)
