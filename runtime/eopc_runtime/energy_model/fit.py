"""The fit: relative least squares with coefficients that cannot be negative, and its error on cells left out.

    minimise  sum over rows of ((E(n, m) - E) / E)²,   θ1..θ5 >= 0, θ0 free

Every row is divided by its own energy, else the dearest cells decide. Bounds keep the fit monotone, so that a
budget has one largest answer. θ0 is free because a sensor that lags reads isolated runs too low by a constant;
forced to 0 or more, the error on public AGX Orin data triples (0.68 to 1.95 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eopc_runtime.energy_model.folds import FOLDS, Samples, make_folds
from eopc_runtime.energy_model.forms import FORMS, PHYS5, QUADRATIC, Array, Form, Theta
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import did_you_mean

FEWEST_CELLS = 6  # below, the six coefficients are a guess (6 cells: 5.2 % mean error, 8: 1.4 %)
FEWEST_QUADRATIC = 10  # below, θ4 and θ5 are tied
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted form; `given_up` are coefficients that the cells could not tell apart from others (they are 0)."""

    form: Form
    coefficients: Array
    given_up: int

    def energy_j(self, n: Array, m: Array) -> Array:
        """Predicted joules."""
        predicted: Array = self.form.columns(n, m) @ self.coefficients
        return predicted

    @property
    def theta(self) -> Theta:
        """The fit as θ; UsageError for a form that is no polynomial."""
        if self.form.mix is None:
            raise UsageError(f"The form {self.form.name} is for comparison only: it cannot price a sequence.")
        return Theta(*(float(x) for x in self.form.mix @ self.coefficients))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors on cells left out of the fit, as shares: mean over the cells of their mean, and the largest."""

    mape: float
    worst: float


def choose_form(name: str, cells: int) -> Form:
    """Return the form of this name; "auto" ties θ4 and θ5 below 10 cells. UsageError below 6 cells."""
    if name != AUTO and name not in FORMS:
        raise UsageError(f'There is no form "{name}".{did_you_mean(name, FORMS)} Forms: {AUTO}, {", ".join(FORMS)}.')
    if cells < FEWEST_CELLS:
        raise UsageError(
            f"{cells} distinct (n_in, n_out) cells are too few to fit: at least {FEWEST_CELLS} are needed, and 12 to "
            "16, the corners of the range among them, give an error below 1 %. Measure more lengths."
        )
    if name != AUTO:
        return FORMS[name]
    return FORMS[QUADRATIC if cells >= FEWEST_QUADRATIC else PHYS5]


def fit(samples: Samples, form: Form) -> Fitted:
    """Fit one form; UsageError if even the price of a generated token cannot be told."""
    if len(set(samples.n_out)) < 2:
        raise UsageError(
            "All cells generate the same number of tokens, so the price of a token cannot be told from the "
            "fixed cost. Measure at least three answer lengths."
        )
    weighted = form.columns(samples.n_in, samples.n_out) / samples.energy_j[:, None]
    scale = np.abs(weighted).max(axis=0)
    weighted = weighted / scale
    kept = _independent(weighted)
    found = bounded_least_squares(weighted[:, kept], np.ones(len(samples)), np.array(form.free)[kept])
    coefficients = np.zeros(len(form.free))
    coefficients[kept] = found / scale[kept]
    return Fitted(form, coefficients, int((~kept).sum()))


def cross_validate(samples: Samples, form: Form, folds: int = FOLDS, seed: int = 0) -> HeldOut:
    """Fit with each fold of cells left out in turn, and return the error on what was left out."""
    cells = samples.cells()
    error_of_cell = []
    worst = 0.0
    for held_out in make_folds(cells, folds, seed):
        fitted = fit(samples.within(set(cells) - set(held_out)), form)
        for cell in held_out:
            tested = samples.within([cell])
            errors = relative_errors(fitted, tested)
            error_of_cell.append(float(errors.mean()))
            worst = max(worst, float(errors.max()))
    return HeldOut(float(np.mean(error_of_cell)), worst)


def relative_errors(fitted: Fitted, samples: Samples) -> Array:
    """Return |predicted - measured| / measured, one per sample."""
    errors: Array = np.abs(fitted.energy_j(samples.n_in, samples.n_out) - samples.energy_j) / samples.energy_j
    return errors


def bounded_least_squares(a: Array, b: Array, free: npt.NDArray[np.bool_]) -> Array:
    """Minimise |a x - b| with x >= 0 where not `free`: the active-set method of Lawson and Hanson.

    Columns should be of similar size. Free variables are solved for from the start and never leave.
    """
    tolerance = 1e-12 * max(float(np.abs(a.T @ b).max()), 1e-300)
    solved = free.copy()
    x = _solve(a, b, solved)
    for _ in range(10 * a.shape[1]):
        gradient = np.where(solved, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= tolerance:
            break
        solved[int(gradient.argmax())] = True
        while ((trial := _solve(a, b, solved))[solved & ~free] <= 0).any():
            leaving = solved & ~free & (trial <= 0)
            share = float((x[leaving] / (x[leaving] - trial[leaving])).min())
            x = x + share * (trial - x)
            solved &= free | (x > 1e-15 * np.abs(x).max())
            x[~solved] = 0.0
        x = trial
    return x


def _solve(a: Array, b: Array, solved: npt.NDArray[np.bool_]) -> Array:
    """Plain least squares in the solved variables, the others 0."""
    x = np.zeros(a.shape[1])
    if solved.any():
        x[solved] = np.linalg.lstsq(a[:, solved], b, rcond=None)[0]
    return x


def _independent(columns: Array) -> npt.NDArray[np.bool_]:
    """Mark the columns that are not combinations of those before them, as when all prompts have one length."""
    kept = np.zeros(columns.shape[1], dtype=bool)
    for j in range(columns.shape[1]):
        column = columns[:, j]
        rest = column - columns[:, kept] @ np.linalg.lstsq(columns[:, kept], column, rcond=None)[0]
        kept[j] = np.linalg.norm(rest) > 1e-7 * np.linalg.norm(column)
    return kept
