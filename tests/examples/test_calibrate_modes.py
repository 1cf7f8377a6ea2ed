"""calibrate_modes.py leaves the board in the mode it found, whatever happens; nvpmodel and eopc are stand-ins."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import EXAMPLES, Place

SCRIPT = EXAMPLES / "03-calibrate-and-validate" / "calibrate_modes.py"
# Writes what it was called with; fails where FAIL says so, hangs where HANG does.
EOPC = """
mode=$(nvpmodel -q | head -n 1); echo "${mode#*: } $*" >> "$EOPC_TEST_HOME/eopc.log"
[[ "$mode $*" != *${FAIL:-never}* ]] || { echo "Error: no." >&2; exit 1; }
if [[ "$mode $*" == *${HANG:-never}* ]]; then touch "$EOPC_TEST_HOME/hangs"; exec sleep 60; fi
if [ "$1" = calibrate ]; then echo '{"mape_cv": 0.01, "margin": 0.05}'
else echo '{"mape": null, "over_price": 0, "verified": 0}'; fi
"""


@pytest.fixture
def start(place: Place) -> list[str]:
    """The command line of the script on the board, whose eopc is the one above."""
    (place.home / "bin/eopc").write_text(f"#!/bin/bash\n{EOPC}", encoding="utf-8")
    return [str(place.home / "bin/python3"), str(SCRIPT), "box.eopc", "--settle", "0"]


def run(place: Place, command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**place.environment(), **changes}
    return subprocess.run(command, cwd=place.home, env=environment, capture_output=True, text=True, check=False)


def mode(place: Place) -> str:
    return (place.board / "var/lib/nvpmodel/status").read_text(encoding="utf-8")


def calls(place: Place) -> list[str]:
    log = place.home / "eopc.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_every_mode_is_calibrated_then_validated(place: Place, start: list[str]) -> None:
    """With tegrastats; options after -- reach eopc calibrate; reports are kept; a mode that asks to reboot is named."""
    done = run(place, [*start, "--out", "out", "--", "--quick", "--seed", "3"])
    assert done.returncode == 0, done.stderr
    assert calls(place) == [
        f"{name} {words} --json"
        for name in ("MAXN", "MODE_30W")
        for words in (
            "calibrate box.eopc --meter tegrastats --quick --seed 3",
            "validate box.eopc --meter tegrastats --sequences 20",
        )
    ]
    assert sorted(path.name for path in (place.home / "out").iterdir()) == [
        f"{name}.{what}.json" for name in ("MAXN", "MODE_30W") for what in ("calibrate", "validate")
    ]
    assert "held-out error 1.00%, margin 5.0%; validation: mean error unverified" in done.stdout
    assert "MODE_15W" in done.stdout.splitlines()[-1]
    assert "Reboot required" in done.stdout
    assert mode(place) == "pmode:0000"


def test_a_mode_that_fails_does_not_end_the_others(place: Place, start: list[str]) -> None:
    """Its validation is left out, the exit code says so, and the mode is restored."""
    (place.board / "var/lib/nvpmodel/status").write_text("pmode:0002", encoding="utf-8")
    done = run(place, start, FAIL="MAXN calibrate")
    assert done.returncode == 1
    assert [line.split()[:2] for line in calls(place)] == [
        ["MAXN", "calibrate"], ["MODE_30W", "calibrate"], ["MODE_30W", "validate"],
    ]  # fmt: skip
    assert "MAXN           failed" in done.stdout
    assert mode(place) == "pmode:0002"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_restores_the_mode(place: Place, start: list[str], number: signal.Signals) -> None:
    """Ctrl-C, an end from outside, a lost connection, in the middle of another mode's calibration."""
    (place.board / "var/lib/nvpmodel/status").write_text("pmode:0002", encoding="utf-8")
    environment = {**place.environment(), "HANG": "MAXN calibrate"}
    process = subprocess.Popen(start, cwd=place.home, env=environment, stderr=subprocess.PIPE, text=True)
    until_s = time.monotonic() + 60
    while not (place.home / "hangs").exists():
        assert time.monotonic() < until_s
        assert process.poll() is None
        time.sleep(0.02)
    assert mode(place) == "pmode:0000"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Power mode MODE_30W is restored." in said
    assert mode(place) == "pmode:0002"


def test_nothing_is_changed_where_it_could_not_be_restored(place: Place, start: list[str]) -> None:
    """nvpmodel does not work, or the active mode is unknown: said at once, before any calibration."""
    (place.board / "stuck").touch()
    (place.board / "var/lib/nvpmodel/status").write_text("pmode:0002", encoding="utf-8")
    done = run(place, [*start, "--only", "MAXN"])
    assert "does not work here: NVPM ERROR: failed to set power mode!" in done.stderr
    assert (done.returncode, calls(place)) == (1, [])
    (place.board / "var/lib/nvpmodel/status").write_text("pmode:0009", encoding="utf-8")
    done = run(place, start)
    assert (done.returncode, calls(place)) == (1, [])
    assert "cannot be read" in done.stderr


def test_wrong_use_is_said(place: Place, start: list[str], tmp_path: Path) -> None:
    """A mode that does not exist; a machine without nvpmodel.conf."""
    done = run(place, [*start, "--only", "TURBO"])
    assert done.stderr == "Error: there is no mode TURBO. Modes: MAXN, MODE_15W, MODE_30W.\n"
    (place.board / "etc/nvpmodel.conf").unlink()
    done = run(place, start)
    assert "this is no Jetson" in done.stderr
    assert done.returncode == 1
