"""The account of one sequence: what was spent, and whether the next step still fits.

The ledger refuses what would overspend, so the sum of its debits never exceeds the budget. `next_action`
decides before each decode step, from the prices alone, whether to step, to go down a tier or to stop; it
reads the ledger and changes nothing.
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
        self._entries: dict[tuple[str, str], Entry] = {}

    def affords(self, joules: float) -> bool:
        """True if a debit of this size would be accepted."""
        return self.budget_j is None or self.spent_j + joules <= self.budget_j

    def debit(self, phase: str, joules: float, tier: str = "") -> bool:
        """Book joules and return True; return False and book nothing if that would overspend."""
        if not (math.isfinite(joules) and joules >= 0):
            raise ValueError(f"a debit is a finite amount of 0 J or more, not {joules}")
        if not self.affords(joules):
            return False
        self.spent_j += joules
        old = self._entries.get((phase, tier), Entry(phase, tier, 0.0, 0))
        self._entries[phase, tier] = Entry(phase, tier, old.joules + joules, old.debits + 1)
        return True

    @property
    def remaining_j(self) -> float:
        """Joules left, infinite without a budget."""
        return math.inf if self.budget_j is None else self.budget_j - self.spent_j

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What was spent per phase and tier, in the order in which they were first charged."""
        return tuple(self._entries.values())

    @property
    def by_phase(self) -> dict[str, float]:
        """Joules per phase."""
        totals: dict[str, float] = {}
        for entry in self._entries.values():
            totals[entry.phase] = totals.get(entry.phase, 0.0) + entry.joules
        return totals

    @property
    def by_tier(self) -> dict[str, float]:
        """Joules per tier."""
        totals: dict[str, float] = {}
        for entry in self._entries.values():
            totals[entry.tier] = totals.get(entry.tier, 0.0) + entry.joules
        return totals


def next_action(table: EnergyTable, ledger: Ledger, tier: int, context: int, remaining_tokens: int) -> str:
    """Return "step", "downshift" (to tier + 1, then ask again) or "stop" before the next decode step.

    Args:
        tier: index of the tier in use; a sequence only ever goes down from it.
        context: tokens in the cache now; the next step attends to one more.
        remaining_tokens: new tokens still wanted, the next one included.

    A step on this tier is right while the rest could still be finished on the cheapest tier from here down.
    After that a lower tier is right if it affords more of the rest. Otherwise this tier spends what is
    left, and then stops.
    """
    if remaining_tokens < 1:
        return "stop"
    if ledger.budget_j is None:
        return "step"
    lower = range(tier + 1, len(table.tiers))
    rest = min(table.steps_price_j(t, context + 1, remaining_tokens - 1) for t in (tier, *lower))
    if ledger.affords((table.step_price_j(tier, context + 1) + rest) * (1 + ROUNDING)):
        return "step"
    here = affordable_steps(table, ledger, tier, context, remaining_tokens)
    if any(affordable_steps(table, ledger, t, context, remaining_tokens) > here for t in lower):
        return "downshift"
    return "step" if here else "stop"


def affordable_steps(table: EnergyTable, ledger: Ledger, tier: int, context: int, wanted: int) -> int:
    """Return how many of the wanted steps the ledger still affords on one tier."""
    low, high = 0, wanted
    while low < high:  # bisection, as in policy.affordable_tokens
        steps = (low + high + 1) // 2
        if ledger.affords(table.steps_price_j(tier, context, steps)):
            low = steps
        else:
            high = steps - 1
    return low
