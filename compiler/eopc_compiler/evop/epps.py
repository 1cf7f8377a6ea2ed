"""EPPS, the genetic search as EvoP published it (arXiv 2502.14910, section 3.3, and the authors' public code).

Tournament selection, two-point crossover of the first half of the selected with the second, bit flips, and a random
repair to the exact count. Nothing survives a generation by right; the best of all generations is the result. What was
evaluated once is not evaluated again, which the authors' code does, so evaluations are counted unique here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from eopc_compiler.evop.pattern import Genes, crossover, flip, genes, repair
from eopc_compiler.evop.tally import Tally


@dataclass(frozen=True, slots=True)
class EppsSettings:
    """The published values."""

    population: int = 50
    tournament: int = 3
    flip_rate: float = 0.001  # per gene
    generations: int = 100


def epps(tally: Tally, rng: random.Random, settings: EppsSettings | None = None) -> None:
    """Search until the generations or the tally's budget are spent; the tally keeps the best."""
    s = settings or EppsSettings()
    space = tally.space
    bits = [tuple(rng.random() < 0.5 for _ in space.units) for _ in range(s.population)]
    population = [repair(space, chromosome, rng) for chromosome in bits]
    losses = tally.losses(population)
    for _ in range(s.generations):
        parents = [genes(space, population[i]) for i in select(losses, s.tournament, rng)]
        children = [flip(chromosome, s.flip_rate, rng) for chromosome in cross_halves(parents, rng)]
        population = [repair(space, chromosome, rng) for chromosome in children]
        losses = tally.losses(population)


def select(losses: Sequence[float], tournament: int, rng: random.Random) -> list[int]:
    """As many winners as there are members: of `tournament` drawn with replacement, the one with the smallest loss."""
    everyone = range(len(losses))
    return [min(rng.choices(everyone, k=tournament), key=losses.__getitem__) for _ in everyone]


def cross_halves(parents: Sequence[Genes], rng: random.Random) -> list[Genes]:
    """Member i of the first half crossed with member i of the second; of an odd number, the last stays as it is."""
    half = len(parents) // 2
    pairs = [crossover(parents[i], parents[half + i], rng) for i in range(half)]
    return [first for first, _ in pairs] + [second for _, second in pairs] + list(parents[2 * half :])
