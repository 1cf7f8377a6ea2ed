"""Sampling meters on a fake clock: exact joules, and a fault for everything that would make them wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from eopc_runtime.errors import MeterLostError
from eopc_runtime.power.base import Sensor, Window, measure_idle
from eopc_runtime.power.sampling import PolledMeter, SampledMeter, SensorError

Power = Callable[[float], Mapping[str, float]]


class Bench:
    """A meter at 20 Hz whose power is a function of time, on a clock that the test moves."""

    def __init__(self, power: Power | None = None, rails: tuple[str, ...] = ("A",), sub: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.power: Power = power or (lambda t: {"A": 10.0 + t % 0.5})
        sensor = Sensor("bench", rails, sub, steps_w={"A": 0.04}, remarks=("a remark",))
        self.meter = PolledMeter(
            sensor, lambda: self.power(self.now), rate_hz=20, clock=lambda: self.now, threaded=False
        )

    def run(self, seconds: float, step_s: float = 0.05) -> None:
        """Let time pass, polling every step."""
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            self.meter.poll()

    def sleep(self, seconds: float) -> None:
        """At least one step, so that time passes."""
        self.run(max(seconds, 0.05))

    def window(self, seconds: float, step_s: float = 0.05) -> Window:
        self.meter.begin("w")
        self.run(seconds, step_s)
        return self.meter.end("w")


def swing(t: float) -> dict[str, float]:
    """A power that never stands still: a ramp, of which the trapezoid is exact."""
    return {"A": 10 + t, "B": 1.0}


def test_a_window_has_the_exact_joules_of_a_ramp() -> None:
    """10 + t watts over 0 to 4 s are 48 J, all covered; with its samples, rails, steps and remarks."""
    window = Bench(swing).window(4.0)
    assert window.energy_j == pytest.approx(48.0, rel=1e-9)  # rounding of 80 additions
    assert (window.duration_s, window.covered_s) == (pytest.approx(4.0), pytest.approx(4.0))
    assert (window.verified, window.faults, window.source, window.meter) == (True, (), "measured", "bench")
    assert window.samples >= 80
    assert (window.rails, window.steps_w, window.notes) == (("A",), {"A": 0.04}, ("a remark",))
    assert window.mean_w == pytest.approx(12.0)
    assert window.to_json()["rails"] == ["A"]


def test_ends_between_two_polls_are_sharp() -> None:
    """A reading of its own at both ends: a window of 2.03 s that begins between two polls is covered in full."""
    bench = Bench(swing)
    bench.run(1.0)
    bench.now += 0.017
    bench.meter.begin("w")
    start = bench.now
    bench.run(2.0)
    bench.now += 0.03
    window = bench.meter.end("w")
    assert window.covered_s == pytest.approx(window.duration_s) == pytest.approx(2.03)
    assert window.energy_j == pytest.approx(10 * 2.03 + (bench.now**2 - start**2) / 2, rel=1e-9)


def test_windows_nest_and_overlap() -> None:
    """Each window has its own joules: the inner ones lie inside the outer, and the overlap counts in both."""
    bench = Bench(lambda t: {"A": 10.0 + (round(t * 20) % 2)})
    bench.meter.begin("all")
    bench.meter.begin("first")
    bench.run(3.0)
    bench.meter.begin("second")
    bench.run(1.0)
    first = bench.meter.end("first")
    bench.run(2.0)
    second, whole = bench.meter.end("second"), bench.meter.end("all")
    assert [w.duration_s for w in (first, second, whole)] == [pytest.approx(4), pytest.approx(3), pytest.approx(6)]
    assert [w.energy_j for w in (first, second, whole)] == [pytest.approx(42), pytest.approx(31.5), pytest.approx(63)]


def test_a_window_name_is_open_once() -> None:
    """Beginning twice, or ending what was not begun, is a mistake of the caller."""
    meter = Bench().meter
    meter.begin("w")
    with pytest.raises(ValueError, match="open already"):
        meter.begin("w")
    meter.end("w")
    with pytest.raises(ValueError, match="no open window"):
        meter.end("w")
    with pytest.raises(ValueError, match="no open window"):
        meter.energy_so_far_j("w")


def test_the_total_is_the_sum_of_its_rails_and_sub_rails_are_listed() -> None:
    """B is part of the total, C is not; C was unreadable once, so its joules are not known."""
    bench = Bench(lambda t: {"A": 10 + t, "B": 1.0} | ({} if t == 1.0 else {"C": 0.5}), ("A", "B"), ("C", "D"))
    window = bench.window(4.0)
    assert window.energy_j == pytest.approx(52.0)
    assert window.rails_j["B"] == pytest.approx(4.0)
    assert window.rails_j["D"] is None
    bench.power = lambda t: {"A": 10 + t, "B": 1.0, "C": -0.1}
    assert bench.window(4.0).rails_j["C"] is None  # a negative sub-rail is not known, and spoils nothing


def test_idle_power_is_measured_and_subtracted() -> None:
    """Gross and idle-subtracted joules stand side by side once the idle power is known."""
    bench = Bench(lambda t: {"A": 5.0 + 0.01 * (round(t * 20) % 2)})
    idle = measure_idle(bench.meter, 10.0, sleep=bench.sleep, clock=lambda: bench.now)
    assert idle.power_w == pytest.approx(5.005)
    assert (idle.seconds, idle.rails) == (pytest.approx(10.0), ("A",))
    assert bench.window(2.0).energy_idle_subtracted_j is None
    bench.meter.idle_w = idle.power_w
    bench.power = lambda t: {"A": 15.0 + 0.01 * (round(t * 20) % 2)}
    bench.meter.poll()
    window = bench.window(4.0)
    assert window.energy_j == pytest.approx(60.02)
    assert window.energy_idle_subtracted_j == pytest.approx(40.0)
    assert window.idle_w == idle.power_w


def test_idle_power_of_a_still_board_is_kept_and_noted() -> None:
    """A coarse sensor does not move on an idle board: not a fault there, but said."""
    bench = Bench(lambda t: {"A": 4.0})
    idle = measure_idle(bench.meter, 10.0, sleep=bench.sleep, clock=lambda: bench.now)
    assert idle.power_w == pytest.approx(4.0)
    assert "no reading changed" in idle.notes[0]


@pytest.mark.parametrize("power", [{"A": 0.0}, {}, {"A": -1.0}])
def test_idle_power_that_could_not_be_measured_is_none(power: dict[str, float]) -> None:
    """Zero, nothing and negative are no idle power."""
    bench = Bench(lambda t: power)
    assert measure_idle(bench.meter, 5.0, sleep=bench.sleep, clock=lambda: bench.now).power_w is None


# faults: every one makes the joules None


def unverified(window: Window, *faults: str) -> None:
    assert set(faults) <= set(window.faults), window
    assert (window.verified, window.energy_j, window.energy_idle_subtracted_j) == (False, None, None)
    assert all(joules is None for joules in window.rails_j.values())
    assert window.notes


def test_a_short_window_is_unverified() -> None:
    """Under two seconds, or under twenty samples, a sensor's step and lag decide."""
    unverified(Bench(swing).window(1.9), "short")
    slow = Bench(swing)
    slow.meter.max_gap_s = 10
    unverified(slow.window(5.0, step_s=0.5), "short")
    assert Bench(swing).window(2.0).verified


