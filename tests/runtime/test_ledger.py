"""The ledger: what is booked never exceeds the budget, and the next action spends it well."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BudgetError
from eopc_runtime.ledger import Ledger, affordable_steps, next_action
from eopc_runtime.policy import Request, pick_tier

price = st.floats(min_value=1e-6, max_value=5)


def table(*tiers, margin=0.0):
    """An energy table from (prefill_j1, step_j0, step_j1) triples."""
    return EnergyTable(
        device="orin",
        source="prior",
        margin=margin,
        tiers=tuple(TierEnergy(f"t{i}", 0.0, p, 0.0, s0, s1, s1, "prior") for i, (p, s0, s1) in enumerate(tiers)),
    )


tables = st.builds(
    lambda tiers, margin: table(*tiers, margin=margin),
    st.lists(st.tuples(price, price, price), min_size=1, max_size=4),
    st.floats(min_value=0, max_value=0.5),
)

LADDER = table((1.0, 10.0, 0.0), (0.4, 5.0, 0.0), (0.2, 2.0, 0.0))


def run(ladder, budget_j, prompt_tokens, max_new_tokens):
    """Play a whole sequence as a session does; returns the ledger, the plan, new tokens and tiers used."""
    plan = pick_tier(ladder, budget_j, Request(prompt_tokens, max_new_tokens))
    ledger = Ledger(budget_j)
    assert ledger.debit("prefill", ladder.prefill_price_j(plan.prefill, prompt_tokens), f"t{plan.prefill}")
    tier, n, made, tiers = plan.decode, prompt_tokens, 1, [plan.decode]
    while (action := next_action(ladder, ledger.remaining_j, tier, n, made - 1, max_new_tokens - made)) != "stop":
        if action == "downshift":
            tier += 1
            tiers.append(tier)
            continue
        assert ledger.debit("decode", ladder.step_price_j(tier, n, made), f"t{tier}")
        made += 1
    return ledger, plan, made, tiers


def test_a_debit_within_the_budget_is_booked():
    """Joules are kept by phase and by tier."""
    ledger = Ledger(10.0)
    assert ledger.debit("prefill", 1.5, "t0")
    assert ledger.debit("decode", 2.0, "t0")
    assert ledger.debit("decode", 1.0, "t1")
    assert ledger.debit("decode", 0.5, "t1")
    assert (ledger.spent_j, ledger.remaining_j) == (5.0, 5.0)
    assert ledger.by_phase == {"prefill": 1.5, "decode": 3.5}
    assert ledger.by_tier == {"t0": 3.5, "t1": 1.5}
    assert [(e.phase, e.tier, e.joules, e.debits) for e in ledger.entries] == [
        ("prefill", "t0", 1.5, 1),
        ("decode", "t0", 2.0, 1),
        ("decode", "t1", 1.5, 2),
    ]


def test_a_debit_above_the_budget_books_nothing():
    """The refusal leaves the account as it was; a smaller debit still goes."""
    ledger = Ledger(2.0)
    assert not ledger.debit("prefill", 2.5, "t0")
    assert (ledger.spent_j, ledger.entries, ledger.by_phase) == (0.0, (), {})
    assert ledger.debit("prefill", 2.0, "t0")
    assert not ledger.debit("decode", 1e-9, "t0")


def test_without_a_budget_everything_is_booked():
    """The sum is still known."""
    ledger = Ledger(None)
    assert ledger.debit("prefill", 1e6)
    assert (ledger.spent_j, ledger.remaining_j) == (1e6, math.inf)


@pytest.mark.parametrize("joules", [-1.0, float("nan"), float("inf")])
def test_an_impossible_debit_is_an_error_of_ours(joules):
    """No one gets energy back, and the account stays a number."""
    with pytest.raises(ValueError, match="finite amount"):
        Ledger(5.0).debit("decode", joules)


@pytest.mark.parametrize("budget_j", [0.0, -3.0, float("nan")])
def test_a_ledger_needs_a_positive_budget(budget_j):
    """Zero is not the same as no budget."""
    with pytest.raises(ValueError, match="positive budget"):
        Ledger(budget_j)


@given(st.floats(1e-3, 1e3), st.lists(st.floats(0, 100), max_size=200))
def test_debits_never_exceed_the_budget(budget_j, debits):
    """Whatever is asked for, the booked sum stays within the budget."""
    ledger = Ledger(budget_j)
    booked = [joules for joules in debits if ledger.debit("decode", joules, "t0")]
    assert ledger.spent_j <= budget_j
    assert math.fsum(booked) <= budget_j * (1 + 1e-12)  # 200 additions round by 1e-16 each
    assert ledger.remaining_j >= 0


@pytest.mark.parametrize(
    ("budget_j", "tier", "remaining", "action"),
    [
        (100.0, 0, 10, "step"),  # ten steps of 10 J
        (56.0, 0, 10, "step"),  # one of 10 J, then nine of 5 J fit
        (54.0, 0, 10, "downshift"),  # they do not: t1 affords ten, t0 five
        (27.0, 1, 10, "step"),  # on t1 one of 5 J, then nine of 2 J
        (19.0, 1, 10, "downshift"),  # t2 affords nine, t1 three
        (19.0, 2, 10, "step"),  # no lower tier: spend what is left
        (1.0, 0, 10, "stop"),
        (1.0, 2, 1, "stop"),
        (9.0, 0, 1, "downshift"),
        (100.0, 0, 0, "stop"),
    ],
)
def test_the_next_action_follows_the_ledger(budget_j, tier, remaining, action):
    """Step while the rest can be finished one tier down, go down when that affords more, stop when nothing fits."""
    assert next_action(LADDER, budget_j, tier, n=10, done=0, remaining=remaining) == action


@pytest.mark.parametrize("left_j", range(14, 61))
def test_a_rest_is_spent_on_the_two_tiers_around_its_lambda(left_j):
    """Six steps from t0 lose no more than the best schedule that goes down, but for what does not divide."""
    losses, prices, steps = (0.0, 0.1, 0.4), (10, 5, 2), 6  # nats and joules a step; 0.02, then 0.1 nats per joule
    schedules = [(a, b, steps - a - b) for a in range(steps + 1) for b in range(steps + 1 - a)]
    paid_for = [s for s in schedules if sum(k * p for k, p in zip(s, prices, strict=True)) <= left_j]
    best = min(sum(k * x for k, x in zip(s, losses, strict=True)) for s in paid_for)
    tier, lost, rest = 0, 0.0, left_j + 0.01  # beside the room for rounding
    for done in range(steps):
        while (action := next_action(LADDER, rest, tier, 10, done, steps - done)) == "downshift":
            tier += 1
        assert action == "step"
        rest -= prices[tier]
        lost += losses[tier]
    assert rest >= 0
    assert lost - best <= 0.1 + 1e-9  # one step: a t1 where the best has a t0


def test_without_a_budget_the_tier_is_kept():
    """There is nothing to save for."""
    assert next_action(LADDER, math.inf, 0, 10, 0, 10) == "step"
    assert next_action(LADDER, math.inf, 0, 10, 0, 0) == "stop"


def test_a_dear_tier_is_left_in_time_to_finish():
    """A plan that fits whole on its tiers never needs to go down."""
    ledger, plan, made, tiers = run(LADDER, 61.0, prompt_tokens=10, max_new_tokens=11)
    assert (plan.label, made, tiers) == ("t0>t1", 11, [1])
    assert ledger.by_tier == {"t0": 10.0, "t1": 50.0}


def test_a_lower_tier_that_is_dearer_is_not_taken():
    """Going down must pay."""
    ladder = table((0.1, 2.0, 0.0), (0.1, 3.0, 0.0))
    assert next_action(ladder, 4.5, 0, 10, 0, 5) == "step"


@given(tables, st.floats(min_value=1e-3, max_value=1e6), st.integers(1, 300), st.integers(1, 60))
def test_a_played_sequence_keeps_its_budget_and_its_plan(ladder, budget_j, prompt_tokens, max_new_tokens):
    """The sequence spends at most the budget and makes at least the tokens the plan promised."""
    try:
        ledger, plan, made, tiers = run(ladder, budget_j, prompt_tokens, max_new_tokens)
    except BudgetError:
        return
    assert ledger.spent_j <= budget_j
    assert plan.new_tokens <= made <= max_new_tokens
    assert tiers == sorted(tiers)


def test_a_budget_equal_to_the_named_price_plays_to_the_end():
    """Closed form and step-by-step sum round differently; the headroom of 1e-9 covers it over 2000 steps."""
    ladder = table((0.0123, 0.0731, 3.3e-6), margin=0.07)
    price_j = ladder.plan_price_j(0, 0, 333, 2000) * (1 + 2e-9)
    ledger, _, made, _ = run(ladder, price_j, 333, 2000)
    assert made == 2000
    assert ledger.spent_j == pytest.approx(price_j, rel=1e-8)


def test_a_meter_may_only_raise_the_account():
    """What was seen beyond the debits is booked as metered, also above the budget; less is not given back."""
    ledger = Ledger(10.0)
    ledger.debit("prefill", 4.0, "t0")
    ledger.raise_to(5.5, "t0")
    ledger.raise_to(3.0, "t0")
    assert ledger.spent_j == 5.5
    assert ledger.by_phase == {"prefill": 4.0, "metered": 1.5}
    ledger.raise_to(12.0, "t0")
    assert ledger.remaining_j == -2.0
    assert not ledger.debit("decode", 0.1, "t0")
    with pytest.raises(ValueError, match="finite"):
        ledger.raise_to(math.nan)


@given(tables, st.floats(0, 1e5), st.integers(1, 4000), st.integers(0, 500), st.integers(0, 3000))
def test_affordable_steps_are_paid_for_and_one_more_is_not(ladder, left_j, n, done, wanted):
    """The closed form agrees with the price itself: k steps fit, k + 1 do not, unless all wanted ones do."""
    for tier in range(len(ladder.tiers)):
        steps = affordable_steps(ladder, left_j, tier, n, done, wanted)
        assert 0 <= steps <= wanted
        assert ladder.steps_price_j(tier, n, done, steps) <= left_j
        if steps < wanted:
            assert ladder.steps_price_j(tier, n, done, steps + 1) > left_j


def test_nothing_left_affords_no_step():
    """Also when a meter saw an overspend."""
    assert affordable_steps(LADDER, 0.0, 0, 10, 0, 5) == 0
    assert affordable_steps(LADDER, -3.0, 2, 10, 0, 5) == 0
    assert affordable_steps(LADDER, -3.0, 2, 10, 0, 0) == 0
