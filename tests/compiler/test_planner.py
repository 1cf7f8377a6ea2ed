"""From budgets to masks, with a made-up price, loss and clock: no model and no device."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.planner import CLOSE, RUN_OFF, Objective, TierPlan, plan_ladder, plan_masks
from eopc_compiler.shrink import (
    EMPTY,
    WEIGHTS,
    cheapest_mask,
    depth_steps,
    dual,
    group_weight,
    probe_masks,
    shrink_to_budget,
    smallest_mask,
)
from eopc_runtime.errors import BudgetError
from eopc_runtime.units import parse_energy

ALIGN = 2
HAIR = 1e-9  # joules above the floor: the same sum in another order may differ in the last bit


def price(mask: Mask) -> float:
    """A fixed part, and something for every layer, group and channel, as the roofline has it."""
    return 1.0 + sum(0.5 + 0.3 * d.num_key_value_heads + 0.1 * d.intermediate_size for d in mask.layers)


class Clock:
    """A clock on which every look takes a second, so that a search of n seconds judges about n candidates."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def layer(
    source: int, kv: Sequence[float], ffn: Sequence[float], influence: float = 0.5, parcel: int = ALIGN
) -> LayerCurves:
    """A layer by the loss that every further group and parcel adds."""
    groups, channels = len(kv) + 1, parcel * (len(ffn) + 1)
    dims = LayerDims(source, groups, channels)
    curves = tuple(accumulate(kv)), tuple(accumulate(ffn))
    return LayerCurves(dims, parcel, tuple(range(groups)), tuple(range(channels)), *curves, influence)


class Case:
    """A made-up model: curves, and what leaving layers out costs, alone and beside a gap."""

    def __init__(self, curves: Sequence[LayerCurves], worth: Sequence[float] = ()) -> None:
        self.curves = tuple(curves)
        self.worth = worth or [c.influence for c in curves]
        self.full = Mask(tuple(c.dims for c in curves))

    def measured(self, mask: Mask) -> float:
        """Layers out of a row cost more than the sum, so that influence alone is not the whole story."""
        kept = {d.source_layer for d in mask.layers}
        gone = [i not in kept for i in range(len(self.curves))]
        pairs = sum(a and b for a, b in pairwise(gone))
        return 1.0 + sum(w for w, g in zip(self.worth, gone, strict=True) if g) + 0.3 * pairs

    def repaired(self, mask: Mask) -> float:
        """What repair is worth differs from mask to mask."""
        share = 0.5 + 0.4 * ((7 * len(mask.layers) + sum(d.intermediate_size for d in mask.layers)) % 5) / 5
        return 1.0 + share * (self.objective.predicted(mask) - 1.0)

    def shipped(self, ladders: Sequence[Sequence[Mask]]) -> list[float]:
        """More text changes nothing here, and neither do smaller tiers."""
        return [self.repaired(ladder[-1]) for ladder in ladders]

    @property
    def objective(self) -> Objective:
        return Objective(self.curves, price, self.measured, lambda up: self.repaired(up[-1]), ALIGN, self.shipped)

    def plan(self, budgets: Sequence[float], seconds: float = 12, **options: Any) -> tuple[TierPlan, ...]:
        return plan_ladder(self.full, budgets, self.objective, seconds, clock=Clock(), **options)

    def heuristic(self, budget: float) -> list[Mask]:
        """Where the search starts: ever more of the least influential layers gone, the rest shrunk to fit."""
        starts = depth_steps(self.full, EMPTY, lambda mask: price(mask) <= budget, self.curves)
        return [m for m in (shrink_to_budget(s, budget, self.curves, price, ALIGN) for s in starts) if m]

    @property
    def floor(self) -> float:
        return price(smallest_mask(self.full, self.curves, ALIGN))

    def between(self, depth: float) -> float:
        """A budget between the floor (0) and dense (1)."""
        return self.floor + (price(self.full) - self.floor) * depth + HAIR


