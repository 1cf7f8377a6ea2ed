"""Whether a budget can be promised at all, and at which prices: pure, before the first joule.

A promise is as good as the prices behind it. Prices that no meter has confirmed (prior, proxy) may admit a
request, with a warning; under a strict budget they are refused, unless a safety factor is named that covers
how wrong they can be. Lengths outside the calibrated hull are refused under a strict budget, and priced with a
stated factor otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.policy import Plan, Request, affordable_tokens, fits, needed_j, pick_tier
from eopc_runtime.provenance import Hull
from eopc_runtime.units import format_energy

# Datasheet priors under-predict public AGX Orin measurements by up to 3.6x.
NOMINAL_SAFETY = 4.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How firmly a budget is promised.

    strict: refuse what cannot be promised, instead of warning. safety: factor on every price, 1 or more.
    drift: how far measured joules have been above the prices of late (1: not), from `controller`.
    """

    strict: bool = False
    safety: float = 1.0
    drift: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.safety, bool) or not (math.isfinite(self.safety) and self.safety >= 1):
            raise UsageError(f"The safety factor is {self.safety}; it multiplies prices, so give 1 or more.")
        if not (math.isfinite(self.drift) and self.drift > 0):
            raise ValueError(f"drift is a ratio above 0, not {self.drift}")


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted request: its prices before any drift, the factor on them, its plan, what the user should know."""

    table: EnergyTable
    factor: float  # safety x extrapolation
    drift: float
    plan: Plan
    warnings: tuple[str, ...]

    def prices(self, drift: float) -> EnergyTable:
        """Return the prices charged at a drift: it widens the margin as far as margin and factor fall short of it."""
        return self.table.widened(_multiplier(self.table, self.factor, drift))


def admit(
    table: EnergyTable, budget_j: float | None, request: Request, terms: Terms, tier: int | None = None
) -> Admission:
    """Decide whether and how a request runs; `tier` starts it there instead of where the policy would.

    BudgetError when not even one token fits, or when a strict budget cannot be promised; the message says
    what would do.
    """
    warnings: list[str] = []
    if budget_j is None and terms.strict:
        raise UsageError("A strict budget was asked for, but no budget was given. Add one, for example 10J.")
    if budget_j is not None and table.nominal:
        _check_nominal(table, terms)
        warnings.append(_nominal_warning(table, terms))
    if budget_j is not None and not table.nominal:
        warnings += _doubtful_level(table, terms)
    hull = table.calibration.hull if table.calibration else None
    n, m = request.prompt_tokens, request.max_new_tokens
    inflation = _inflation(table, request)
    if hull and inflation > 1:
        if terms.strict:
            raise BudgetError(_outside(hull, request))
        warnings.append(f"extrapolated: {n} + {m} tokens are outside {hull}; prices are raised {inflation:.3g} times.")
    if terms.drift > 1 + table.margin:
        warnings.append(f"Of late sequences cost {terms.drift:.2f} times the prediction; prices are raised by that.")
    priced = prices_of(table, request, terms)
    plan = pick_tier(priced, budget_j, request) if tier is None else _forced(priced, tier, budget_j, request)
    return Admission(table, terms.safety * inflation, terms.drift, plan, tuple(warnings))


def prices_of(table: EnergyTable, request: Request, terms: Terms) -> EnergyTable:
    """Return the prices that a request is admitted at: raised for safety, for lengths not calibrated, and by drift."""
    return table.widened(_multiplier(table, terms.safety * _inflation(table, request), terms.drift))


def _inflation(table: EnergyTable, request: Request) -> float:
    """Return the factor on prices of lengths outside the calibrated range; 1 inside it, or where none is known."""
    hull = table.calibration.hull if table.calibration else None
    return hull.inflation(request.prompt_tokens, request.max_new_tokens) if hull else 1.0


def _multiplier(table: EnergyTable, factor: float, drift: float) -> float:
    """Return what prices are multiplied by, so that they are at least the bare prices x drift."""
    return max(factor, drift / (1 + table.margin))


def _forced(table: EnergyTable, tier: int, budget_j: float | None, request: Request) -> Plan:
    """Return the plan that starts on one tier; BudgetError when it cannot pay for the first token."""
    n, tokens = request.prompt_tokens, request.max_new_tokens
    if budget_j is not None:
        need_j = needed_j(table, tier, request)
        if not fits(need_j, budget_j):
            raise BudgetError(
                f"t{tier} needs {format_energy(need_j, round_up=True)} ({table.source}) for {n} prompt tokens and "
                f"one new token, but the budget is {format_energy(budget_j)}. "
                "Raise the budget, or leave the tier to the policy."
            )
        tokens = affordable_tokens(table, tier, tier, budget_j, request)
    return Plan(tier, tier, table.plan_price_j(tier, tier, n, tokens), tokens)


def _check_nominal(table: EnergyTable, terms: Terms) -> None:
    if terms.strict and terms.safety < NOMINAL_SAFETY:
        raise BudgetError(
            f"A strict budget cannot be promised with {table.source} prices, {_doubt(table)}. Calibrate on the device "
            f"with `eopc calibrate`, or name a safety factor of {NOMINAL_SAFETY:g} or more with --safety."
        )


def _doubtful_level(table: EnergyTable, terms: Terms) -> list[str]:
    """Say so if it is not known, or less than was asked for, how often the margin holds."""
    conformal = table.calibration.conformal if table.calibration else None
    if conformal is None:
        return ["It is not known how often these prices hold: no cells were kept for a margin."] if terms.strict else []
    if conformal.short:
        held, asked = f"{conformal.level:.0%}", f"{1 - conformal.alpha:.0%}"
        return [f"The margin holds for {held} of sequences, not {asked}: only {conformal.k} cells were kept for it."]
    return []


def _nominal_warning(table: EnergyTable, terms: Terms) -> str:
    raised = f" Prices are raised {terms.safety:g} times." if terms.safety > 1 else ""
    cure = "" if terms.safety >= NOMINAL_SAFETY else f" Calibrate on the device, or add --safety {NOMINAL_SAFETY:g}."
    return f"The budget is kept in {table.source} joules, {_doubt(table)}.{raised}{cure}"


def _doubt(table: EnergyTable) -> str:
    if table.source == "proxy":
        return "time x an assumed power that no meter has confirmed"
    return "computed and not measured: real ones can be up to 3.6 times as many"


def _outside(hull: Hull, request: Request) -> str:
    n, m = request.prompt_tokens, request.max_new_tokens
    return (
        f"A strict budget cannot be promised for {n} prompt and {m} new tokens: the prices were calibrated for {hull}. "
        "Stay within these lengths, calibrate a wider range, or run without --strict."
    )
