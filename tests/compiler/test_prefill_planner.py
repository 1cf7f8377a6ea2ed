"""Whether a ladder gets a tier that prunes its prefill: made-up prices and losses, no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.planner import TierPlan
from eopc_compiler.prefill_planner import Behind, paths_to_try, plan_prefill
from eopc_compiler.stage_plan import prompt_paths
from eopc_compiler.state import BuildArgs
from eopc_compiler.token_selector import PromptPath

LAYERS, WIDTH = 10, 8
FULL = Mask(tuple(LayerDims(i, 2, WIDTH) for i in range(LAYERS)))
CURVES = [LayerCurves(d, 2, (0, 1), tuple(range(WIDTH)), (0.5,), (0.01, 0.02, 0.04), 0.5) for d in FULL.layers]


def decode_j(mask: Mask) -> float:
    return sum(0.2 + 0.1 * d.num_key_value_heads + 0.05 * d.intermediate_size for d in mask.layers)


def price(prompt_j: float) -> Callable[[Mask], float]:
    """A prompt for so many joules a layer, before the answer."""
    return lambda mask: LAYERS * prompt_j + decode_j(mask)


def static(prompt_j: float, *budgets: float) -> tuple[TierPlan, ...]:
    """t0, and for every budget the whole depth at the width that fits."""
    cost, tiers = price(prompt_j), [TierPlan(None, FULL, price(prompt_j)(FULL), 2.0, "dense")]
    for budget in budgets:
        widths = [Mask(tuple(LayerDims(i, 2, w) for i in range(LAYERS))) for w in range(WIDTH, 0, -2)]
        mask = next(m for m in widths if cost(m) <= budget)
        tiers.append(TierPlan(budget, mask, cost(mask), loss(mask), "pruned to its budget"))
    return tuple(tiers)


def loss(mask: Mask) -> float:
    return 2.0 + 0.1 * sum(WIDTH - d.intermediate_size for d in mask.layers) / LAYERS


def behind(prompt_j: float, harm: float, *depths: int) -> dict[PromptPath, Behind]:
    """Prompts that skip layers cost less, and harm the answer by so much for each layer skipped."""

    def of_depth(depth: int) -> Behind:
        harmed = harm * (LAYERS - depth)
        return Behind(
            lambda mask: depth * prompt_j + decode_j(mask), lambda: 2.0 + harmed, lambda up: loss(up[-1]) + harmed
        )

    return {PromptPath(depth): of_depth(depth) for depth in depths}


def nested(tiers: tuple[TierPlan, ...]) -> bool:
    return all(b.mask.nested_in(a.mask) for a, b in pairwise(tiers))


def test_a_dear_prompt_is_pruned_where_that_harms_less_than_a_narrower_tier() -> None:
    """The tier stands right below t0, the others are wider behind it, all within their budgets, nested."""
    plan = static(0.5, 11.2, 10.5)
    found = plan_prefill(plan, behind(0.5, 0.001, 8, 7), CURVES, 2)
    assert [t.prompt for t in found][:3] == [None, PromptPath(7), None]
    assert found[1].mask == FULL and nested(found)
    for tier in found[1:]:
        assert tier.budget_j is None or tier.energy_j <= tier.budget_j
    assert found[-1].prefill == 1 and found[-1].loss < plan[-1].loss


def test_a_budget_that_the_whole_model_meets_behind_it_is_its_own() -> None:
    """Then no narrower tier is needed for that budget."""
    plan = static(0.5, 12.5)
    found = plan_prefill(plan, behind(0.5, 0.001, 7), CURVES, 2)
    assert len(found) == 2
    assert (found[1].budget_j, found[1].prompt, found[1].mask) == (12.5, PromptPath(7), FULL)
    assert found[1].energy_j <= 12.5


@pytest.mark.parametrize(
    ("prompt_j", "harm"), [(0.5, 1.0), (0.001, 0.0)], ids=["skipping harms more", "prompts cost next to nothing"]
)
def test_otherwise_the_ladder_stays_as_it_is(prompt_j: float, harm: float) -> None:
    """And where a prompt is cheap, nothing is measured at all."""
    plan = static(prompt_j, 8.0 + 10 * prompt_j)
    assert plan_prefill(plan, behind(prompt_j, harm, 8, 7), CURVES, 2) == plan


def test_a_depth_that_was_asked_for_is_kept_whether_it_wins_or_not() -> None:
    """The tiers below stay with t0's prompts where those are better."""
    plan = static(0.5, 10.5)
    found = plan_prefill(plan, behind(0.5, 1.0, 7), CURVES, 2, always=True)
    assert [(t.prompt, t.prefill) for t in found] == [(None, 0), (PromptPath(7), 1), (None, 0)]
    assert found[2] == plan[1]


