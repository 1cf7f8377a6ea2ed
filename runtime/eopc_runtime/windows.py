"""Joules allowed over time, as pure decisions: which window counts, what is left in it, and what a request gets.

A window is a minute or an hour of UTC, or a day of local time. It is never left for an earlier one, so a clock that
is set back opens nothing. A clock that jumps ahead opens nothing either: the window moves along with what was spent
in it. What tells a jump from time that passed is a second clock, which runs steadily from the boot of the machine;
between two boots only the wall clock is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from eopc_runtime.errors import BudgetError
from eopc_runtime.jsonfields import did_you_mean
from eopc_runtime.units import format_energy, parse_energy

_SLEW = 1e-3  # by how much a disciplined clock may run faster than the steady one: 500 ppm, and the steady one's error
_SLACK_S = 0.05  # between the readings of the two clocks


@dataclass(frozen=True, slots=True)
class Moment:
    """What two clocks show: s since 1970 (UTC), and s since the boot that is named (empty: not known)."""

    wall_s: float
    steady_s: float = 0.0
    boot: str = ""


def _day_start_s(wall_s: float) -> float:
    return datetime.fromtimestamp(wall_s).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def _next_day_s(start_s: float) -> float:
    noon = datetime.fromtimestamp(start_s) + timedelta(hours=36)  # days have 23 to 25 hours
    return _day_start_s(noon.timestamp())


@dataclass(frozen=True, slots=True)
class _Period:
    """Where windows of a kind begin: the one that holds a time, and the one after a window."""

    start_s: Callable[[float], float]
    next_s: Callable[[float], float]


PERIODS: Mapping[str, _Period] = {
    "minute": _Period(lambda s: s // 60 * 60, lambda s: s + 60),
    "hour": _Period(lambda s: s // 3600 * 3600, lambda s: s + 3600),
    "day": _Period(_day_start_s, _next_day_s),
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """At most so many joules in every window of a period."""

    limit_j: float
    period: str  # a key of PERIODS

    def __post_init__(self) -> None:
        if self.period not in PERIODS:
            raise BudgetError(
                f'An allowance per "{self.period}" is not known; eopc knows {", ".join(PERIODS)}.'
                f"{did_you_mean(self.period, PERIODS)}"
            )
        if not (math.isfinite(self.limit_j) and self.limit_j > 0):
            raise BudgetError(f"The allowance is {self.limit_j} J per {self.period}. Give a positive energy.")

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """Read `2Wh/day` or `500J/minute`; BudgetError says what is wrong."""
        match = re.fullmatch(r"([^/]+)/\s*([A-Za-z]+)\s*", text)
        if match is None:
            raise BudgetError(
                f'"{text}" is no allowance. Write an energy per period, for example 2Wh/day or 500J/minute.'
            )
        return cls(parse_energy(match[1]), match[2].lower())

    def __str__(self) -> str:
        return f"{format_energy(self.limit_j)} per {self.period}"


def check_allowances(allowances: Sequence[Allowance]) -> tuple[Allowance, ...]:
    """Return them; BudgetError when a period has two."""
    periods = [allowance.period for allowance in allowances]
    for period in periods:
        if periods.count(period) > 1:
            raise BudgetError(f"There are two allowances per {period}. Give one for every period.")
    return tuple(allowances)


@dataclass(frozen=True, slots=True)
class Window:
    """The window that counts: where it began, what was spent in it, and how many were opened before it."""

    start_s: float
    spent_j: float = 0.0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Spending:
    """What was spent in the windows that count, by period; `anchor` is what later moments are compared with."""

    anchor: Moment
    windows: Mapping[str, Window] = field(default_factory=dict)

    def at(self, now: Moment, periods: Sequence[str]) -> Spending:
        """Return the spending with the windows that count at a moment, for these periods and those already known."""
        reached_s = _reached_s(self.anchor, now)
        windows = dict(self.windows)
        opened = False
        for period in dict.fromkeys((*self.windows, *periods)):
            start_of = PERIODS[period].start_s
            window = windows.get(period)
            if window is None:
                windows[period] = Window(start_of(now.wall_s))
            elif start_of(reached_s) > window.start_s:
                opened = True
                windows[period] = Window(start_of(now.wall_s), 0.0, window.number + 1)
            else:  # it goes on; after a jump ahead it is called by its new time, and has spent what it has
                windows[period] = replace(window, start_s=max(window.start_s, start_of(now.wall_s)))
        jumped = not _agrees(self.anchor, now)
        return Spending(now if opened or jumped else self.anchor, windows)

    def plus(self, joules: float, numbers: Mapping[str, int] | None = None) -> Spending:
        """Return the spending with joules added, to every window or only to those that are still of these numbers."""
        return replace(
            self,
            windows={
                period: replace(window, spent_j=max(window.spent_j + joules, 0.0))
                if numbers is None or numbers.get(period) == window.number
                else window
                for period, window in self.windows.items()
            },
        )

    def left_j(self, allowance: Allowance) -> float:
        """Joules left of an allowance, never below 0."""
        return max(allowance.limit_j - self.windows[allowance.period].spent_j, 0.0)

    def wait_s(self, allowance: Allowance, now: Moment) -> float:
        """Seconds until the next window of an allowance."""
        return max(PERIODS[allowance.period].next_s(self.windows[allowance.period].start_s) - now.wall_s, 0.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a request gets.

    action: admit (all it wanted), downshift (fewer joules, but enough to run) or defer (none now). grant_j: joules
    granted. wait_s: seconds until there are enough, where deferred. limited_by: the allowance that decides, if any.
    """

    action: str
    grant_j: float
    wait_s: float = 0.0
    limited_by: Allowance | None = None


