"""What a meter showed: lag, power, drift, and readings that cannot be."""

from __future__ import annotations

import pytest

from eopc_runtime.reconcile import Guard, MeterWatch

GUARD = Guard(lag_s=0.35, reconcile_s=1.0, settle_s=0.3, surge=1.5, memory_s=2.0, stuck_s=5.0)


def watched(watts: float = 40.0, predicted_w: float = 40.0, seconds: float = 3.0, step_s: float = 0.05) -> MeterWatch:
    """A watch after some seconds of steps at a constant power, read before every step."""
    watch = MeterWatch(GUARD, 0.0, 1.0)
    for i in range(round(seconds / step_s)):
        now = i * step_s
        watch.read(now, watts * max(now - GUARD.lag_s, 0.0))
        watch.book(now, predicted_w * step_s)
    return watch


def test_what_is_still_in_the_sensor_is_added_as_predicted() -> None:
    """After 3 s at 40 W the meter shows 40 x 2.6 J; with the 0.4 s booked since, 120 J are likely."""
    assert watched().likely_j() == pytest.approx(120.0, rel=0.02)


def test_the_bound_is_the_power_seen_with_a_surge() -> None:
    """Seen until 2.6 s at 40 W; by 3 s at most 0.4 s x 40 W x 1.5 more."""
    assert watched().bound_j(3.0) == pytest.approx(40 * 2.6 + 0.4 * 40 * 1.5, rel=0.01)


def test_nothing_is_bounded_before_the_meter_has_seen_enough() -> None:
    """0.3 s must be covered, which with the lag takes 0.65 s."""
    early = watched(seconds=0.6)
    assert early.watts is None
    assert early.bound_j(0.6) == 0.0
    assert watched(seconds=0.8).watts == pytest.approx(40.0)


def test_a_drift_is_seen_and_forgotten() -> None:
    """A board that takes 1.3 times what was predicted drifts towards 1.3; one that costs less drifts below 1."""
    assert watched(watts=52.0, seconds=12.0).drift == pytest.approx(1.3, abs=0.01)
    assert watched(watts=52.0, seconds=2.0).drift == pytest.approx(1.3, abs=0.2)
    assert watched(watts=30.0, seconds=12.0).drift == pytest.approx(0.75, abs=0.01)
    assert watched(watts=40.0, seconds=12.0).drift == pytest.approx(1.0, abs=0.01)
    assert watched(watts=30.0, seconds=12.0).worst_drift == 1.0


def test_a_slower_board_at_the_same_power_is_seen_as_dearer() -> None:
    """Steps of 65 ms instead of 50 ms at 40 W cost 1.3 times the prediction."""
    watch = MeterWatch(GUARD, 0.0, 1.0)
    for i in range(200):
        now = 0.065 * i
        watch.read(now, 40 * max(now - GUARD.lag_s, 0.0))
        watch.book(now, 40 * 0.05)
    assert watch.drift == pytest.approx(1.3, abs=0.01)


def test_readings_are_due_when_old_and_when_the_budget_is_nearly_spent() -> None:
    """Not before the lag has passed; then at every step until power is known; then every second; at the end always."""
    watch = watched(seconds=0.1)
    assert not watch.wants_reading(0.2, 100.0)
    assert watch.wants_reading(0.4, 100.0)
    watch = watched(seconds=3.0)  # read last at 2.95 s
    assert not watch.wants_reading(3.2, 1000.0)
    assert watch.wants_reading(3.2, 2 * 40 * 1.35 - 1)
    assert watch.wants_reading(3.96, 1000.0)
    watch.lose(4.0, "gone")
    assert not watch.wants_reading(9.0, 0.0)


@pytest.mark.parametrize(
    ("reading", "says"),
    [(float("nan"), "it reads nan J"), (float("inf"), "it reads inf J"), (103.0, "went back from 104 to 103 J")],
)
def test_an_impossible_reading_ends_the_trust(reading: float, says: str) -> None:
    """No number, or energy given back: the meter is lost, with the reason and the time; no bound comes from it."""
    watch = watched()
    watch.read(3.0, reading)
    assert watch.lost is not None
    assert says in watch.lost
    assert "3 s into the sequence" in watch.lost
    assert watch.bound_j(3.0) == 0.0


def test_a_reading_that_stands_still_is_lost_after_five_seconds() -> None:
    """A stuck sensor is no measurement of an idle board; four seconds may be one slow sensor's interval."""
    watch = watched()
    stuck = 40 * 2.6
    watch.read(3.0, stuck)
    watch.read(7.5, stuck)
    assert watch.lost is None
    watch.read(8.1, stuck)
    assert watch.lost is not None
    assert "it has read 104 J for 5." in watch.lost


def test_the_first_reason_stands() -> None:
    """What ended the trust is what is reported."""
    watch = watched()
    watch.lose(3.0, "unplugged")
    watch.lose(4.0, "still unplugged")
    assert watch.lost == "unplugged, 3 s into the sequence"


@pytest.mark.parametrize("change", [{"lag_s": -1.0}, {"surge": 0.5}, {"memory_s": 0.0}, {"stuck_s": float("inf")}])
def test_an_impossible_guard_is_refused(change: dict[str, float]) -> None:
    """Times are not negative, and a surge does not lower power."""
    with pytest.raises(ValueError, match="a guard has"):
        Guard(**change)
