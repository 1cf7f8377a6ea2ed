"""The books of one search: which patterns it has asked for, the best so far, and when its budget is spent.

A pattern counts once, when it is first asked for, on however few tokens and whether its loss was known already or not.
So searchers are compared at equal numbers of unique patterns, and a search that goes on from a journal counts as one
that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eopc_compiler.evop.fitness import Fitness
from eopc_compiler.evop.pattern import Pattern, Space


class BudgetSpentError(Exception):
    """Ends a searcher wherever it stands; `search_pattern` catches it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands."""

    best_loss: float  # nats per token, on all tokens; infinite until a pattern got that far
    evaluations: int  # unique patterns
    evaluations_per_s: float  # unique patterns whose loss was not known already


Report = Callable[[Progress], None]


class Tally:
    """Hands patterns to a `Fitness` and keeps count."""

    def __init__(
        self,
        fitness: Fitness,
        space: Space,
        evaluations: int,
        report: Report | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count from zero; a search may ask for at most `evaluations` unique patterns."""
        self.fitness, self.space, self.limit = fitness, space, evaluations
        self.seen: set[Pattern] = set()
        self.fresh = 0  # of the seen ones: those whose loss on the first stage was not known before
        self.best: Pattern | None = None
        self.best_loss = math.inf
        self.history: list[tuple[int, float]] = []  # (unique patterns, best loss) at every improvement
        self._report, self._clock, self._start_s = report, clock, clock()

    @property
    def left(self) -> int:
        """Unique patterns that may still be asked for."""
        return self.limit - len(self.seen)

    def losses(self, patterns: Sequence[Pattern], stage: int = -1) -> list[float]:
        """Mean losses in nats per token.

        Raises BudgetSpentError once more patterns are new than may still be asked for; those that fit are evaluated
        and counted first.
        """
        affordable, order = self._admit(patterns)
        losses = self.fitness.losses(affordable, stage)
        if stage in (-1, self.fitness.stages - 1):
            for pattern, loss, count in zip(affordable, losses, order, strict=True):
                self._consider(pattern, loss, count)
        if self._report and affordable:
            elapsed_s = self._clock() - self._start_s
            rate = self.fresh / elapsed_s if elapsed_s > 0 else 0.0
            self._report(Progress(self.best_loss, len(self.seen), rate))
        if len(affordable) < len(patterns):
            raise BudgetSpentError
        return losses

    def _admit(self, patterns: Sequence[Pattern]) -> tuple[list[Pattern], list[int]]:
        """The patterns up to the first that cannot be paid, and how many were seen when each was asked for."""
        affordable, order = [], []
        for pattern in patterns:
            if pattern not in self.seen:
                if not self.left:
                    break
                self.fresh += not self.fitness.knows(pattern, 0)
                self.seen.add(pattern)
            affordable.append(pattern)
            order.append(len(self.seen))
        return affordable, order

    def _consider(self, pattern: Pattern, loss: float, count: int) -> None:
        better = loss < self.best_loss or (self.best is None and loss == math.inf)
        if better and self.space.holds(pattern):  # searchers also ask for smaller counts
            self.best, self.best_loss = pattern, loss
            self.history.append((count, loss))