losses = st.integers(0, 50).map(lambda n: n / 50)  # ties and zeros are common


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Models of 1 to 9 layers of any KV groups and FFN parcels, ties and zero losses included."""
    curves = []
    groups, parcels = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    for source in range(draw(st.integers(1, 9))):
        kv = draw(st.lists(losses, min_size=groups, max_size=groups))
        ffn = draw(st.lists(losses, min_size=parcels, max_size=parcels))
        curves.append(layer(source, kv, ffn, draw(st.sampled_from([0.0, 0.01, 0.1, 0.1, 0.5, 1.3]))))
    return Case(curves)


def example(count: int = 6) -> Case:
    """Layers whose influence misleads: what is influential is cheap to lose, and the other way round."""
    influences = [0.9, 0.1, 0.5, 0.2, 0.8, 0.3, 0.7, 0.4][:count]
    curves = [layer(i, [0.2 + 0.1 * i], [0.05, 0.1 * i, 0.4], v) for i, v in enumerate(influences)]
    return Case(curves, [1.0 - v for v in influences])


@settings(deadline=None, max_examples=40)
@given(cases(), st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True))
def test_every_tier_fits_its_budget_inside_the_tier_above(case: Case, depths: list[float]) -> None:
    """For any reachable budgets: tiers fit, nest, have aligned widths and at least a group and a parcel per layer."""
    dense, budgets = price(case.full), [case.between(depth) for depth in depths]
    tiers = case.plan(budgets)
    assert tiers[0].mask == case.full and tiers[0].energy_j == dense
    assert [t.budget_j for t in tiers[1:]] == sorted((b for b in budgets if b < dense), reverse=True)
    for above, tier in pairwise(tiers):
        assert tier.budget_j is not None and tier.energy_j <= tier.budget_j
        assert tier.energy_j == price(tier.mask) and tier.loss == case.repaired(tier.mask)
        assert tier.mask.nested_in(above.mask)
        for d in tier.mask.layers:
            assert d.num_key_value_heads >= 1 and d.intermediate_size >= ALIGN and d.intermediate_size % ALIGN == 0


@settings(deadline=None, max_examples=40)
@given(cases(), st.floats(0, 0.999))
def test_the_result_is_never_worse_than_the_heuristic_it_started_from(case: Case, depth: float) -> None:
    """The tier loses no more, repaired, than the heuristic's best; of the finalists none loses less."""
    budget = case.between(depth)
    for tier in case.plan([budget])[1:]:
        start = min(case.heuristic(budget), key=case.objective.predicted)
        assert tier.loss <= case.repaired(start)
        assert tier.loss == min(row["loss"] for row in tier.considered)
        assert all(row["energy_j"] <= budget for row in tier.considered)
        assert float(len(tier.mask.layers)) in {row["layers"] for row in tier.considered}


def test_the_search_finds_what_the_heuristic_misses() -> None:
    """Where influence misleads, evolution over the layers ends below the heuristic's best prediction."""
    case = example(8)
    budget = case.between(0.4)
    start = min(map(case.objective.predicted, case.heuristic(budget)))
    (_, tier) = case.plan([budget], seconds=300)
    assert min(row["predicted_loss"] for row in tier.considered) < start - 0.1
    assert tier.evaluations > len(case.heuristic(budget))


@pytest.mark.parametrize("seed", range(4))
def test_more_seconds_never_predict_a_worse_loss(seed: int) -> None:
    """A longer search has seen all that the shorter one of the same seed has."""
    case = example(8)
    tiers = [case.plan([case.between(0.35)], seconds=s, seed=seed)[1] for s in (0, 5, 20, 60, 200)]
    best = [min(row["predicted_loss"] for row in tier.considered) for tier in tiers]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
    evaluations = [tier.evaluations for tier in tiers]
    assert evaluations == sorted(evaluations) and evaluations[-1] > evaluations[0]