def test_the_depths_tried_are_those_of_the_paper() -> None:
    """From a fifth to two fifths of the layers skipped; a model of one layer has none to skip."""
    assert [p.depth for p in paths_to_try(30, (0.0,))] == [24, 22, 20, 18]
    assert paths_to_try(1, (0.0, 0.5)) == ()


def test_tokens_spare_a_prompt_what_layers_do() -> None:
    """Half of the tokens in twice as many layers; not beyond the first layer, which all tokens run through."""
    by_tokens = paths_to_try(30, (0.5,))
    assert by_tokens == (PromptPath(19, 0.5), PromptPath(15, 0.5), PromptPath(11, 0.5), PromptPath(7, 0.5))
    assert paths_to_try(12, (0.75,)) == (PromptPath(7, 0.75), PromptPath(3, 0.75))  # 13 and 17 would be too many


@pytest.mark.parametrize(
    ("depth", "tokens", "shares"),
    [
        ("auto", "auto", {0.0, 5 / 16}),
        ("auto", "none", {0.0}),
        ("auto", 0.5, {0.5}),
        (20, "auto", {0.0}),
        (20, 0.5, {0.5}),
    ],
)
def test_shares_are_tried_unless_layers_were_asked_for(depth: Any, tokens: Any, shares: set[float]) -> None:
    """A depth alone means whole layers, as before there were token selectors."""
    paths = prompt_paths(BuildArgs(prefill_depth=depth, prefill_tokens=tokens), 30)
    assert {p.share for p in paths} == shares
    assert len(paths) == (4 * len(shares) if depth == "auto" else 1)


def test_a_depth_that_promises_most_is_measured_alone_and_dropped_if_it_does_not_keep_it() -> None:
    """Repairs are dear: one depth's tiers are repaired, and the static ladder stays where they lose after all."""
    plan = static(0.5, 11.2, 10.5)
    measured: list[int] = []

    def watched(path: PromptPath, one: Behind, worse: float) -> Behind:
        def repaired(ladder: Sequence[Mask]) -> float:
            measured.append(path.depth)
            return one.repaired(ladder) + worse

        return Behind(one.price, one.whole, repaired)

    honest = {d: watched(d, one, 0.0) for d, one in behind(0.5, 0.001, 9, 8, 7).items()}
    assert plan_prefill(plan, honest, CURVES, 2)[1].prompt == PromptPath(7) and set(measured) == {7}
    disappointing = {d: watched(d, one, 1.0) for d, one in behind(0.5, 0.001, 9, 8, 7).items()}
    assert plan_prefill(plan, disappointing, CURVES, 2) == plan


def test_candidates_behind_pruned_prompts_are_repaired_above_the_tiers_below_them() -> None:
    """A bundle lets smaller tiers take their matrices first, so that is what a candidate is judged with."""
    plan = static(0.5, 11.2, 10.5)
    seen: list[list[Mask]] = []
    one = behind(0.5, 0.001, 7)[PromptPath(7)]

    def repaired(ladder: Sequence[Mask]) -> float:
        seen.append(list(ladder))
        return one.repaired(ladder)

    found = plan_prefill(plan, {PromptPath(7): Behind(one.price, one.whole, repaired)}, CURVES, 2)
    assert seen == [[plan[2].mask, found[2].mask], [found[3].mask]]