def test_a_drop_out_is_uncovered() -> None:
    """A second without readings is neither bridged nor counted as 0 W: the window is unverified."""
    bench = Bench(swing)
    bench.meter.begin("w")
    bench.run(3.0)
    bench.now += 1.0
    bench.run(3.0)
    window = bench.meter.end("w")
    unverified(window, "gaps")
    assert window.covered_s == pytest.approx(5.95, abs=0.06)  # one poll belongs to the gap
    assert window.duration_s == pytest.approx(7.0)


def test_a_hiccup_is_noted_and_no_fault() -> None:
    """0.2 s of 20 s missing is under two per cent: verified, with a note, and covered_s says how much."""
    bench = Bench(swing)
    bench.meter.begin("w")
    bench.run(10.0)
    bench.now += 0.2
    bench.run(10.0)
    window = bench.meter.end("w")
    assert window.verified
    assert window.covered_s < window.duration_s - 0.19
    assert "1 gap(s)" in " ".join(window.notes)


def test_failed_readings_are_missing_not_zero() -> None:
    """One failed reading in ten is bridged and counted; a second of failures is a gap with its reason."""

    def flaky(t: float) -> Mapping[str, float]:
        if round(t * 20) % 10 == 5:
            raise SensorError("bus error")
        return swing(t)

    window = Bench(flaky).window(4.0)
    assert window.energy_j == pytest.approx(48.0, rel=1e-9)
    assert "8 reading(s) refused: bus error" in window.notes

    def broken(t: float) -> Mapping[str, float]:
        if 1.0 < t < 2.0:
            raise OSError(5, "Input/output error", "/sys/in1_input")
        return swing(t)

    window = Bench(broken).window(4.0)
    unverified(window, "gaps", "refused")
    assert "/sys/in1_input: Input/output error" in " ".join(window.notes)


