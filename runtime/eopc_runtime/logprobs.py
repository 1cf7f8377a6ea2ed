"""Log-probabilities of tokens, from a model's logits as they are: before temperature and every filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import UsageError
from eopc_runtime.runners.base import Logits


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log-probability in nats, and the most likely tokens in its place with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def check_logprobs(count: int | None, vocab: int) -> int | None:
    """Return how many most likely tokens are wanted; UsageError when that is no number from 0 to the vocabulary."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= vocab):
        raise UsageError(f"logprobs is {count!r}; it must be a whole number from 0 to {vocab}.")
    return count


def token_logprobs(logits: Logits, token: int, top: int) -> TokenLogprobs:
    """Return the log-probability of one token under logits [vocab], and the `top` most likely tokens."""
    return rows_logprobs(logits[None], [token], top)[0]


def rows_logprobs(logits: Logits, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return the same for tokens [n] under logits [n, vocab]."""
    norm = log_norm(logits)
    return [
        TokenLogprobs(token, float(row[token] - scale), tuple((i, float(row[i] - scale)) for i in _highest(row, top)))
        for row, token, scale in zip(logits, tokens, norm, strict=True)
    ]


def log_norm(logits: Logits) -> npt.NDArray[np.float64]:
    """Return log sum exp of every row of [n, vocab]."""
    best = logits.max(axis=1, keepdims=True)
    # fp32 exp, float64 sum: the error stays below 1e-6 nats without a float64 copy of the logits
    found: npt.NDArray[np.float64] = np.log(np.exp(logits - best).sum(axis=1, dtype=np.float64)) + best[:, 0]
    return found


def _highest(row: Logits, count: int) -> list[int]:
    """Indexes of the highest values, highest first; of equal ones the lowest index."""
    if count == 0:
        return []
    if count == 1:
        return [int(row.argmax())]
    least = np.partition(row, row.size - count)[row.size - count]
    candidates = np.flatnonzero(row >= least)
    return [int(i) for i in candidates[np.argsort(-row[candidates], kind="stable")][:count]]
