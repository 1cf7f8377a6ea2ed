"""Coverage-guided fuzzing: `python tests/fuzz/fuzz.py manifest --seconds 600`, or `all` for every target in turn.

Needs `pip install -e ".[fuzz]"` (atheris: Linux, CPython up to 3.13). What it finds is written to the folder it ran
in, as crash-HASH; `python tests/fuzz/fuzz.py manifest --input crash-HASH` shows what happens.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Fuzz, or read one input."""
    sys.path[:0] = [str(FOLDER)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--input", type=Path)
    args = parser.parse_args()
    if args.input:
        from targets import TARGETS

        print("accepted" if TARGETS[args.target].run(args.input.read_bytes()) else "refused")
        return
    if args.target == "all":
        from targets import TARGETS

        commands = [[sys.executable, __file__, name, "--seconds", str(args.seconds)] for name in TARGETS]
        sys.exit(max(subprocess.call(command) for command in commands))
    import atheris

    with atheris.instrument_imports(include=["eopc_runtime"]):
        from targets import TARGETS
    from mutate import mutate

    target = TARGETS[args.target]

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate(data, rng, target.is_json) if rng.random() < 0.7 else atheris.Mutate(data, max_size)
        return bytes(changed[:max_size])

    with tempfile.TemporaryDirectory() as corpus:
        for i, content in enumerate(target.seeds):
            (Path(corpus) / f"seed{i}").write_bytes(content)
        options = [f"-max_total_time={args.seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=20000"]
        atheris.Setup([sys.argv[0], *options, corpus], target.run, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
