"""Where names of points go, so that none covers another or a point: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER, HEIGHT = 7.0, 13.0  # of 12 px text, on the wide side
GAP = 9.0  # from a point to its name


@dataclass(frozen=True, slots=True)
class Label:
    """A name at (x, y), the left end of its baseline or its right one."""

    x: float
    y: float
    text: str
    anchor: str  # start | end


def place_labels(points: Sequence[tuple[float, float, str]], left: float, right: float) -> list[Label]:
    """Return a label for every point whose name finds room beside, above or below it; names stay between the edges.

    A name that finds none is left out: the point keeps the text that shows when it is pointed at, and its table row.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    found = []
    for x, y, name in points:
        width = CHARACTER * len(name)
        for dx, dy in ((GAP, 4), (-GAP, 4), (GAP, -8), (-GAP, -8), (GAP, 17), (-GAP, 17)):
            start = x + dx if dx > 0 else x + dx - width
            box = (start, y + dy - 0.8 * HEIGHT, start + width, y + dy + 0.2 * HEIGHT)
            if left <= box[0] and box[2] <= right and not any(_meet(box, other) for other in taken):
                taken.append(box)
                found.append(Label(x + dx, y + dy, name, "start" if dx > 0 else "end"))
                break
    return found


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
