"""The plan: the best pair a budget affords, never above it, and a useful refusal."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.ledger import ROUNDING
from eopc_runtime.policy import Request, pick_tier, smallest_budget_j
from eopc_runtime.units import parse_energy

price = st.floats(min_value=1e-6, max_value=5)


def table(*tiers, margin=0.0):
    """An energy table from (prefill_j0, prefill_j1, step_j0, step_j1) tuples."""
    return EnergyTable(
        device="orin",
        source="prior",
        margin=margin,
        tiers=tuple(TierEnergy(f"t{i}", p0, p1, 0.0, s0, s1, s1, "prior") for i, (p0, p1, s0, s1) in enumerate(tiers)),
    )


tables = st.builds(
    lambda tiers, margin: table(*tiers, margin=margin),
    st.lists(st.tuples(price, price, price, price), min_size=1, max_size=4),
    st.floats(min_value=0, max_value=0.5),
)
requests = st.builds(Request, st.integers(1, 500), st.integers(1, 500))
budgets = st.floats(min_value=1e-3, max_value=1e7)

# prompt of 10 tokens and 11 new ones: prefill 10 / 4 / 2 J, ten steps 100 / 50 / 20 J
LADDER = table((0, 1.0, 10.0, 0.0), (0, 0.4, 5.0, 0.0), (0, 0.2, 2.0, 0.0))
REQUEST = Request(10, 11)


@pytest.mark.parametrize(
    ("budget_j", "label", "new_tokens", "energy_j"),
    [
        (None, "t0", 11, 110.0),
        (111.0, "t0", 11, 110.0),
        (61.0, "t0>t1", 11, 60.0),
        (55.0, "t1", 11, 54.0),
        (31.0, "t0>t2", 11, 30.0),
        (25.0, "t1>t2", 11, 24.0),
        (23.0, "t2", 11, 22.0),
        (9.0, "t2", 4, 8.0),
        (2.1, "t2", 1, 2.0),
    ],
)
def test_the_best_pair_that_fits_is_taken(budget_j, label, new_tokens, energy_j):
    """First the highest decode tier for the whole request, then the highest prefill tier, then most "
    "tokens."""
    plan = pick_tier(LADDER, budget_j, REQUEST)
    assert (plan.label, plan.new_tokens) == (label, new_tokens)
    assert plan.energy_j == pytest.approx(energy_j, rel=1e-12)


def test_of_plans_affording_equally_many_tokens_the_highest_is_taken():
    """When every tier affords just one token, the first one is t0."""
    ladder = table((0, 1.0, 10.0, 0.0), (0, 1.0, 9.0, 0.0))
    assert pick_tier(ladder, 11.0, Request(10, 5)).label == "t0"


def test_the_margin_is_part_of_the_price():
    """What fits bare does not fit with a margin of 10 %."""
    bare, raised = table((0, 1.0, 10.0, 0.0)), table((0, 1.0, 10.0, 0.0), margin=0.1)
    assert pick_tier(bare, 111.0, REQUEST).new_tokens == 11
    assert pick_tier(raised, 111.0, REQUEST).new_tokens == 10


@given(tables, budgets, requests)
def test_a_plan_affords_what_it_says_and_no_token_more(ladder, budget_j, request):
    """E <= B always, and B < E(n, m+1) on every pair unless the request is met whole."""
    try:
        plan = pick_tier(ladder, budget_j, request)
    except BudgetError:
        return
    n = request.prompt_tokens
    assert plan.energy_j == ladder.plan_price_j(plan.prefill, plan.decode, n, plan.new_tokens)
    assert plan.energy_j <= budget_j
    assert 1 <= plan.new_tokens <= request.max_new_tokens
    assert plan.prefill <= plan.decode
    if plan.new_tokens < request.max_new_tokens:
        for decode in range(len(ladder.tiers)):
            for prefill in range(decode + 1):
                more = ladder.plan_price_j(prefill, decode, n, plan.new_tokens + 1)
                assert budget_j < more * (1 + ROUNDING)


@given(tables, budgets, requests)
def test_a_plan_for_the_whole_request_is_the_first_that_fits(ladder, budget_j, request):
    """No higher pair affords the whole request."""
    try:
        plan = pick_tier(ladder, budget_j, request)
    except BudgetError:
        return
    assume(plan.new_tokens == request.max_new_tokens)
    for decode in range(plan.decode + 1):
        for prefill in range(decode + 1 if decode < plan.decode else plan.prefill):
            higher = ladder.plan_price_j(prefill, decode, request.prompt_tokens, request.max_new_tokens)
            assert higher * (1 + ROUNDING) > budget_j


@given(tables, budgets, requests)
def test_a_larger_budget_never_affords_fewer_tokens(ladder, budget_j, request):
    """Twice the joules are never worse."""
    try:
        less = pick_tier(ladder, budget_j, request).new_tokens
    except BudgetError:
        less = 0
    assume(less)
    assert pick_tier(ladder, 2 * budget_j, request).new_tokens >= less


@given(tables, requests)
def test_a_refusal_names_a_budget_that_then_works(ladder, request):
    """The budget in the message, typed back as written, affords at least one token."""
    with pytest.raises(BudgetError) as caught:
        pick_tier(ladder, smallest_budget_j(ladder, request) * 0.99, request)
    named = re.search(r"Raise the budget to (\S+ \S+) or more", str(caught.value))
    assert named
    assert pick_tier(ladder, parse_energy(named[1]), request).new_tokens >= 1


def test_a_refusal_names_tier_device_and_source():
    """The message has what the reader needs to decide."""
    with pytest.raises(BudgetError, match=r"No tier fits 1\.5 J for 10 prompt tokens on orin") as caught:
        pick_tier(LADDER, 1.5, REQUEST)
    assert "t2, needs 2.01 J" in str(caught.value)
    assert "(prior)" in str(caught.value)


@pytest.mark.parametrize("budget_j", [0.0, -1.0, float("nan")])
def test_a_budget_that_is_no_positive_energy_is_refused(budget_j):
    """Nothing can be paid from it."""
    with pytest.raises(BudgetError, match="positive energy"):
        pick_tier(LADDER, budget_j, REQUEST)


@pytest.mark.parametrize(("prompt", "new", "says"), [(0, 5, "no token"), (5, 0, "0 new tokens"), (5, -1, "-1 new")])
def test_an_empty_request_is_refused(prompt, new, says):
    """A plan needs a prompt and something to generate."""
    with pytest.raises(UsageError, match=says):
        Request(prompt, new)
