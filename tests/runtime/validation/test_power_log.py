"""Sequences against a synthetic tegrastats log whose joules are known exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from eopc_runtime.errors import UsageError
from eopc_runtime.power.boards import list_boards
from eopc_runtime.power.tegrastats_log import PowerLog, read_log
from eopc_runtime.sequence_record import SequenceRecord
from eopc_runtime.validation.power_log import Timeline, check_sequences, measure_span, place_in_time

RULES = [board.rails for board in list_boards()]
OFFSET_S = 7200.0  # the board's clock is two hours ahead of UTC
START_S = datetime(2026, 8, 10, 19, 39, 50, tzinfo=timezone.utc).timestamp()  # 21:39:50 on the board
LINE = (
    "{clock}RAM 2513/7620MB (lfb 1x4MB) SWAP 25/3810MB (cached 0MB) CPU [11%@729,8%@729,7%@729,4%@729,3%@729,14%@729] "
    "GR3D_FREQ 0% cpu@51.218C tj@51.718C VDD_IN {mw}mW/6179mW VDD_CPU_GPU_CV 1273mW/2369mW VDD_SOC 1234mW/1392mW\n"
)


def write_log(watts: Callable[[float], float], seconds: int = 60, per_s: int = 10, clock: bool = True) -> list[str]:
    """Lines of a log: line j of a second shows the power (j + 0.5) / per_s into it, and flickers by 0.1 W.

    The flicker is up and down in turn, so that over a whole number of intervals it adds nothing.
    """
    lines = []
    for i in range(seconds * per_s):
        t = (i + 0.5) / per_s
        stamp = time.strftime("%m-%d-%Y %H:%M:%S ", time.gmtime(START_S + OFFSET_S + int(t))) if clock else ""
        mw = round(1000 * watts(t)) + (100 if i % 2 else -100)
        lines.append(LINE.format(clock=stamp, mw=mw))
    return lines


def read(lines: list[str], interval_s: float | None = None) -> PowerLog:
    """The log as eopc reads it."""
    return read_log(lines, RULES, (), interval_s)


def record(start_s: float, seconds: float, **changes: Any) -> SequenceRecord:
    """A sequence that ran from `start_s` after the start of the log, predicted to cost 60 J."""
    fields: dict[str, Any] = {
        "engine": "abc",
        "start_wall_s": START_S + start_s,
        "end_wall_s": START_S + start_s + seconds,
        "utc_offset_s": OFFSET_S,
        "start_s": 100.0,
        "end_s": 100.0 + seconds,
        "plan": "t0",
        "tiers_used": ("t0",),
        "prompt_tokens": 64,
        "completion_tokens": 100,
        "predicted_j": 60.0,
        "price_j": 66.0,
        "budget_j": None,
        "energy_j": 66.0,
        "energy_source": "calibrated",
        "power_mode": None,
        "finish_reason": "length",
        "enforced_by": None,
    }
    return SequenceRecord(**{**fields, **changes})


def timeline(watts: Callable[[float], float], **options: Any) -> Timeline:
    """A log of these watts, placed in time by its printed clock."""
    return place_in_time(read(write_log(watts, **options)), OFFSET_S)


def busy(t: float) -> float:
    """20 W from second 10 to 14 and 30 W from 20 to 22, with 5 W between: 80 J and 60 J."""
    return 20.0 if 10 <= t < 14 else 30.0 if 20 <= t < 22 else 5.0


def test_joules_of_a_sequence_are_those_of_its_part_of_the_log() -> None:
    """A window within constant power has exactly power x time, in local time two hours off UTC."""
    inside = check_sequences(timeline(busy), [record(10.55, 3.0)])[0]
    assert inside.measured_j == pytest.approx(20.0 * 3.0)
    assert inside.error == pytest.approx(0.0)
    assert inside.verified
    assert inside.samples in (30, 31)  # both edges are lines, and epoch seconds have a resolution of 0.2 microseconds


def test_edges_are_interpolated() -> None:
    """From 5 W to 20 W between two lines: the trapezoid of the edge is half of each."""
    (found,) = check_sequences(timeline(busy), [record(9.95, 4.0)])
    # 9.95 to 10.05 s rises from 5 to 20 W; 13.95 is the last line at 20 W
    assert found.measured_j == pytest.approx(0.1 * 12.5 + 3.9 * 20.0)


def test_every_sequence_is_looked_up_on_its_own() -> None:
    """Two sequences in one log, in any order, and one that costs more than its price."""
    found = check_sequences(timeline(busy), [record(20.05, 1.9), record(10.05, 3.9)])
    assert not found[0].verified
    assert "at least 2 s and 20 samples are needed" in found[0].notes[0]
    assert found[1].measured_j == pytest.approx(78.0)
    assert found[1].over_price


@pytest.mark.parametrize(("seconds", "per_s"), [(1.0, 10), (10.0, 1)])
def test_short_windows_are_unverified_never_zero(seconds: float, per_s: int) -> None:
    """Below 2 s, or below 20 samples (a log of one line per second takes 20 s), there is no figure."""
    (found,) = check_sequences(timeline(lambda t: 20.0, per_s=per_s), [record(10.5, seconds)])
    assert (found.verified, found.measured_j, found.error) == (False, None, None)
    assert "at least 2 s and 20 samples are needed" in found.notes[0]


def test_a_sensor_that_lags_is_read_later() -> None:
    """Everything shows 0.4 s late: with that lag the joules are right, without it the edges are wrong."""
    late = timeline(lambda t: busy(t - 0.4))
    assert check_sequences(late, [record(10.05, 3.9)], lag_s=0.4)[0].measured_j == pytest.approx(78.0)
    assert check_sequences(late, [record(10.05, 3.9)])[0].measured_j == pytest.approx(78.0 - 0.4 * 15.0, abs=0.8)


def test_lines_without_a_clock_need_a_start_and_an_interval() -> None:
    """Older releases print no clock; what is missing is named."""
    lines = write_log(busy, clock=False)
    with pytest.raises(UsageError, match="give --interval"):
        place_in_time(read(lines), OFFSET_S)
    with pytest.raises(UsageError, match="give --start"):
        place_in_time(read(lines, 0.1), OFFSET_S)
    placed = place_in_time(read(lines, 0.1), OFFSET_S, START_S + 0.05)
    assert check_sequences(placed, [record(10.55, 3.0)])[0].measured_j == pytest.approx(60.0)


def test_an_interval_beside_a_clock_is_placed_by_the_clock() -> None:
    """The spacing is the interval, the position that of the printed seconds."""
    placed = place_in_time(read(write_log(busy), 0.1), OFFSET_S)
    assert placed.span_s[0] == pytest.approx(START_S + 0.05)
    assert check_sequences(placed, [record(10.55, 3.0)])[0].measured_j == pytest.approx(60.0)


def test_what_is_assumed_is_said() -> None:
    """Local time, and how coarse the clock is."""
    assumptions = timeline(busy).assumptions
    assert "local time is UTC+2 h" in assumptions[0]
    assert "1 s coarse" in assumptions[1]


def test_a_sequence_outside_the_log_is_unverified() -> None:
    """Before its first line, after its last, and over its end."""
    before, after, over = check_sequences(timeline(busy), [record(-100, 5), record(200, 5), record(58, 5)])
    assert (before.verified, before.notes) == (False, ("it ran outside the time of the log",))
    assert (after.verified, after.notes) == (False, ("it ran outside the time of the log",))
    assert not over.verified
    assert any("not covered" in note for note in over.notes)


def test_a_gap_in_the_log_is_no_energy_of_zero() -> None:
    """A second of missing lines within a sequence makes it unverified; one in another part does not matter."""
    lines = write_log(lambda t: 20.0)
    cut = lines[:150] + lines[160:]
    gap, whole = check_sequences(place_in_time(read(cut), OFFSET_S), [record(13, 4), record(30, 4)])
    assert not gap.verified
    assert whole.measured_j == pytest.approx(80.0)


def test_a_stuck_or_dead_sensor_is_found() -> None:
    """The same number on every line for 8 s is unverified; a log of 0 W has no power to check anything against."""
    lines = [line.replace("19900mW", "20000mW").replace("20100mW", "20000mW") for line in write_log(lambda t: 20.0)]
    (stuck,) = check_sequences(place_in_time(read(lines), OFFSET_S), [record(10, 8)])
    assert (stuck.verified, "stuck" in stuck.notes[0]) == (False, True)
    dead = [line.replace("VDD_IN 19900mW", "VDD_IN 0mW").replace("VDD_IN 20100mW", "VDD_IN 0mW") for line in lines]
    dead = [line.replace("VDD_IN 20000mW", "VDD_IN 0mW") for line in dead]
    with pytest.raises(UsageError, match=r"0 usable lines of power.*VDD_IN reads 0 mW"):
        place_in_time(read(dead), OFFSET_S)


def test_a_wall_clock_that_was_set_meanwhile_makes_a_sequence_unverified() -> None:
    """Wall clock 4 s, monotonic clock 10 s: its part of the log cannot be told."""
    (found,) = check_sequences(timeline(lambda t: 20.0), [record(10, 4, end_s=110.0)])
    assert not found.verified
    assert "the wall clock was set by -6.0 s meanwhile" in found.notes


def test_a_window_waits_for_nobody() -> None:
    """A log that ends within a sequence is judged at once, not after a timeout of a live meter."""
    begun = time.monotonic()
    window = measure_span(timeline(lambda t: 20.0, per_s=1, seconds=30), START_S + 5, START_S + 60)
    assert time.monotonic() - begun < 0.5
    assert not window.verified
