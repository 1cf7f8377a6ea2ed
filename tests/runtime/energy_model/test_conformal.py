"""The margin: its rank, its level, and that new cells exceed it as rarely as it says."""

from __future__ import annotations

import numpy as np
import pytest

from eopc_runtime.energy_model.conformal import (
    cell_scores,
    largest_ratio,
    margin_of,
    needed_cells,
    split_conformal,
)
from eopc_runtime.energy_model.fit import fit
from eopc_runtime.energy_model.folds import Samples, hold_out
from eopc_runtime.energy_model.forms import FORMS, Theta
from eopc_runtime.errors import UsageError

THETA = Theta(-10.5, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-6)
CELLS = [(n, m) for n in (64, 128, 256, 512, 1024, 2048) for m in (64, 128, 256, 512, 1024, 2048)]


def noisy(rng: np.random.Generator, repeats: int = 1, noise: float = 0.02) -> Samples:
    """The cells' energies with noise."""
    return Samples.of(
        (n, m, THETA.energy_j(float(n), float(m)) * (1 + noise * rng.standard_normal()))
        for n, m in CELLS
        for _ in range(repeats)
    )


@pytest.mark.parametrize(("alpha", "cells"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1)])
def test_the_cells_a_level_needs(alpha: float, cells: int) -> None:
    """19 for 95 %, 99 for 99 %; with as many the level is held exactly, with one less it is not."""
    assert needed_cells(alpha) == cells
    assert not split_conformal([1.0] * cells, alpha).short
    assert split_conformal([1.0] * cells, alpha).level == pytest.approx(1 - alpha)
    if cells > 1:
        assert split_conformal([1.0] * (cells - 1), alpha).short


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_level_that_is_no_share_is_refused(alpha: float) -> None:
    """alpha lies between 0 and 1."""
    with pytest.raises(UsageError, match="alpha"):
        needed_cells(alpha)


def test_the_margin_is_the_right_order_statistic() -> None:
    """ceil(0.95 x 20) = 19th of 19; ceil(0.9 x 20) = 18th; with 39 scores ceil(0.95 x 40) = 38th."""
    scores = [1 + i / 1000 for i in range(1, 20)]
    assert split_conformal(scores[::-1], 0.05).q == pytest.approx(0.019)
    assert split_conformal(scores, 0.1).q == pytest.approx(0.018)
    many = split_conformal([1 + i / 1000 for i in range(1, 40)], 0.05)
    assert (many.q, many.level, many.k) == (pytest.approx(0.038), pytest.approx(0.95), 39)


def test_too_few_cells_say_which_level_they_hold() -> None:
    """Ten scores: the largest holds 10/11, whatever was asked for."""
    found = split_conformal([1.0, 1.02, *([1.0] * 8)], 0.05)
    assert (found.q, found.k, found.short) == (pytest.approx(0.02), 10, True)
    assert found.level == pytest.approx(10 / 11)


def test_a_cells_score_is_its_worst_run_over_what_is_charged() -> None:
    """Of two runs the dearer counts; a negative constant is not part of what is charged."""
    charged = THETA.charged().energy_j(512.0, 256.0)
    runs = Samples.of([(512, 256, charged * 1.01), (512, 256, charged * 1.03), (64, 64, charged)])
    scores = cell_scores(THETA, runs)
    assert scores[0] == pytest.approx(1.03)
    assert len(scores) == 2


def test_new_cells_exceed_the_margin_as_rarely_as_it_says() -> None:
    """300 worlds of 2 % noise, 12 cells fitted, 19 for the margin, 5 new: at most 5 % above (+ 3 standard errors).

    Not far below either: a margin that is never exceeded says nothing. The constant is 0 here, so that nothing but the
    margin stands between prediction and energy.
    """
    theta = Theta(0.0, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-6)
    rng = np.random.default_rng(0)
    above = trials = 0
    for world in range(300):
        energies = theta.energy_j(*(np.array(c, dtype=float) for c in zip(*CELLS, strict=True)))
        energies = energies * (1 + 0.02 * rng.standard_normal(len(CELLS)))
        samples = Samples.of((n, m, e) for (n, m), e in zip(CELLS, energies, strict=True))
        fitted, kept = hold_out(CELLS, 24, seed=world)
        found = fit(samples.within(fitted), FORMS["quadratic"]).theta
        scores = cell_scores(found, samples.within(kept))
        order = rng.permutation(24)
        margin = split_conformal([scores[i] for i in order[:19]], 0.05)
        above += sum(scores[i] > 1 + margin.q for i in order[19:])
        trials += 5
    assert 0.02 < above / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_margin_carried_to_the_fit_on_all_cells_bounds_what_the_first_did() -> None:
    """Everywhere in the hull, charged x (1 + q) of the whole fit is at least that of the fit the scores belong to."""
    samples = noisy(np.random.default_rng(5))
    form = FORMS["quadratic"]
    whole = fit(samples, form)
    margin = margin_of(samples, form, whole)
    assert margin is not None
    assert (margin.k, margin.level) == (19, pytest.approx(0.95))
    fitted, kept = hold_out(samples.cells(), 19)
    part = fit(samples.within(fitted), form).theta
    own = split_conformal(cell_scores(part, samples.within(kept)))
    for n, m in CELLS:
        bound = whole.theta.charged().energy_j(float(n), float(m)) * (1 + margin.q)
        assert bound >= part.charged().energy_j(float(n), float(m)) * (1 + own.q) * (1 - 1e-9)


def test_the_largest_ratio_is_that_of_the_hull() -> None:
    """A fit twice as dear per token is up to twice as dear; against itself the ratio is 1."""
    hull = noisy(np.random.default_rng(0)).hull()
    dear = Theta(0.0, 0.0, 0.0, 0.8, 0.0, 0.0)
    cheap = Theta(0.0, 0.0, 0.0, 0.4, 0.0, 0.0)
    assert largest_ratio(dear, cheap, hull) == pytest.approx(2.0)
    assert largest_ratio(THETA, THETA, hull) == 1.0


def test_without_spare_cells_there_is_no_margin() -> None:
    """Twelve cells are all needed for the fit; thirteen spare one, which holds one half."""
    form = FORMS["quadratic"]
    samples = noisy(np.random.default_rng(1))
    for count, level in ((12, None), (13, 0.5)):
        some = samples.within([*CELLS[:6], *CELLS[30:], CELLS[14]][:count])
        margin = margin_of(some, form, fit(some, form))
        assert (margin.level if margin else None) == level
