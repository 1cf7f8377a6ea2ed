"""Plans as points: their kinds, joules and losses, and which of them nothing beats."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.bundle import Bundle, Workload
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.report import front
from eopc_runtime.report.front import Point, best_first, kind_of, plan_energy, plan_points, workloads
from eopc_runtime.report.labels import CHARACTER, HEIGHT, place_labels
from eopc_runtime.report.plan_file import read_plan
from eopc_runtime.tier_info import PrefillInfo, SelectorInfo


def test_every_pair_has_the_joules_of_the_table_and_only_planned_ones_a_loss(planned: Path) -> None:
    """Six pairs of three tiers; a loss that was not measured is none, and not that of a neighbour."""
    bundle = Bundle.open(planned)
    points = plan_points(bundle.manifest, bundle.energy, read_plan(planned), bundle.manifest.workload)
    assert {p.plan: p.loss for p in points} == {
        "t0": 0.0, "t0>t1": 0.0625, "t1": None, "t0>t2": 0.3125, "t1>t2": None, "t2": None
    }  # fmt: skip
    for point, (prefill, decode) in zip(points, bundle.energy.plans(), strict=True):
        assert point.energy_j == pytest.approx(bundle.energy.plan_price_j(prefill, decode, 64, 100))


def test_kinds_follow_what_the_tiers_do(planned: Path) -> None:
    """Whole, static, handed over, a prompt through fewer layers, channels chosen by the prompt."""
    t0, t1, t2 = Bundle.open(planned).manifest.tiers

    class Tier:
        def __init__(self, prefill: Any = None, selector: Any = None) -> None:
            self.prefill, self.selector = prefill, selector

    pruned = Tier(PrefillInfo(2, "g"))
    choosing = Tier(PrefillInfo(3, "g"), SelectorInfo("g", (1,), (1,), (1,)))
    tiers: Any = (t0, pruned, choosing, t1, t2)
    pairs = ((0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (1, 3), (2, 3))
    assert [kind_of(tiers, *pair) for pair in pairs] == [
        front.WHOLE, front.PRUNED, front.CHOOSING, front.STATIC, front.HANDED, front.PRUNED, front.HANDED
    ]  # fmt: skip


@given(st.lists(st.tuples(st.floats(1, 9), st.one_of(st.none(), st.floats(0, 9))), max_size=12))
def test_the_front_is_what_no_other_plan_beats(rows: list[tuple[float, float | None]]) -> None:
    """A point is on it if no other known one costs no more and loses no more (of equals, one)."""
    points = [Point(str(i), front.HANDED, joules, 0.0, loss) for i, (joules, loss) in enumerate(rows)]
    found = best_first(points)
    known = [(p.energy_j, p.loss) for p in points if p.loss is not None]
    want = {a for a in known if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in known)}
    assert [(p.energy_j, p.loss) for p in found] == sorted(want)


def test_the_curve_of_a_pair_is_the_price_of_the_pair(planned: Path) -> None:
    """The coefficients of t0>t2 give what the table charges for it, at any length."""
    table = Bundle.open(planned).energy
    theta = Theta.of_tier(plan_energy(table, "t0>t2"))
    for n, m in ((8, 1), (64, 100), (500, 7)):
        assert theta.energy_j(float(n), float(m)) == pytest.approx(table.plan_price_j(0, 2, n, m))


def test_workloads_fit_the_context(planned: Path) -> None:
    """The reference, long answers, long prompts; a small context cuts them."""
    manifest = Bundle.open(planned).manifest
    assert workloads(manifest) == (Workload(64, 100), Workload(128, 256), Workload(960, 64))
    for work in workloads(manifest):
        assert work.prompt_tokens + work.new_tokens <= manifest.context


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=9))
def test_names_cover_neither_names_nor_points(places: list[tuple[int, int]]) -> None:
    """However crowded: a name that finds no room is left out."""
    points = [(5.0 * x, 5.0 * y, f"t{i}>t9") for i, (x, y) in enumerate(places)]
    labels = place_labels(points, 0, 400)
    boxes = []
    for label in labels:
        width = CHARACTER * len(label.text)
        left = label.x if label.anchor == "start" else label.x - width
        boxes.append((left, label.y - 0.8 * HEIGHT, left + width, label.y + 0.2 * HEIGHT))
        assert left >= 0 and left + width <= 400
    boxes += [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    for a, b in itertools.combinations(boxes[: len(labels)], 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    for a, b in itertools.product(boxes[: len(labels)], boxes[len(labels) :]):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    if len(points) == 1:
        assert len(labels) == 1
