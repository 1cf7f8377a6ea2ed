"""Which tiers run a request under a budget: a pure decision on the prices of the energy table.

A plan is a pair, a prefill tier and a decode tier at or below it. The prompt is cheap beside the answer, so
a good prefill with a cheap decode costs about as much as the cheap tier alone and answers better; that is
why the pair is priced phase by phase.

A plan fits if its price, margin included, and one quantum are within the budget. The quantum covers what
measuring cannot resolve: the larger of one decode step and one sensor step x sampling period. Joules that no
meter has confirmed (prior, proxy) are nominal and have no quantum.
"""

from __future__ import annotations

from dataclasses import dataclass

from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.ledger import ROUNDING, affordable_steps
from eopc_runtime.units import format_energy


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to run: prompt length and the most new tokens wanted."""

    prompt_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise UsageError("The prompt has no token. Give a prompt with some text.")
        if self.max_new_tokens < 1:
            raise UsageError(f"{self.max_new_tokens} new tokens were asked for. Ask for 1 or more.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Tier indexes of the two phases, the joules charged (with margin) and the new tokens they pay for."""

    prefill: int
    decode: int
    energy_j: float
    new_tokens: int

    @property
    def label(self) -> str:
        """`t0>t2`, or `t0` when both phases run on one tier."""
        return plan_label(self.prefill, self.decode)


def plan_label(prefill: int, decode: int) -> str:
    """Return `t0>t2`, or `t0` where both phases run on one tier."""
    return f"t{prefill}" if prefill == decode else f"t{prefill}>t{decode}"


def pick_tier(table: EnergyTable, budget_j: float | None, request: Request) -> Plan:
    """Return the best plan a budget affords; without a budget, t0 for the whole request.

    The whole request comes first: of the plans that afford it, the highest decode tier, then the highest
    prefill tier. If none does, the plan that affords most tokens. BudgetError names the smallest budget
    that affords one token.
    """
    n, m = request.prompt_tokens, request.max_new_tokens
    if budget_j is None:
        return Plan(0, 0, table.plan_price_j(0, 0, n, m), m)
    if not budget_j > 0:
        raise BudgetError(f"The budget is {budget_j} J. Give a positive energy, for example 5J.")
    pairs = table.plans()
    quanta = [quantum_j(table, decode, request) for decode in range(len(table.tiers))]
    for prefill, decode in pairs:
        price = table.plan_price_j(prefill, decode, n, m)
        if fits(price + quanta[decode], budget_j):
            return Plan(prefill, decode, price, m)
    best, tokens = None, 1
    for prefill, decode in reversed(pairs):  # from the cheapest up: a higher pair must afford as many tokens
        if fits(table.plan_price_j(prefill, decode, n, tokens) + quanta[decode], budget_j):
            best, tokens = (prefill, decode), affordable_tokens(table, prefill, decode, budget_j, request)
    if best is None:
        raise BudgetError(_too_small(table, budget_j, request))
    return Plan(*best, table.plan_price_j(*best, n, tokens), tokens)


def affordable_tokens(table: EnergyTable, prefill: int, decode: int, budget_j: float, request: Request) -> int:
    """Return the largest m up to the request's that the budget affords, 0 if not even one token fits."""
    n, quantum = request.prompt_tokens, quantum_j(table, decode, request)

    def affords(m: int) -> bool:
        return fits(table.plan_price_j(prefill, decode, n, m) + quantum, budget_j)

    if not affords(1):
        return 0
    left_j = budget_j / (1 + ROUNDING) - quantum - table.prefill_price_j(prefill, n)
    tokens = 1 + affordable_steps(table, left_j, decode, n, 0, request.max_new_tokens - 1)
    while tokens < request.max_new_tokens and affords(tokens + 1):  # the last bit of rounding, either way
        tokens += 1
    while tokens > 1 and not affords(tokens):
        tokens -= 1
    return tokens


def quantum_j(table: EnergyTable, decode: int, request: Request) -> float:
    """Return the joules kept free at admission: 0 for nominal joules, else the larger of step and sensor step."""
    if table.nominal:
        return 0.0
    step_j = table.step_price_j(decode, request.prompt_tokens, request.max_new_tokens)
    meter = table.calibration.meter if table.calibration else None
    return max(step_j, (meter.quantum_j if meter else None) or 0.0)


def smallest_budget_j(table: EnergyTable, request: Request) -> float:
    """Return the smallest budget that affords one new token on any plan."""
    return min(needed_j(table, tier, request) for tier in range(len(table.tiers)))


def needed_j(table: EnergyTable, tier: int, request: Request) -> float:
    """Return the smallest budget that affords one new token with both phases on this tier."""
    price_j = table.prefill_price_j(tier, request.prompt_tokens) + quantum_j(table, tier, request)
    return price_j * (1 + 2 * ROUNDING)


def fits(price_j: float, budget_j: float) -> bool:
    """True if the price is within the budget, with room for the rounding of a ledger."""
    return price_j * (1 + ROUNDING) <= budget_j


def _too_small(table: EnergyTable, budget_j: float, request: Request) -> str:
    n = request.prompt_tokens
    cheapest = min(range(len(table.tiers)), key=lambda tier: needed_j(table, tier, request))
    need = format_energy(needed_j(table, cheapest, request), round_up=True)
    return (
        f"No tier fits {format_energy(budget_j)} for {n} prompt tokens on {table.device}. The cheapest, "
        f"t{cheapest}, needs {need} for the prompt and one new token ({table.source}). Raise the "
        f"budget to {need} or more, shorten the prompt, or build a smaller tier."
    )
