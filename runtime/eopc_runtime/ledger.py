"""The account of one sequence: what was spent, and whether the next step still fits.

The ledger refuses what would overspend, so the sum of its debits never exceeds the budget. `next_action`
decides before each decode step, from the prices alone, whether to step, to go down a tier or to stop; it
is a pure function of the prices and of the joules left.

The tiers of a ladder are points of one trade of quality for joules, each the choice of one dual variable λ in
nats per joule. Joules left that pay for the rest on no single tier exactly are best spent on the two tiers
around their λ: on other pairs the same joules lose more, as λ rises down the ladder. So a sequence stays on a
tier while the next one down could finish it, and λ follows the ledger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eopc_runtime.energy import EnergyTable

# What is planned ahead keeps this share free, so that the ledger, which adds the same joules step by step
# in floating point, never refuses the last step of a plan. It is far above the rounding of any sequence
# (1e-16 per addition).
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Entry:
    """Joules spent in one phase on one tier, and by how many debits."""

    phase: str
    tier: str
    joules: float
    debits: int


class Ledger:
    """Joules of one sequence against its budget (None: no limit, everything is still booked)."""

    def __init__(self, budget_j: float | None) -> None:
        if budget_j is not None and not budget_j > 0:
            raise ValueError(f"a ledger needs a positive budget or None, not {budget_j}")
        self.budget_j = budget_j
        self.spent_j = 0.0
        self._booked: dict[tuple[str, str], list[float]] = {}  # joules and debits by phase and tier

    def affords(self, joules: float) -> bool:
        """True if a debit of this size would be accepted."""
        return self.budget_j is None or self.spent_j + joules <= self.budget_j

    def debit(self, phase: str, joules: float, tier: str = "") -> bool:
        """Book joules and return True; return False and book nothing if that would overspend."""
        if not (math.isfinite(joules) and joules >= 0):
            raise ValueError(f"a debit is a finite amount of 0 J or more, not {joules}")
        if not self.affords(joules):
            return False
        self._book(phase, joules, tier)
        return True

    def raise_to(self, joules: float, tier: str = "") -> None:
        """Book what a meter saw beyond the debits, so that at least this much is spent, also above the budget.

        It never lowers the account: what a sequence was charged too much is only known once it has ended.
        """
        if not math.isfinite(joules):
            raise ValueError(f"a meter's reading is a finite number of joules, not {joules}")
        if joules > self.spent_j:
            self._book("metered", joules - self.spent_j, tier)
            self.spent_j = joules

    @property
    def remaining_j(self) -> float:
        """Joules left, infinite without a budget; below 0 only if a meter saw an overspend."""
        return math.inf if self.budget_j is None else self.budget_j - self.spent_j

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What was spent per phase and tier, in the order in which they were first charged."""
        return tuple(Entry(*key, joules, int(debits)) for key, (joules, debits) in self._booked.items())

    @property
    def by_phase(self) -> dict[str, float]:
        """Joules per phase (prefill, decode, metered)."""
        totals: dict[str, float] = {}
        for entry in self.entries:
            totals[entry.phase] = totals.get(entry.phase, 0.0) + entry.joules
        return totals

    @property
    def by_tier(self) -> dict[str, float]:
        """Joules per tier."""
        totals: dict[str, float] = {}
        for entry in self.entries:
            totals[entry.tier] = totals.get(entry.tier, 0.0) + entry.joules
        return totals

    def _book(self, phase: str, joules: float, tier: str) -> None:
        self.spent_j += joules
        booked = self._booked.setdefault((phase, tier), [0.0, 0])
        booked[0] += joules
        booked[1] += 1


def next_action(table: EnergyTable, left_j: float, tier: int, n: int, done: int, remaining: int) -> str:
    """Return "step", "downshift" (to the next of `table.below`, then ask again) or "stop" before the next decode step.

    Args:
        left_j: joules left of the budget, infinite without one.
        tier: index of the tier in use; a sequence only ever goes down from it.
        n: prompt tokens.
        done: decode steps run so far.
        remaining: new tokens still wanted, the next one included.

    A step on this tier is right while the rest could still be finished on it or on the next one down. After
    that a lower tier is right if it affords more of the rest. Otherwise this tier spends what is left, and
    then stops.
    """
    if remaining < 1:
        return "stop"
    if left_j == math.inf or affords_rest(table, left_j, tier, n, done, remaining, here=1):
        return "step"
    here = affordable_steps(table, left_j, tier, n, done, remaining)
    if any(affordable_steps(table, left_j, t, n, done, remaining) > here for t in table.below(tier)):
        return "downshift"
    return "step" if here else "stop"


def affords_rest(table: EnergyTable, left_j: float, tier: int, n: int, done: int, remaining: int, here: int) -> bool:
    """True if `here` steps on this tier, and the rest on it or on the next tier down, are paid for."""
    paid_j = table.steps_price_j(tier, n, done, here)
    if paid_j > left_j:
        return False
    return any(
        (paid_j + table.steps_price_j(t, n, done + here, remaining - here)) * (1 + ROUNDING) <= left_j
        for t in (tier, *table.below(tier)[:1])
    )


def affordable_steps(table: EnergyTable, left_j: float, tier: int, n: int, done: int, wanted: int) -> int:
    """Return how many of the wanted steps the joules left pay for on one tier.

    Solves k b + k^2 s / 2 = left for k, with b the price of a step before its own index counts and s the rise
    per step, in the form that stays exact for s = 0; the price itself then settles the last step.
    """
    if table.steps_price_j(tier, n, done, wanted) <= left_j:
        return wanted
    energy = table.tiers[tier]
    bare_j = max(left_j, 0.0) / (1 + table.margin)
    b = energy.step_j(n, done) + energy.step_ji / 2
    steps = min(int(2 * bare_j / (b + math.sqrt(b * b + 2 * energy.step_ji * bare_j))), wanted)
    while steps < wanted and table.steps_price_j(tier, n, done, steps + 1) <= left_j:
        steps += 1
    while steps > 0 and table.steps_price_j(tier, n, done, steps) > left_j:
        steps -= 1
    return steps
