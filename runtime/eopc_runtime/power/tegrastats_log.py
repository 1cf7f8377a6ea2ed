"""A tegrastats log to total power and joules, line by line, with everything that was left out named.

Time comes from a fixed interval, or else from the printed clock, which has a resolution of 1 s: lines of one
printed second are spread evenly over it. Without either there is power, but no energy.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.jsonfields import did_you_mean, shown
from eopc_runtime.power.integrate import MAX_GAP_PERIODS, Integral, Sample, integrate
from eopc_runtime.power.rails import Candidate, RailRule, asked_for, candidates, choose
from eopc_runtime.power.tegrastats_line import Line, guess_release, parse_line

# One rail set must make up this share of the lines with a total; otherwise the log mixes boards and has no energy.
ONE_BOARD_SHARE = 0.9
NO_RAIL = (
    "no power rail in this log; run tegrastats with sudo, or this board has none. "
    "Without root some releases print memory and temperatures only."
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of tegrastats: its total in mW and the rails it is the sum of, or the reason why there is none."""

    number: int  # in the file, from 1
    total_mw: int | None
    rails: tuple[str, ...]
    reason: str | None
    t_s: float | None  # from the first line on
    watts: Mapping[str, float]  # every rail that was read, sub-rails included


@dataclass(frozen=True, slots=True)
class PowerLog:
    """A log as read. `rails` is empty, and joules are None, where the lines come from different rail sets."""

    lines: tuple[LogLine, ...]
    skipped: int
    release: str | None  # a guess
    clock_start_s: float | None  # first printed wall clock, s since 1970 without a zone
    time_source: str | None  # interval | clock | None
    notes: tuple[str, ...]
    rails: tuple[str, ...] = ()
    boards: tuple[str, ...] = ()  # the known boards with these rails
    samples: int = 0  # lines with a total
    mean_w: float | None = None  # arithmetic mean of the lines
    rails_w: Mapping[str, float] = field(default_factory=dict)  # the same of every rail, sub-rails included
    energy_j: float | None = None
    rails_j: Mapping[str, float] = field(default_factory=dict)
    duration_s: float | None = None
    covered_s: float | None = None
    clock_first_s: float | None = None  # wall clock at t_s = 0, estimated to a part of a second

    def series(self) -> tuple[Sample, ...]:
        """Return (t_s, (total W,)) of the lines that count, for integrating over parts of the log."""
        return tuple(
            (line.t_s, (line.total_mw / 1000,))
            for line in self.lines
            if line.t_s is not None and line.total_mw is not None and line.rails == self.rails
        )


def read_log(
    text: Iterable[str],
    rules: Sequence[RailRule],
    rails: Sequence[str] = (),
    interval_s: float | None = None,
) -> PowerLog:
    """Read the lines of a log.

    Args:
        rules: the rails of the board, or of every known board in the order in which they are tried.
        rails: sum exactly these rails instead.
        interval_s: seconds between two lines; None takes the printed clock.

    Raises DeviceError when nothing in it comes from tegrastats, no line has a power rail, or a rail that was
    asked for is in none of them; UsageError on a rail named twice or an interval that is none.
    """
    if len(set(rails)) != len(rails):
        raise UsageError(f"--rails names a rail twice in {', '.join(rails)}: it would be counted twice.")
    if interval_s is not None and not (math.isfinite(interval_s) and interval_s > 0):
        raise UsageError(f"the interval is {interval_s} s; give the seconds between two lines, for example 0.1.")
    known = frozenset(rails).union(*(rule.names for rule in rules))
    ignored = frozenset(name for rule in rules for name in rule.ignored) - set(rails)
    parsed: list[tuple[int, str, Line]] = []
    skipped = 0
    for number, raw in enumerate(text, start=1):
        if not raw.strip():
            continue
        line = parse_line(raw, known, ignored)
        if line is None:
            skipped += 1
        else:
            parsed.append((number, raw, line))
    _require_rails([line for _, _, line in parsed], skipped, rails)
    lines = _totals(parsed, rules, rails)
    clocks = [line.clock_s for _, _, line in parsed]
    times, source, notes = line_times(clocks, interval_s)
    pairs = zip(_spread(clocks), times, strict=True)
    first = [clock_s - t_s for clock_s, t_s in pairs if clock_s is not None and t_s is not None]
    if skipped:
        notes.append(f"{skipped} line(s) skipped: not from tegrastats")
    log = PowerLog(
        lines=tuple(replace(line, t_s=t_s) for line, t_s in zip(lines, times, strict=True)),
        skipped=skipped,
        release=next((found for _, raw, _ in parsed if (found := guess_release(raw))), None),
        clock_start_s=next((line.clock_s for _, _, line in parsed if line.clock_s is not None), None),
        time_source=source,
        notes=tuple(notes),
        clock_first_s=statistics.median(first) if first else None,
    )
    return _with_energy(log, rules)


