"""A domain: named documents of one kind of text, its weight in the mixture, and its three disjoint splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from eopc_runtime.errors import UsageError

Split = Literal["calibration", "selection", "heldout"]

# The n-th document in hash order goes to entry n mod 5: three documents are enough to fill every split.
_DEAL: tuple[Split, ...] = ("calibration", "selection", "heldout", "calibration", "calibration")


@dataclass(frozen=True, slots=True)
class Domain:
    """Named documents of one kind of text, without repeats; `weight` is relative to that of other domains."""

    name: str
    documents: tuple[str, ...]
    weight: float = 1.0

    def split(self, split: Split) -> tuple[str, ...]:
        """The documents of one split, in hash order; the three splits share no document."""
        if split not in get_args(Split):
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(get_args(Split))}")
        ranked = sorted(set(self.documents), key=document_id)
        return tuple(text for i, text in enumerate(ranked) if _DEAL[i % len(_DEAL)] == split)


def document_id(text: str) -> str:
    """SHA-256 of a document, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def mixture_shares(domains: Sequence[Domain]) -> tuple[float, ...]:
    """Weights that sum to 1, the alpha of arXiv 2601.02674. Raises UsageError for weights that give no mixture."""
    for domain in domains:
        check_weight(domain.name, domain.weight)
    total = math.fsum(domain.weight for domain in domains)
    if not 0 < total < math.inf:
        raise UsageError("The weights of all calibration domains are 0. Give at least one of them a positive weight.")
    return tuple(domain.weight / total for domain in domains)


def check_weight(name: str, weight: float) -> None:
    """Raise UsageError unless the weight is a finite number that is not negative."""
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(
            f"The weight of calibration domain {name} is {weight:g}; expected 0 or a positive number. "
            "Weights are relative: NAME=FILE@2 counts twice as much as a domain without a weight."
        )
