"""The polynomial: by phase, in the paper's numbering, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.energy_model.forms import FORMS, Theta, monomials

size = st.floats(0, 10)
small = st.floats(1e-9, 1e-3)
thetas = st.builds(Theta, st.floats(-20, 20), size, small, st.floats(1e-6, 10), small, small)
lengths = st.integers(1, 4096)


@given(thetas, lengths, lengths)
def test_prefill_and_steps_add_up_to_the_charged_energy(theta: Theta, n: int, m: int) -> None:
    """For every n and m >= 1: prefill + (m - 1) steps = max(θ0, 0) + the rest; 1e-12 covers the order of adding."""
    tier = theta.to_tier("t0", "calibrated")
    charged = theta.charged().energy_j(float(n), float(m))
    assert tier.sequence_j(n, m) == pytest.approx(charged, rel=1e-12)
    assert tier.prefill_j(n) == pytest.approx(theta.charged().energy_j(float(n), 1.0), rel=1e-12)


@given(thetas, lengths, st.integers(1, 200))
def test_every_step_is_the_difference_of_two_sequences(theta: Theta, n: int, i: int) -> None:
    """Step i is what m = i + 1 costs more than m = i; the difference of two large sums rounds to 1e-9 of them."""
    tier = theta.to_tier("t0", "calibrated")
    longer, shorter = theta.charged().energy_j(float(n), i + 1.0), theta.charged().energy_j(float(n), float(i))
    assert tier.step_j(n, i) == pytest.approx(longer - shorter, rel=1e-6, abs=1e-9 * longer)


@given(thetas)
def test_a_theta_survives_the_phases(theta: Theta) -> None:
    """θ -> prices by phase -> θ gives the same six numbers, also a negative θ0."""
    back = Theta.of_tier(theta.to_tier("t0", "calibrated"))
    for i in range(6):
        name = f"theta{i}"
        assert getattr(back, name) == pytest.approx(getattr(theta, name), rel=1e-9, abs=1e-12)


@given(thetas, lengths, lengths)
def test_the_expected_energy_is_the_fits_own_where_that_is_possible(theta: Theta, n: int, m: int) -> None:
    """Among measured lengths a meter should show θ's energy; elsewhere at least m tokens, never more than charged."""
    tier = theta.to_tier("t0", "calibrated")
    own = theta.energy_j(float(n), float(m))
    assert tier.expected_j(n, m) == pytest.approx(max(own, 0.0), rel=1e-9, abs=1e-9)
    elsewhere = tier.expected_j(n, m, measured=False)
    assert 0 < elsewhere <= tier.sequence_j(n, m)
    assert elsewhere >= tier.expected_j(n, m)
    assert elsewhere >= min(tier.steps_j(n, 0, m), tier.sequence_j(n, m))


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=6), lengths, lengths)
def test_the_papers_numbering_round_trips_and_multiplies_by_m(t: list[float], n: int, m: int) -> None:
    """E(n, m) = m e(n, m), with e in the paper's order, and t -> θ -> t changes nothing."""
    theta = Theta.from_paper(t)
    assert list(theta.to_paper()) == t
    e = t[0] + t[1] * n * n / m + t[2] * n + t[3] * n / m + t[4] * m + t[5] / m
    scale = sum(abs(x) for x in t) * n * n * m * m
    assert theta.energy_j(float(n), float(m)) == pytest.approx(m * e, abs=1e-12 * max(scale, 1e-9))


def test_a_paper_form_of_another_size_is_refused() -> None:
    """Five coefficients are not the paper's form."""
    with pytest.raises(ValueError, match="six"):
        Theta.from_paper([1.0] * 5)


def test_the_tied_form_prices_a_step_by_its_context() -> None:
    """phys5: θ4 = 2 θ5, so a step costs the same for a token of the prompt and of the answer."""
    mix = FORMS["phys5"].mix
    assert mix is not None
    theta = Theta(*(mix @ np.array([1.0, 2.0, 3.0, 4.0, 5.0])))
    tier = theta.to_tier("t0", "calibrated")
    assert tier.step_jn == tier.step_ji == 4.0
    assert (theta.theta0, theta.theta3, theta.theta1, theta.theta2) == (1.0, 2.0, 3.0, 5.0)


def test_the_forms_have_the_published_terms() -> None:
    """Each published form, written per token, equals its columns / m at a cell with all terms apart."""
    n, m = np.array([3.0]), np.array([7.0])
    per_token = {
        "b1": [1],
        "b2": [1, 1 / 7],
        "b3": [1, 1 / 10],
        "b4": [1, 3 / 7, 3],
        "flops": [1, 9 / 7, 3, 3 / 7, 7],
        "quadratic": [1 / 7, 1, 3 / 7, 3, 7, 9 / 7],
        "linear": [1 / 7, 1, 3 / 7],
    }
    for name, terms in per_token.items():
        np.testing.assert_allclose(FORMS[name].columns(n, m)[0] / 7, terms, rtol=1e-12)
    np.testing.assert_array_equal(monomials(n, m)[0], [1, 3, 9, 7, 21, 49])


def test_only_the_fixed_cost_may_be_negative() -> None:
    """In the priced forms the first column, the constant, is the free one."""
    for name in ("quadratic", "phys5", "linear"):
        assert FORMS[name].free == (True, *(False,) * (len(FORMS[name].free) - 1))
