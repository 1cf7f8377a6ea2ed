"""`eopc energy read`: a tegrastats log to total power and joules."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table

if TYPE_CHECKING:
    from eopc_runtime.power.tegrastats_log import LogLine, PowerLog

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 72
_ROWS = 40  # of a log without energy


@click.command("read")
@click.option(
    "--tegrastats", "log", required=True, metavar="LOG", type=click.Path(allow_dash=True), help="The log; - is stdin."
)
@click.option("--board", metavar="B", help="Read it by this board's rails. [default: by the rails that are there]")
@click.option("--interval", type=float, metavar="S", help="Seconds between lines. [default: the printed clock]")
@click.option("--rails", metavar="A,B,...", help="Sum exactly these rails instead of the board's total.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def read(log: str, board: str | None, interval: float | None, rails: str | None, as_json: bool) -> None:
    """Turn a tegrastats log into watts and joules.

    Reads the formats of JetPack 4 to 7.2. The total is the module's, by the board's rule: its input rail, or
    a sum where it has none; a line that lacks a rail has no total. Energy is a trapezoid over the first
    number of each line. Without --interval times come from the printed clock, which is 1 s coarse.
    """
    from eopc_runtime.power.boards import board_rails, list_boards
    from eopc_runtime.power.tegrastats_log import read_log

    rules = [board_rails(board)] if board else [known.rails for known in list_boards()]
    found = read_log(_lines(log), rules, _rail_names(rails), interval)
    if as_json:
        print_json(describe(found))
    else:
        _print(found)


def describe(log: PowerLog) -> dict[str, Any]:
    """Return a log as JSON; what is not known is null."""
    return {
        "samples": log.samples,
        "energy_j": log.energy_j,
        "mean_w": log.mean_w,
        "rails": list(log.rails),
        "duration_s": log.duration_s,
        "covered_s": log.covered_s,
        "rails_j": dict(log.rails_j),
        "rails_w": dict(log.rails_w),
        "boards": list(log.boards),
        "release": log.release,
        "time_source": log.time_source,
        "skipped": log.skipped,
        "notes": list(log.notes),
        "lines": [_describe_line(line) for line in log.lines],
    }


def sparkline(values: Sequence[float | None], width: int = _WIDTH) -> str:
    """Return one line of bars, from the lowest to the highest value; a part without any value is blank."""
    size = max(1, math.ceil(len(values) / width))
    parts = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    means = [sum(part) / len(part) if part else None for part in parts]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(_BARS) - 1
    return "".join(" " if m is None else _BARS[round(top * (m - low) / span) if span else 0] for m in means)


def _describe_line(line: LogLine) -> dict[str, Any]:
    return {"line": line.number, "t_s": line.t_s, "total_mw": line.total_mw, "reason": line.reason}


def _print(log: PowerLog) -> None:
    boards = f" ({' or '.join(log.boards)})" if log.boards else ""
    names = " + ".join(log.rails) or ("differ from line to line" if log.samples else "no complete set")
    click.echo(f"rails     {names}{boards}")
    click.echo(f"release   {f'{log.release}, a guess' if log.release else 'not recognised'}")
    click.echo(f"samples   {log.samples} of {len(log.lines)} lines, {log.skipped} skipped")
    click.echo(f"duration  {_seconds(log)}")
    click.echo(f"energy    {'not known' if log.energy_j is None else f'{log.energy_j:.4f} J'}")
    totals = [None if line.total_mw is None else line.total_mw / 1000 for line in log.lines]
    if log.mean_w is not None:
        click.echo(f"power     {log.mean_w:.4f} W mean")
        click.echo()
        print_table(("rail", "mean W", "J", ""), [_rail_row(log, rail) for rail in log.rails_w])
        used = [w if line.rails == log.rails else None for w, line in zip(totals, log.lines, strict=True)]
        watts = [w for w in used if w is not None]
        click.echo()
        click.echo(f"{min(watts):.3f} W to {max(watts):.3f} W over the log:")
        click.echo(sparkline(used))
    else:
        click.echo()
        rows = _line_rows(log.lines)
        print_table(("line", "total W"), rows[:_ROWS])
        if len(rows) > _ROWS:
            click.echo(f"... and {len(rows) - _ROWS} more rows; --json has every line")
    for note in log.notes:
        click.echo(f"note: {note}", err=True)


def _seconds(log: PowerLog) -> str:
    if log.duration_s is None:
        return "not known"
    where = {None: "", "interval": "from the given interval", "clock": "from the printed clock"}[log.time_source]
    covered = f", {log.covered_s:.2f} s covered" if log.covered_s is not None else ""
    return f"{log.duration_s:.2f} s {where}".rstrip() + covered


def _rail_row(log: PowerLog, rail: str) -> tuple[str, ...]:
    joules = log.rails_j.get(rail)
    return (
        rail,
        f"{log.rails_w[rail]:.4f}",
        "-" if joules is None else f"{joules:.4f}",
        "" if rail in log.rails else "not added",
    )


def _line_rows(lines: Sequence[LogLine]) -> list[tuple[str, ...]]:
    """One row per run of lines with the same outcome."""
    rows: list[tuple[str, ...]] = []
    for (mw, reason), group in groupby(lines, key=lambda line: (line.total_mw, line.reason)):
        numbers = [line.number for line in group]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append((name, f"- {reason}" if mw is None else f"{mw / 1000:.3f}"))
    return rows


def _rail_names(text: str | None) -> list[str]:
    from eopc_runtime.errors import UsageError

    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f'--rails "{text}" has an empty name. Write rails with commas, for example VDD_IN,VDD_SOC.')
    return names


def _lines(log: str) -> list[str]:
    """The lines of a file or of stdin; bytes that are no text become marks, and such lines are judged as they are."""
    from eopc_runtime.errors import UsageError

    try:
        raw = sys.stdin.buffer.read() if log == "-" else Path(log).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{log} does not exist. Give a file with the output of tegrastats, or - for stdin.") from None
    except OSError as error:
        raise UsageError(f"{log} cannot be read ({error.strerror}).") from error
    return raw.decode("utf-8-sig", "replace").split("\n")
