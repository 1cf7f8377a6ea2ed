"""From visits to prices: medians, visits that others disturbed, the margin and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace

import numpy as np
import pytest

from eopc_runtime.calibration.fitting import fit_tier, middle, visit_energies
from eopc_runtime.calibration.journal import Measured
from eopc_runtime.calibration.plan import CellPlan, Visit, order_visits, plan_cells
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.errors import UsageError

THETA = Theta(0.4, 0.004, 2e-6, 0.35, 6e-6, 5e-6)
PLAN = plan_cells((32, 512), (32, 512), 14, 19)


def measured(visit: Visit, energy_j: float, share: float | None = None) -> Measured:
    """A visit with one window."""
    n, m = visit.cell
    return Measured(visit.turn, visit.tier, n, m, (energy_j,), None, 1, 3.0, 60, None, share)


def exact(visit: Visit) -> float:
    """What the polynomial says."""
    return THETA.energy_j(float(visit.cell[0]), float(visit.cell[1]))


def visits(energy: Callable[[Visit], float] = exact, plan: CellPlan = PLAN) -> list[Measured]:
    """Every visit of a plan on t0."""
    return [measured(visit, energy(visit)) for visit in order_visits(plan, ["t0"])]


def test_exact_measurements_give_their_coefficients_back() -> None:
    """All six, with no error on the cells kept out and no margin."""
    found = fit_tier("t0", PLAN, visits())
    np.testing.assert_allclose(astuple(found.theta), astuple(THETA), rtol=1e-6)  # a least squares of six columns
    assert found.mape_cv < 1e-9
    assert found.conformal.q == pytest.approx(0.0, abs=1e-9)
    assert (found.conformal.k, found.conformal.level) == (19, 0.95)
    assert (found.spread, found.disturbed, found.warnings) == (pytest.approx(0.0), 0, ())


def test_one_odd_visit_per_cell_does_not_move_the_prices() -> None:
    """In every cell one of three visits takes 1.8 times as much: the median leaves it out, the margin does not."""
    found = fit_tier("t0", PLAN, visits(lambda v: exact(v) * (1.8 if v.turn == 1 else 1.0)))
    np.testing.assert_allclose(astuple(found.theta), astuple(THETA), rtol=1e-6)
    assert found.mape_cv < 1e-9
    assert found.conformal.q == pytest.approx(0.8)
    assert found.spread == pytest.approx(0.8)


def test_visits_that_others_disturbed_count_only_where_there_is_no_quiet_one() -> None:
    """The dear ones are known to be disturbed, so neither prices nor margin follow them."""
    disturbed = [
        measured(v, exact(v) * (1.8 if v.turn else 1.0), 0.4 if v.turn else 0.01) for v in order_visits(PLAN, ["t0"])
    ]
    found = fit_tier("t0", PLAN, disturbed)
    np.testing.assert_allclose(astuple(found.theta), astuple(THETA), rtol=1e-6)
    assert found.conformal.q == pytest.approx(0.0, abs=1e-9)
    assert (found.disturbed, found.visits, found.noisy_cells, found.warnings) == (66, 99, 0, ())


def test_cells_that_were_never_quiet_are_said() -> None:
    """They count all the same, and a warning tells."""
    loud = [measured(v, exact(v), 0.4 if v.cell in PLAN.fit[:3] else 0.0) for v in order_visits(PLAN, ["t0"])]
    found = fit_tier("t0", PLAN, loud)
    assert (found.noisy_cells, found.disturbed) == (3, 9)
    assert "3 of 33 cells were measured only while other processes used the CPU" in found.warnings[0]


def test_the_middle_of_visits_leaves_odd_ones_out() -> None:
    """The median of up to three; of five the mean of the three in the middle."""
    assert middle([3.0]) == 3.0
    assert middle([1.0, 9.0, 2.0]) == 2.0
    assert middle([1.0, 2.0, 3.0, 7.0, 99.0]) == 4.0


def test_a_visit_counts_with_the_median_of_its_windows() -> None:
    """One of five windows is odd."""
    item = Measured(0, "t0", 32, 32, (1.0, 1.1, 9.0, 1.05, 1.02), None, 1, 1.0, 0, None, None)
    assert visit_energies([item]) == ({(32, 32): [1.05]}, 0)


def test_a_short_plan_says_what_its_margin_really_holds() -> None:
    """Nine cells kept out are worth 90 %, not 95."""
    plan = plan_cells((32, 512), (32, 512), 8, 9, rounds=1)
    found = fit_tier("t0", plan, visits(plan=plan))
    assert (found.form, found.conformal.k, found.conformal.level) == ("phys5", 9, 0.9)
    assert any("the margin holds 90%, not 95%: 9 cells" in warning for warning in found.warnings)
    assert found.spread is None  # one visit cannot differ from itself


def test_answers_that_cost_nothing_are_no_fit() -> None:
    """All cells of one prompt length cost the same, whatever the answer: a token would be free."""
    with pytest.raises(UsageError, match=r"On t0 longer answers did not cost more.*--no-resume"):
        fit_tier("t0", PLAN, visits(lambda v: 1.0 + 0.01 * v.cell[0]))


def test_a_meter_that_shows_hardly_more_than_idle_power_is_doubted() -> None:
    """96 % of the joules are idle ones: it may be another device's meter."""
    items = [replace(m, idle_subtracted_j=(0.04 * m.energy_j[0],)) for m in visits()]
    found = fit_tier("t0", PLAN, items)
    assert found.idle_share == pytest.approx(0.96)
    assert "96% of the energy is idle power" in found.warnings[0]


def test_noise_is_covered_by_the_margin_for_about_as_many_as_it_says() -> None:
    """With 2 % noise, of 2000 new sequences at most 5 % + 4 points exceed the price (a beta spread at k = 19)."""
    rng = np.random.default_rng(5)
    shares = []
    for seed in range(20):
        plan = plan_cells((32, 512), (32, 512), 14, 19, rounds=1, seed=seed)
        found = fit_tier("t0", plan, visits(lambda v: exact(v) * rng.normal(1.0, 0.02), plan))
        n, m = np.exp(rng.uniform(np.log(32), np.log(512), (2, 2000)))
        ratio = THETA.energy_j(n, m) * rng.normal(1.0, 0.02, 2000) / found.theta.charged().energy_j(n, m)
        shares.append(float((ratio > 1 + found.conformal.q).mean()))
    assert np.mean(shares) < 0.09