def line_times(
    clocks: Sequence[float | None], interval_s: float | None
) -> tuple[list[float | None], str | None, list[str]]:
    """Return the time of each line in s from the first, where it comes from, and what to say about it."""
    spread = _spread(clocks)
    timed = [t for t in spread if t is not None]
    spread = [None if t is None else t - timed[0] for t in spread]
    span_s = timed[-1] - timed[0] if len(timed) > 1 else None
    if interval_s is not None:
        notes = []
        fixed_s = interval_s * (len(clocks) - 1)
        if span_s is not None and abs(span_s - fixed_s) > max(2.0, 0.2 * fixed_s):
            notes.append(f"the printed clock says {span_s:.0f} s, the given interval {fixed_s:.1f} s for these lines")
        return [i * interval_s for i in range(len(clocks))], "interval", notes
    if span_s is None:
        if len(clocks) == 1:
            return [0.0], None, []
        return [None] * len(clocks), None, ["the lines carry no clock: give --interval for the energy"]
    notes = ["times are from the printed clock, which is 1 s coarse"]
    if len(timed) < len(clocks):
        notes.append(f"{len(clocks) - len(timed)} line(s) without a clock are left out of the energy")
    return spread, "clock", notes


def _spread(clocks: Sequence[float | None]) -> list[float | None]:
    """Wall clock of each line from whole seconds: lines of one evenly over it; the outer seconds may be parts."""
    groups = [(clock, len(list(group))) for clock, group in groupby(c for c in clocks if c is not None)]
    if not groups:
        return [None] * len(clocks)
    usual = statistics.median([n for _, n in groups[1:-1]] or [n for _, n in groups])
    times: list[float] = []
    for i, (clock, n) in enumerate(groups):
        per_s = max(n, usual) if i in (0, len(groups) - 1) else n
        late = 1 - n / per_s if i == 0 and len(groups) > 1 else 0.0  # the log began late in its first second
        times += [clock + late + (j + 0.5) / per_s for j in range(n)]
    left = iter(times)
    return [None if clock is None else next(left) for clock in clocks]


def _require_rails(lines: Sequence[Line], skipped: int, rails: Sequence[str]) -> None:
    if not lines:
        raise DeviceError(
            f"no line of this log is from tegrastats ({skipped} skipped). Give the output of tegrastats, as text."
        )
    if not any(line.rails_mw or line.unreadable or line.repeated for line in lines):
        raise DeviceError(NO_RAIL)
    seen = {name for line in lines for names in (line.rails_mw, line.unreadable, line.repeated) for name in names}
    for name in rails:
        if name not in seen:
            raise DeviceError(
                f'the log has no rail "{shown(name)}".{did_you_mean(name, seen)} '
                f"It has {shown(', '.join(sorted(seen)))}."
            )


