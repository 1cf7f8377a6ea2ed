"""Likelihoods, divergence and agreement from logits: pure, in parts that keep memory small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eopc_runtime.logprobs import log_norm
from eopc_runtime.runners.base import Logits

ROWS = 64  # of logits at a time where a copy of them is needed


def token_nll(logits: Logits, targets: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return -log p of targets [n] under logits [n, vocab], in nats."""
    chosen = logits[np.arange(len(targets)), np.asarray(targets)]
    found: npt.NDArray[np.float64] = log_norm(logits) - chosen
    return found


def divergence(reference: Logits, logits: Logits) -> float:
    """Return the summed KL(reference || logits) in nats over the rows of two [n, vocab]."""
    total = 0.0
    for start in range(0, len(logits), ROWS):
        p, q = reference[start : start + ROWS], logits[start : start + ROWS]
        p_log = p - log_norm(p)[:, None]  # float64
        q_log = q - log_norm(q)[:, None]
        total += float((np.exp(p_log) * (p_log - q_log)).sum())
    return total


def agreement(reference: Logits, logits: Logits) -> int:
    """Return for how many rows both have the same most likely token."""
    return int((reference.argmax(axis=1) == logits.argmax(axis=1)).sum())
