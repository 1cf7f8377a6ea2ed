"""The fit: exact against brute force, recovers what made the data, keeps signs, and refuses what it cannot tell."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.energy_model.fit import (
    bounded_least_squares,
    choose_form,
    cross_validate,
    fit,
    relative_errors,
)
from eopc_runtime.energy_model.folds import Samples
from eopc_runtime.energy_model.forms import FORMS, Theta
from eopc_runtime.errors import UsageError

GRID = [(n, m) for n in (32, 64, 128, 256, 512) for m in (32, 64, 128, 256, 512)]
ORIN_INT4 = Theta(-10.5, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-6)
Floats = npt.NDArray[np.float64]


def samples(theta: Theta, cells: list[tuple[int, int]], noise: float = 0.0, repeats: int = 1, seed: int = 0) -> Samples:
    """Energies of a θ with relative noise."""
    rng = np.random.default_rng(seed)
    return Samples.of(
        (n, m, theta.energy_j(float(n), float(m)) * (1 + noise * rng.standard_normal()))
        for n, m in cells
        for _ in range(repeats)
    )


def brute_force(a: Floats, b: Floats, free: npt.NDArray[np.bool_]) -> float:
    """The least |a x - b|² over all sets of coefficients that may be 0: independent of the active-set method."""
    bounded = [j for j in range(a.shape[1]) if not free[j]]
    least = np.inf
    for count in range(len(bounded) + 1):
        for dropped in itertools.combinations(bounded, count):
            kept = [j for j in range(a.shape[1]) if j not in dropped]
            x = np.zeros(a.shape[1])
            if kept:
                x[kept] = np.linalg.lstsq(a[:, kept], b, rcond=None)[0]
            if (x[bounded] >= 0).all():
                least = min(least, float(((a @ x - b) ** 2).sum()))
    return least


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(6, 20), st.integers(0, 2))
def test_the_active_set_finds_the_minimum(seed: int, columns: int, rows: int, free_count: int) -> None:
    """Signs are kept, and no choice of zeros does better than what was found (1e-9 of |b|²: rounding)."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    free = np.arange(columns) < free_count
    x = bounded_least_squares(a, b, free)
    assert (x[~free] >= 0).all()
    assert ((a @ x - b) ** 2).sum() <= brute_force(a, b, free) + 1e-9 * (b @ b)


def test_a_bound_that_does_not_bind_changes_nothing() -> None:
    """Where plain least squares has the right signs, the bounded solution is the same."""
    a = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(bounded_least_squares(a, a @ [2.0, 3.0], np.array([False, False])), [2.0, 3.0])


@pytest.mark.parametrize("theta0", [-10.5, 0.0, 4.0])
def test_a_theta_is_recovered_from_noisy_energies(theta0: float) -> None:
    """2 % noise, 5 x 5 cells, 3 runs: held-out error <= 3 %, no negative price, the token's price within 5 %.

    With the negative constant the shortest cells are worth little, so its own size comes out within 3 J.
    """
    theta = Theta(theta0, 0.0026, 8.9e-7, 0.3683, 5.6e-6, 6e-6)
    cells = [(n, m) for n, m in GRID if theta.energy_j(float(n), float(m)) > 5]
    noisy = samples(theta, cells, noise=0.02, repeats=3)
    found = fit(noisy, FORMS["quadratic"]).theta
    assert cross_validate(noisy, FORMS["quadratic"]).mape <= 0.03
    assert min(astuple(found)[1:]) >= 0
    assert found.theta3 == pytest.approx(theta.theta3, rel=0.05)
    assert found.theta0 == pytest.approx(theta0, abs=3.0)


def test_without_noise_the_theta_is_exact() -> None:
    """Six coefficients from 25 exact cells; 1e-5 is the conditioning of n² and m² columns."""
    found = fit(samples(ORIN_INT4, GRID), FORMS["quadratic"]).theta
    np.testing.assert_allclose(astuple(found), astuple(ORIN_INT4), rtol=1e-5)