def _totals(parsed: Sequence[tuple[int, str, Line]], rules: Sequence[RailRule], rails: Sequence[str]) -> list[LogLine]:
    """The total of each line. A fallback set counts only in a log that never shows the preferred one."""
    options = asked_for(rails) if rails else candidates(rules)
    chosen = [_choose(line, options) for _, _, line in parsed]
    preferred = {board for option, _ in chosen if option and not option.fallback for board in option.boards}
    lines = []
    for (number, _, line), (option, why) in zip(parsed, chosen, strict=True):
        names, reason = option.names if option else (), why or None
        if option and option.fallback and preferred & set(option.boards):
            names, reason = (), f"incomplete rail set: {' + '.join(names)} only, other lines have more"
        total = sum(line.rails_mw[name] for name in names) if names else None
        if total == 0:  # one rail may be below its step; a module that prints lines draws power
            total, names, reason = None, (), f"{' + '.join(names)} reads 0 mW"
        watts = {name: mw / 1000 for name, mw in line.rails_mw.items()}
        lines.append(LogLine(number, total, names, reason, None, watts))
    return lines


def _choose(line: Line, options: Sequence[Candidate]) -> tuple[Candidate | None, str]:
    if line.repeated:
        return None, f"{', '.join(sorted(line.repeated))} stands there twice"
    return choose(options, line.rails_mw, line.unreadable, clean=not line.stray)


def _with_energy(log: PowerLog, rules: Sequence[RailRule]) -> PowerLog:
    """Add the rail set, means and joules."""
    notes = list(log.notes)
    sets = Counter(line.rails for line in log.lines if line.total_mw is not None)
    missing = Counter(line.reason for line in log.lines if line.reason)
    notes += [f"{n} line(s) without a total: {reason}" for reason, n in missing.most_common(5)]
    if not sets:
        return replace(log, notes=tuple(notes))
    names, n = sets.most_common(1)[0]
    if n < ONE_BOARD_SHARE * sets.total():
        notes.append(f"the lines have {len(sets)} different rail sets: totals per line, but no energy")
        return replace(log, samples=sets.total(), notes=tuple(notes))
    if n < sets.total():
        notes.append(f"{sets.total() - n} line(s) have other rails and are left out of means and energy")
    used = [line for line in log.lines if line.rails == names]
    others = sorted({name for line in used for name in line.watts} - set(names))
    rules = [rule for rule in rules if names in rule.total]
    boards = tuple(rule.board for rule in rules if rule.names.issuperset(others)) or tuple(r.board for r in rules)
    if not rules:
        notes.append("these rails are no board's total: compare the figures only with others of the same rails")
    log = replace(
        log,
        rails=names,
        boards=boards,
        samples=len(used),
        mean_w=statistics.fmean(line.total_mw for line in used if line.total_mw is not None) / 1000,
        rails_w={
            name: statistics.fmean(line.watts[name] for line in used if name in line.watts)
            for name in (*names, *others)
        },
    )
    return _integrated(log, used, notes)


def _integrated(log: PowerLog, used: Sequence[LogLine], notes: list[str]) -> PowerLog:
    samples = [(line.t_s, tuple(line.watts[name] for name in log.rails)) for line in used if line.t_s is not None]
    if len(samples) < 2:
        if samples:
            notes.append("one sample in time: power, but no energy")
        return replace(log, duration_s=0.0 if samples else None, covered_s=None, notes=tuple(notes))
    steps = [b[0] - a[0] for a, b in pairwise(samples) if b[0] > a[0]]
    period_s = statistics.median(steps) if steps else 0.0
    total = integrate(samples, MAX_GAP_PERIODS * period_s)
    notes += _time_notes(total)
    duration_s = total.covered_s + total.uncovered_s
    if total.covered_s == 0:
        return replace(log, duration_s=duration_s, covered_s=0.0, notes=tuple(notes))
    return replace(
        log,
        energy_j=sum(total.joules),
        rails_j=dict(zip(log.rails, total.joules, strict=True)),
        duration_s=duration_s,
        covered_s=total.covered_s,
        notes=tuple(notes),
    )


def _time_notes(total: Integral) -> list[str]:
    notes = []
    if total.gaps:
        notes.append(
            f"{total.gaps} gap(s) of {total.uncovered_s:.1f} s together are not covered: their energy is missing"
        )
    if total.backsteps:
        notes.append(f"the printed clock went backwards {total.backsteps} time(s); nothing is counted there")
    return notes
