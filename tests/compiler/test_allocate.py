"""Parcels go by loss per cost along the convex hulls of their curves."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from eopc_compiler.allocate import Curve, Key, Kind, allocate

COSTS: dict[Kind, float] = {"kv_groups": 8.0, "ffn": 0.5}
PARCELS = {"kv_groups": 1, "ffn": 4}  # 8 and 2 units of cost


def cost(kind: Kind) -> float:
    """Of one unit."""
    return COSTS[kind]


def saved(counts: dict[Key, int]) -> float:
    return sum(cost(kind) * n for (_, kind), n in counts.items())


def ffn(*added: float) -> Curve:
    """A curve by what each further parcel adds."""
    return tuple(accumulate(added))


def test_the_cheapest_parcels_go_first_across_layers() -> None:
    """Convex curves are taken in the order of their slopes."""
    curves: dict[Key, Curve] = {(0, "ffn"): ffn(1, 4, 9), (1, "ffn"): ffn(2, 3, 10)}
    taken = [allocate(curves, PARCELS, cost, 2.0 * n) for n in range(7)]
    counts = [(c[0, "ffn"] // 4, c[1, "ffn"] // 4) for c in taken]
    assert counts == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3)]


def test_kinds_compete_by_loss_per_cost() -> None:
    """A group that costs four parcels goes before a parcel that adds a quarter of its loss and a hair."""
    curves: dict[Key, Curve] = {(0, "ffn"): ffn(1.01), (0, "kv_groups"): ffn(4.0)}
    assert allocate(curves, PARCELS, cost, 8.0) == {(0, "kv_groups"): 1, (0, "ffn"): 0}
    curves[0, "ffn"] = ffn(0.99)
    assert allocate(curves, PARCELS, cost, 2.0) == {(0, "kv_groups"): 0, (0, "ffn"): 4}


def test_a_dear_first_parcel_does_not_hide_a_cheap_second() -> None:
    """Two parcels for 5 beat two for 3 each, though the first of them alone would cost 5."""
    curves: dict[Key, Curve] = {(0, "ffn"): ffn(5, 0), (1, "ffn"): ffn(3, 3)}
    assert allocate(curves, PARCELS, cost, 4.0) == {(0, "ffn"): 8, (1, "ffn"): 0}


def test_at_least_reaches_the_goal_where_nearest_stops_short() -> None:
    """Nearest rounds to half a parcel; at_least rounds up, but not for a bit of rounding."""
    curves: dict[Key, Curve] = {(0, "ffn"): ffn(1, 1, 1, 1)}

    def parcels(goal: float, at_least: bool) -> int:
        return allocate(curves, PARCELS, cost, goal, at_least)[0, "ffn"] // 4

    assert [parcels(g, False) for g in (0.9, 1.1, 2.9, 3.1)] == [0, 1, 1, 2]
    assert [parcels(g, True) for g in (0.1, 2.0, 2.0 + 1e-12, 2.1)] == [1, 1, 1, 2]
    assert parcels(-1.0, True) == 0


def test_exhausted_curves_give_what_they_have() -> None:
    """A goal beyond all curves takes everything; empty curves take nothing."""
    curves: dict[Key, Curve] = {(0, "ffn"): ffn(1, 2), (1, "kv_groups"): (), (2, "kv_groups"): ffn(7)}
    assert allocate(curves, PARCELS, cost, 1e6) == {(0, "ffn"): 8, (1, "kv_groups"): 0, (2, "kv_groups"): 1}
    assert allocate({}, PARCELS, cost, 5.0) == {}


curve = st.lists(st.integers(0, 20), max_size=6).map(lambda added: ffn(*map(float, added)))
keys: st.SearchStrategy[Key] = st.tuples(st.integers(0, 5), st.sampled_from(("kv_groups", "ffn")))


@given(st.dictionaries(keys, curve, max_size=8), st.floats(0, 1), st.booleans())
def test_what_is_saved_is_within_a_parcel_of_a_reachable_goal(
    curves: dict[Key, Curve], share: float, at_least: bool
) -> None:
    """Half a parcel of the largest kind either way, or from the goal up to one above it; always whole parcels."""
    everything = {key: len(c) * PARCELS[key[1]] for key, c in curves.items()}
    goal = share * saved(everything)
    counts = allocate(curves, PARCELS, cost, goal, at_least)
    largest = max((cost(key[1]) * PARCELS[key[1]] for key, c in curves.items() if c), default=0.0)
    over = saved(counts) - goal
    assert (-1e-6 <= over <= largest + 1e-6) if at_least else abs(over) <= largest / 2 + 1e-6
    for key, n in counts.items():
        assert 0 <= n <= everything[key] and n % PARCELS[key[1]] == 0