def test_errors_count_relative_to_each_row() -> None:
    """One wrong large cell does not spoil the small ones: they stay within 5 %; plain least squares is 30 % off."""
    exact = samples(Theta(0.0, 0.001, 0.0, 0.5, 0.0, 0.0), [*GRID, (64, 4096)])
    energy = exact.energy_j.copy()
    energy[-1] *= 1.2
    spoiled = Samples(exact.n_in, exact.n_out, energy)
    errors = np.abs(fit(spoiled, FORMS["linear"]).energy_j(exact.n_in, exact.n_out) - exact.energy_j) / exact.energy_j
    assert errors[:-1].max() < 0.05
    columns = FORMS["linear"].columns(spoiled.n_in, spoiled.n_out)
    plain = columns @ np.linalg.lstsq(columns, spoiled.energy_j, rcond=None)[0]
    assert (np.abs(plain - exact.energy_j) / exact.energy_j)[:-1].max() > 0.3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_every_fit_is_monotone(seed: int) -> None:
    """Whatever the energies, a fitted table never gets cheaper with a longer prompt or a longer answer."""
    rng = np.random.default_rng(seed)
    wild = Samples.of((n, m, float(rng.uniform(1, 100))) for n, m in GRID)
    theta = fit(wild, FORMS["quadratic"]).theta
    n = np.arange(1.0, 600.0, 7.0)
    grid = theta.energy_j(n[:, None], n[None, :])
    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()


@pytest.mark.parametrize(("cells", "form"), [(25, "quadratic"), (10, "quadratic"), (9, "phys5"), (6, "phys5")])
def test_few_cells_get_the_tied_form(cells: int, form: str) -> None:
    """From 10 cells on all six coefficients are free; from 6 on five."""
    assert choose_form("auto", cells).name == form


def test_fewer_than_six_cells_are_refused() -> None:
    """Five cells cannot carry a model; the message says how many can."""
    with pytest.raises(UsageError, match=r"5 distinct .* at least 6"):
        choose_form("auto", 5)
    with pytest.raises(UsageError, match=r'no form "quadratik".*Did you mean "quadratic"'):
        choose_form("quadratik", 30)


def test_the_tied_form_holds_on_physical_data() -> None:
    """Where a step's price depends on its context alone, phys5 fits 8 cells exactly."""
    theta = Theta(-5.0, 0.003, 1e-6, 0.5, 1e-4, 5e-5)
    eight = samples(theta, [(n, m) for n in (32, 128, 512) for m in (64, 128, 512)][:8])
    found = fit(eight, choose_form("auto", 8))
    assert relative_errors(found, samples(theta, GRID)).max() < 1e-6


def test_what_one_prompt_length_cannot_tell_is_given_up() -> None:
    """With a single n_in the prompt's terms fold into others: they are 0, counted, and the fit is still exact there."""
    one = samples(ORIN_INT4, [(128, m) for m in (32, 48, 64, 128, 200, 256, 300, 400, 512, 700)])
    found = fit(one, FORMS["quadratic"])
    assert found.given_up == 3
    assert relative_errors(found, one).max() < 1e-9
    assert fit(samples(ORIN_INT4, GRID), FORMS["quadratic"]).given_up == 0


def test_one_answer_length_cannot_price_a_token() -> None:
    """A token's price and the fixed cost are then one number."""
    with pytest.raises(UsageError, match="same number of tokens"):
        fit(samples(ORIN_INT4, [(n, 64) for n in range(32, 512, 32)]), FORMS["quadratic"])


def test_a_form_that_is_no_polynomial_prices_nothing() -> None:
    """B3 is there to be compared only."""
    with pytest.raises(UsageError, match="comparison only"):
        _ = fit(samples(ORIN_INT4, GRID), FORMS["b3"]).theta


def test_held_out_errors_are_larger_than_the_fits_own() -> None:
    """Cells that were left out are predicted worse than those that were fitted, and both see the noise."""
    noisy = samples(ORIN_INT4, [(n, m) for n, m in GRID if m > 32], noise=0.05, seed=3)
    own = float(relative_errors(fit(noisy, FORMS["quadratic"]), noisy).mean())
    held_out = cross_validate(noisy, FORMS["quadratic"])
    assert 0.01 < own < held_out.mape < 0.2
    assert held_out.worst > held_out.mape