def test_a_seed_gives_one_plan_and_seeds_differ() -> None:
    """The same seed gives the same ladder; some other seed looks at other candidates."""
    case = example(8)
    budgets = [case.between(0.3), case.between(0.7)]
    plans = [case.plan(budgets, seconds=30, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert any(plan != plans[0] for plan in plans[2:])


def test_a_search_of_a_tiny_model_ends_when_all_has_been_tried() -> None:
    """With one layer there is nothing to search, however many seconds there are."""
    case = Case([layer(0, [0.1], [0.2, 0.3])])
    clock = Clock()
    plan_ladder(case.full, [case.between(0.5)], case.objective, 1e9, clock=clock)
    assert clock.now < 1000


@settings(deadline=None, max_examples=40)
@given(cases(), st.floats(0.01, 100))
def test_a_budget_that_dense_fits_gives_one_dense_tier_that_says_so(case: Case, spare: float) -> None:
    """Budgets above the dense price prune nothing, and the largest of them is t0's."""
    dense = price(case.full)
    (tier,) = case.plan([dense + spare, dense])
    assert tier.mask == case.full and tier.budget_j == dense + spare and "fits" in tier.note


def test_a_dense_tier_above_every_budget_says_so_and_has_none() -> None:
    """Where no budget fits dense, t0 stays as the reference, without a budget."""
    case = example(3)
    tiers = case.plan([0.8 * price(case.full)])
    assert tiers[0].budget_j is None and "above every budget" in tiers[0].note
    assert len(tiers) == 2 and "fits" not in tiers[1].note


@settings(deadline=None, max_examples=40)
@given(cases(), st.floats(0.01, 0.99))
def test_an_unreachable_budget_names_the_smallest_that_can_be_reached(case: Case, share: float) -> None:
    """Below the smallest mask's price: BudgetError with both numbers, and the number it names does work."""
    budget = case.floor * share
    with pytest.raises(BudgetError, match="no tier of this model fits") as caught:
        case.plan([price(case.full), budget])
    match = re.search(r"smallest needs ([\d.]+ m?J)", str(caught.value))
    assert match is not None
    named = parse_energy(match[1].replace(" ", ""))
    assert case.floor <= named <= case.floor * 1.01  # printed with three digits, rounded up
    assert price(cheapest_mask(case.full, ALIGN)) <= case.floor  # what is refused before any work
    assert case.plan([named])[-1].energy_j <= named


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_smallest_reachable_budget_itself_works(case: Case) -> None:
    """A budget of exactly the floor is met, whatever the last bit of a sum says."""
    assert case.plan([case.floor])[-1].energy_j <= case.floor


def test_the_order_of_budgets_does_not_matter() -> None:
    """Ladders are built from the smallest budget up, however they were given."""
    case = example()
    budgets = [case.between(depth) for depth in (0.2, 0.9, 0.6)]
    assert case.plan(budgets) == case.plan(sorted(budgets))


def test_progress_names_each_budget() -> None:
    """The reporter hears of every tier that is searched, dense ones not."""
    case, heard = example(), list[str]()
    case.plan([2 * price(case.full), case.between(0.8), case.between(0.5)], seconds=40, report=heard.append)
    assert len({line.partition(":")[0] for line in heard}) == 2
    told = [re.search(r"\d+ (candidates, best|layers measured,) [\d.]+ nats$", line) for line in heard]
    assert {match[1] for match in told if match} == {"candidates, best", "layers measured,"} and all(told)


def test_a_plan_survives_json() -> None:
    """What the stage cache writes reads back as the same plan."""
    for tier in example().plan([example().between(0.5)]):
        assert TierPlan.from_json(json.loads(json.dumps(asdict(tier)))) == tier


def test_units_go_by_loss_per_joule_and_the_last_of_a_layer_stays() -> None:
    """Parcels of 0.2 J and groups of 0.3 J are taken in the order of loss per joule, from whichever layer."""
    case = Case([layer(0, [0.9], [0.04, 0.26, 0.7]), layer(1, [0.15], [0.02, 0.3])])
    steps = [(0.2, (2, 8), (2, 4)), (0.4, (2, 6), (2, 4)), (0.7, (2, 6), (1, 4)), (0.9, (2, 4), (1, 4))]
    for saved, *kept in steps:  # 0.1, 0.2, 0.5, 1.3 nats per joule; behind them 1.5, 3 and 3.5
        mask = shrink_to_budget(case.full, price(case.full) - saved + HAIR, case.curves, price, ALIGN)
        assert mask is not None
        assert [(d.num_key_value_heads, d.intermediate_size) for d in mask.layers] == kept
    everything = price(case.full) - 2 * 0.3 - 5 * 0.2
    least = shrink_to_budget(case.full, everything + HAIR, case.curves, price, ALIGN)
    assert least == Mask((LayerDims(0, 1, ALIGN), LayerDims(1, 1, ALIGN)))
    assert shrink_to_budget(case.full, everything - 0.01, case.curves, price, ALIGN) is None


@settings(deadline=None, max_examples=40)
@given(cases(), st.floats(0, 1))
def test_shrinking_just_fits(case: Case, depth: float) -> None:
    """The mask fits, nests, and is no more than one step below its budget; what fits already is left alone."""
    least = Mask(tuple(LayerDims(d.source_layer, 1, ALIGN) for d in case.full.layers))
    budget = price(least) + (price(case.full) - price(least)) * depth + HAIR
    mask = shrink_to_budget(case.full, budget, case.curves, price, ALIGN)
    assert mask is not None and mask.nested_in(case.full) and price(mask) <= budget
    assert mask == case.full or price(mask) + 0.3 > budget - 2 * HAIR  # a group is the largest step
    assert shrink_to_budget(case.full, price(least) - 0.01, case.curves, price, ALIGN) is None
    assert shrink_to_budget(mask, budget, case.curves, price, ALIGN) == mask


def test_shrinking_copes_with_prices_that_are_not_additive() -> None:
    """Where later units save less than the first, the mask still fits."""
    case = Case([layer(0, [], [0.1] * 9), layer(1, [], [0.1] * 9)])

    def concave(mask: Mask) -> float:
        return sum(float(d.intermediate_size) ** 1.1 for d in mask.layers)

    for share in (0.9, 0.6, 0.3):
        budget = share * concave(case.full)
        mask = shrink_to_budget(case.full, budget, case.curves, concave, ALIGN)
        assert mask is not None and 0.8 * budget < concave(mask) <= budget


def test_the_smallest_mask_is_a_sixth_of_the_layers_with_one_unit_each() -> None:
    """Nine layers leave the two most influential, with one group and one parcel."""
    case = Case([layer(i, [0.5], [0.25], 0.1 * i) for i in range(9)])
    smallest = smallest_mask(case.full, case.curves, ALIGN)
    assert smallest == Mask(tuple(LayerDims(i, 1, ALIGN) for i in (7, 8)))


def test_depth_steps_go_from_width_alone_to_depth_alone_around_the_tier_below() -> None:
    """Layers go by influence, not those of the tier below; the last step is the first that fits with none narrowed."""
    case = Case([layer(i, [0.5], [0.25], 0.1 * i) for i in range(9)])
    below = Mask((case.full.layers[0],))
    budget = price(Mask(case.full.layers[:6]))
    steps = depth_steps(case.full, below, lambda mask: price(mask) <= budget, case.curves)
    assert [[d.source_layer for d in m.layers] for m in steps] == [[0, *range(1 + gone, 9)] for gone in range(4)]


def test_units_of_the_tier_below_are_not_taken() -> None:
    """A cut goes around what the tier below keeps, though it be the cheapest; where nothing else is left, None."""
    case = Case([layer(0, [0.1], [0.1, 0.1]), layer(1, [0.9], [0.9, 0.9])])
    below = Mask((replace(case.full.layers[0], num_key_value_heads=1),))
    mask = shrink_to_budget(case.full, price(case.full) - 0.7 + HAIR, case.curves, price, ALIGN, below)
    assert mask is not None and below.nested_in(mask)
    assert mask.layers[0].intermediate_size == case.full.layers[0].intermediate_size
    least = 1.0 + 2 * 0.5 + 2 * 0.3 + 0.1 * (6 + ALIGN)
    assert shrink_to_budget(case.full, least + HAIR, case.curves, price, ALIGN, below) is not None
    assert shrink_to_budget(case.full, least - 0.01, case.curves, price, ALIGN, below) is None


def test_measured_depth_decides_where_predictions_mislead() -> None:
    """Repair mends missing layers, not narrow ones: the tier goes by depth alone, though predictions say width."""
    curves = [layer(i, [], [0.01, 0.01, 0.01], 0.5) for i in range(6)]
    case = Case(curves)
    budget = price(Mask(case.full.layers[:4]))

    def repaired(ladder: Sequence[Mask]) -> float:
        return 1.0 + sum(8 - d.intermediate_size for d in ladder[-1].layers)

    objective = replace(case.objective, repaired=repaired)
    (_, tier) = plan_ladder(case.full, [budget], objective, 5, clock=Clock())
    assert tier.loss == 1.0 and len(tier.mask.layers) == 4
    assert case.objective.predicted(tier.mask) > min(row["predicted_loss"] for row in tier.considered)


def test_depth_alone_is_measured_whichever_steps_before_it_cannot_fit() -> None:
    """At 7.5 J layers at their narrowest are a joule each, whole ones 1.9 J: steps of 6, 5, 4 and 3 layers fit."""
    case = Case([layer(i, [0.2], [0.1, 0.1, 0.1], 0.1 * i) for i in range(8)])
    objective = replace(case.objective, repaired=lambda ladder: 9.0 - len(ladder[-1].layers))
    _, tier = plan_ladder(case.full, [7.5], objective, 0, clock=Clock())
    assert len(tier.mask.layers) == 6
    assert {row["layers"] for row in tier.considered} == {6, 5, 4, 3}


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_finalists_that_lose_about_the_same_are_judged_as_they_ship(scale: float) -> None:
    """Those within CLOSE of what the best adds, RUN_OFF at most, all at once; the others have lost already."""
    case, asked = example(), list[Mask]()

    class Even(Case):
        def repaired(self, mask: Mask) -> float:
            return 1.0 + scale * (1 + 0.02 * (len(mask.layers) - 1))  # 2, 4 and 6 % above the shallowest; dense has 1.0

        def shipped(self, ladders: Sequence[Sequence[Mask]]) -> list[float]:
            asked.extend(ladder[-1] for ladder in ladders)
            return [3.0 - 0.1 * len(ladder[-1].layers) for ladder in ladders]

    plan = Even(case.curves, case.worth).plan([case.between(0.5)])
    depths = [len(mask.layers) for mask in asked]
    assert 1 < len(depths) <= RUN_OFF and max(depths) - min(depths) < CLOSE / 0.02
    assert len(plan[1].mask.layers) == max(depths)
    considered = sorted(row["layers"] for row in plan[1].considered)
    assert min(depths) == considered[0] and max(depths) < considered[-1]


def test_candidates_are_repaired_above_the_tiers_that_were_chosen_before() -> None:
    """Which matrices a tier may have of its own depends on what smaller ones take."""
    case, seen = example(), list[tuple[Mask, ...]]()

    def repaired(ladder: Sequence[Mask]) -> float:
        seen.append(tuple(ladder))
        return case.repaired(ladder[-1])

    def shipped(ladders: Sequence[Sequence[Mask]]) -> list[float]:
        return [repaired(ladder) for ladder in ladders]

    budgets = [case.between(depth) for depth in (0.25, 0.5, 0.75)]
    objective = replace(case.objective, repaired=repaired, shipped=shipped)
    _, *tiers = plan_ladder(case.full, budgets, objective, 5, clock=Clock())
    chosen = [tier.mask for tier in reversed(tiers)]
    assert {ladder[:-1] for ladder in seen} == {(), tuple(chosen[:1]), tuple(chosen[:2])}


def test_given_masks_are_paired_with_the_budgets_below_dense() -> None:
    """User masks take the budgets that dense exceeds, from large to small; further masks have none."""
    full = Mask((LayerDims(0, 2, 8), LayerDims(1, 2, 8)))
    masks = [Mask((LayerDims(0, 1, 4), LayerDims(1, 2, 8))), Mask((LayerDims(1, 2, 8),)), Mask((LayerDims(1, 1, 2),))]
    dense = price(full)
    tiers = plan_masks(full, masks, [price(masks[1]), dense + 1, price(masks[0])], price)
    assert [t.mask for t in tiers] == [full, *masks]
    assert [t.budget_j for t in tiers] == [dense + 1, price(masks[0]), price(masks[1]), None]
    assert [t.energy_j for t in tiers] == [price(t.mask) for t in tiers]


def test_a_given_mask_above_its_budget_is_refused() -> None:
    """A mask that is too dear for its budget is named with both numbers."""
    full, mask = Mask((LayerDims(0, 2, 8),)), Mask((LayerDims(0, 2, 6),))
    with pytest.raises(BudgetError, match=r"mask 1 needs .* above its budget"):
        plan_masks(full, [mask], [price(mask) - 0.01], price)


@given(st.lists(st.lists(st.floats(0.01, 5.0), min_size=3, max_size=6), min_size=2, max_size=4))
@settings(deadline=None, max_examples=60)
def test_one_dual_variable_rises_as_budgets_fall(steps: list[list[float]]) -> None:
    """Ê(λ) is monotone: a tier of fewer joules was cut at a larger λ, and the whole model at none."""
    case = Case([layer(i, [], sorted(errors)) for i, errors in enumerate(steps)])
    floor, full = price(smallest_mask(case.full, case.curves, ALIGN)), price(case.full)
    floor = max(floor, full - 0.1 * ALIGN * sum(len(errors) for errors in steps))
    found = list[tuple[float, float]]()
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        mask = shrink_to_budget(case.full, floor + share * (full - floor) + HAIR, case.curves, price, ALIGN)
        assert mask is not None
        found.append((price(mask), dual(mask, case.curves, price, ALIGN)))
    assert found[0] == (pytest.approx(full), 0.0)
    assert all(a[0] >= b[0] - HAIR and a[1] <= b[1] * (1 + 1e-9) for a, b in pairwise(found))


def test_the_dual_variable_is_loss_per_joule_of_the_dearest_cut() -> None:
    """Two parcels of 0.2 J each are gone from a layer; the second of them cost 0.3 nats: 1.5 nats per joule."""
    case = Case([layer(0, [], [0.1, 0.3, 0.9]), layer(1, [], [2.0, 3.0])])
    mask = shrink_to_budget(case.full, price(case.full) - 0.4 + HAIR, case.curves, price, ALIGN)
    assert mask is not None
    assert dual(mask, case.curves, price, ALIGN) == pytest.approx(0.3 / 0.2)


CHEAP_GROUPS = [layer(i, kv=[0.01 * (i + 1), 0.3], ffn=[0.1, 0.2, 0.3]) for i in range(3)]


def probed() -> tuple[Mask, Mask]:
    masks = probe_masks(Mask(tuple(c.dims for c in CHEAP_GROUPS)), CHEAP_GROUPS, price, ALIGN)
    assert masks
    return masks


def test_the_probe_compares_two_masks_of_one_price() -> None:
    """One takes groups as the curves say, the other channels alone; both fit half of what channels can save."""
    full = Mask(tuple(c.dims for c in CHEAP_GROUPS))
    mixed, channels = probed()
    assert [d.num_key_value_heads for d in mixed.layers] == [2, 2, 2]
    assert [d.num_key_value_heads for d in channels.layers] == [3, 3, 3]
    goal = price(full) - 0.1 * 3 * 6 / 2
    assert goal - 0.3 < price(mixed) <= goal + HAIR and goal - 0.3 < price(channels) <= goal + HAIR


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.8, 2.0])
def test_the_weight_of_groups_is_found_whatever_channels_lose(weight: float, scale: float) -> None:
    """If losses are curves, groups weighed, times a scale of their own, the probe gives that weight."""
    masks = probed()
    weighed = [c.weighed(weight) for c in CHEAP_GROUPS]
    lost = [scale * sum(weighed[d.source_layer].added(d) for d in mask.layers) for mask in masks]
    assert group_weight(CHEAP_GROUPS, masks, (lost[0], lost[1])) == pytest.approx(weight)


