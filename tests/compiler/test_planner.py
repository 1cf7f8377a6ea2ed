"""From budgets to masks, with a made-up price and loss: no model, no device, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerScores
from eopc_compiler.ladder import Mask
from eopc_compiler.planner import TierPlan, plan_ladder, plan_masks, shrink_to_budget, smallest_mask
from eopc_runtime.errors import BudgetError
from eopc_runtime.units import parse_energy

ALIGN = 2


def price(mask: Mask) -> float:
    """A fixed part, and something for every layer, group and channel, as the roofline has it."""
    return 1.0 + sum(0.5 + 0.3 * d.num_key_value_heads + 0.1 * d.intermediate_size for d in mask.layers)


class Case:
    """A made-up model: scores per unit, and a loss that grows by the importance of all that is dropped."""

    def __init__(self, scores: Sequence[LayerScores]) -> None:
        self.scores = scores
        self.full = Mask(tuple(LayerDims(i, len(s.kv_groups), len(s.ffn_channels)) for i, s in enumerate(scores)))

    def loss(self, mask: Mask) -> float:
        kept = 0.0
        for d in mask.layers:
            s = self.scores[d.source_layer]
            kept += s.influence * (
                sum(sorted(s.kv_groups, reverse=True)[: d.num_key_value_heads])
                + sum(sorted(s.ffn_channels, reverse=True)[: d.intermediate_size])
            )
        return 10.0 - kept

    def plan(self, budgets: Sequence[float], **options: Any) -> tuple[TierPlan, ...]:
        return plan_ladder(self.full, budgets, self.scores, price, self.loss, ALIGN, **options)

    @property
    def floor(self) -> float:
        return price(smallest_mask(self.full, self.scores, ALIGN))


def shares(count: int) -> st.SearchStrategy[tuple[float, ...]]:
    weights = st.lists(st.integers(0, 50), min_size=count, max_size=count)  # ties and zeros are common
    return weights.map(lambda w: tuple(x / max(sum(w), 1) for x in w))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Models of 1 to 9 layers of any KV groups and FFN units, ties and zero importances included."""
    layers = []
    for _ in range(draw(st.integers(1, 9))):
        groups, units = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        influence = draw(st.sampled_from([0.0, 0.01, 0.1, 0.1, 0.5, 1.3]))
        layers.append(LayerScores(draw(shares(groups)), draw(shares(ALIGN * units)), influence))
    return Case(layers)


@given(cases(), st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True))
def test_every_tier_fits_its_budget_inside_the_tier_above(case: Case, depths: list[float]) -> None:
    """For any reachable budgets: tiers fit, nest, have aligned widths and at least a group and a unit per layer."""
    dense = price(case.full)
    # a hair above the floor: the same joules summed in another order may differ in the last bit
    budgets = [case.floor + (dense - case.floor) * depth + 1e-9 for depth in depths]
    tiers = case.plan(budgets)
    assert tiers[0].mask == case.full and tiers[0].energy_j == dense
    assert [t.budget_j for t in tiers[1:]] == sorted((b for b in budgets if b < dense), reverse=True)
    for above, tier in pairwise(tiers):
        assert tier.budget_j is not None and tier.energy_j <= tier.budget_j
        assert tier.energy_j == price(tier.mask) and tier.loss == case.loss(tier.mask)
        assert tier.mask.nested_in(above.mask)
        for d in tier.mask.layers:
            assert d.num_key_value_heads >= 1 and d.intermediate_size >= ALIGN and d.intermediate_size % ALIGN == 0


@given(cases(), st.floats(0, 0.999))
def test_the_chosen_candidate_has_the_smallest_loss_of_those_considered(case: Case, depth: float) -> None:
    """The plan keeps its candidates, all within the budget, and none of them loses less."""
    dense = price(case.full)
    budget = case.floor + (dense - case.floor) * depth + 1e-9
    for tier in case.plan([budget])[1:]:
        assert tier.loss == min(row["loss"] for row in tier.considered)
        assert all(row["energy_j"] <= budget for row in tier.considered)
        assert float(len(tier.mask.layers)) in {row["layers"] for row in tier.considered}


@given(cases(), st.floats(0.01, 100))
def test_a_budget_that_dense_fits_gives_one_dense_tier_that_says_so(case: Case, spare: float) -> None:
    """Budgets above the dense price prune nothing, and the largest of them is t0's."""
    dense = price(case.full)
    (tier,) = case.plan([dense + spare, dense])
    assert tier.mask == case.full and tier.budget_j == dense + spare and "fits" in tier.note


def test_a_dense_tier_above_every_budget_says_so_and_has_none() -> None:
    """Where no budget fits dense, t0 stays as the reference, without a budget."""
    case = Case([LayerScores((0.5, 0.5), (0.4, 0.3, 0.2, 0.1), 0.5)] * 3)
    tiers = case.plan([0.8 * price(case.full)])
    assert tiers[0].budget_j is None and "above every budget" in tiers[0].note
    assert len(tiers) == 2 and "fits" not in tiers[1].note


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
    assert case.plan([named])[-1].energy_j <= named


