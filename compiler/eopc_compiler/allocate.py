"""Which layer loses how much: the global choice by loss added per cost saved, as pure functions."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from typing import Literal

Kind = Literal["kv_groups", "ffn"]
KINDS: tuple[Kind, ...] = ("kv_groups", "ffn")  # in the order a layer computes them
Key = tuple[int, Kind]  # a source layer and a kind of unit
Curve = tuple[float, ...]  # loss added once 1, 2, ... parcels of units are removed; never falls
Counts = dict[Key, int]  # units to remove, by layer and kind


def allocate(
    curves: Mapping[Key, Curve],
    parcels: Mapping[str, int],
    cost: Callable[[Kind], float],
    goal: float,
    at_least: bool = False,
) -> Counts:
    """Take parcels of units in the order of loss added per cost saved until `goal` is saved, or as near as parcels get.

    Within a layer parcels go in the curve's order, so a dear first parcel hides a cheap second one: the slope that
    counts is the flattest over the parcels ahead (the lower convex hull of the curve).

    Args:
        parcels: units that go at a time, by kind.
        cost: of one unit.
        at_least: save `goal` or more where the curves reach that far, not the nearest to it.
    """
    slack = 1.0 - 1e-9 if at_least else 0.5
    hulls = {key: _hull(curve) for key, curve in curves.items()}
    price = {key: cost(key[1]) * parcels[key[1]] for key in curves}
    heap = [(slopes[0][0] / price[key], key, 0) for key, slopes in hulls.items() if slopes]
    heapq.heapify(heap)
    counts: Counts = dict.fromkeys(curves, 0)
    saved = 0.0
    while heap:
        _, key, segment = heapq.heappop(heap)
        _, length = hulls[key][segment]
        taken = min(length, int((goal - saved) / price[key] + slack))  # parcels
        if taken <= 0:
            continue  # too large for what is left; a smaller kind may still fit
        counts[key] += taken * parcels[key[1]]
        saved += taken * price[key]
        if taken == length and segment + 1 < len(hulls[key]):
            heapq.heappush(heap, (hulls[key][segment + 1][0] / price[key], key, segment + 1))
    return counts


def last_slope(curve: Curve, taken: int) -> float:
    """Loss per parcel of the last of `taken` parcels, on the lower convex hull; 0 where none is taken."""
    slope, left = 0.0, taken
    for rise, length in _hull(curve):
        if left <= 0:
            break
        slope, left = rise, left - length
    return slope


def _hull(curve: Curve) -> list[tuple[float, int]]:
    """(slope, parcels) of the lower convex hull of a curve through the origin, slopes ascending."""
    points = [(0, 0.0), *((i + 1, e) for i, e in enumerate(curve))]
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in itertools.pairwise(hull)]
