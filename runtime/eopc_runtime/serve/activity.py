"""What the live page shows: watts of late, the last requests, totals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_WINDOW_S = 5.0  # watts are the joules booked in so many seconds
_KEPT = 20  # requests


@dataclass(frozen=True, slots=True)
class Done:
    """A request that has ended."""

    time_s: float  # since 1970 (UTC)
    plan: str
    prompt_tokens: int
    completion_tokens: int
    energy_j: float
    budget_j: float | None
    ended_by: str


class Activity:
    """Kept by the event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._booked: deque[tuple[float, float]] = deque()
        self._done: deque[Done] = deque(maxlen=_KEPT)
        self._energy_j = 0.0
        self._tokens = 0
        self.tier: str | None = None  # that computed the last token

    def book(self, joules: float) -> None:
        """Note joules that were booked now."""
        self._booked.append((self._clock(), joules))
        self._energy_j += joules
        self._forget()

    def end(self, done: Done) -> None:
        """Note a request that has ended."""
        self._done.appendleft(done)
        self._tokens += done.completion_tokens

    def watts(self) -> float:
        """Mean power of what was booked of late."""
        self._forget()
        return sum(joules for _, joules in self._booked) / _WINDOW_S

    def to_json(self) -> dict[str, Any]:
        """Return everything for the page."""
        return {
            "watts": self.watts(),
            "tier": self.tier,
            "energy_j": self._energy_j,
            "tokens": self._tokens,
            "requests": [asdict(done) for done in self._done],
        }

    def _forget(self) -> None:
        oldest = self._clock() - _WINDOW_S
        while self._booked and self._booked[0][0] < oldest:
            self._booked.popleft()
