"""Joules from samples: the trapezoid, clipped edges, gaps, and clocks that step back."""

from __future__ import annotations

import math

import pytest

from eopc_runtime.power.integrate import integrate


def ramp(n: int, step_s: float = 1.0) -> list[tuple[float, tuple[float, ...]]]:
    """W = t at t = 0, step, 2 step, ..."""
    return [(i * step_s, (i * step_s,)) for i in range(n)]


def test_a_ramp_integrates_exactly() -> None:
    """The trapezoid is exact for a line: the integral of t from 0 to 10 is 50."""
    total = integrate(ramp(11), max_gap_s=3)
    assert total.joules == (50.0,)
    assert (total.covered_s, total.uncovered_s, total.samples, total.gaps) == (10.0, 0.0, 11, 0)


def test_edges_are_interpolated() -> None:
    """From 2.5 to 4.25 s the ramp gives (4.25^2 - 2.5^2) / 2; samples outside only cover the edges."""
    total = integrate(ramp(11), max_gap_s=3, start_s=2.5, end_s=4.25)
    assert total.joules[0] == pytest.approx((4.25**2 - 2.5**2) / 2, rel=1e-12)  # rounding of doubles
    assert total.covered_s == pytest.approx(1.75)
    assert total.samples == 2  # at 3 and 4 s


def test_parts_add_up_to_the_whole() -> None:
    """A window cut anywhere has the energy of its parts."""
    samples = [(t, (math.sin(t) + 2, t % 3)) for t in (0.1 * i for i in range(100))]
    whole = integrate(samples, 1).joules
    first, second = integrate(samples, 1, end_s=3.33).joules, integrate(samples, 1, start_s=3.33).joules
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(whole, rel=1e-12)


def test_a_gap_is_uncovered_and_adds_nothing() -> None:
    """Ten missing seconds are reported, not bridged."""
    samples = [(0.0, (10.0,)), (1.0, (10.0,)), (11.0, (10.0,)), (12.0, (10.0,))]
    total = integrate(samples, max_gap_s=3)
    assert total.joules == (20.0,)
    assert (total.covered_s, total.uncovered_s, total.gaps) == (2.0, 10.0, 1)


def test_only_the_part_of_a_gap_inside_the_window_counts() -> None:
    """A gap that began before the window is not held against it in full."""
    samples = [(0.0, (10.0,)), (8.0, (10.0,)), (9.0, (10.0,))]
    total = integrate(samples, max_gap_s=3, start_s=6.0)
    assert (total.covered_s, total.uncovered_s) == (1.0, 2.0)


def test_a_clock_that_steps_back_does_no_harm() -> None:
    """Nothing is counted across the step, in either direction, and it is reported."""
    samples = [(100.0, (5.0,)), (101.0, (5.0,)), (40.0, (5.0,)), (41.0, (5.0,))]
    total = integrate(samples, max_gap_s=3)
    assert total.joules == (10.0,)
    assert (total.covered_s, total.backsteps) == (2.0, 1)


def test_a_repeated_time_counts_once() -> None:
    """Two readings of the same instant have no area between them."""
    assert integrate([(0.0, (5.0,)), (1.0, (5.0,)), (1.0, (9.0,)), (2.0, (5.0,))], 3).joules == (10.0,)


def test_a_rail_that_was_not_read_throughout_is_nan() -> None:
    """One missing reading of a rail makes its joules unknown, and leaves the others alone."""
    total = integrate([(0.0, (5.0, 1.0)), (1.0, (5.0, math.nan)), (2.0, (5.0, 1.0))], 3)
    assert total.joules[0] == 10.0
    assert math.isnan(total.joules[1])


def test_nothing_gives_nothing() -> None:
    """Without samples, or with one, there is no covered time."""
    assert integrate([], 3).covered_s == integrate([(0.0, (5.0,))], 3).covered_s == 0.0
