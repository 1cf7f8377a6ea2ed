"""A live tegrastats, played by scripts: one that runs, dies, floods, hangs, prints no rails, or is not there."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest

from eopc_runtime.errors import DeviceError, MeterLostError
from eopc_runtime.power.boards import board_rails, list_boards
from eopc_runtime.power.sampling import SampledMeter
from eopc_runtime.power.tegrastats import TegrastatsMeter, open_tegrastats

RULES = [board.rails for board in list_boards()]
PERIOD_S = 0.04  # the scripts below print at 25 Hz

HEAD = "RAM 1/2MB (lfb 1x4MB) CPU [0%@729] cpu@42C"
# Prints `count` lines of VDD_IN that swing between 9 and 11 W, then does what `then` says. It ends quietly when
# its reader goes away, as tegrastats does.
SCRIPT = """
import itertools, os, sys, time
head, pause, count, line, then = {head!r}, {pause}, {count}, {line!r}, {then!r}
try:
    for i in range(count):
        os.write(1, (head + " " + line.format(9000 + 2000 * (i % 2)) + "\\n").encode())
        time.sleep(pause)
    exec(then)
except (BrokenPipeError, KeyboardInterrupt):
    sys.exit(0)
"""


class Fake:
    """Writes a script called tegrastats and the command that runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(
        self,
        line: str = "VDD_IN {0}mW/1mW VDD_SOC 500mW/1mW",
        count: int = 10**9,
        pause: float = PERIOD_S,
        then: str = "",
    ) -> list[str]:
        script = self.folder / "tegrastats"
        script.write_text(SCRIPT.format(head=HEAD, pause=pause, count=count, line=line, then=then))
        return [sys.executable, "-S", str(script)]

    def open(self, **options: object) -> TegrastatsMeter:
        command = self.command(**options)  # type: ignore[arg-type]
        meter = open_tegrastats(RULES, command=command, period_s=PERIOD_S, first_line_s=10)
        meter.max_gap_s = 0.5  # these tests are about the child, not about the load of the machine
        return meter


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_lines_become_joules(fake: Fake) -> None:
    """10 W on average, stamped on arrival with a monotonic clock; the window ends at a line after its end."""
    with fake.open() as meter:
        meter.begin("w")
        time.sleep(2.4)
        so_far_j = meter.energy_so_far_j("w")
        window = meter.end("w")
        child = meter._process
    assert (window.verified, window.rails, window.source) == (True, ("VDD_IN",), "measured")
    assert window.energy_j is not None
    assert window.mean_w == pytest.approx(10.0, rel=0.02)  # 9 and 11 W in turn, over 50 lines
    assert window.energy_j == pytest.approx(10.0 * window.duration_s, rel=0.03)
    assert so_far_j == pytest.approx(window.energy_j, rel=0.1)
    assert window.rails_j["VDD_SOC"] == pytest.approx(0.5 * window.covered_s, rel=1e-6)
    assert "tegrastats" in meter.sensor.details["command"]
    assert child.poll() is not None  # closing the meter ended the child


def test_a_tegrastats_that_dies_is_lost(fake: Fake) -> None:
    """Three lines and an exit: the live reading raises, the window is unverified, both with the child's last words."""
    with fake.open(count=3, then="sys.stderr.write('no such device\\n'); sys.exit(3)") as meter:
        meter.begin("w")
        time.sleep(0.6)
        with pytest.raises(MeterLostError, match=r"exit code 3: no such device"):
            meter.energy_so_far_j("w")
        window = meter.end("w")
    assert (window.verified, window.energy_j) == (False, None)
    assert "lost" in window.faults


def test_a_tegrastats_that_falls_silent_is_lost(fake: Fake) -> None:
    """It lives, but prints nothing more: no reading, not the last one for ever."""
    with fake.open(count=5, then="time.sleep(60)") as meter:
        meter.begin("w")
        time.sleep(1.6)
        with pytest.raises(MeterLostError, match="no reading for"):
            meter.energy_so_far_j("w")
        window = meter.end("w")
    assert window.energy_j is None
    assert "gaps" in window.faults


