"""Which cells are measured, and in which order."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.calibration.plan import BLOCK, order_visits, parse_range, plan_cells
from eopc_runtime.errors import UsageError

WIDE = (32, 512)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), fit=st.integers(6, 20), conformal=st.integers(1, 40))
def test_corners_are_fitted_and_no_cell_is_drawn_twice(seed: int, fit: int, conformal: int) -> None:
    """Whatever the seed, the four corners are among the cells to fit, all cells differ and lie within the range."""
    plan = plan_cells(WIDE, (16, 300), fit, conformal, seed=seed)
    assert {(n, m) for n in WIDE for m in (16, 300)} <= set(plan.fit)
    assert (len(plan.fit), len(plan.conformal)) == (fit, conformal)
    assert len(set(plan.cells)) == fit + conformal
    assert all(32 <= n <= 512 and 16 <= m <= 300 for n, m in plan.cells)


def test_a_seed_fixes_the_plan() -> None:
    """Equal seeds give equal plans and orders, others give others."""
    one, same, other = (plan_cells(WIDE, WIDE, 14, 19, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.cells != other.cells
    assert order_visits(one, ["t0", "t1"]) == order_visits(same, ["t0", "t1"])


def test_lengths_are_log_uniform() -> None:
    """Half of the random lengths lie below the geometric mean of the range, not below its middle."""
    plan = plan_cells(WIDE, WIDE, 6, 2000)
    share = sum(n < math.sqrt(32 * 512) for n, _ in plan.conformal) / 2000
    assert 0.46 < share < 0.54  # 2000 draws: a standard deviation of 1.1 points


def test_every_cell_of_every_tier_is_visited_once_per_round() -> None:
    """No visit is missing or made twice, and rounds follow each other."""
    plan = plan_cells(WIDE, WIDE, 14, 19, rounds=3)
    tiers = ["t0", "t1", "t2"]
    visits = order_visits(plan, tiers)
    assert len(visits) == len(set(visits)) == 3 * 3 * 33
    assert [v.turn for v in visits] == sorted(v.turn for v in visits)
    assert {(v.tier, v.cell) for v in visits if v.turn == 1} == {(t, c) for t in tiers for c in plan.cells}


def test_tiers_and_cells_are_mixed_over_a_round() -> None:
    """No tier is measured in one stretch, and its cells come in no order of length: drift must not look like either."""
    plan = plan_cells(WIDE, WIDE, 14, 19, rounds=1)
    visits = order_visits(plan, ["t0", "t1", "t2"])
    runs = [1]
    for before, after in pairwise(visits):
        runs = [*runs[:-1], runs[-1] + 1] if before.tier == after.tier else [*runs, 1]
    assert max(runs) <= 4 * BLOCK
    halves = [{v.tier for v in half} for half in (visits[:49], visits[49:])]
    assert halves == [{"t0", "t1", "t2"}] * 2
    lengths = [v.cell[1] for v in visits if v.tier == "t0"]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("n_in", "n_out", "fit", "conformal", "message"),
    [
        ((512, 32), WIDE, 14, 19, "--prompt-range 512:32 is no range"),
        (WIDE, (0, 32), 14, 19, "--new-range 0:32 is no range"),
        (WIDE, WIDE, 5, 19, "at least 6 cells"),
        (WIDE, WIDE, 14, 0, "At least one cell"),
        ((32, 34), (32, 36), 14, 19, "hold 15 pairs"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    n_in: tuple[int, int], n_out: tuple[int, int], fit: int, conformal: int, message: str
) -> None:
    """The message names the option and the limit."""
    with pytest.raises(UsageError, match=message):
        plan_cells(n_in, n_out, fit, conformal)


def test_ranges_are_written_with_a_colon() -> None:
    """32:512 is read, anything else is refused with the form that is expected."""
    assert parse_range("32:512", "--new-range") == (32, 512)
    for text in ("32", "32-512", "a:b", "-3:5", ":"):
        with pytest.raises(UsageError, match=r"--new-range .* LOW:HIGH"):
            parse_range(text, "--new-range")
