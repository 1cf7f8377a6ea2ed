"""Token choice: greedy, the filters one by one, and the draw itself."""

from __future__ import annotations

import numpy as np
import pytest

from eopc_runtime.errors import ModelError, UsageError
from eopc_runtime.sampling import SamplingParams, sample

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))


def drawn(params: SamplingParams, logits: np.ndarray = LOGITS, count: int = 400) -> np.ndarray:
    """Shares of each token over `count` draws."""
    rng = np.random.default_rng(0)
    tokens = [sample(logits, [], params, rng) for _ in range(count)]
    return np.bincount(tokens, minlength=logits.size) / count


def test_greedy_takes_the_most_likely_token_and_no_random_number() -> None:
    """Temperature 0 is one argmax and leaves the generator untouched."""
    rng = np.random.default_rng(3)
    assert sample(LOGITS, [], SamplingParams(), rng) == 1
    assert rng.random() == np.random.default_rng(3).random()


def test_plain_sampling_follows_the_softmax() -> None:
    """At temperature 1 the shares are the probabilities."""
    # 4000 draws: the standard deviation of a share is at most 0.008, so 0.03 is almost four of them
    np.testing.assert_allclose(drawn(SamplingParams(temperature=1.0), count=4000), np.exp(LOGITS), atol=0.03)


def test_high_temperature_flattens() -> None:
    """A huge temperature makes every token about equally likely."""
    np.testing.assert_allclose(drawn(SamplingParams(temperature=1e6), count=4000), 0.25, atol=0.03)


def test_top_k_keeps_exactly_the_k_best() -> None:
    """Only the two best tokens are ever drawn with top_k 2, and both are."""
    shares = drawn(SamplingParams(temperature=1.0, top_k=2))
    assert shares[0] == shares[2] == 0
    assert shares[1] > 0
    assert shares[3] > 0


def test_top_k_above_the_vocabulary_changes_nothing() -> None:
    """A top_k larger than the vocabulary draws like no top_k."""
    wide = drawn(SamplingParams(temperature=1.0, top_k=100))
    np.testing.assert_array_equal(wide, drawn(SamplingParams(temperature=1.0)))


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.79, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: set[int]) -> None:
    """The nucleus holds the fewest tokens whose mass reaches top_p."""
    assert set(np.flatnonzero(drawn(SamplingParams(temperature=1.0, top_p=top_p)))) == kept


@pytest.mark.parametrize(("flat", "top_p"), [(False, 0.95), (True, 0.5)])
def test_top_p_on_a_large_vocabulary_equals_a_full_sort(flat: bool, top_p: float) -> None:
    """The shortcut over the head of the distribution never changes the nucleus, peaked or flat."""
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=5000) * (0.01 if flat else 3.0)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-p)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1].tolist())
    seen = set(np.flatnonzero(drawn(SamplingParams(temperature=1.0, top_p=top_p), logits, 300)).tolist())
    assert seen <= nucleus
    assert len(seen) > 10  # the draw is not stuck on the head


class Fixed:
    """Stands for a generator that gives one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("number", [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("size", [3, 256, 257, 5000])
def test_a_draw_inverts_the_cumulated_probabilities(size: int, number: float) -> None:
    """Found by blocks what a running sum over all tokens finds, and never a token that cannot be."""
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    logits[[0, -1]] = -np.inf
    token = sample(logits, [], SamplingParams(temperature=1.0), Fixed(number))  # type: ignore[arg-type]
    edges = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
    assert np.isfinite(logits[token])
    share = edges / edges[-1]
    assert (share[token - 1] if token else 0.0) - 1e-6 <= number <= share[token] + 1e-6  # weights are fp32


def test_min_p_drops_tokens_far_below_the_best() -> None:
    """min_p 0.5 keeps tokens with at least half the best probability."""
    assert set(np.flatnonzero(drawn(SamplingParams(temperature=1.0, min_p=0.5)))) == {1, 3}


def test_repetition_penalty_lowers_seen_tokens_on_both_sides_of_zero() -> None:
    """A seen token loses whether its logit is positive or negative, and the input array is not changed."""
    rng = np.random.default_rng(0)
    params = SamplingParams(repetition_penalty=2.0)
    positive, negative = np.array([3.0, 2.0], dtype=np.float32), np.array([-1.0, -1.5], dtype=np.float32)
    assert sample(positive, [0, 0], params, rng) == 1
    assert sample(negative, [0], params, rng) == 1
    assert sample(positive, [], params, rng) == 0
    np.testing.assert_array_equal(positive, [3.0, 2.0])


def test_equal_seeds_agree_and_fresh_generators_do_not() -> None:
    """The same seed repeats a sequence; without a seed two sequences differ."""
    logits = np.zeros(1000, dtype=np.float32)

    def run(params: SamplingParams) -> list[int]:
        rng = params.rng()
        return [sample(logits, [], params, rng) for _ in range(20)]

    seeded, free = SamplingParams(temperature=1.0, seed=7), SamplingParams(temperature=1.0)
    assert run(seeded) == run(seeded)
    assert run(free) != run(free)  # equal by chance once in 1000**20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float) -> None:
    """NaN anywhere raises instead of silently choosing a token."""
    broken = np.array([0.0, np.nan, 9.0], dtype=np.float32)
    with pytest.raises(ModelError, match="not finite"):
        sample(broken, [], SamplingParams(temperature=temperature), np.random.default_rng(0))


def test_tiny_temperature_does_not_overflow() -> None:
    """A temperature close to zero picks the best token without warnings."""
    logits = np.array([1000.0, 900.0, -1e4], dtype=np.float32)
    assert sample(logits, [], SamplingParams(temperature=1e-4), np.random.default_rng(0)) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"temperature": True},
    ],
)
def test_parameters_out_of_range_name_themselves(bad: dict[str, float]) -> None:
    """Every bad value raises an error that names the parameter."""
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
