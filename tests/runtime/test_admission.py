"""Admission: what a budget may be promised with, and what the user is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.admission import Terms, admit
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.policy import Request, quantum_j
from eopc_runtime.provenance import Calibration, Conformal, Hull, MeterRecord

HULL = Hull((8, 64), (4, 64))
STRICT = Terms(strict=True)
CALIBRATION = Calibration(HULL, Conformal(0.05, 19, 0.0, 0.95), 31, {}, None, None)


def table(source: str = "calibrated", margin: float = 0.0, quantum: float | None = None) -> EnergyTable:
    """Two tiers: 1 J per prompt token / 8 and 4 or 1 J per step; calibrated ones with a hull."""
    tiers = tuple(TierEnergy(f"t{i}", 0.0, step / 8, 0.0, step, 0.0, 0.0, source) for i, step in enumerate((4.0, 1.0)))
    meter = MeterRecord("ina3221", ("VDD_IN",), 5.0, quantum)
    calibration = replace(CALIBRATION, meter=meter)
    return EnergyTable("board", source, margin, tiers, None, calibration if source == "calibrated" else None)


@pytest.mark.parametrize("source", ["prior", "proxy"])
def test_a_nominal_table_warns_in_one_line_and_strict_refuses(source: str) -> None:
    """The warning names the source and the cure; strict names the least safety factor; that factor is accepted."""
    request = Request(8, 4)
    (warning,) = admit(table(source), 50.0, request, Terms()).warnings
    assert source in warning
    assert "\n" not in warning
    assert "--safety 4" in warning
    for terms in (STRICT, Terms(strict=True, safety=3.9)):
        with pytest.raises(BudgetError, match=r"safety factor of 4 or more"):
            admit(table(source), 50.0, request, terms)
    safe = admit(table(source), 100.0, request, Terms(strict=True, safety=4.0))
    assert safe.plan.energy_j == pytest.approx(4 * (4.0 + 3 * 4.0))
    assert safe.warnings == (warning.split(". Calibrate")[0].removesuffix(".") + ". Prices are raised 4 times.",)


def test_without_a_budget_nothing_is_promised() -> None:
    """No warning, no refusal of a prior; strict without a budget is a mistake."""
    assert admit(table("prior"), None, Request(8, 4), Terms()).warnings == ()
    with pytest.raises(UsageError, match="no budget was given"):
        admit(table(), None, Request(8, 4), STRICT)


def test_a_calibrated_table_admits_a_strict_budget_in_silence() -> None:
    """Measured prices within their hull need no warning."""
    found = admit(table(margin=0.05), 100.0, Request(8, 16), STRICT)
    assert found.warnings == ()
    assert found.plan.label == "t0"


@pytest.mark.parametrize(("n", "m"), [(7, 16), (65, 16), (16, 3), (16, 65)])
def test_outside_the_hull_strict_refuses_and_others_pay_a_stated_factor(n: int, m: int) -> None:
    """Every side of the rectangle; the factor is in the price and in the warning, marked extrapolated."""
    request = Request(n, m)
    with pytest.raises(BudgetError, match="8 to 64 prompt and 4 to 64 new tokens"):
        admit(table(), 5000.0, request, STRICT)
    found = admit(table(), 5000.0, request, Terms())
    assert "extrapolated" in found.warnings[0]
    assert "1.2 times" in found.warnings[0]
    assert found.plan.energy_j == pytest.approx(1.2 * table().plan_price_j(0, 0, n, m))


def test_the_largest_tier_that_fits_with_a_quantum_is_taken() -> None:
    """16 J for the whole request on t0, and one step of 4 J kept free: 20.1 J admit it, 19.9 J do not."""
    request = Request(8, 4)
    assert admit(table(), 20.1, request, STRICT).plan.label == "t0"
    assert admit(table(), 19.9, request, STRICT).plan.label == "t0>t1"
    assert quantum_j(table(), 0, request) == 4.0
    assert quantum_j(table(quantum=6.5), 0, request) == 6.5
    assert quantum_j(table("prior"), 0, request) == 0.0


def test_a_length_that_does_not_fit_is_capped() -> None:
    """With 12 J on t1: prompt 1 J, a step kept free, ten steps: eleven tokens of 64."""
    plan = admit(table(), 12.1, Request(8, 64), STRICT).plan
    assert (plan.label, plan.new_tokens) == ("t1", 11)


def test_a_drift_widens_the_margin_only_as_far_as_it_falls_short() -> None:
    """A drift of 1.03 is within a margin of 5 %; 1.26 is charged as 1.26, not on top of it, and said."""
    request, prices = Request(8, 4), table(margin=0.05)
    calm = admit(prices, 100.0, request, Terms(drift=1.03))
    assert calm.warnings == ()
    assert calm.plan.energy_j == pytest.approx(16 * 1.05)
    hot = admit(prices, 100.0, request, Terms(drift=1.26))
    assert hot.plan.energy_j == pytest.approx(16 * 1.26)
    assert "1.26 times the prediction" in hot.warnings[0]
    safe = admit(prices, 200.0, request, Terms(drift=1.26, safety=2.0))
    assert safe.plan.energy_j == pytest.approx(16 * 1.05 * 2)


@pytest.mark.parametrize("safety", [0.9, 0.0, -4.0, float("nan"), float("inf"), True])
def test_a_safety_factor_below_one_is_refused(safety: float) -> None:
    """Prices are raised, never lowered."""
    with pytest.raises(UsageError, match="1 or more"):
        Terms(safety=safety)


@pytest.mark.parametrize("drift", [0.0, -1.0, float("nan")])
def test_a_drift_is_a_ratio(drift: float) -> None:
    """Anything else is our own mistake."""
    with pytest.raises(ValueError, match="ratio"):
        Terms(drift=drift)


@given(st.floats(1.0, 500.0), st.integers(8, 64), st.integers(4, 64), st.floats(0, 0.3), st.floats(1, 5))
def test_what_is_admitted_fits_with_its_quantum(budget_j: float, n: int, m: int, margin: float, safety: float) -> None:
    """Price at these terms + quantum <= budget, on every plan that is admitted."""
    request, prices = Request(n, m), table(margin=margin)
    try:
        found = admit(prices, budget_j, request, Terms(strict=True, safety=safety))
    except BudgetError:
        return
    charged = found.prices(1.0)
    price_j = charged.plan_price_j(found.plan.prefill, found.plan.decode, n, found.plan.new_tokens)
    assert price_j == found.plan.energy_j
    assert price_j + quantum_j(charged, found.plan.decode, request) <= budget_j
    assert charged.margin == pytest.approx((1 + margin) * safety - 1)


def test_a_forced_tier_that_is_too_dear_says_what_it_needs() -> None:
    """Prompt 4 J and a step of 4 J kept free on t0."""
    with pytest.raises(BudgetError, match=r"t0 needs 8\.01 J \(calibrated\)"):
        admit(table(), 5.0, Request(8, 4), Terms(), tier=0)
    assert admit(table(), 9.0, Request(8, 4), Terms(), tier=0).plan.new_tokens == 1


def test_a_table_without_a_hull_is_not_extrapolated() -> None:
    """No range is known, so there is nothing to be outside of; a strict budget says that no level is known."""
    bare = replace(table(), calibration=None)
    assert admit(bare, 1e6, Request(5000, 5000), Terms()).warnings == ()
    (warning,) = admit(bare, 1e6, Request(5000, 5000), STRICT).warnings
    assert "not known how often" in warning


def test_a_margin_of_too_few_cells_says_which_level_it_holds() -> None:
    """Ten cells hold 91 %, not 95 %."""
    short = replace(table(), calibration=replace(CALIBRATION, conformal=Conformal(0.05, 10, 0.0, 10 / 11)))
    (warning,) = admit(short, 100.0, Request(8, 4), Terms()).warnings
    assert "91% of sequences, not 95%: only 10 cells" in warning
