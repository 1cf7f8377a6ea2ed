"""What the runtime adds to a decode step: a token of `Session` beside ONNX Runtime's bare run of the same step.

    python benchmarks/overhead.py BUNDLE [--tokens 64] [--rounds 9] [--threads 2]

Both run the same tier from the same prompt on the same bound buffers, in one process, in turn. A session's step adds
the choice of the token, its text, stop strings, the ledger and the policy. Printed: the median over rounds of
milliseconds per step, and of the ratio round by round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from eopc_runtime.session import Session

PROMPT = "Write a long story about a lighthouse keeper and the sea."


def main() -> None:
    """Parse arguments, run the rounds, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with Session.open(args.bundle, threads=args.threads, verify=False) as session:
        rounds = [
            (bare_step_s(session, args.tokens), session_step_s(session, args.tokens)) for _ in range(args.rounds + 1)
        ][1:]  # the first warms up
    bare, whole = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    sys.stdout.write(f"bare {bare:.2f} ms, session {whole:.2f} ms per step; ratio {ratio:.3f}\n")


def bare_step_s(session: Session, tokens: int) -> float:
    """Seconds of one `InferenceSession` run with bound buffers, mean over the steps after a prefill."""
    runner = session.pool.get("t0")
    cache, _ = session.prefill(session.encode_prompt(PROMPT))
    spent = 0.0
    for token in range(100, 100 + tokens):
        session.decode(cache, token)  # moves the bindings on to the next position
        step = cache.decode_binding
        start = time.perf_counter()
        runner._session.run_with_iobinding(step.binding)  # type: ignore[attr-defined]  # the same step once more
        spent += time.perf_counter() - start
    return spent / tokens


def session_step_s(session: Session, tokens: int) -> float:
    """Seconds of one generated token, mean over the steps after the first."""
    stream = session.stream(PROMPT, budget=1e6, max_new_tokens=tokens + 1)
    next(stream)
    start = time.perf_counter()
    count = sum(1 for _ in stream)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
