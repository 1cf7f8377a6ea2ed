"""Calibrate and validate a bundle in every nvpmodel mode of this Jetson, and leave the board in the mode it was in.

    python3 calibrate_modes.py BUNDLE [--only MODE]... [--out FOLDER] [-- OPTIONS OF eopc calibrate]

The tables of all modes stand side by side in the bundle's energy.json; `eopc run` takes that of the active mode. What
both commands said goes to OUT/MODE.calibrate.json and OUT/MODE.validate.json. A mode that needs a reboot is left out
and named. The first mode is restored at the end, also after an error, Ctrl-C, SIGTERM or a lost connection.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopc_runtime.calibration.conditions import Place, read_power_mode

MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
SET_S = 120  # nvpmodel takes seconds; one that waits longer is stuck


@dataclass(frozen=True)
class Mode:
    """A power mode: ids differ from board to board and release to release, names are what prices belong to."""

    ident: int
    name: str


def known_modes(place: Place) -> list[Mode]:
    """Return the modes of nvpmodel.conf, in its order."""
    conf = place.root / "etc/nvpmodel.conf"
    if not conf.exists():
        sys.exit(f"Error: there is no {conf}: this is no Jetson, or nvidia-l4t-nvpmodel is not installed.")
    return [Mode(int(ident), name) for ident, name in MODE.findall(conf.read_text(encoding="utf-8", errors="replace"))]


def set_mode(mode: Mode, place: Place) -> str | None:
    """Switch to a mode; return None when it is active, else what nvpmodel said."""
    command = [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "nvpmodel", "-m", str(mode.ident)]
    try:
        # before a mode that needs a reboot nvpmodel asks for a "yes"; this answer keeps the old mode
        done = subprocess.run(command, input="no\n", capture_output=True, text=True, timeout=SET_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and read_power_mode(place) == mode.name:
        return None
    said = " ".join((done.stdout + done.stderr).split())
    return said or f"nvpmodel ended with {done.returncode} and said nothing"


@contextmanager
def mode_restored(mode: Mode, place: Place) -> Iterator[None]:
    """Come back to a mode whatever happens inside; exits at once, with nothing changed, when it cannot be set now."""
    if (reason := set_mode(mode, place)) is not None:
        sys.exit(f"Error: `sudo -n nvpmodel -m {mode.ident}` does not work here: {reason}. The README says what to do.")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: a shell's background job ignores it
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the board must not stay in another mode
        if (reason := set_mode(mode, place)) is not None:
            print(f"Error: {mode.name} is not restored ({reason}). Run: sudo nvpmodel -m {mode.ident}", file=sys.stderr)
        else:
            print(f"Power mode {mode.name} is restored.", file=sys.stderr)


def measure(bundle: str, mode: Mode, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and validate in the active mode; return both reports, the second one None if the first failed."""
    calibrate = ["calibrate", bundle, "--meter", options.meter, *options.calibrate_options]
    validate = ["validate", bundle, "--meter", options.meter, "--sequences", str(options.sequences)]
    calibrated = eopc(calibrate, options.out / f"{mode.name}.calibrate.json")
    validated = eopc(validate, options.out / f"{mode.name}.validate.json") if calibrated else None
    return {"mode": mode.name, "calibrate": calibrated, "validate": validated}


def eopc(words: Sequence[str], report: Path) -> dict[str, Any] | None:
    """Run a command with --json, keep its report and return it; None when it failed, which it has explained itself."""
    print(f"== eopc {' '.join(words)}", file=sys.stderr)
    done = subprocess.run(["eopc", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    report.write_text(done.stdout, encoding="utf-8")
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def line(result: dict[str, Any]) -> str:
    """Return one line of the table at the end."""
    calibrated, validated = result["calibrate"], result["validate"]
    if not (calibrated and validated):
        return f"{result['mode']:<14} failed; the same command goes on where it stopped"
    error = "unverified" if validated["mape"] is None else f"{validated['mape']:.2%}"
    return (
        f"{result['mode']:<14} held-out error {calibrated['mape_cv']:.2%}, margin {calibrated['margin']:.1%}; "
        f"validation: mean error {error}, above the price {validated['over_price']} of {validated['verified']}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Calibrate and validate a bundle in every power mode of this Jetson.",
        epilog="What follows -- goes to eopc calibrate.",
    )
    parser.add_argument("bundle")
    parser.add_argument("--only", action="append", metavar="MODE", help="this mode only; may be given again")
    parser.add_argument("--out", type=Path, default=Path("calibration"), help="folder for the reports [calibration]")
    parser.add_argument("--meter", default="tegrastats", help="as in eopc calibrate [tegrastats]")
    parser.add_argument("--sequences", type=int, default=20, help="to validate with, in each mode [20]")
    parser.add_argument("--settle", type=float, default=30, metavar="S", help="pause after a change of mode [30]")
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    return parser.parse_args(own, argparse.Namespace(calibrate_options=words[len(own) + 1 :]))


def main() -> None:
    """Go through the modes; exit 1 when one could not be calibrated and validated."""
    options, place = parse(), Place()
    modes = known_modes(place)
    by_name = {mode.name: mode for mode in modes}
    if unknown := sorted(set(options.only or ()) - set(by_name)):
        sys.exit(f"Error: there is no mode {', '.join(unknown)}. Modes: {', '.join(by_name)}.")
    active = by_name.get(read_power_mode(place) or "")
    if active is None:
        sys.exit("Error: the active power mode cannot be read, so it could not be restored. Check `nvpmodel -q`.")
    options.out.mkdir(parents=True, exist_ok=True)
    results, left_out = [], []
    with mode_restored(active, place):
        for mode in modes:
            if options.only and mode.name not in options.only:
                continue
            if reason := set_mode(mode, place):
                left_out.append(f"{mode.name:<14} left out: {reason}")
                continue
            time.sleep(options.settle)
            results.append(measure(options.bundle, mode, options))
    print("\n".join([*map(line, results), *left_out]))
    sys.exit(0 if results and all(result["validate"] for result in results) else 1)


if __name__ == "__main__":
    main()
