"""Likelihood, divergence, intervals: against their formulas in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eopc_runtime.evaluation.choices import Share, pick
from eopc_runtime.evaluation.likelihood import ROWS, agreement, divergence, token_nll

RNG = np.random.default_rng(3)
P, Q = (RNG.normal(0, 4, (ROWS + 9, 50)).astype(np.float32) for _ in range(2))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """By the formula, in float64."""
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_token_likelihoods_are_those_of_a_softmax() -> None:
    """Also for logits whose exponentials overflow."""
    targets = RNG.integers(0, 50, len(P))
    want = -log_softmax(P)[np.arange(len(P)), targets]
    np.testing.assert_allclose(token_nll(P, targets), want, rtol=1e-6)
    np.testing.assert_allclose(token_nll(P + np.float32(1000), targets), want, atol=2e-3)  # fp32 steps near 1000


def test_divergence_is_kullback_leibler_from_the_reference() -> None:
    """Summed over rows, not symmetric, zero of a model with itself, blind to a constant."""
    p, q = log_softmax(P), log_softmax(Q)
    assert divergence(P, Q) == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-6)
    assert divergence(Q, P) != pytest.approx(divergence(P, Q), rel=1e-3)
    assert divergence(P, P) == pytest.approx(0.0, abs=1e-9)
    assert divergence(P, P + np.float32(2)) == pytest.approx(0.0, abs=1e-4)


def test_agreement_counts_rows_with_the_same_most_likely_token() -> None:
    """Two of three."""
    one = np.eye(3, dtype=np.float32)
    assert agreement(one, one[[0, 1, 1]]) == 2


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_intervals_are_wilsons(right: int, n: int, low: float, high: float) -> None:
    """Values of Newcombe (1998) and of the closed form at the ends, to four digits."""
    share = Share.of(right, n)
    assert (share.value, share.low, share.high) == (
        right / n, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5)
    )  # fmt: skip


def test_the_normalised_choice_is_per_character() -> None:
    """A long choice may lose in all and win per character; of equals the first is taken."""
    assert pick([-6.0, -9.0], [3, 9]) == (0, 1)
    assert pick([-4.0, -4.0], [2, 2]) == (0, 0)
    assert math.isclose(Share.of(1, 2).value, 0.5)
