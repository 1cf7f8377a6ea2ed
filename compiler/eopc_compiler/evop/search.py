"""One entry point for every way to choose which units to remove."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from eopc_compiler.evop.baselines import best_of_random, sleb
from eopc_compiler.evop.epps import epps
from eopc_compiler.evop.evolve import evolve
from eopc_compiler.evop.fitness import Fitness
from eopc_compiler.evop.journal import Journal
from eopc_compiler.evop.pattern import Pattern, Space
from eopc_compiler.evop.tally import BudgetSpentError, Report, Tally
from eopc_runtime.errors import UsageError

Searcher = Callable[[Tally, random.Random], None]
SEARCHERS: dict[str, Searcher] = {
    "evolve": evolve,
    "epps": epps,
    "sleb": lambda tally, _: sleb(tally),
    "random": best_of_random,
}


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best pattern of a search, and what it took to find it."""

    pattern: Pattern
    loss: float  # nats per token on all tokens
    method: str
    seed: int
    evaluations: int  # unique patterns asked for
    history: tuple[tuple[int, float], ...]  # (unique patterns, best loss) at every improvement
    computed: int = field(compare=False, default=0)  # losses of a pattern on a stage not known when the search began


def search_pattern(
    fitness: Fitness,
    layers: int,
    remove: int,
    method: str = "evolve",
    evaluations: int = 400,
    seed: int = 0,
    journal: Path | None = None,
    report: Report | None = None,
    *,
    sub_blocks: bool = False,
    protected: frozenset[int] = frozenset(),
) -> SearchResult:
    """Search for the pattern with the smallest loss that removes exactly `remove` layers.

    Args:
        fitness: what patterns cost; it may be shared by several searches.
        layers: of the model.
        remove: layers, or with `sub_blocks` attentions and as many FFNs, to leave out.
        method: one of `SEARCHERS`.
        evaluations: most unique patterns to ask for; a method may end with fewer.
        seed: of every random choice; the same seed gives the same result with every executor.
        journal: a file that losses are written to at once and read from at the start.
        report: called after every batch of patterns.
        protected: layers that stay.

    Raises:
        UsageError: for an unknown method, or a budget that ends before the first pattern of the right count.
    """
    if method not in SEARCHERS:
        raise UsageError(f"There is no search method {method!r}. Choose one of {', '.join(SEARCHERS)}.")
    tally = Tally(fitness, Space(layers, remove, sub_blocks, protected), evaluations, report)
    with Journal(journal, fitness) if journal else nullcontext():
        before = fitness.computed
        with suppress(BudgetSpentError):
            SEARCHERS[method](tally, random.Random(seed))
    if tally.best is None:
        raise UsageError(
            f"{evaluations} evaluations end before {method} reaches a pattern of {remove} removed. Allow more."
        )
    return SearchResult(
        tally.best,
        tally.best_loss,
        method,
        seed,
        len(tally.seen),
        tuple(tally.history),
        fitness.computed - before,
    )
