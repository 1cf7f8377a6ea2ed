"""Errors, violations and coverage over verified sequences only."""

from __future__ import annotations

import pytest

from eopc_runtime.validation.compare import Checked, Summary, summarise


def checked(measured: float | None, budget: float | None = None, predicted: float = 10.0) -> Checked:
    """A sequence that was predicted to cost 10 J and charged 11 J."""
    return Checked("1", "t0", 64, 64, predicted, 11.0, budget, measured, 3.0, 60, measured is not None, None, ())


def test_the_figures_are_those_of_the_definition() -> None:
    """Two within, one above its price, one above its budget only, one unverified."""
    found = summarise([checked(10.0), checked(8.0), checked(12.5), checked(10.5, budget=10.2), checked(None)])
    assert found == Summary(
        sequences=5,
        verified=4,
        mape=pytest.approx((0.0 + 2 / 8 + 2.5 / 12.5 + 0.5 / 10.5) / 4),
        bias=pytest.approx((0.0 - 0.2 + 0.25 + 0.05) / 4),
        violations=2,
        over_price=1,
        over_budget=1,
        coverage=0.75,
        worst_over=pytest.approx(12.5 / 11 - 1),
    )


def test_a_sequence_above_both_price_and_budget_is_one_violation() -> None:
    """Counted once, named twice."""
    found = summarise([checked(13.0, budget=12.0)])
    assert (found.violations, found.over_price, found.over_budget) == (1, 1, 1)


def test_without_a_verified_sequence_there_is_no_figure() -> None:
    """Unverified is not 0 J, not 0 % and not a success."""
    found = summarise([checked(None), checked(None)])
    assert (found.verified, found.mape, found.bias, found.coverage, found.worst_over) == (0, None, None, None, None)
    assert checked(None).error is None
    assert not checked(None).over_price
