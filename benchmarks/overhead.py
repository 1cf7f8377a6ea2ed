"""What the runtime adds to a decode step: the time of `Session`'s steps over that spent in ONNX Runtime inside them.

    python benchmarks/overhead.py BUNDLE [--tokens 64] [--rounds 9] [--threads 2]

Both times are taken in the same steps, so a machine that slows down slows both. A session's step adds the choice of the
token, its text, stop strings, the ledger and the policy. Printed: medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from eopc_runtime.session import Session

PROMPT = "Write a long story about a lighthouse keeper and the sea."


class Timed:
    """An `InferenceSession` that adds up the seconds of its bound runs."""

    def __init__(self, session: Any) -> None:
        self._session, self.spent_s = session, 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.spent_s += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def main() -> None:
    """Parse arguments, run the rounds, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with Session.open(args.bundle, threads=args.threads, verify=False) as session:
        runner: Any = session.pool.get("t0")
        timed = runner._step_session = Timed(runner._step_session)
        rounds = [measure(session, timed, args.tokens) for _ in range(args.rounds + 1)][1:]  # the first warms up
    bare, whole = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
    ratio = statistics.median(whole_s / bare_s for bare_s, whole_s in rounds)
    sys.stdout.write(f"bare {bare:.2f} ms, session {whole:.2f} ms per step; ratio {ratio:.3f}\n")


def measure(session: Session, timed: Timed, tokens: int) -> tuple[float, float]:
    """Seconds per step in ONNX Runtime, and in all, over the steps after the first token."""
    stream = session.stream(PROMPT, budget=1e6, max_new_tokens=tokens + 1, tier="t0")
    next(stream)
    before, start = timed.spent_s, time.perf_counter()
    count = sum(1 for _ in stream)
    return (timed.spent_s - before) / count, (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
