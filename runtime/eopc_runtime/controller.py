"""The budget of one running sequence: every step is decided here, from the prices and what a meter showed.

The controller has no clock and no meter: it is told the time and the readings, and its decisions follow from
them alone. So a sequence is decided again, step for step, from the log of what it was told (`replay`).

Without a meter the ledger of debits keeps the budget, at the level of the margin. A live meter may only raise
what is debited; a refund would be a promise about energy that is still on its way through the sensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eopc_runtime.admission import Admission, Terms, admit
from eopc_runtime.energy import EnergyTable
from eopc_runtime.ledger import Ledger, affordable_steps, affords_rest, next_action
from eopc_runtime.policy import Request
from eopc_runtime.reconcile import Guard, MeterWatch
from eopc_runtime.units import format_energy

IMPLAUSIBLE = 0.5  # a meter that shows less of the prediction misses a rail, or the prices are far off


class Seen(NamedTuple):
    """What the controller is told before a phase: time, the meter's reading (or why it was lost), steps wished."""

    time_s: float
    metered_j: float | None = None
    lost: str | None = None
    at_most: int = 1


class Decision(NamedTuple):
    """What was decided: run `steps` on a tier for a price, or stop; and the joules spent with it."""

    action: str  # prefill | step | stop
    tier: int
    steps: int
    price_j: float
    spent_j: float


@dataclass(frozen=True, slots=True)
class Start:
    """All that a sequence's decisions depend on before its first step, besides the prices."""

    request: Request
    budget_j: float | None
    terms: Terms = field(default_factory=Terms)
    tier: int | None = None  # start on this tier instead of the policy's
    metered: bool = False
    guard: Guard = field(default_factory=Guard)


