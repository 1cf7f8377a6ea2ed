"""An assistant that spends at most so many joules per answer, and so many per day.

    python3 assistant.py BUNDLE --per-answer 10J --per-day 2kJ --state allowance.json

Every line of stdin is a question; its answer goes to stdout, and what it cost to stderr. Joules are set aside before
an answer begins and settled at its end, so a process killed in between costs its day too much, never too little.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from eopc_runtime.cli.meters import meter_of_run, prices_here
from eopc_runtime.errors import BudgetError, EopcError, UsageError
from eopc_runtime.session import Session
from eopc_runtime.units import format_energy, parse_energy

TURNS = 3  # questions that are remembered, answers included


class Allowance:
    """The joules of a day. The state file is replaced as a whole: after a power cut it is the old or the new one."""

    def __init__(self, path: Path, per_day_j: float, today: Callable[[], date] = date.today) -> None:
        """Lock the state, so that two processes cannot spend the same joules; UsageError when another one has it."""
        self._path, self._per_day_j, self._today = path, per_day_j, today
        self._lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{path} is in use by another assistant; end it, or give this one a --state.") from None

    def left_j(self) -> float:
        """Joules that are left today."""
        return max(self._per_day_j - self._read()[1], 0.0)

    def book(self, joules: float) -> None:
        """Add to what was spent today; what was set aside and not used comes back as a negative number."""
        day, spent_j = self._read()
        draft = self._path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"day": day, "spent_j": max(spent_j + joules, 0.0)}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)

    def _read(self) -> tuple[str, float]:
        """The day that counts, and what was spent on it. A clock that was set back opens no second allowance."""
        today = self._today().isoformat()
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
            day, spent_j = str(date.fromisoformat(state["day"])), float(state["spent_j"])
        except FileNotFoundError:
            return today, 0.0
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"{self._path} is no allowance; delete it to begin with a full one.") from None
        return (day, spent_j) if day >= today else (today, 0.0)


def answer(session: Session, allowance: Allowance, messages: list[dict[str, str]], per_answer_j: float) -> str:
    """Print the answer as it comes and return it; BudgetError when the day has too little left for one token."""
    budget_j = min(per_answer_j, allowance.left_j())
    if budget_j <= 0:
        raise BudgetError("The joules of this day are spent.")
    generation = session.stream(messages=messages, budget=budget_j)  # raises before it spends anything
    allowance.book(budget_j)
    for event in generation:
        print(event.text, end="", flush=True)
    print(flush=True)
    result = generation.result
    allowance.book(result.energy_j - budget_j)
    for warning in result.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    spent = f"{format_energy(result.energy_j)} of {format_energy(budget_j)} ({result.energy_source})"
    left = format_energy(allowance.left_j())
    print(f"[{result.plan}: {spent}, ended by {result.finish_reason}; {left} left today]", file=sys.stderr)
    return result.text


def converse(session: Session, allowance: Allowance, questions: Iterable[str], per_answer_j: float) -> None:
    """Answer line after line; a question that cannot be answered says why and is forgotten."""
    messages: list[dict[str, str]] = []
    for question in filter(None, map(str.strip, questions)):
        asked = [*messages[-2 * TURNS + 2 :], {"role": "user", "content": question}]
        try:
            text = answer(session, allowance, asked, per_answer_j)
        except EopcError as error:
            print(f"(no answer: {error})", flush=True)
        else:
            messages = [*asked, {"role": "assistant", "content": text}]


def main() -> None:
    """Open the bundle with this board's meter and the prices of its present power mode, and converse on stdin."""
    parser = argparse.ArgumentParser(description="An assistant with joules per answer and per day.")
    parser.add_argument("bundle")
    parser.add_argument("--per-answer", type=parse_energy, default=10.0, metavar="ENERGY")
    parser.add_argument("--per-day", type=parse_energy, default=2000.0, metavar="ENERGY")
    parser.add_argument("--state", type=Path, default=Path("allowance.json"), metavar="FILE")
    options = parser.parse_args()
    try:
        with ExitStack() as stack:
            allowance = Allowance(options.state, options.per_day)
            session = stack.enter_context(Session.open(options.bundle))
            runner = session.runner
            meter = meter_of_run(session.bundle, None, budget=True, on_gpu=runner is not None and runner.on_gpu)
            if meter is not None:
                stack.enter_context(meter)
            prices, warning = prices_here(session.bundle, None, meter and meter.sensor.rails, False, runner)
            session.use(meter=meter, table=prices)
            for remark in filter(None, [warning, *session.notes]):
                print(f"Warning: {remark}", file=sys.stderr)
            converse(session, allowance, sys.stdin, options.per_answer)
    except EopcError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