def test_negative_power_is_refused() -> None:
    """A negative rail refuses the whole reading: clamping it to 0 would be a wrong total."""
    bench = Bench(lambda t: {"A": -3.0 if 1 < t < 3 else 10 + t})
    window = bench.window(4.0)
    unverified(window, "gaps", "refused")
    assert "A reads -3 W" in " ".join(window.notes)


def test_a_rail_that_disappears_is_missing() -> None:
    """The sum of two rails is not the other one."""
    unverified(Bench(lambda t: swing(t) if t < 2 else {"A": 10 + t}, ("A", "B")).window(4.0), "gaps", "refused")


def test_constant_zero_is_a_fault() -> None:
    """A sensor that reads 0 W all the time measures nothing."""
    unverified(Bench(lambda t: {"A": 0.0}).window(4.0), "zero")


def test_a_stuck_reading_is_a_fault() -> None:
    """Under load a reading moves: nothing but one value for five seconds, or for ten inside a window."""
    unverified(Bench(lambda t: {"A": 17.3}).window(6.0), "stuck")
    unverified(Bench(lambda t: {"A": 17.3 if 2 < t < 14 else 10 + t}).window(20.0), "stuck")
    assert Bench(lambda t: {"A": 17.3 if 2 < t < 7 else 10 + t}).window(20.0).verified


def test_a_sensor_that_was_stuck_before_is_found_in_a_short_window() -> None:
    """The stretch without a change may have begun before the window did."""
    bench = Bench(lambda t: {"A": 17.3})
    bench.run(10.0)
    unverified(bench.window(2.5), "stuck")


def test_a_clock_that_goes_backwards_is_a_fault() -> None:
    """A monotonic clock does not; when it does, no number comes of it."""
    bench = Bench(swing)
    bench.run(20.0)
    bench.meter.begin("w")
    bench.run(3.0)
    bench.now -= 10.0
    bench.run(12.0)
    unverified(bench.meter.end("w"), "clock")


