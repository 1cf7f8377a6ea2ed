"""Stop strings that may begin and end anywhere, also in the middle of a token."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.errors import UsageError


class StopScanner:
    """Passes text on as it arrives, and never lets out any part of a stop string.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first wins
    (of several ending at the same place the longest), and the text ends where that stop string begins.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = check_stops(stops)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """True once a stop string was seen; later text is dropped."""
        return self._stopped

    def push(self, text: str) -> str:
        """Take new text and return what may be shown now."""
        if self._stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = _first_complete(self._held, self._stops)
        if found is not None:
            shown, self._held, self._stopped = self._held[:found], "", True
            return shown
        cut = len(self._held) - _possible_start(self._held, self._stops)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return text that was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings without duplicates; raises UsageError for an empty one or for a bare string."""
    if isinstance(stops, str):
        raise UsageError(f"stop is the string {stops!r}; expected a list of strings, for example [{stops!r}].")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stop string {stop!r} is not a text of at least one character.")
    return tuple(dict.fromkeys(stops))


def _first_complete(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop string that ends first begins, or None."""
    best: tuple[int, int] | None = None
    for stop in stops:
        start = text.find(stop)
        if start >= 0 and (best is None or (start + len(stop), start) < best):
            best = (start + len(stop), start)
    return None if best is None else best[1]


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(len(stop) for stop in stops) - 1)
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(stop.startswith(end) for stop in stops):
            return size
    return 0
