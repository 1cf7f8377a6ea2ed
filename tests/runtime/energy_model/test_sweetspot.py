"""The sweet spot and the token cap: exact, finite, clipped to what was measured, and said in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.sweetspot import (
    advice,
    grid,
    j_per_token,
    optimum,
    round_lengths,
    sweet_spot,
    token_cap,
)

maybe = st.sampled_from([0.0, 1e-12, 1e-7, 1e-4, 1e-2])
thetas = st.builds(
    Theta, st.floats(-20, 20), st.floats(0, 0.1), maybe, st.floats(1e-6, 10), maybe, maybe | st.floats(0, 1e-3)
)
lengths = st.integers(1, 8192)


@settings(deadline=None)  # a busy machine is no failure
@given(thetas, lengths, st.floats(1e-6, 1e7), st.integers(1, 100_000))
def test_the_token_cap_fits_and_one_more_does_not(theta: Theta, n: int, budget_j: float, limit: int) -> None:
    """E(m) <= B < E(m + 1), also for θ5 = 0 and for B below the fixed cost, where the cap is 0."""
    charged = theta.charged()
    cap = token_cap(theta, n, budget_j, limit)
    assert 0 <= cap <= limit
    if cap > 0:
        assert charged.energy_j(float(n), float(cap)) <= budget_j
    if cap < limit:
        assert charged.energy_j(float(n), cap + 1.0) > budget_j
    if budget_j < charged.energy_j(float(n), 0.0):
        assert cap == 0


@settings(deadline=None)  # a busy machine is no failure
@given(thetas, lengths, lengths)
def test_the_cap_inverts_the_energy(theta: Theta, n: int, m: int) -> None:
    """The budget of m tokens buys m tokens (or more where a token is free of cost in floating point)."""
    budget_j = theta.charged().energy_j(float(n), float(m))
    assert token_cap(theta, n, budget_j, m) == m


def test_a_negative_constant_buys_nothing() -> None:
    """With θ0 = -10 a budget of 5 J buys ten tokens of 0.5 J, not thirty."""
    assert token_cap(Theta(-10.0, 0.0, 0.0, 0.5, 0.0, 0.0), 100, 5.0, 1000) == 10


@settings(deadline=None)  # a busy machine is no failure
@given(thetas, lengths)
def test_no_length_is_cheaper_per_token_than_the_sweet_spot(theta: Theta, n: int) -> None:
    """Among all lengths that were measured, the best one named is the cheapest (1e-12: ties in floating point)."""
    low, high = 16, 600
    spot = sweet_spot(theta, n, (low, high))
    least = min(j_per_token(theta, n, m) for m in range(low, high + 1))
    assert spot.j_per_token == j_per_token(theta, n, spot.best_n_out) <= least * (1 + 1e-12)
    assert low <= spot.low <= spot.best_n_out <= spot.high <= high
    assert (spot.n_out_star is None) == bool(spot.reason) == spot.clipped


@settings(deadline=None)  # a busy machine is no failure
@given(thetas, lengths)
def test_the_range_named_is_within_a_percent_and_no_wider_one_is(theta: Theta, n: int) -> None:
    """Both ends cost at most 1 % more per token than the best; a token further out costs more, unless it is an edge."""
    low, high = 16, 600
    spot = sweet_spot(theta, n, (low, high))
    limit = spot.j_per_token * 1.01
    for m in (spot.low, spot.high):
        assert j_per_token(theta, n, m) <= limit * (1 + 1e-12)
    for m, edge in ((spot.low - 1, low), (spot.high + 1, high)):
        if low <= m <= high and edge not in (spot.low, spot.high):
            assert j_per_token(theta, n, m) > limit * (1 - 1e-12)


@pytest.mark.parametrize(
    ("theta", "reason", "best"),
    [
        (Theta(5.0, 0.01, 0.0, 0.5, 1e-5, 0.0), "longer answer is always cheaper", 512),
        (Theta(-5.0, 0.0, 0.0, 0.5, 1e-5, 1e-5), "no fixed cost to share", 32),
        (Theta(500.0, 0.0, 0.0, 0.5, 0.0, 1e-5), "outside the measured 32 to 512", 512),
        (Theta(1e-3, 0.0, 0.0, 0.5, 0.0, 1e-3), "outside the measured 32 to 512", 32),
    ],
)
def test_without_a_lowest_point_there_is_null_and_a_reason(theta: Theta, reason: str, best: int) -> None:
    """θ5 = 0, no fixed cost, or an optimum beyond what was measured: null, why, and the cheapest edge, marked."""
    spot = sweet_spot(theta, 128, (32, 512))
    assert spot.n_out_star is None
    assert reason in spot.reason
    assert (spot.best_n_out, spot.clipped) == (best, True)


def test_the_raw_negative_constant_does_not_pull_the_optimum_to_zero() -> None:
    """With θ0 = -10.5 the optimum is that of θ0 = 0: the prompt's cost alone is shared."""
    measured = Theta(-10.5, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-6)
    found, _ = optimum(measured, 512)
    assert found == pytest.approx(((0.00257 * 512 + 8.9e-7 * 512**2) / 5.96e-6) ** 0.5)
    assert found == optimum(measured.charged(), 512)[0]


def test_the_advice_reads_as_a_sentence() -> None:
    """Prompt length, range, and whether the range simply ends there."""
    theta = Theta(0.0, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-5)
    spot = sweet_spot(theta, 512, (32, 2048))
    assert spot.n_out_star == 161
    assert advice(spot) == f"at n_in 512, answers of {spot.low}-{spot.high} tokens cost least per token"
    longer = sweet_spot(Theta(5.0, 0.01, 0.0, 0.5, 1e-5, 0.0), 512, (32, 512))
    assert advice(longer).endswith("(nothing longer was measured)")
    shorter = sweet_spot(Theta(-5.0, 0.0, 0.0, 0.5, 0.0, 1e-3), 512, (32, 512))
    assert advice(shorter).endswith("(nothing shorter was measured)")
    assert "answers of 7 tokens" in advice(sweet_spot(theta, 512, (7, 7)))


def test_the_grid_has_every_pair() -> None:
    """J per token of each prompt and answer length, charged energy over tokens."""
    theta = Theta(2.0, 0.0, 0.0, 0.5, 0.0, 0.0)
    records = grid(theta, (16, 32), (4, 8))
    assert [(r["n_in"], r["n_out"]) for r in records] == [(16, 4), (16, 8), (32, 4), (32, 8)]
    assert records[0]["j_per_token"] == 1.0


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 5000), st.integers(0, 200_000), st.integers(3, 9))
def test_lengths_shown_are_few_rising_and_keep_both_ends(low: int, more: int, most: int) -> None:
    """Ends and powers of two, at most one more than asked for."""
    lengths = round_lengths(low, low + more, most)
    assert lengths[0] == low
    assert lengths[-1] == low + more
    assert list(lengths) == sorted(set(lengths))
    assert len(lengths) <= most + 1
