"""Joules allowed over time, kept in a file: `2Wh/day`, `500J/minute`, several at once.

Before a sequence runs its whole grant is booked, and what it did not use is given back at its end. So a process that
is killed in between has booked too much, never too little. The file is written beside, synced and renamed: after a
power cut it is the old one or the new one. A second process on the same file is refused.
"""

from __future__ import annotations

import fcntl
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from eopc_runtime.errors import AllowanceError, UsageError
from eopc_runtime.files import replace_synced
from eopc_runtime.jsonfields import Fields, parse_json
from eopc_runtime.units import format_energy
from eopc_runtime.windows import PERIODS, Allowance, Moment, Spending, Window, check_allowances, decide

_HELD_S = 5.0  # when to ask again where sequences that run may give back enough
_UNWRITTEN_S = 60.0  # when to ask again where the account cannot be written
_LATEST_S = 250e9  # a wall clock beyond the year 9800 is no date


def read_clocks() -> Moment:
    """Read the wall clock and the clock since boot, which goes on in suspend."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return Moment(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot)


@dataclass(frozen=True, slots=True)
class Grant:
    """Joules that were booked for a request; `downshifted` when they are fewer than it wanted."""

    joules: float
    downshifted: bool
    windows: Mapping[str, int]  # the windows they were booked in


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of an allowance, and in how many seconds it is whole again."""

    allowance: Allowance
    left_j: float
    reset_s: float


class BudgetPolicy:
    """Grants joules within allowances over time. Safe to use from many threads; one process at a time.

    Without a file the account lives as long as the process. Without allowances everything wanted is granted.
    """

    def __init__(
        self, allowances: Sequence[Allowance], path: Path | None = None, clock: Callable[[], Moment] = read_clocks
    ) -> None:
        """Open the account and lock it.

        Raises UsageError when another process has it, when the file is no account, or cannot be written;
        BudgetError when two allowances have one period.
        """
        self.allowances = check_allowances(allowances)
        self._periods = [allowance.period for allowance in self.allowances]
        self._path, self._clock = path, clock
        self._guard = threading.Lock()
        self._held_j = 0.0  # granted and not yet settled
        self._lock = None if path is None else _Lock(path)
        try:
            self._spending = (None if path is None else _read(path)) or Spending(clock())
        except UsageError:
            self.close()
            raise
        self._now()  # so that a clock that is set right after this is seen to jump

    def request(self, wanted_j: float, least_j: float = 0.0) -> Grant:
        """Book and return joules: all that are wanted, or what is left where that is `least_j` or more.

        Args:
            wanted_j: joules; a plain number above 0, or infinite for whatever is left.
            least_j: joules without which the request cannot run.

        Raises:
            AllowanceError: too few are left now, and it says in how many seconds there are enough; or the account
                cannot be written, so that nothing may be spent.
            BudgetError: the request needs more than a whole allowance.
        """
        with self._guard:
            now, spending = self._now()
            decision = decide(spending, self.allowances, now, wanted_j, least_j)
            if decision.limited_by is not None and decision.action == "defer":
                left_j = spending.left_j(decision.limited_by)
                needs = f", and the request needs {format_energy(least_j, round_up=True)}" if least_j else ""
                held, wait_s = "", decision.wait_s
                if self._held_j and all(spending.left_j(a) + self._held_j >= least_j for a in self.allowances):
                    held, wait_s = f" Sequences that run hold {format_energy(self._held_j)}.", min(wait_s, _HELD_S)
                raise AllowanceError(
                    f"Of {decision.limited_by} {format_energy(left_j)} are left{needs}.{held} "
                    f"Ask again in {math.ceil(wait_s)} s.",
                    wait_s,
                )
            if self.allowances:
                booked = spending.plus(decision.grant_j)
                try:
                    self._save(booked)
                except OSError as error:
                    raise AllowanceError(
                        f"{self._path} cannot be written ({error.strerror or error}), so nothing is granted. Make room "
                        "for it, and ask again.",
                        _UNWRITTEN_S,
                    ) from error
                self._spending = booked
                self._held_j += decision.grant_j
            numbers = {period: window.number for period, window in spending.windows.items()}
            return Grant(decision.grant_j, decision.action == "downshift", numbers)

    def settle(self, grant: Grant, spent_j: float) -> None:
        """Give back what a grant did not use, to the windows it was booked in; or book what a meter saw beyond it.

        An account that cannot be written now is written with the next request; until then the file has more booked.
        """
        if not self.allowances:
            return
        with self._guard:
            _, spending = self._now()
            unused_j = grant.joules - spent_j
            self._held_j = max(self._held_j - grant.joules, 0.0)
            self._spending = spending.plus(-unused_j, grant.windows if unused_j > 0 else None)
            with suppress(OSError):
                self._save(self._spending)

    def left(self) -> tuple[Left, ...]:
        """What is left of every allowance now; it does not wait while the account is written."""
        if self._guard.acquire(blocking=False):
            try:
                now, spending = self._now()
            finally:
                self._guard.release()
        else:
            now = self._clock()
            spending = self._spending.at(now, self._periods)
        return tuple(Left(a, spending.left_j(a), spending.wait_s(a, now)) for a in self.allowances)

    @property
    def left_j(self) -> float:
        """Joules that can be granted now: the least that is left of any allowance; infinite without one."""
        return min((left.left_j for left in self.left()), default=math.inf)

    def close(self) -> None:
        """Give the account free for another process."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> BudgetPolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _now(self) -> tuple[Moment, Spending]:
        """The time, and the spending in the windows that count now."""
        now = self._clock()
        self._spending = self._spending.at(now, self._periods)
        return now, self._spending

    def _save(self, spending: Spending) -> None:
        """See that the spending is on the disk. The draft has one name: one that a kill left behind is written over."""
        if self._path is not None:
            draft = self._path.with_name(f".{self._path.name}.new")
            replace_synced(self._path, json.dumps(_to_json(spending)).encode(), draft)


class _Lock:
    """Holds a file beside the account for as long as the process lives; the system lets go of it when it dies."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.with_suffix(".lock").open("w")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be kept ({error.strerror}). Name a file in a folder that may be written to."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(
                f"{path} is in use by another process, and two could spend the same joules. End it, or name another "
                "file."
            ) from None

    def close(self) -> None:
        self._file.close()


