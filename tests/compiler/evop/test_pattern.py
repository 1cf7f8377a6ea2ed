"""Patterns keep exact counts under every operator, and say what they remove."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.evop.pattern import (
    Pattern,
    Space,
    crossover,
    flip,
    genes,
    neighbours,
    random_pattern,
    repair,
    swap,
    swap_count,
)
from eopc_runtime.errors import UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Small spaces of both kinds, some with protected layers."""
    layers = draw(st.integers(2, 12))
    protected = draw(st.frozensets(st.integers(0, layers - 1), max_size=layers - 1))
    remove = draw(st.integers(1, min(layers - len(protected), layers - 1)))
    return Space(layers, remove, draw(st.booleans()), protected)


@given(spaces(), st.integers(0, 2**32), st.integers(1, 3))
def test_every_operator_stays_in_the_space(space: Space, seed: int, count: int) -> None:
    """Random patterns, swaps, and repaired crossings and flips have exact counts and spare protected layers."""
    rng = random.Random(seed)
    first, second = random_pattern(space, rng), random_pattern(space, rng)
    children = [swap(space, first, count, rng)]
    children += [
        repair(space, flip(c, 0.3, rng), rng) for c in crossover(genes(space, first), genes(space, second), rng)
    ]
    assert all(space.holds(p) for p in (first, second, *children))
    assert all(space.protected.isdisjoint(p.attention + p.ffn) for p in children)


@given(spaces(), st.integers(0, 2**32))
def test_repair_leaves_a_legal_chromosome_alone(space: Space, seed: int) -> None:
    """Nothing is set or cleared where the counts are right, and genes are the inverse of repair."""
    rng = random.Random(seed)
    pattern = random_pattern(space, rng)
    assert repair(space, genes(space, pattern), rng) == pattern


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_swap_changes_as_many_units_as_asked(seed: int, count: int) -> None:
    """With enough units on both sides, exactly `count` are put back and `count` others removed."""
    rng = random.Random(seed)
    space = Space(10, 4)
    parent = random_pattern(space, rng)
    child = swap(space, parent, count, rng)
    assert len(set(parent.removed) - set(child.removed)) == count


def test_crossover_exchanges_one_segment() -> None:
    """Each gene of the two children comes from one parent each, and the exchanged ones are neighbours."""
    rng = random.Random(0)
    first, second = (False,) * 9, (True,) * 9
    for _ in range(50):
        a, b = crossover(first, second, rng)
        assert all(x != y for x, y in zip(a, b, strict=True))
        assert sum(x != y for x, y in itertools.pairwise(a)) <= 2


def test_flips_happen_at_their_rate() -> None:
    """Of 20,000 genes at rate 0.1, about 2,000 change (within five standard deviations of 42)."""
    changed = sum(flip((False,) * 20_000, 0.1, random.Random(3)))
    assert abs(changed - 2000) < 212


def test_one_swap_is_the_likeliest_mutation() -> None:
    """The smaller of two draws from 1..3 is 1 in 5 of 9 cases, 2 in 3 of 9, 3 in 1 of 9."""
    rng = random.Random(1)
    counts = Counter(swap_count(rng) for _ in range(9000))
    assert [counts[n] for n in (1, 2, 3)] == pytest.approx([5000, 3000, 1000], abs=200)


def test_a_space_lists_every_pattern_once() -> None:
    """Iteration gives `size` different patterns, all legal; for whole layers that is the binomial coefficient."""
    for space in (Space(7, 3), Space(5, 2, sub_blocks=True), Space(6, 2, protected=frozenset({0, 5}))):
        found = list(space)
        assert len(set(found)) == len(found) == space.size
        assert all(space.holds(p) for p in found)
    assert Space(30, 3).size == math.comb(30, 3) == 4060


def test_neighbours_are_all_one_swap_away() -> None:
    """K (L - K) of them, each sharing all but one removed unit; none across kinds."""
    space = Space(8, 3)
    pattern = space.pattern((1, 4, 6))
    found = set(neighbours(space, pattern))
    assert len(found) == 3 * 5
    assert all(space.holds(p) and len(set(p.removed) & {1, 4, 6}) == 2 for p in found)
    halves = Space(4, 1, sub_blocks=True)
    assert len(set(neighbours(halves, halves.pattern((0, 5))))) == 3 + 3


def test_a_pattern_says_what_runs() -> None:
    """Bits, layers without attention or FFN, and the path through the forward pass agree."""
    whole = Pattern(3, False, (1,))
    assert (whole.bits, whole.attention, whole.ffn) == ("010", (1,), (1,))
    assert whole.path == (True, True, False, False, True, True)
    halves = Pattern(3, True, (0, 5))  # attention 0 and FFN 2
    assert (halves.bits, halves.attention, halves.ffn) == ("100001", (0,), (2,))
    assert halves.path == (False, True, True, True, True, False)


def test_a_pattern_becomes_what_slicing_keeps(make_tiny: MakeTiny) -> None:
    """A removed layer is absent; a removed sub-block is empty; the rest is whole."""
    config, _ = make_tiny()
    assert [k.source_layer for k in Pattern(3, False, (1,)).kept(config)] == [0, 2]
    first, second, third = Pattern(3, True, (0, 5)).kept(config)
    assert (first.kv_groups, len(first.ffn_channels)) == ((), 128)
    assert (len(second.kv_groups), len(second.ffn_channels)) == (4, 128)
    assert (len(third.kv_groups), third.ffn_channels) == (4, ())


@pytest.mark.parametrize(("layers", "remove", "protected"), [(4, 0, ()), (4, 4, ()), (6, 5, (0, 5))])
def test_an_impossible_count_is_refused(layers: int, remove: int, protected: tuple[int, ...]) -> None:
    """Nothing to remove, nothing to keep, or too many protected: one sentence with the range."""
    with pytest.raises(UsageError, match="Remove at least 1 and at most"):
        Space(layers, remove, protected=frozenset(protected))


def test_a_foreign_pattern_is_not_held() -> None:
    """Wrong count, wrong model, protected or wrong kind of unit."""
    space = Space(6, 2, protected=frozenset({0}))
    assert space.holds(space.pattern((1, 5)))
    for pattern in (space.pattern((1,)), space.pattern((0, 1)), Pattern(7, False, (1, 2)), Pattern(6, True, (1, 2))):
        assert not space.holds(pattern)
