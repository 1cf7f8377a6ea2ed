"""The default search: elitist evolution with exact counts, staged tokens, and children screened before they cost.

Mutation, elitism and stages follow EvoPress (arXiv 2410.14649): children differ from a parent by swaps that keep the
counts exact, no pattern is tried twice, few tokens sort the children out, and whoever gets far enough is compared with
the elite on the elite's own tokens. Three things are added to need fewer evaluations:

* One removal at a time first: half of the founders are drawn so that layers that hurt little alone go first.
* Many more children are bred than evaluated. A regression on all losses so far, over single layers and pairs of layers,
  picks those with the best forecast; a few are picked at random, so that it cannot only confirm itself.
* Where nothing improves, random immigrants are bred among the children, until something does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eopc_compiler.evop.pattern import Pattern, Space, random_pattern, swap, swap_count
from eopc_compiler.evop.tally import Tally

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EvolveSettings:
    """How many of what."""

    founders: int = 32
    elite: int = 6  # parents of a generation: the best so far
    children: int = 16  # evaluated per generation
    unscreened: int = 2  # of those: picked at random
    bred: int = 400  # per generation, before screening
    survivors: float = 0.25  # share of the children that goes on to the next stage of tokens
    patience: int = 4  # generations without improvement before immigrants come
    prior_share: float = 0.2  # single removals are tried first if they take at most this share of the budget
    screen: bool = True


def evolve(tally: Tally, rng: random.Random, settings: EvolveSettings | None = None) -> None:
    """Search until the tally's budget or the space is spent; the tally keeps the best."""
    s = settings or EvolveSettings()
    weights = _single_removals(tally, s)
    first: dict[Pattern, float] = {}  # losses on the first stage of tokens: what screening learns from
    final: dict[Pattern, float] = {}  # losses on all tokens: what the elite is chosen by
    children = _founders(tally.space, s.founders, weights, rng)
    stale, best = 0, math.inf
    while children := children[: tally.left]:  # the last ones, too, shall reach the last stage
        _race(tally, children, s, first, final)
        stale, best = (0, tally.best_loss) if tally.best_loss < best else (stale + 1, best)
        elite = sorted(final, key=lambda p: (final[p], p))[: s.elite]
        litter = _breed(tally.space, elite, s.bred, rng) - first.keys()
        if stale >= s.patience or not litter:
            litter |= {random_pattern(tally.space, rng) for _ in range(s.bred)} - first.keys()
        if not litter and len(first) < tally.space.size:  # nearly all tried, and the draws missed the rest
            litter = {pattern for pattern in tally.space if pattern not in first}
        children = _pick(tally.space, sorted(litter), s, first, rng)


def _single_removals(tally: Tally, s: EvolveSettings) -> dict[int, float]:
    """Odds of every unit to be removed in a founder: they fall by e with every quarter of the ranking."""
    space = tally.space
    if len(space.units) > s.prior_share * tally.limit:
        return dict.fromkeys(space.units, 1.0)
    losses = tally.losses([space.pattern([unit]) for unit in space.units], 0)
    odds: dict[int, float] = {}
    for units in space.kinds:
        ranked = sorted(units, key=lambda unit: (losses[space.units.index(unit)], unit))
        odds |= {unit: math.exp(-4 * rank / len(units)) for rank, unit in enumerate(ranked)}
    return odds


def _founders(space: Space, count: int, odds: dict[int, float], rng: random.Random) -> list[Pattern]:
    """Different patterns, half drawn by odds and half uniformly; fewer in a small space."""
    found: dict[Pattern, None] = {}
    for attempt in range(20 * count):
        if len(found) == min(count, space.size):
            break
        found[weighted_pattern(space, odds, rng) if attempt % 2 else random_pattern(space, rng)] = None
    return list(found)


def weighted_pattern(space: Space, odds: dict[int, float], rng: random.Random) -> Pattern:
    """Units drawn one after the other without replacement, with the given odds."""
    removed: list[int] = []
    for units in space.kinds:
        # the largest u^(1/w) are such a draw (Efraimidis and Spirakis 2006); in logarithms, against underflow
        keys = {unit: math.log(1.0 - rng.random()) / odds[unit] for unit in units}
        removed += sorted(units, key=keys.__getitem__)[-space.remove :]
    return space.pattern(removed)


