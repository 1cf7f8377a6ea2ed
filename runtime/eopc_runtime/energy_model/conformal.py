"""The margin: a factor on the prediction that new sequences exceed rarely, with the level it really holds.

Split conformal prediction: cells the fit has not seen are scored by their largest measured / charged ratio; the
margin 1 + q is the ceil((1 - alpha)(k + 1))-th smallest of k scores. A new cell from the same source exceeds it
with a probability of at most alpha, whatever the errors look like, provided that k >= 1 / alpha - 1.

The ratio is to the energy a budget is charged, in which a negative constant is not credited: the margin is added to
that energy and to no other. What is charged too much for short answers therefore does not widen it a second time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eopc_runtime.energy_model.fit import Fitted, fit
from eopc_runtime.energy_model.folds import Samples, hold_out
from eopc_runtime.energy_model.forms import Form, Theta
from eopc_runtime.errors import UsageError
from eopc_runtime.provenance import Conformal, Hull

ALPHA = 0.05
FIT_CELLS = 12  # what a fit keeps for itself before cells are spared for the margin


def needed_cells(alpha: float) -> int:
    """Return the cells that a level of 1 - alpha takes: 19 for 95 %, 99 for 99 %."""
    if not 0 < alpha < 1:
        raise UsageError(f"alpha is {alpha}; it is the share of sequences that may cost more, between 0 and 1.")
    return max(math.ceil(1 / alpha - 1 - 1e-9), 1)


def split_conformal(scores: Sequence[float], alpha: float = ALPHA) -> Conformal:
    """Return the margin for these measured / charged ratios, one per cell, and the level it holds."""
    needed_cells(alpha)
    k = len(scores)
    rank = min(math.ceil((1 - alpha) * (k + 1) - 1e-9), k)
    return Conformal(alpha=alpha, k=k, q=sorted(scores)[rank - 1] - 1, level=rank / (k + 1))


def cell_scores(theta: Theta, samples: Samples) -> list[float]:
    """Return the largest measured / charged ratio of each cell's runs."""
    ratio = samples.energy_j / theta.charged().energy_j(samples.n_in, samples.n_out)
    best: dict[tuple[int, int], float] = {}
    for n, m, r in zip(samples.n_in, samples.n_out, ratio, strict=True):
        cell = (int(n), int(m))
        best[cell] = max(best.get(cell, 0.0), float(r))
    return list(best.values())


def margin_of(samples: Samples, form: Form, whole: Fitted, alpha: float = ALPHA, seed: int = 0) -> Conformal | None:
    """Return the margin of a fit on all samples, None where too few cells are there to keep any out.

    The scores belong to a fit on the other cells. Its bound is carried over to the fit on all of them by the largest
    ratio of the two within the hull, so that the level stays true.
    """
    cells = samples.cells()
    spare = min(needed_cells(alpha), len(cells) - FIT_CELLS)
    if spare < 1:
        return None
    fitted_cells, kept = hold_out(cells, spare, seed)
    part = fit(samples.within(fitted_cells), form)
    found = split_conformal(cell_scores(part.theta, samples.within(kept)), alpha)
    factor = largest_ratio(part.theta, whole.theta, samples.hull())
    return Conformal(found.alpha, found.k, (1 + found.q) * factor - 1, found.level)


def largest_ratio(one: Theta, other: Theta, hull: Hull) -> float:
    """Return the largest ratio of two charged energies over the hull, on a lattice of 65 x 65 lengths."""
    n, m = np.meshgrid(np.geomspace(*hull.n_in, 65), np.geomspace(*hull.n_out, 65))
    return float((one.charged().energy_j(n, m) / other.charged().energy_j(n, m)).max())