def test_a_tegrastats_that_floods_is_thinned(fake: Fake) -> None:
    """Lines without any pause: memory and work stay bounded, the joules right, and the window says so."""
    with fake.open(pause=0) as meter:
        meter.begin("w")
        time.sleep(2.2)
        window = meter.end("w")
    assert window.verified
    assert window.samples <= 2.3 / (PERIOD_S / 4) + 1
    assert window.mean_w == pytest.approx(10.0, abs=1.0)  # whichever of 9 and 11 W were kept
    assert "tegrastats prints faster than its interval" in " ".join(window.notes)


def test_a_flood_without_line_ends_is_no_reading(fake: Fake) -> None:
    """Megabytes without a line end are cut, and nothing in them is taken for power."""
    then = "\nwhile True: os.write(1, b'VDD_IN ' * 10000)"
    with fake.open(count=5, then=then) as meter:
        meter.begin("w")
        time.sleep(1.5)
        with pytest.raises(MeterLostError):
            meter.energy_so_far_j("w")
        assert meter.end("w").energy_j is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"line": ""}, "run tegrastats with sudo"),
        ({"line": "VDD_GPU_SOC {0}mW/1mW"}, "incomplete rail set: VDD_CPU_CV, VIN_SYS_5V0 missing"),
        ({"count": 0, "then": "sys.exit('Failed to open /dev/x')"}, "exit code 1: Failed to open /dev/x"),
    ],
)
def test_a_tegrastats_without_a_total_is_an_error(fake: Fake, options: dict[str, object], says: str) -> None:
    """No rails, not enough of them, or an immediate end: said at the start, with the cause."""
    with pytest.raises(DeviceError, match="gives no power") as caught:
        fake.open(**options)
    assert says in str(caught.value)


def test_a_tegrastats_that_prints_nothing_is_an_error(fake: Fake) -> None:
    """Waiting has an end."""
    command = fake.command(count=0, then="time.sleep(60)")
    with pytest.raises(DeviceError, match="it printed nothing"):
        open_tegrastats(RULES, command=command, first_line_s=0.3)


def test_a_missing_tegrastats_is_an_error() -> None:
    """The usual case away from a Jetson."""
    with pytest.raises(DeviceError, match="not installed or not on PATH"):
        open_tegrastats(RULES, command=("no-such-tegrastats",))


def test_a_tegrastats_that_may_not_run_is_an_error(tmp_path: Path) -> None:
    """A file that is no program."""
    (tmp_path / "tegrastats").touch(mode=0o644)
    with pytest.raises(DeviceError, match="cannot be started"):
        open_tegrastats(RULES, command=(str(tmp_path / "tegrastats"),))


# the rail set is chosen once; lines are fed by hand, without a child's timing


def feed(meter: TegrastatsMeter, line: str, now: list[float]) -> None:
    now[0] += meter.period_s
    meter._take(f"{HEAD} {line}\n".encode(), now[0])


def test_a_line_that_lost_its_rail_is_a_missing_reading(fake: Fake) -> None:
    """Thor's VIN was there in the beginning; three rails do not stand in for it later, nor a doubled VIN."""
    now = [time.monotonic()]
    thor = "VDD_GPU 2000mW/1mW VDD_CPU_SOC_MSS 6000mW/1mW VIN_SYS_5V0 5000mW/1mW"
    command = fake.command(line=f"{thor} VIN 19000mW/1mW", count=1, then="time.sleep(60)")
    rules = [board_rails("thor")]
    with open_tegrastats(rules, command=command, clock=lambda: now[0], first_line_s=10) as meter:
        SampledMeter.begin(meter, "w")
        for i in range(40):
            feed(meter, f"{thor} VIN {19000 + i}mW/1mW", now)
        for line in (thor, f"{thor} VIN 19000mW/1mW VIN 19000mW/1mW", f"{thor} VIN -3mW/1mW", "noise") * 5:
            feed(meter, line, now)
        window = meter.end("w")
    assert meter.sensor.rails == ("VIN",)
    assert {"gaps", "refused"} <= set(window.faults)
    assert "VIN is missing" in " ".join(window.notes)
    assert "VIN stands twice" in " ".join(window.notes)


def test_the_command_is_a_parameter() -> None:
    """sudo, a container, another path: whatever starts it is recorded with the meter."""
    with pytest.raises(DeviceError, match=shlex.quote("echo a b")):
        open_tegrastats(RULES, command=("sh", "-c", "echo a b"), first_line_s=2)