def test_the_order_of_budgets_does_not_matter() -> None:
    """Ladders are built from the largest budget down, however they were given."""
    case = Case([LayerScores((0.6, 0.4), (0.4, 0.3, 0.2, 0.1), 0.1 * i) for i in range(1, 7)])
    dense = price(case.full)
    budgets = [0.5 * dense, 0.9 * dense, 0.7 * dense]
    assert case.plan(budgets) == case.plan(sorted(budgets))


def test_progress_names_each_budget() -> None:
    """The reporter hears of every tier that is fitted, dense ones not."""
    case = Case([LayerScores((0.5, 0.5), (0.4, 0.3, 0.2, 0.1), 0.5)] * 3)
    dense, heard = price(case.full), list[str]()
    case.plan([2 * dense, 0.9 * dense, 0.7 * dense], report=heard.append)
    assert len(heard) == 2 and all("fitting" in line for line in heard)


def test_the_least_influential_layers_go_first() -> None:
    """With FFN and KV at their floor a tier can only drop layers; the weakest third of the influences survives not."""
    influences = [0.9, 0.1, 0.5, 0.2, 0.8, 0.3]
    case = Case([LayerScores((1.0,), (0.5, 0.5), i) for i in influences])
    for drop in (1, 2, 3, 4):
        keep = sorted(range(6), key=lambda i: -influences[i])[: 6 - drop]
        (_, tier) = case.plan([price(case.full) - drop * 1.0 + 1e-9])  # a layer at its floor costs 0.5 + 0.3 + 0.2
        assert {d.source_layer for d in tier.mask.layers} == set(keep)


def test_ffn_units_are_taken_by_importance_and_kv_groups_after_them() -> None:
    """Units go from least to most important, weighted by their layer's influence; the last one of a layer stays."""
    case = Case(
        [
            LayerScores((0.7, 0.3), (0.4, 0.3, 0.2, 0.06, 0.03, 0.01), 1.0),  # units 0.7 0.26 0.04
            LayerScores((0.9, 0.1), (0.3, 0.3, 0.2, 0.1, 0.06, 0.04), 0.2),  # units 0.12 0.06 0.02
        ]
    )
    dense, unit = price(case.full), 0.1 * ALIGN
    cuts = []
    for taken in range(1, 5):
        mask = shrink_to_budget(case.full, dense - taken * unit + 1e-9, case.scores, price, ALIGN)
        assert mask is not None
        cuts.append([d.intermediate_size for d in mask.layers])
        assert all(d.num_key_value_heads == 2 for d in mask.layers)
    assert cuts == [[6, 4], [4, 4], [4, 2], [2, 2]]
    kv = [
        shrink_to_budget(case.full, dense - 4 * unit - 0.3 * groups + 1e-9, case.scores, price, ALIGN)
        for groups in (1, 2)
    ]
    # layer 1's weaker group is worth 0.1 x 0.2, layer 0's 0.3 x 1
    assert [[d.num_key_value_heads for d in mask.layers] for mask in kv if mask] == [[2, 1], [1, 1]]
    assert shrink_to_budget(case.full, dense - 4 * unit - 0.6 - 0.01, case.scores, price, ALIGN) is None


@given(cases(), st.floats(0, 0.999))
def test_shrinking_takes_no_more_than_needed_and_the_least_important(case: Case, depth: float) -> None:
    """What is cut is worth no more than what could have been cut instead, and one step less would not fit."""
    least = Mask(tuple(LayerDims(d.source_layer, 1, ALIGN) for d in case.full.layers))
    budget = price(least) + (price(case.full) - price(least)) * depth + 1e-9
    mask = shrink_to_budget(case.full, budget, case.scores, price, ALIGN)
    assert mask is not None and price(mask) <= budget
    if mask == case.full:
        return
    cut, kept = [], []
    for d in mask.layers:
        s = case.scores[d.source_layer]
        ranked = sorted(s.ffn_channels, reverse=True)
        units = [s.influence * sum(ranked[i : i + ALIGN]) for i in range(0, len(ranked), ALIGN)]
        cut += units[d.intermediate_size // ALIGN :]
        kept += units[1 : d.intermediate_size // ALIGN]  # the first unit can never go
    whole_groups = [d.num_key_value_heads for d in mask.layers] == [d.num_key_value_heads for d in case.full.layers]
    if whole_groups:
        assert max(cut) <= min(kept, default=max(cut)) + 1e-12
    else:
        assert not kept  # groups only once no FFN unit is left
    assert price(mask) + (0.1 * ALIGN if whole_groups else 0.3) > budget - 2e-9


def test_the_smallest_mask_is_a_third_of_the_layers_with_one_unit_each() -> None:
    """Nine layers leave the three most influential, with one group and one unit."""
    case = Case([LayerScores((0.5, 0.5), (0.25,) * 4, 0.1 * i) for i in range(9)])
    smallest = smallest_mask(case.full, case.scores, ALIGN)
    assert smallest == Mask(tuple(LayerDims(i, 1, ALIGN) for i in (6, 7, 8)))


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
