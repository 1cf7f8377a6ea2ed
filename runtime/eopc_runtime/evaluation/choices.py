"""Multiple choice by likelihood: the choice that the model finds most likely behind the context.

`acc` compares the summed log-likelihoods of the choices, `acc_norm` these per character of the choice, both as
lm-evaluation-harness does. The context runs as a prompt, so a tier that treats prompts in its own way does so here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eopc_runtime.errors import UsageError
from eopc_runtime.evaluation.likelihood import token_nll
from eopc_runtime.evaluation.tasks import Question
from eopc_runtime.runners.base import TierRunner
from eopc_runtime.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]  # ids of a context, and of what goes on behind it
Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True, slots=True)
class Share:
    """How many of n were right, with the bounds of the 95 % interval (Wilson's score interval)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, n: int) -> Share:
        """The share of `right` among n > 0."""
        p, z2 = right / n, Z95 * Z95
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return cls(p, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A tier on a task."""

    questions: int
    acc: Share
    acc_norm: Share


def score_task(
    runner: TierRunner,
    questions: Sequence[Question],
    encode: Callable[[str, str], Pair],
    context: int,
    show: Callable[[int], None] = lambda done: None,
) -> TaskScore:
    """Answer all questions on a tier.

    Args:
        encode: ids of a context and a continuation, see `encode_pair`.
        context: most tokens that the tier takes.
        show: told how many questions are done.
    """
    right = right_norm = 0
    for done, question in enumerate(questions):
        show(done)
        lls = [log_likelihood(runner, *encode(question.context, f" {c}"), context) for c in question.choices]
        plain, normalised = pick(lls, [len(choice) for choice in question.choices])
        right += plain == question.gold
        right_norm += normalised == question.gold
    n = len(questions)
    return TaskScore(n, Share.of(right, n), Share.of(right_norm, n))


def pick(lls: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """Return the most likely choice, and the most likely per character; of equals the first."""
    per_character = [ll / length for ll, length in zip(lls, lengths, strict=True)]
    return lls.index(max(lls)), per_character.index(max(per_character))


def log_likelihood(runner: TierRunner, context: Sequence[int], continuation: Sequence[int], limit: int) -> float:
    """Return log p(continuation | context) in nats; too long a context loses its beginning."""
    if not continuation:
        raise UsageError("a choice adds no token behind its question, so it has no likelihood. Mend its text.")
    kept = [*context, *continuation][-(limit + 1) :]
    if len(kept) <= len(continuation):
        raise UsageError(
            f"a choice of {len(continuation)} tokens leaves no room for its question in this bundle's context of "
            f"{limit}. Build with a larger --context."
        )
    cache = runner.new_cache()
    first = runner.prefill(cache, kept[: -len(continuation)])
    total = float(token_nll(first, continuation[:1]).sum())
    if rest := continuation[1:]:
        total += float(token_nll(runner.forward(cache, continuation[:-1], logits="all"), rest).sum())
    return -total


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the ids of both, cut where the ids of the context alone end; spaces at its end go to the continuation.

    Texts are tokenised together, as a word may begin with the space before it.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    head = tokenizer.encode(stripped)
    return head, whole[len(head) :]