class Controller:
    """Decides one sequence; call `begin`, then `next` before every step, until it says stop."""

    def __init__(self, table: EnergyTable, start: Start) -> None:
        """Admit the request, or raise BudgetError or UsageError; see `admission.admit`."""
        self.start = start
        self.admission: Admission = admit(table, start.budget_j, start.request, start.terms, start.tier)
        self.plan = self.admission.plan
        self.tier = self.plan.decode
        self.done = 0  # decode steps granted
        self.ledger = Ledger(start.budget_j)
        self.seen: list[Seen] = []
        self.decisions: list[Decision] = []
        self._names = [tier.tier for tier in table.tiers]
        self._drift = start.terms.drift
        self._prices = self.admission.prices(self._drift)
        self._reserve_j = 0.0  # what the meter may have missed at its last reading, beyond what is booked
        self._watch: MeterWatch | None = None

    def begin(self, seen: Seen) -> Decision:
        """Book the prefill, which begins now."""
        if self.start.metered:
            self._watch = MeterWatch(self.start.guard, seen.time_s, self._drift)
        tier, n = self.plan.prefill, self.start.request.prompt_tokens
        price_j = self._prices.prefill_price_j(tier, n)
        if not self.ledger.debit("prefill", price_j, self._names[tier]):
            raise AssertionError(
                f"the plan promised a prefill of {price_j} J, and {self.ledger.remaining_j} J are left"
            )
        self._hear(seen)
        if self._watch is not None:
            self._watch.book(seen.time_s, self.admission.table.tiers[tier].prefill_j(n))
        return self._log(seen, Decision("prefill", tier, 0, price_j, self.ledger.spent_j))

    def wants_reading(self, time_s: float) -> bool:
        """True if the meter should be read before the next decision."""
        watch = self._watch
        return watch is not None and watch.wants_reading(time_s, self.ledger.remaining_j)

    def next(self, seen: Seen) -> Decision:
        """Decide what comes now: up to `seen.at_most` decode steps on one tier, which are booked, or a stop."""
        self._hear(seen)
        n = self.start.request.prompt_tokens
        remaining = self.start.request.max_new_tokens - 1 - self.done
        left_j, tier = self.ledger.remaining_j - self._reserve_j, self.tier
        while (action := next_action(self._prices, left_j, tier, n, self.done, remaining)) == "downshift":
            tier = self._prices.below(tier)[0]
        if action == "stop":
            return self._log(seen, Decision("stop", tier, 0, 0.0, self.ledger.spent_j))
        steps = self._granted(seen, left_j, tier, remaining)
        price_j = self._price_j(tier, steps)
        if self._blind(seen.time_s, price_j) or not self.ledger.debit("decode", price_j, self._names[tier]):
            return self._log(seen, Decision("stop", tier, 0, 0.0, self.ledger.spent_j))
        if self._watch is not None:
            self._watch.book(seen.time_s, self.admission.table.tiers[tier].steps_j(n, self.done, steps))
        self.tier = tier
        self.done += steps
        return self._log(seen, Decision("step", tier, steps, price_j, self.ledger.spent_j))

    @property
    def drift(self) -> float:
        """Measured over predicted joules of late; what the next sequence should start with."""
        return self._drift

    @property
    def enforced_by(self) -> str | None:
        """Who kept the budget: "meter" if one was read to the end and saw enough, else "model"; None without one."""
        if self.start.budget_j is None:
            return None
        trusted = self._watch is not None and self._watch.trusted(self.seen[-1].time_s)
        return "meter" if trusted else "model"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line each: from the admission and from the meter."""
        found = list(self.admission.warnings)
        watch, budget_j = self._watch, self.start.budget_j
        if watch is not None and watch.lost is not None:
            found.append(f"The meter was lost ({watch.lost}); from there the model kept the budget.")
        elif watch is not None and budget_j is not None and self.enforced_by == "model":
            found.append(
                f"The sequence ended before the meter, which lags {self.start.guard.lag_s:g} s, had shown enough of "
                "it; the model kept the budget."
            )
        if watch is not None and watch.worst_drift > max(1 + self.admission.table.margin, self.start.terms.drift):
            found.append(f"The meter showed up to {watch.worst_drift:.2f} times the prediction; prices were raised.")
        if watch is not None and watch.windows and watch.drift < IMPLAUSIBLE:
            found.append(
                f"The meter showed {watch.drift:.2f} times the prediction; does it read all of the board's rails?"
            )
        if budget_j is not None and self.ledger.spent_j > budget_j:
            over = format_energy(self.ledger.spent_j - budget_j)
            found.append(f"The meter saw {over} more than the budget.")
        return tuple(found)

    def _hear(self, seen: Seen) -> None:
        """Take in what the meter showed; prices follow the drift."""
        watch = self._watch
        if watch is None or watch.lost is not None:
            return
        if seen.lost is not None:
            watch.lose(seen.time_s, seen.lost)
        elif seen.metered_j is not None:
            watch.read(seen.time_s, seen.metered_j)
            if watch.lost is None:
                self.ledger.raise_to(watch.likely_j(), self._names[self.tier])
                self._reserve_j = max(watch.bound_j(seen.time_s) - self.ledger.spent_j, 0.0)
        if watch.lost is not None:
            self._reserve_j = 0.0
        if watch.drift != self._drift:
            self._drift = watch.drift
            self._prices = self.admission.prices(self._drift)

    def _granted(self, seen: Seen, left_j: float, tier: int, remaining: int) -> int:
        """Return how many of the steps wished can run unwatched: all, those that are paid for, or one."""
        n, steps = self.start.request.prompt_tokens, min(seen.at_most, remaining)
        if steps < 2:
            return 1
        prices, done = self._prices, self.done
        if affords_rest(prices, left_j, tier, n, done, remaining, here=1):
            steps = steps if affords_rest(prices, left_j, tier, n, done, remaining, here=steps) else 1
        else:
            steps = max(affordable_steps(prices, left_j, tier, n, done, steps), 1)
        if self._watch is None:
            return steps
        surprise_j = self._price_j(tier, steps) * self.start.guard.surge
        return 1 if self._blind(seen.time_s, surprise_j) or not self.ledger.affords(surprise_j) else steps

    def _blind(self, time_s: float, price_j: float) -> bool:
        """True if what the meter cannot have seen yet may already leave no room for a price."""
        if self._watch is None or self.start.budget_j is None:
            return False
        return self._watch.bound_j(time_s) + price_j > self.start.budget_j

    def _price_j(self, tier: int, steps: int) -> float:
        return self._prices.steps_price_j(tier, self.start.request.prompt_tokens, self.done, steps)

    def _log(self, seen: Seen, decision: Decision) -> Decision:
        self.seen.append(seen)
        self.decisions.append(decision)
        return decision


def replay(table: EnergyTable, start: Start, seen: Sequence[Seen]) -> tuple[Decision, ...]:
    """Decide a logged sequence again; the decisions are those that were made, whatever the clock says now."""
    controller = Controller(table, start)
    for i, item in enumerate(seen):
        if i == 0:
            controller.begin(item)
        else:
            controller.next(item)
    return tuple(controller.decisions)
