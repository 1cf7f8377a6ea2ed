"""Choosing the next token from logits: validated parameters and one pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopc_runtime.errors import ModelError, UsageError

FloatArray = NDArray[np.floating[Any]]

# With top_p candidates are sorted; those above this share of the likeliest nearly always hold the mass: sort these.
_TAIL = 1e-5
_BLOCK = 256  # sums of blocks are many times faster than a running sum over the vocabulary


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; the default (temperature 0) is greedy and needs no random numbers."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(
            _is_number(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 or more",
        )
        if self.top_k is not None:
            _check(_is_int(self.top_k) and self.top_k >= 1, "top_k", self.top_k, "a whole number of 1 or more")
        if self.top_p is not None:
            _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        if self.min_p is not None:
            _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        _check(_is_number(penalty) and penalty > 0, "repetition_penalty", penalty, "above 0 (1 changes nothing)")
        if self.seed is not None:
            _check(_is_int(self.seed) and self.seed >= 0, "seed", self.seed, "a whole number of 0 or more")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    def rng(self) -> np.random.Generator:
        """Return the random generator of one sequence: the same for equal seeds, fresh without one."""
        return np.random.default_rng(self.seed)


def sample(logits: FloatArray, history: Sequence[int], params: SamplingParams, rng: np.random.Generator) -> int:
    """Return the next token id for `logits` [vocab], given all tokens of the sequence so far.

    The order is that of transformers: repetition penalty, temperature, top_k, top_p, min_p. `logits` is not
    changed. Raises ModelError when the logits hold NaN or have no finite maximum.
    """
    if params.repetition_penalty != 1.0 and len(history) > 0:
        logits = _penalise(logits, history, params.repetition_penalty)
    best = int(np.argmax(logits))  # argmax returns the first NaN when there is one, so one look is enough
    if not math.isfinite(float(logits[best])):
        raise ModelError(
            f"the model returned logits that are not finite ({float(logits[best])}); "
            "the bundle may overflow in its compute type. Rebuild it with --precision fp32 to check."
        )
    if params.greedy:
        return best
    ids, weights = _candidates(logits, float(logits[best]), params)
    drawn = _draw(weights, rng)
    return drawn if ids is None else int(ids[drawn])


def _penalise(logits: FloatArray, history: Sequence[int], penalty: float) -> FloatArray:
    """Return a copy in which every token seen so far is less likely (divide above zero, multiply below)."""
    seen = np.unique(np.asarray(history, dtype=np.int64))
    changed: FloatArray = logits.copy()
    values = changed[seen]
    changed[seen] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def _candidates(logits: FloatArray, top: float, params: SamplingParams) -> tuple[NDArray[np.int64] | None, FloatArray]:
    """Return the token ids still allowed (None: all) and their unnormalised probabilities, 1 for the likeliest."""
    ids: NDArray[np.int64] | None = None
    if params.top_k is not None and params.top_k < logits.shape[0]:
        ids = np.argpartition(logits, -params.top_k)[-params.top_k :]
        logits = logits[ids]
    # the maximum taken out first: exp can then neither overflow nor lose the head
    weights: FloatArray = np.exp((logits - logits.dtype.type(top)) / logits.dtype.type(params.temperature))
    if params.top_p is not None and params.top_p < 1.0:
        ids, weights = _keep(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= params.min_p * weights.max()))
    return ids, weights


def _keep(
    ids: NDArray[np.int64] | None, weights: FloatArray, kept: NDArray[np.int64]
) -> tuple[NDArray[np.int64], FloatArray]:
    return kept if ids is None else ids[kept], weights[kept]


def _nucleus(weights: FloatArray, top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of most likely tokens whose share of the mass reaches `top_p` (at least one)."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    head = np.flatnonzero(weights >= _TAIL)
    if float(weights[head].sum(dtype=np.float64)) < goal:
        head = np.arange(weights.size)
    order = head[np.argsort(-weights[head], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), goal)) + 1
    return order[:count]


def _draw(weights: FloatArray, rng: np.random.Generator) -> int:
    """Return an index with a probability proportional to its weight: first its block, then its place in it."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64))
    drawn = rng.random() * blocks[-1]
    block = min(int(np.searchsorted(blocks, drawn, side="right")), blocks.size - 1)
    part = weights[block * _BLOCK : (block + 1) * _BLOCK]
    left = drawn - (blocks[block - 1] if block else 0.0)
    place = int(np.searchsorted(np.cumsum(part, dtype=np.float64), left, side="right"))
    if place == part.size:  # rounding may put the draw on the last edge
        place = int(np.flatnonzero(part)[-1])
    return block * _BLOCK + place


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name} is {value!r}; it must be {expected}.")
