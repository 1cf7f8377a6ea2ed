"""Why a request would run as it would: every plan that was considered, its price, and what a budget buys of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eopc_runtime.admission import admit, prices_of
from eopc_runtime.controller import Start
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError
from eopc_runtime.ledger import ROUNDING
from eopc_runtime.policy import (
    Plan,
    Request,
    affordable_tokens,
    fits,
    needed_j,
    plan_label,
    quantum_j,
    smallest_budget_j,
)
from eopc_runtime.units import format_energy

_ADMITTED = 1 + 2 * ROUNDING  # room for the rounding that admission leaves, which is once more for a tier asked for


@dataclass(frozen=True, slots=True)
class Option:
    """A plan that was considered.

    price_j: joules charged for the whole request. quantum_j: joules kept free beside it, under a budget. tokens: new
    tokens that the budget pays for, all of the request's without one. fits: whether that is the whole request.
    """

    plan: str  # "t0>t2", or "t0" for both phases
    prefill: str
    decode: str
    price_j: float
    quantum_j: float
    tokens: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would run; `plan`, `energy_j` and `tokens` are None where nothing would, and `why` says the reason."""

    prompt_tokens: int
    max_new_tokens: int
    budget_j: float | None
    energy_source: str
    plan: str | None
    energy_j: float | None  # charged for the prompt and so many new tokens
    tokens: int | None
    least_j: float  # the smallest budget that pays for the prompt and one new token
    whole_j: float  # the smallest budget under which the best plan, or the tier asked for, runs all of it
    why: str
    options: tuple[Option, ...]  # best decode tier first, then best prefill tier
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return {**asdict(self), "options": [asdict(o) for o in self.options], "warnings": list(self.warnings)}


def explain(table: EnergyTable, start: Start) -> Explanation:
    """Decide a request as `admission.admit` does, and say why; UsageError as there."""
    request, budget_j = start.request, start.budget_j
    prices = prices_of(table, request, start.terms)
    options = tuple(_option(prices, pair, budget_j, request) for pair in prices.plans())
    plan: Plan | None = None
    warnings: tuple[str, ...] = ()
    try:
        admission = admit(table, budget_j, request, start.terms, start.tier)
        plan, warnings = admission.plan, admission.warnings
        why = _reason(plan, start)
    except BudgetError as error:
        why = str(error)
    return Explanation(
        prompt_tokens=request.prompt_tokens,
        max_new_tokens=request.max_new_tokens,
        budget_j=budget_j,
        energy_source=table.source,
        plan=None if plan is None else plan.label,
        energy_j=None if plan is None else plan.energy_j,
        tokens=None if plan is None else plan.new_tokens,
        least_j=_least_j(prices, start.tier, request),
        whole_j=_whole_j(prices, start.tier or 0, request),
        why=why,
        options=options,
        warnings=warnings,
    )


def _least_j(prices: EnergyTable, tier: int | None, request: Request) -> float:
    if tier is None:
        return smallest_budget_j(prices, request)
    return needed_j(prices, tier, request) * _ADMITTED


def _whole_j(prices: EnergyTable, tier: int, request: Request) -> float:
    price_j = prices.plan_price_j(tier, tier, request.prompt_tokens, request.max_new_tokens)
    return (price_j + quantum_j(prices, tier, request)) * _ADMITTED**2


def _option(prices: EnergyTable, pair: tuple[int, int], budget_j: float | None, request: Request) -> Option:
    price_j = prices.plan_price_j(*pair, request.prompt_tokens, request.max_new_tokens)
    quantum = 0.0 if budget_j is None else quantum_j(prices, pair[1], request)
    tokens = request.max_new_tokens
    if budget_j is not None:
        tokens = affordable_tokens(prices, *pair, budget_j, request)
    return Option(
        plan=plan_label(*pair),
        prefill=prices.tiers[pair[0]].tier,
        decode=prices.tiers[pair[1]].tier,
        price_j=price_j,
        quantum_j=quantum,
        tokens=tokens,
        fits=budget_j is None or fits(price_j + quantum, budget_j),
    )


def _reason(plan: Plan, start: Start) -> str:
    tokens, wanted = plan.new_tokens, start.request.max_new_tokens
    if start.tier is not None:
        return f"t{start.tier} was asked for; {tokens} of {wanted} new tokens are paid for on it."
    if start.budget_j is None:
        return "There is no budget, so the best tier runs all of it."
    budget = format_energy(start.budget_j)
    if tokens == wanted:
        return f"{plan.label} is the best plan that {budget} pays for with all {wanted} new tokens."
    return (
        f"{budget} pays for all {wanted} new tokens on no plan; {plan.label} is the best one of those that afford the "
        f"most of them, {tokens}."
    )
