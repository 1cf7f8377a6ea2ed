"""tegrastats as a meter: a child process whose lines are stamped on arrival with a monotonic clock.

The rail set is chosen from the first line that has a total and kept: a later line without one of its rails
is a missing reading. A child that ends, floods, or prints no rail is an error or a fault, never 0 W.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from eopc_runtime.errors import DeviceError
from eopc_runtime.power.base import Sensor
from eopc_runtime.power.rails import Candidate, RailRule, asked_for, candidates, choose
from eopc_runtime.power.sampling import SampledMeter
from eopc_runtime.power.tegrastats_line import Line, parse_line
from eopc_runtime.power.tegrastats_log import NO_RAIL

NAME = "tegrastats"
COMMAND = ("tegrastats", "--interval", "100")
PERIOD_S = 0.1  # shorter intervals are clamped to about this; 100 ms gave 9.1 lines/s

FIRST_LINE_S = 5.0  # to wait for a line with a total
LINES_WITHOUT_RAIL = 5  # before giving up earlier than that
LONGEST_LINE = 1 << 16  # bytes; a real line has about 1 kB
STOP_S = 2.0


class TegrastatsMeter(SampledMeter):
    """Windows over the lines of a running tegrastats; see `open_tegrastats`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        command: Sequence[str],
        rules: Sequence[RailRule],
        rails: Sequence[str] = (),
        *,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        first_line_s: float = FIRST_LINE_S,
    ) -> None:
        super().__init__(Sensor(NAME, ()), period_s, clock)
        self._process, self._command = process, shlex.join(command)
        self._options = asked_for(rails) if rails else candidates(rules)
        self._known = frozenset(rails).union(*(rule.names for rule in rules))
        self._ignored = frozenset(name for rule in rules for name in rule.ignored) - set(rails)
        self._rule: Candidate | None = None
        self._reason = "it printed nothing"  # why there is no rule yet
        self._lines = self._flood = 0
        self._arrived_s = float("-inf")
        self._errors: deque[str] = deque(maxlen=3)
        self._ready = threading.Event()
        self._threads = [
            threading.Thread(target=target, args=(stream,), name="eopc-tegrastats", daemon=True)
            for target, stream in ((self._read_lines, process.stdout), (self._read_errors, process.stderr))
        ]
        for thread in self._threads:
            thread.start()
        self._ready.wait(first_line_s)
        if self._rule is None:
            reason = self._lost if self._lost and not self._lines else self._reason
            self.close()
            raise DeviceError(f"{self._command} gives no power: {reason}.")

    def close(self) -> None:
        """End the child and forget open windows."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(STOP_S)
        super().close()

    def _read_lines(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed while reading
            while line := stream.readline(LONGEST_LINE):
                self._take(line, self._clock())
        code = self._process.wait()
        why = "; ".join(self._errors)
        self.lose(f"tegrastats ended (exit code {code}{': ' if why else ''}{why})")
        self._ready.set()

    def _read_errors(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):
            while line := stream.readline(LONGEST_LINE):
                self._errors.append(line.decode("utf-8", "replace").strip()[:200])

    def _take(self, raw: bytes, now_s: float) -> None:
        """Take one line that arrived now. Lines far faster than the interval are a flood, and dropped."""
        if now_s - self._arrived_s < self.period_s / 4:
            self._flood += 1
            return
        if self._flood:  # told once per line that is kept: a flood must not keep the lock busy
            self.refuse("tegrastats prints faster than its interval", self._flood)
        self._arrived_s, self._flood = now_s, 0
        line = parse_line(raw.decode("utf-8", "replace"), self._known, self._ignored)
        if line is None:
            return
        if self._rule is None:
            self._settle(line)
        if self._rule is not None:
            self._feed_line(line, now_s, self._rule)

    def _settle(self, line: Line) -> None:
        """Choose the rail set from a line, or note why that cannot be done yet."""
        self._lines += 1
        option, reason = choose(self._options, line.rails_mw, line.unreadable, clean=not line.stray)
        if option is None or line.repeated:
            self._reason = NO_RAIL if not line.rails_mw else reason or "a rail stands twice in its lines"
            if self._lines >= LINES_WITHOUT_RAIL:
                self._ready.set()
            return
        self.sensor = Sensor(
            NAME,
            option.names,
            tuple(name for name in line.rails_mw if name not in option.names),
            details={"command": self._command},
        )
        self._rule = option
        self._ready.set()

    def _feed_line(self, line: Line, now_s: float, rule: Candidate) -> None:
        twice = sorted(line.repeated & set(rule.names))
        if twice:
            self.refuse(f"{', '.join(twice)} stands twice in a line")
        else:
            self.feed(now_s, {name: mw / 1000 for name, mw in line.rails_mw.items()})


def open_tegrastats(
    rules: Sequence[RailRule],
    rails: Sequence[str] = (),
    *,
    command: Sequence[str] = COMMAND,
    period_s: float = PERIOD_S,
    clock: Callable[[], float] = time.monotonic,
    first_line_s: float = FIRST_LINE_S,
) -> TegrastatsMeter:
    """Start tegrastats and wait for its first total.

    Args:
        rules: the rails of the board, or of every known board in the order in which they are tried.
        rails: sum exactly these instead.
        command: how to start it; its interval should be `period_s`.

    Raises DeviceError when it cannot be started, ends at once, or shows no total.
    """
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise DeviceError(f"{command[0]} is not installed or not on PATH. It comes with Jetson Linux.") from None
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started ({error.strerror}).") from None
    return TegrastatsMeter(process, command, rules, rails, period_s=period_s, clock=clock, first_line_s=first_line_s)
