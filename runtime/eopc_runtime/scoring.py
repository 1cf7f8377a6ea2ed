"""The log-probabilities of a given text, for evaluation through the runtime: nothing is chosen, all tokens are read.

A text of n tokens is charged as if they were fed one by one: a prefill of one token and n - 1 decode steps, or a
prefill of n where that is dearer. Either reads more than the runner does, which takes them in parts and multiplies
every one with the vocabulary; so what is charged bounds what is spent, in the prices' joules.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from eopc_runtime.admission import Terms, prices_of
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError
from eopc_runtime.generation import Stepped
from eopc_runtime.ledger import Ledger
from eopc_runtime.logprobs import TokenLogprobs, rows_logprobs
from eopc_runtime.policy import Request, fits
from eopc_runtime.runners.base import Logits, RunnerPool
from eopc_runtime.units import format_energy

PART = 64  # tokens run at a time: their logits [part, vocab] fp32 are 13 MB for a vocabulary of 50k


@dataclass(frozen=True, slots=True)
class Score:
    """A scored text: the log-probability of every token but the first, and the logits [vocab] of what would follow."""

    tokens: tuple[TokenLogprobs, ...]
    following: Logits
    tier: str
    budget_j: float | None
    energy_j: float
    energy_source: str


class Scoring(Stepped[None, Score]):
    """A text that is being scored: every step runs a part of it on one tier; then read `result`."""

    def __init__(
        self,
        pool: RunnerPool,
        table: EnergyTable,
        ids: Sequence[int],
        *,
        tier: int | None = None,
        budget_j: float | None = None,
        drift: float = 1.0,
        top: int = 0,
    ) -> None:
        """Choose the tier: the one asked for, else the best that the budget pays for; BudgetError where none is."""
        prices = prices_of(table, Request(1, len(ids)), Terms(drift=drift))
        index, self.price_j = _choose(prices, len(ids), tier, budget_j)
        self.next_tier = table.tiers[index].tier
        self._ledger = Ledger(budget_j)
        self._source = table.source
        super().__init__("scoring", self._run(pool, tuple(ids), top))

    @property
    def spent_j(self) -> float:
        """Joules booked: all of them before the first part runs."""
        return self._ledger.spent_j

    @property
    def spent_by_phase_j(self) -> dict[str, float]:
        """The same by phase; reading a text is a prefill."""
        return self._ledger.by_phase

    def _run(self, pool: RunnerPool, ids: tuple[int, ...], top: int) -> Generator[None, None, Score]:
        runner = pool.get(self.next_tier)
        cache = runner.new_cache()
        if not self._ledger.debit("prefill", self.price_j, self.next_tier):
            raise AssertionError(f"the tier was chosen to fit, and {self.price_j} J do not")
        found: list[TokenLogprobs] = []
        for start in range(0, len(ids), PART):
            part = ids[start : start + PART]
            logits = runner.forward(cache, part, logits="all")
            targets = ids[start + 1 : start + 1 + len(part)]
            found += rows_logprobs(logits[: len(targets)], targets, top)
            yield
        return Score(
            tuple(found),
            np.array(logits[-1]),  # of its own: the runner's buffer is written over
            self.next_tier,
            self._ledger.budget_j,
            self._ledger.spent_j,
            self._source,
        )


def score_price_j(prices: EnergyTable, tier: int, n: int) -> float:
    """Joules charged for n tokens of a given text on a tier index."""
    one_by_one_j = prices.prefill_price_j(tier, 1) + prices.steps_price_j(tier, 1, 0, n - 1)
    return max(one_by_one_j, prices.prefill_price_j(tier, n))


def _choose(prices: EnergyTable, n: int, tier: int | None, budget_j: float | None) -> tuple[int, float]:
    """The tier index and its price."""
    tiers = range(len(prices.tiers)) if tier is None else (tier,)
    priced = [(index, score_price_j(prices, index, n)) for index in tiers]
    for index, price_j in priced:
        if budget_j is None or fits(price_j, budget_j):
            return index, price_j
    assert budget_j is not None
    need = format_energy(min(price_j for _, price_j in priced) * (1 + 1e-8), round_up=True)
    raise BudgetError(
        f"Scoring {n} tokens needs {need} ({prices.source}), but the budget is {format_energy(budget_j)}. "
        f"Raise it to {need} or more, or give a shorter text."
    )