def test_a_probe_that_tells_nothing_leaves_the_curves_as_they_are() -> None:
    """No group went, or channels lost nothing; and what lies far out is not believed."""
    masks = probed()
    assert group_weight(CHEAP_GROUPS, (masks[1], masks[1]), (0.2, 0.2)) == 1.0
    assert group_weight(CHEAP_GROUPS, masks, (0.2, -0.01)) == 1.0
    assert [group_weight(CHEAP_GROUPS, masks, (lost, 0.1)) for lost in (0.0, 99.0)] == list(WEIGHTS)


def test_there_is_no_probe_where_the_curves_take_no_group() -> None:
    """Groups that cost more than any channel, or none that could go."""
    for kv in ([9.0, 9.0], []):
        dear = [layer(i, kv=kv, ffn=[0.1, 0.2, 0.3]) for i in range(3)]
        assert probe_masks(Mask(tuple(c.dims for c in dear)), dear, price, ALIGN) is None


def test_weighed_groups_stay_longer() -> None:
    """A mask cut to the same budget keeps more of them."""
    full = Mask(tuple(c.dims for c in CHEAP_GROUPS))
    kept = [
        sum(d.num_key_value_heads for d in mask.layers)
        for weight in (1.0, 100.0)
        if (mask := shrink_to_budget(full, price(full) - 0.8, [c.weighed(weight) for c in CHEAP_GROUPS], price, ALIGN))
    ]
    assert kept[0] < kept[1] == 9