def _race(
    tally: Tally,
    children: Sequence[Pattern],
    s: EvolveSettings,
    first: dict[Pattern, float],
    final: dict[Pattern, float],
) -> None:
    """Score children on more and more tokens, fewer of them each time; note first and final losses."""
    field = list(children)
    last = tally.fitness.stages - 1
    for stage in range(last + 1):
        losses = dict(zip(field, tally.losses(field, stage), strict=True))
        if stage == 0:
            first |= losses
        if stage == last:
            final |= losses
        field = sorted(field, key=lambda p: (losses[p], p))[: max(1, math.ceil(s.survivors * len(field)))]


def _breed(space: Space, elite: Sequence[Pattern], count: int, rng: random.Random) -> set[Pattern]:
    """Different mutants of randomly chosen parents."""
    return {swap(space, rng.choice(elite), swap_count(rng), rng) for _ in range(count)}


def _pick(
    space: Space, litter: Sequence[Pattern], s: EvolveSettings, losses: dict[Pattern, float], rng: random.Random
) -> list[Pattern]:
    """The children to evaluate: the best by forecast, and a few at random."""
    if not s.screen or len(litter) <= s.children:
        return rng.sample(litter, min(s.children, len(litter)))
    order = np.argsort(forecast(space, losses, litter), kind="stable")
    ranked = [litter[i] for i in order]
    chosen, rest = ranked[: s.children - s.unscreened], ranked[s.children - s.unscreened :]
    return chosen + rng.sample(rest, s.unscreened)


NEAR = 1.0  # layers at distance d count as the same layer to exp(-d / NEAR)
RIDGE = 0.01  # share of a loss's variance that single layers and pairs are not expected to explain
FLOOR = 0.05  # of the spread of losses; differences to the best below it count as equal


def forecast(space: Space, losses: dict[Pattern, float], patterns: Sequence[Pattern]) -> Floats:
    """Forecast scores, smaller is better, by kernel ridge regression on the losses so far.

    The kernel (1 + a·S·b / K)², with a and b the patterns' bits, has as its features every unit and every pair of
    units; S lets neighbouring layers speak for each other. It is fitted to log(loss - best), standardised, because only
    the order among good patterns matters, and bad losses would drown it.
    """
    known = list(losses)
    values = np.array([losses[p] for p in known])
    finite = np.isfinite(values)
    values[~finite] = values[finite].max(initial=0.0)
    gap = values - values.min()
    target = np.log(gap + FLOOR * np.median(gap) + 1e-9)
    target = (target - target.mean()) / (target.std() + 1e-9)
    bits, similar = _bits(space, known), _similarity(space)
    gram = _kernel(bits, bits, similar, space.remove)
    size = gram.diagonal().mean()
    solved = np.linalg.solve(gram / size + RIDGE * np.eye(len(known)), target)
    scores: Floats = _kernel(_bits(space, patterns), bits, similar, space.remove) / size @ solved
    return scores


def _bits(space: Space, patterns: Sequence[Pattern]) -> Floats:
    """One row per pattern, one column per unit of the model [n, units]."""
    bits = np.zeros((len(patterns), space.layers * (1 + space.sub_blocks)))
    for row, pattern in zip(bits, patterns, strict=True):
        row[list(pattern.removed)] = 1.0
    return bits


def _similarity(space: Space) -> Floats:
    """exp(-distance / NEAR) between the units of a kind, zero across kinds [units, units]."""
    layer = np.arange(space.layers)
    one = np.exp(-np.abs(layer[:, None] - layer[None]) / NEAR)
    return np.kron(np.eye(1 + space.sub_blocks), one)


def _kernel(first: Floats, second: Floats, similar: Floats, remove: int) -> Floats:
    product: Floats = (1 + first @ similar @ second.T / remove) ** 2
    return product
