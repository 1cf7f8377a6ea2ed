"""From visits to prices: a robust figure per cell, the fit of a tier, its error on cells kept out, and the margin.

A cell counts with the middle of its visits: the median of up to three, from four on the mean without the lowest and the
highest, so that a single odd one does not move it. The margin is scored on the cells kept out, each by its dearest
visit, since a promise is about single sequences. Visits that other processes disturbed are left out of both where a
cell has quiet ones: prices are those of a device that does nothing else, and what else it does shows as drift.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eopc_runtime.calibration.contention import QUIET_SHARE
from eopc_runtime.calibration.journal import Measured
from eopc_runtime.calibration.plan import CellPlan
from eopc_runtime.energy_model.conformal import ALPHA, cell_scores, split_conformal
from eopc_runtime.energy_model.fit import AUTO, choose_form, fit, relative_errors
from eopc_runtime.energy_model.folds import Cell, Samples
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.errors import UsageError
from eopc_runtime.provenance import Conformal

MOSTLY_IDLE = 0.9


@dataclass(frozen=True, slots=True)
class TierFit:
    """The prices of one tier. Errors are shares (0.01 = 1 %) on cells the fit has not seen.

    spread is how far apart the visits of a cell were, (most - least) / median: the median over the cells and the
    largest; null with one visit per cell. disturbed are the visits during which other processes used the CPU, and
    noisy_cells the cells that had no other. idle_share is the part of the energy that the idle device would have used.
    """

    tier: str
    form: str
    theta: Theta
    mape_cv: float
    worst_cv: float
    conformal: Conformal
    spread: float | None
    worst_spread: float | None
    idle_share: float | None
    visits: int
    disturbed: int
    noisy_cells: int
    warnings: tuple[str, ...]


def fit_tier(tier: str, plan: CellPlan, measured: Sequence[Measured], alpha: float = ALPHA) -> TierFit:
    """Fit one tier to its visits; UsageError when they cannot give a fit."""
    visits, noisy_cells = visit_energies(measured)
    form = choose_form(AUTO, len(plan.fit))
    fitted = fit(_middles(visits, plan.fit), form)
    if fitted.theta.theta3 + fitted.theta.theta5 <= 0:
        raise UsageError(
            f"On {tier} longer answers did not cost more than short ones, so a token has no price: the measurements "
            "scatter too much. Calibrate with --no-resume on an idle device, with longer windows or wider --new-range."
        )
    kept_out = _middles(visits, plan.conformal)
    errors = relative_errors(fitted, kept_out)
    single = Samples.of((n, m, j) for n, m in plan.conformal for j in visits[n, m])
    conformal = split_conformal(cell_scores(fitted.theta, single), alpha)
    spreads = [(max(j) - min(j)) / statistics.median(j) for j in visits.values() if len(j) > 1]
    warnings = []
    if fitted.given_up:
        warnings.append(f"the cells cannot tell {fitted.given_up} of the coefficients apart; they are 0")
    if conformal.short:
        warnings.append(f"the margin holds {conformal.level:.0%}, not {1 - alpha:.0%}: {conformal.k} cells kept out")
    idle_share = _idle_share(measured)
    if idle_share is not None and idle_share > MOSTLY_IDLE:
        warnings.append(f"{idle_share:.0%} of the energy is idle power: does the meter see the work of this device?")
    if conformal.q < 0:
        warnings.append(f"every cell kept out cost less than predicted (by {-conformal.q:.1%} or more)")
    if noisy_cells:
        warnings.append(
            f"{noisy_cells} of {len(visits)} cells were measured only while other processes used the CPU; "
            "their figures are too high by an unknown amount"
        )
    return TierFit(
        tier=tier,
        form=form.name,
        theta=fitted.theta,
        mape_cv=float(errors.mean()),
        worst_cv=float(errors.max()),
        conformal=conformal,
        spread=statistics.median(spreads) if spreads else None,
        worst_spread=max(spreads) if spreads else None,
        idle_share=idle_share,
        visits=len(measured),
        disturbed=sum(not quiet(item) for item in measured),
        noisy_cells=noisy_cells,
        warnings=tuple(warnings),
    )


def visit_energies(measured: Sequence[Measured]) -> tuple[dict[Cell, list[float]], int]:
    """Return the joules per sequence of the visits of every cell, and how many cells had no quiet visit.

    A visit counts with the median over its windows. Disturbed visits count only where a cell has no quiet one.
    """
    by_cell: dict[Cell, list[Measured]] = {}
    for item in sorted(measured, key=lambda m: m.turn):
        by_cell.setdefault((item.n_in, item.n_out), []).append(item)
    good = {cell: [item for item in items if quiet(item)] for cell, items in by_cell.items()}
    energies = {
        cell: [statistics.median(item.energy_j) for item in good[cell] or items] for cell, items in by_cell.items()
    }
    return energies, sum(not items for items in good.values())


def middle(values: Sequence[float]) -> float:
    """Return the median of up to three values, the mean without the lowest and the highest of more."""
    if len(values) < 4:
        return statistics.median(values)
    return statistics.fmean(sorted(values)[1:-1])


def quiet(item: Measured) -> bool:
    """True if no other process used the CPU to speak of, as far as is known."""
    return item.others_share is None or item.others_share <= QUIET_SHARE


def _middles(visits: Mapping[Cell, Sequence[float]], cells: Sequence[Cell]) -> Samples:
    return Samples.of((n, m, middle(visits[n, m])) for n, m in cells)


def _idle_share(measured: Sequence[Measured]) -> float | None:
    known = [
        1 - statistics.median(item.idle_subtracted_j) / statistics.median(item.energy_j)
        for item in measured
        if item.idle_subtracted_j is not None
    ]
    return statistics.median(known) if known else None