def test_a_step_of_the_wall_clock_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meters never ask the wall clock."""
    monkeypatch.setattr(time, "time", lambda: (_ for _ in ()).throw(AssertionError("wall clock asked")))
    assert Bench(swing).window(3.0).verified


def test_a_meter_that_ended_is_a_fault() -> None:
    """What came before the end is not the window."""
    bench = Bench(swing)
    bench.meter.begin("w")
    bench.run(3.0)
    bench.meter.lose("the child died")
    unverified(bench.meter.end("w"), "lost")


# the live reading


def test_the_live_reading_follows_the_joules() -> None:
    """Integrated to the last reading and held until now; at the end it agrees with the window."""
    bench = Bench(swing)
    bench.meter.begin("w")
    assert bench.meter.energy_so_far_j("w") == 0.0
    bench.run(4.0)
    assert bench.meter.energy_so_far_j("w") == pytest.approx(48.0)
    bench.now += 0.1
    assert bench.meter.energy_so_far_j("w") == pytest.approx(48.0 + 0.1 * 14.0)
    bench.meter.poll()
    assert bench.meter.energy_so_far_j("w") == pytest.approx(bench.meter.end("w").energy_j)


def dead(t: float) -> Mapping[str, float]:
    raise SensorError("no such device")


@pytest.mark.parametrize(
    ("later", "seconds", "says"),
    [
        (dead, 1.5, "no reading for 1.5 s"),
        (lambda t: {"A": -1.0}, 1.5, "no reading for"),
        (lambda t: {"A": 12.0}, 6.0, "no reading changed for"),
    ],
)
def test_the_live_reading_raises_when_readings_stop(later: Power, seconds: float, says: str) -> None:
    """Silence, refusals and a stuck value: an error, not the joules so far."""
    bench = Bench(swing)
    bench.meter.begin("w")
    bench.run(3.0)
    bench.power = later
    bench.run(seconds)
    with pytest.raises(MeterLostError, match=says):
        bench.meter.energy_so_far_j("w")


def test_the_live_reading_raises_over_a_gap_that_has_passed() -> None:
    """Readings came back, but the joules of the gap are missing for good."""
    bench = Bench(swing)
    bench.meter.begin("w")
    bench.run(3.0)
    bench.now += 0.5
    bench.run(3.0)
    with pytest.raises(MeterLostError, match="are not covered"):
        bench.meter.energy_so_far_j("w")


def test_the_live_reading_raises_before_the_first_and_after_the_last() -> None:
    """Without any reading there is no number, nor after the source ended or the clock stepped back."""
    bench = Bench(dead)
    bench.meter.begin("w")
    with pytest.raises(MeterLostError, match="no reading yet"):
        bench.meter.energy_so_far_j("w")
    bench = Bench(swing)
    bench.run(10)
    bench.meter.begin("w")
    bench.run(1)
    bench.now -= 5
    bench.run(1)
    with pytest.raises(MeterLostError, match=r"lost: .*clock went backwards|no reading|not covered"):
        bench.meter.energy_so_far_j("w")
    bench.meter.lose("the child died")
    with pytest.raises(MeterLostError, match="the child died"):
        bench.meter.energy_so_far_j("w")


# the thread


def test_the_thread_polls_until_it_is_closed() -> None:
    """A real clock at 50 Hz for two seconds: 20 W within 2 % of the joules, on a busy machine too."""
    readings = [0]

    def read() -> dict[str, float]:
        readings[0] += 1
        return {"A": 20.0 + readings[0] % 2}

    with PolledMeter(Sensor("thread", ("A",)), read, rate_hz=50) as meter:
        meter.max_gap_s = 1.0  # the test is about the thread, not about the load of the machine
        meter.begin("w")
        time.sleep(2.1)
        window = meter.end("w")
        assert window.energy_j is not None
        assert window.energy_j / window.duration_s == pytest.approx(20.5, rel=0.03)  # 20 and 21 W in turn
    taken = readings[0]
    time.sleep(0.1)
    assert readings[0] == taken
    assert not [t for t in threading.enumerate() if t.name == "eopc-thread"]


def test_an_unexpected_failure_in_the_thread_is_a_lost_meter() -> None:
    """The thread does not die in silence."""

    def read() -> dict[str, float]:
        raise RuntimeError("bug")

    with PolledMeter(Sensor("thread", ("A",)), read, rate_hz=50) as meter:
        meter._thread and meter._thread.join(2)
        SampledMeter.begin(meter, "w")
        with pytest.raises(MeterLostError, match="RuntimeError: bug"):
            meter.energy_so_far_j("w")
