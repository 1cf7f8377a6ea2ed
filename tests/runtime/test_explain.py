"""What a session says it would run is what it runs, with every plan's price."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.errors import BudgetError, UsageError

from .test_session import session


@settings(max_examples=100, deadline=None)
@given(
    budget=st.one_of(st.none(), st.floats(0.5, 80.0)),
    prompt=st.integers(1, 30),
    wanted=st.integers(1, 40),
    tier=st.sampled_from([None, "t0", "t2"]),
    margin=st.sampled_from([0.0, 0.2]),
)
def test_the_plan_explained_is_the_plan_run(
    budget: float | None, prompt: int, wanted: int, tier: str | None, margin: float
) -> None:
    """Same plan, same joules where nothing ends it early, and the same refusal."""
    box = session(margin=margin)
    told = box.explain("x" * prompt, budget, max_new_tokens=wanted, tier=tier)
    try:
        result = box.generate("x" * prompt, budget=budget, max_new_tokens=wanted, tier=tier)
    except BudgetError as error:
        assert (told.plan, told.energy_j, told.tokens) == (None, None, None)
        assert told.why == str(error)
        return
    assert told.plan == result.plan
    assert told.warnings == result.warnings
    chosen = next(option for option in told.options if option.plan == told.plan)
    assert chosen.tokens == told.tokens
    if budget is None:
        assert told.energy_j == pytest.approx(result.energy_j)
    elif tier is None:
        better = told.options[: told.options.index(chosen)]
        assert not any(option.fits for option in better)
        assert all(option.tokens <= chosen.tokens for option in told.options)


def test_every_plan_is_listed_with_its_price_and_what_the_budget_buys() -> None:
    """8 prompt and 6 new tokens under 10.5 J, as `test_session` works them out by hand; nothing runs."""
    box = session()
    told = box.explain("12345678", "10.5J", max_new_tokens=6)
    box.pool.get = None  # type: ignore[assignment,method-assign]  # would fail if anything ran
    assert (told.plan, told.energy_j, told.tokens) == ("t0>t2", 9.0, 6)
    assert "t0>t2 is the best plan that 10.5 J pays for with all 6 new tokens" in told.why
    rows = [(option.plan, option.price_j, option.tokens, option.fits) for option in told.options]
    assert rows[:4] == [
        ("t0", 24.0, 1, False),
        ("t0>t1", 14.0, 3, False),
        ("t1", 12.0, 4, False),
        ("t0>t2", 9.0, 6, True),
    ]
    assert json.loads(json.dumps(told.to_json()))["options"][3]["quantum_j"] == 1.0


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 30), wanted=st.integers(1, 30), tier=st.sampled_from([None, "t1"]))
def test_the_budgets_it_names_do_what_they_say(prompt: int, wanted: int, tier: str | None) -> None:
    """`least_j` gets one token and a little less gets none; `whole_j` gets all of them on the best plan."""
    box = session(margin=0.1)
    told = box.explain("x" * prompt, max_new_tokens=wanted, tier=tier)
    assert box.generate("x" * prompt, budget=told.least_j, max_new_tokens=wanted, tier=tier).completion_tokens >= 1
    with pytest.raises(BudgetError):
        box.stream("x" * prompt, budget=told.least_j * (1 - 1e-6), max_new_tokens=wanted, tier=tier)
    whole = box.generate("x" * prompt, budget=told.whole_j, max_new_tokens=wanted, tier=tier)
    assert (whole.plan, whole.completion_tokens) == (tier or "t0", wanted)


def test_a_budget_that_pays_for_a_part_says_so() -> None:
    """The reason names the plan and how many tokens it affords."""
    told = session().explain("12345678", 4.5, max_new_tokens=30)
    assert told.plan == "t2"
    assert told.why == (
        f"4.5 J pays for all 30 new tokens on no plan; t2 is the best one of those that afford the most of them, "
        f"{told.tokens}."
    )


def test_what_is_no_request_is_refused() -> None:
    """A malformed argument is an error, not an explanation."""
    with pytest.raises(UsageError, match="max_new_tokens"):
        session().explain("x", 5.0, max_new_tokens=0)
    with pytest.raises(BudgetError, match="apples"):
        session().explain("x", "5 apples")