def _to_json(spending: Spending) -> dict[str, object]:
    """The account as it is kept: what was spent in which window, and what the clocks showed."""
    windows = {
        period: {"since": datetime.fromtimestamp(w.start_s).astimezone().isoformat(), **asdict(w)}
        for period, w in spending.windows.items()
    }
    return {"windows": windows, "clocks": asdict(spending.anchor)}


def _read(path: Path) -> Spending | None:
    """Read an account; None when there is none yet. A damaged one is not taken for a full allowance."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no allowance ({error}); delete it to begin with a full one.") from error
    try:
        record = Fields(parse_json(text, str(path), UsageError), str(path), UsageError)
        clocks = record.child("clocks")
        anchor = Moment(clocks.number("wall_s"), clocks.number("steady_s"), clocks.text("boot"))
        clocks.done()
        windows = {}
        for period, fields in record.children_by_name("windows").items():
            if period not in PERIODS:
                fields.fail("there is no such period.")
            fields.text("since")  # for people
            windows[period] = Window(
                fields.number("start_s", minimum=0),
                fields.number("spent_j", minimum=0),
                fields.integer("number", minimum=0),
            )
            fields.done()
            if windows[period].start_s > _LATEST_S:
                fields.fail("there is no such date.")
        record.done()
        return Spending(anchor, windows)
    except UsageError as error:
        raise UsageError(f"{path} is no allowance; delete it to begin with a full one. ({error})") from error
