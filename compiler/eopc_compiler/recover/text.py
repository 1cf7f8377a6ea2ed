"""Training text: token windows of the calibration split by domain, and the order in which they are seen."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eopc_compiler.calibration import Domain, Tokenizer, build_calibration
from eopc_runtime.errors import UsageError

RECOVERY_TOKENS = 1 << 20  # of all domains together, at most: more than is seen in the minutes recovery is given


@dataclass(frozen=True)
class TrainingText:
    """Token windows by domain, and the share of the draws that goes to each domain."""

    domains: tuple[tuple[str, Tensor], ...]  # (name, int64 [n, S])
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """UsageError where weights and domains do not go together."""
        if len(self.weights) != len(self.domains) or min(self.weights, default=0) <= 0:
            names = ", ".join(name for name, _ in self.domains)
            raise UsageError(f"training text needs one weight above 0 for each of {names}; found {self.weights}.")

    @property
    def tokens(self) -> Tensor:
        """All windows below each other, [N, S]; rows are what `Draws` counts."""
        return torch.cat([windows for _, windows in self.domains])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, weights and token ids."""
        digest = hashlib.sha256(repr(self.weights).encode())
        for name, windows in self.domains:
            digest.update(f"{name}\0{tuple(windows.shape)}\0".encode() + windows.contiguous().numpy().tobytes())
        return digest.hexdigest()


def training_windows(
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    max_tokens: int,
    seq_len: int = 256,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> TrainingText:
    """Up to `max_tokens` of the *calibration* split, so that selection and held-out text is never trained on.

    A domain with less text than its share gives all it has; its windows come again the sooner.

    Args:
        weights: share of the draws per domain; equal where left out.

    Raises:
        UsageError: a domain has not even one window.
    """
    shares = tuple(weights) if weights is not None else (1.0,) * len(domains)
    count = max(1, max_tokens // (seq_len * len(domains)))
    built = build_calibration(tokenizer, domains, count, seq_len, seed, "calibration", allow_fewer=True)
    return TrainingText(built.domains, shares)


class Draws:
    """Which windows every step sees: a function of the seed and the step, so that a resumed run sees the same.

    Domains take turns by weight; within a domain all windows come once, shuffled, before any comes again.
    """

    def __init__(self, text: TrainingText, seed: int) -> None:
        self._sizes = [len(windows) for _, windows in text.domains]
        self._weights = [weight / sum(text.weights) for weight in text.weights]
        self._seed = seed
        self._rows: list[int] = []
        self._drawn = [0] * len(self._sizes)
        self._shuffled: dict[int, tuple[int, list[int]]] = {}  # domain: (epoch, order)

    def rows(self, step: int, count: int) -> list[int]:
        """The rows of `TrainingText.tokens` for one step of `count` windows."""
        while len(self._rows) < (step + 1) * count:
            self._rows.append(self._next())
        return self._rows[step * count : (step + 1) * count]

    def _next(self) -> int:
        total = len(self._rows) + 1
        owed = [weight * total - drawn for weight, drawn in zip(self._weights, self._drawn, strict=True)]
        domain = owed.index(max(owed))
        epoch, position = divmod(self._drawn[domain], self._sizes[domain])
        self._drawn[domain] += 1
        if self._shuffled.get(domain, (-1, []))[0] != epoch:
            order = list(range(self._sizes[domain]))
            random.Random(f"{self._seed}:{domain}:{epoch}").shuffle(order)
            self._shuffled[domain] = (epoch, order)
        return sum(self._sizes[:domain]) + self._shuffled[domain][1][position]