def decide(
    spending: Spending, allowances: Sequence[Allowance], now: Moment, wanted_j: float, least_j: float
) -> Decision:
    """Decide a request for `wanted_j` that can run on `least_j` or more.

    Args:
        spending: with the windows that count now (`Spending.at`).

    Raises:
        BudgetError: a whole window of some allowance is less than the request needs, so waiting would not help.
    """
    for allowance in allowances:
        if least_j > allowance.limit_j:
            raise BudgetError(
                f"The request needs {format_energy(least_j, round_up=True)}, and the allowance is {allowance}. Shorten "
                "it, or raise the allowance."
            )
    if not allowances:
        return Decision("admit", wanted_j)
    left_j, tightest = min(((spending.left_j(a), a) for a in allowances), key=lambda pair: pair[0])
    if left_j >= wanted_j:
        return Decision("admit", wanted_j)
    if left_j >= least_j and left_j > 0:
        return Decision("downshift", left_j, limited_by=tightest)
    short = [a for a in allowances if spending.left_j(a) < least_j or spending.left_j(a) == 0]
    wait_s, last = max(((spending.wait_s(a, now), a) for a in short), key=lambda pair: pair[0])
    return Decision("defer", 0.0, wait_s, last)


def _expected_s(anchor: Moment, now: Moment) -> float | None:
    """What the wall clock should show by the steady one; None where the machine was started anew."""
    if not anchor.boot or now.boot != anchor.boot or now.steady_s < anchor.steady_s:
        return None
    return anchor.wall_s + now.steady_s - anchor.steady_s


def _reached_s(anchor: Moment, now: Moment) -> float:
    """The latest time that can have been reached since the anchor."""
    expected_s = _expected_s(anchor, now)
    if expected_s is None:
        return now.wall_s
    return min(now.wall_s, expected_s + _tolerance_s(anchor, now))


def _agrees(anchor: Moment, now: Moment) -> bool:
    """Whether the wall clock shows what it should."""
    expected_s = _expected_s(anchor, now)
    return expected_s is not None and abs(now.wall_s - expected_s) <= _tolerance_s(anchor, now)


def _tolerance_s(anchor: Moment, now: Moment) -> float:
    return _SLACK_S + _SLEW * (now.steady_s - anchor.steady_s)
