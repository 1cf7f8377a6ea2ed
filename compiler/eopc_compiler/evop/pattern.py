"""A removal pattern, the space it lives in, and the operators of evolutionary search on it; all pure.

A *unit* is what is removed at once: a whole layer, or, with `sub_blocks`, the attention or the FFN of a layer. A space
asks for exactly `remove` units (of each kind), because equal layers cost equal energy: the count is the budget.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from eopc_compiler.config import LlamaConfig
from eopc_compiler.pruned import KeptLayer
from eopc_runtime.errors import UsageError


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """Removed units of a model with `layers` layers, ascending.

    Whole layers are units 0..L-1. Sub-blocks are units 0..2L-1: first the attentions, then the FFNs.
    """

    layers: int
    sub_blocks: bool
    removed: tuple[int, ...]

    @property
    def bits(self) -> str:
        """One character per unit, "1" where it is removed."""
        removed = set(self.removed)
        return "".join("01"[unit in removed] for unit in range(self.layers * (1 + self.sub_blocks)))

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is removed."""
        return tuple(unit for unit in self.removed if unit < self.layers)

    @property
    def ffn(self) -> tuple[int, ...]:
        """Layers whose FFN is removed."""
        return tuple(u - self.layers for u in self.removed if u >= self.layers) if self.sub_blocks else self.removed

    @property
    def path(self) -> tuple[bool, ...]:
        """Whether each sub-block runs, in the order of the forward pass: attention 0, FFN 0, attention 1, ... [2L]."""
        attention, ffn = set(self.attention), set(self.ffn)
        return tuple(keep for layer in range(self.layers) for keep in (layer not in attention, layer not in ffn))

    def kept(self, config: LlamaConfig) -> tuple[KeptLayer, ...]:
        """What `slice_model` keeps; a layer without attention and FFN is gone, cache and all."""
        attention, ffn = set(self.attention), set(self.ffn)
        kept = (
            KeptLayer(
                index,
                () if index in attention else tuple(range(dims.num_key_value_heads)),
                () if index in ffn else tuple(range(dims.intermediate_size)),
            )
            for index, dims in enumerate(config.layers)
        )
        return tuple(layer for layer in kept if layer.kv_groups or layer.ffn_channels)


@dataclass(frozen=True, slots=True)
class Space:
    """All patterns that remove exactly `remove` units of each kind, and none in a `protected` layer."""

    layers: int
    remove: int
    sub_blocks: bool = False
    protected: frozenset[int] = frozenset()
    # the removable units of each kind: of layers, or of attentions and of FFNs
    kinds: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """UsageError unless there are enough layers to remove, and one left to keep."""
        free = [layer for layer in range(self.layers) if layer not in self.protected]
        if not 0 < self.remove <= len(free) or self.remove >= self.layers:
            raise UsageError(
                f"{self.remove} of {self.layers} layers cannot be removed ({len(free)} are free to go). Remove at "
                f"least 1 and at most {min(len(free), self.layers - 1)}."
            )
        kinds = tuple(tuple(self.layers * kind + layer for layer in free) for kind in range(1 + self.sub_blocks))
        object.__setattr__(self, "kinds", kinds)  # once: searchers ask for it at every step

    @property
    def units(self) -> tuple[int, ...]:
        """The removable units of all kinds."""
        return tuple(itertools.chain.from_iterable(self.kinds))

    @property
    def size(self) -> int:
        """How many patterns there are."""
        return math.prod(math.comb(len(units), self.remove) for units in self.kinds)

    def pattern(self, removed: Sequence[int]) -> Pattern:
        """The pattern of some units of this space, in any order; it may be of another count."""
        return Pattern(self.layers, self.sub_blocks, tuple(sorted(removed)))

    def holds(self, pattern: Pattern) -> bool:
        """Whether the pattern is one of this space: the right units, and exactly the right counts."""
        removed = set(pattern.removed)
        counts = [len(removed.intersection(units)) for units in self.kinds]
        return (
            (pattern.layers, pattern.sub_blocks) == (self.layers, self.sub_blocks)
            and counts == [self.remove] * len(counts)
            and len(pattern.removed) == sum(counts)
        )

    def __iter__(self) -> Iterator[Pattern]:
        """Every pattern, in lexicographic order of its removed units."""
        for chosen in itertools.product(*(itertools.combinations(units, self.remove) for units in self.kinds)):
            yield self.pattern(tuple(itertools.chain.from_iterable(chosen)))


def random_pattern(space: Space, rng: random.Random) -> Pattern:
    """A pattern drawn uniformly from the space."""
    return space.pattern([unit for units in space.kinds for unit in rng.sample(units, space.remove)])


def swap(space: Space, parent: Pattern, count: int, rng: random.Random) -> Pattern:
    """Put back `count` different removed units, and remove as many kept ones of the same kinds (EvoPress's mutation).

    Fewer are swapped where a kind has fewer units to give or to take.
    """
    chosen = [rng.randrange(len(space.kinds)) for _ in range(count)]
    removed = set(parent.removed)
    for kind, units in enumerate(space.kinds):
        gone = [unit for unit in units if unit in removed]
        kept = [unit for unit in units if unit not in removed]
        n = min(chosen.count(kind), len(gone), len(kept))
        removed = (removed - set(rng.sample(gone, n))) | set(rng.sample(kept, n))
    return space.pattern(tuple(removed))


def swap_count(rng: random.Random) -> int:
    """How many units a mutation swaps: the smaller of two draws from 1..3, so that one is likeliest (5 in 9)."""
    return min(rng.randint(1, 3), rng.randint(1, 3))


def neighbours(space: Space, pattern: Pattern) -> Iterator[Pattern]:
    """Every pattern one swap away."""
    removed = set(pattern.removed)
    for units in space.kinds:
        for gone, new in itertools.product(units, units):
            if gone in removed and new not in removed:
                yield space.pattern(tuple(removed - {gone} | {new}))


Genes = tuple[bool, ...]  # one per removable unit of a space, in the order of `Space.units`


def genes(space: Space, pattern: Pattern) -> Genes:
    """The chromosome of a pattern."""
    removed = set(pattern.removed)
    return tuple(unit in removed for unit in space.units)


def crossover(first: Genes, second: Genes, rng: random.Random) -> tuple[Genes, Genes]:
    """Two-point crossover: the children have the genes between two random cuts exchanged; counts may be off."""
    start, stop = sorted((rng.randint(0, len(first)), rng.randint(0, len(first))))
    return (
        first[:start] + second[start:stop] + first[stop:],
        second[:start] + first[start:stop] + second[stop:],
    )


def flip(chromosome: Genes, rate: float, rng: random.Random) -> Genes:
    """Bit-flip mutation: every gene changes with probability `rate`."""
    return tuple(gene != (rng.random() < rate) for gene in chromosome)


def repair(space: Space, chromosome: Genes, rng: random.Random) -> Pattern:
    """The pattern of a chromosome, brought to the exact counts by setting or clearing random genes."""
    removed = {unit for unit, gene in zip(space.units, chromosome, strict=True) if gene}
    for units in space.kinds:
        gone = [unit for unit in units if unit in removed]
        kept = [unit for unit in units if unit not in removed]
        excess = len(gone) - space.remove
        removed.difference_update(rng.sample(gone, max(excess, 0)))
        removed.update(rng.sample(kept, max(-excess, 0)))
    return space.pattern(tuple(removed))
