"""An assistant that spends at most so many joules per answer, and so many per day.

    python3 assistant.py BUNDLE --per-answer 10J --per-day 2kJ --state allowance.json

Every line of stdin is a question; its answer goes to stdout, and what it cost to stderr. Joules are set aside before
an answer begins and settled at its end, so a process killed in between costs its day too much, never too little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from eopc_runtime.allowance import BudgetPolicy
from eopc_runtime.cli.meters import meter_of_run, prices_here
from eopc_runtime.errors import EopcError
from eopc_runtime.session import Session
from eopc_runtime.units import format_energy, parse_energy
from eopc_runtime.windows import Allowance

TURNS = 3  # questions that are remembered, answers included


def answer(session: Session, policy: BudgetPolicy, messages: list[dict[str, str]], per_answer_j: float) -> str:
    """Print the answer as it comes and return it; an error says why there is none."""
    grant = policy.request(per_answer_j)
    try:
        generation = session.stream(messages=messages, budget=grant.joules)
    except EopcError:
        policy.settle(grant, 0.0)  # nothing ran
        raise
    for event in generation:
        print(event.text, end="", flush=True)
    print(flush=True)
    result = generation.result
    policy.settle(grant, result.energy_j)
    for warning in result.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    spent = f"{format_energy(result.energy_j)} of {format_energy(grant.joules)} ({result.energy_source})"
    left = format_energy(policy.left_j)
    print(f"[{result.plan}: {spent}, ended by {result.finish_reason}; {left} left today]", file=sys.stderr)
    return result.text


def converse(session: Session, policy: BudgetPolicy, questions: Iterable[str], per_answer_j: float) -> None:
    """Answer line after line; a question that cannot be answered says why and is forgotten."""
    messages: list[dict[str, str]] = []
    for question in filter(None, map(str.strip, questions)):
        asked = [*messages[-2 * TURNS + 2 :], {"role": "user", "content": question}]
        try:
            text = answer(session, policy, asked, per_answer_j)
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
            policy = stack.enter_context(BudgetPolicy([Allowance(options.per_day, "day")], options.state))
            session = stack.enter_context(Session.open(options.bundle))
            runner = session.runner
            meter = meter_of_run(session.bundle, None, budget=True, on_gpu=runner is not None and runner.on_gpu)
            if meter is not None:
                stack.enter_context(meter)
            prices, warning = prices_here(session.bundle, None, meter and meter.sensor.rails, False, runner)
            session.use(meter=meter, table=prices)
            for remark in filter(None, [warning, *session.notes]):
                print(f"Warning: {remark}", file=sys.stderr)
            converse(session, policy, sys.stdin, options.per_answer)
    except EopcError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
