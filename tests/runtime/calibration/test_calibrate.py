"""A whole calibration on a device of exact energies: prices, guards, and a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopc_runtime.calibration.calibrate import Outcome, Settings, calibrate
from eopc_runtime.calibration.contention import CpuTimes
from eopc_runtime.calibration.journal import journal_folder
from eopc_runtime.calibration.plan import plan_cells
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.errors import BundleError, DeviceError, UsageError
from eopc_runtime.power.base import PROXY
from eopc_runtime.provenance import Hull

ROOT = Path(__file__).resolve().parents[3]
FAKES = ROOT / "tests/runtime/conftest.py"
SMALL = Settings(plan_cells((32, 400), (32, 300), 12, 19, rounds=1))


def run(lab: Any, settings: Settings = SMALL, **rig: Any) -> Outcome:
    """Calibrate the lab's bundle."""
    return calibrate(lab.bundle, lab.rig(**rig), settings)


def prices_of(lab: Any) -> dict[str, Any]:
    """The content of energy.json."""
    content: dict[str, Any] = json.loads((lab.bundle_path / "energy.json").read_text())
    return content


def test_a_calibration_finds_the_devices_coefficients_and_publishes_them(lab: Any) -> None:
    """All six of every tier, in a bundle that verifies, with everything that makes the figures checkable."""
    outcome = run(lab)
    table = lab.bundle.energy
    assert (table.source, table.margin) == ("calibrated", pytest.approx(0.0, abs=1e-6))
    for tier, theta in zip(table.tiers, lab.rig().pool.thetas, strict=True):
        # 12 cells, 6 columns; the meter is exact, what is left is the rounding of 300 additions per sequence
        np.testing.assert_allclose(astuple(Theta.of_tier(tier)), astuple(theta), rtol=1e-5)
    found = table.calibration
    assert found is not None
    assert (found.cells, found.hull) == (31, Hull((32, 400), (32, 300)))
    assert found.meter is not None
    assert (found.meter.name, found.meter.rails, found.meter.idle_w) == ("fake", ("VDD_A", "VDD_B"), 5.0)
    assert found.meter.quantum_j == pytest.approx(0.4 * 0.05)  # one step of both rails for one period
    assert found.identity is not None
    assert (found.identity.module, found.identity.runner) == ("a fake board", "fake 1, 2 threads")
    assert found.identity.rails == ("VDD_A", "VDD_B")
    assert max(found.mape_cv.values()) < 1e-6
    assert lab.bundle.manifest.tiers[1].energy_source == "calibrated"
    assert outcome.fits[0].idle_share == pytest.approx(0.25)  # 5 W of 20 W


def test_the_proxy_fits_real_times_and_stays_a_proxy(lab: Any) -> None:
    """The coefficients are fitted, the source is not upgraded, and no idle power is claimed."""
    run(lab, meter=lab.meter(source=PROXY))
    table = lab.bundle.energy
    assert (table.source, table.nominal) == ("proxy", True)
    assert table.calibration is not None
    assert table.calibration.meter is not None
    assert table.calibration.meter.idle_w is None
    assert Theta.of_tier(table.tiers[0]).theta3 == pytest.approx(0.35, rel=1e-5)


def test_calibrating_again_measures_again(lab: Any) -> None:
    """A finished journal is kept beside the bundle and not reused: the device may have changed."""
    assert run(lab).reused == 0
    lab.device.factor = 1.5
    again = run(lab)
    assert again.reused == 0
    assert Theta.of_tier(lab.bundle.energy.tiers[0]).theta3 == pytest.approx(1.5 * 0.35, rel=1e-5)
    assert [path.name.split(".", 1)[1] for path in journal_folder(lab.bundle_path).iterdir()] == ["done.jsonl"]


def test_two_power_modes_stand_side_by_side(lab: Any) -> None:
    """Each has its own prices; the second calibration keeps the first's."""
    lab.set_mode(0)
    run(lab)
    lab.set_mode(1)
    lab.device.factor = 0.7
    run(lab)
    table = lab.bundle.energy
    assert [t.mode for t in table.modes()] == ["MODE_15W", "MAXN"]
    dear, cheap = table.in_mode("MAXN").tiers[2], table.tiers[2]
    assert cheap.step_j(64, 9) / dear.step_j(64, 9) == pytest.approx(0.7, rel=1e-5)


def test_one_tier_can_be_calibrated_again(lab: Any) -> None:
    """After a whole calibration, t1 alone; before it, a part of the ladder is refused at once."""
    with pytest.raises(UsageError, match="leaves out t0, t2"):
        run(lab, replace(SMALL, tiers=("t1",)))
    run(lab)
    lab.device.factor = 1.1
    outcome = run(lab, replace(SMALL, tiers=("t1",)))
    assert [item.tier for item in outcome.fits] == ["t1"]
    steps = [tier.step_j0 for tier in lab.bundle.energy.tiers]
    want = [theta.theta3 + theta.theta5 for theta in lab.rig().pool.thetas]
    assert steps == pytest.approx([want[0], 1.1 * want[1], want[2]], rel=1e-4)


# guards


def test_a_power_mode_that_changes_in_the_middle_stops_and_setting_it_back_goes_on(lab: Any) -> None:
    """The visit during which it changed does not count; the same command in the old mode finishes with its prices."""
    lab.set_mode(0)
    lab.device.on_forward = lambda device: lab.set_mode(1) if device.forwards == 3000 else None
    with pytest.raises(DeviceError, match=r"power mode changed from MAXN to MODE_15W.*set MAXN again"):
        run(lab)
    assert lab.bundle.energy.source == "prior"
    (journal,) = journal_folder(lab.bundle_path).glob("*.jsonl")
    finished = len(journal.read_text().splitlines()) - 2  # the header, and idle power
    assert 0 < finished < 93
    lab.set_mode(0)
    lab.device.on_forward = None
    outcome = run(lab)
    assert outcome.reused == finished
    assert lab.bundle.energy.mode == "MAXN"
    assert Theta.of_tier(lab.bundle.energy.tiers[0]).theta3 == pytest.approx(0.35, rel=1e-5)


def test_another_mode_begins_a_journal_of_its_own(lab: Any) -> None:
    """What was measured in MAXN is not mixed into the prices of 15W."""
    lab.set_mode(0)
    lab.device.on_forward = lambda device: lab.set_mode(1) if device.forwards == 3000 else None
    with pytest.raises(DeviceError):
        run(lab)
    lab.device.on_forward = None
    assert run(lab).reused == 0
    assert [t.mode for t in lab.bundle.energy.modes()] == ["MODE_15W"]


def test_a_hot_device_is_let_cool_and_a_visit_is_not_measured_hot(lab: Any) -> None:
    """At 97 C it pauses, says so, and goes on at 80 C."""
    lab.set_temperature(97)

    def sleep(seconds: float) -> None:
        lab.device.sleep(seconds)
        lab.set_temperature(80)

    run(lab, sleep=sleep)
    assert lab.said[0] == "pausing: tj-thermal is at 97 C, the limit is 94 C"
    assert lab.bundle.energy.source == "calibrated"


def test_a_device_that_stays_hot_is_not_calibrated(lab: Any) -> None:
    """Ten minutes later it is a refusal, and the bundle is as it was."""
    lab.set_temperature(97)
    with pytest.raises(DeviceError, match=r"tj-thermal is at 97 C after a pause of 10 minutes"):
        run(lab)
    assert lab.bundle.energy.source == "prior"


def test_a_meter_that_is_lost_stops_with_what_was_measured_kept(lab: Any) -> None:
    """The run with a mended meter goes on."""
    meter = lab.meter(faults=lambda i: {"lost": "tegrastats ended"} if i > 20 else {})
    with pytest.raises(DeviceError, match="tegrastats ended"):
        run(lab, meter=meter)
    assert run(lab).reused == 19  # the first window was idle power


@pytest.mark.parametrize(("patience_s", "off"), [(1800.0, 0.02), (0.0, 0.04)])
def test_visits_that_others_disturb_are_made_again_later(lab: Any, patience_s: float, off: float) -> None:
    """A neighbour takes both cores for 25 of every 100 s, in which work costs 1.6 times as much.

    With patience the prices do not show it (a visit may overlap by 5 % unnoticed, which is 3 %); without it they do.
    """

    def neighbour(device: Any) -> None:
        device.factor = 1.6 if device.clock() % 100 < 25 else 1.0

    def cpu() -> CpuTimes:
        whole, rest = divmod(lab.device.clock(), 100)
        return CpuTimes(lab.device.clock(), 2 * (whole * 25 + min(rest, 25)), 0.0, 2)

    lab.device.on_forward = neighbour
    outcome = run(lab, replace(SMALL, patience_s=patience_s), cpu=cpu)
    errors = [
        abs(Theta.of_tier(tier).energy_j(100.0, 100.0) / theta.energy_j(100.0, 100.0) - 1)
        for tier, theta in zip(lab.bundle.energy.tiers, lab.rig().pool.thetas, strict=True)
    ]
    if patience_s == 0:
        assert max(errors) > off
        assert sum(item.noisy_cells for item in outcome.fits) > 10
    else:
        assert max(errors) < off
        assert sum(item.noisy_cells for item in outcome.fits) == 0


def test_a_machine_that_is_never_quiet_is_measured_all_the_same_and_says_so(lab: Any) -> None:
    """When the patience is used up the least disturbed attempts count: a calibration does not wait for ever."""

    def cpu() -> CpuTimes:
        return CpuTimes(lab.device.clock(), 0.6 * lab.device.clock(), 0.0, 2)  # others use 30 %

    quiet_s = run(lab).elapsed_s
    outcome = run(lab, replace(SMALL, patience_s=100.0), cpu=cpu)
    assert outcome.elapsed_s < quiet_s + 100.0 + 60.0  # one pause and one visit may end after the patience
    assert "other processes use 30% of the CPU: visits that they disturb are made again later" in lab.said
    assert [item.noisy_cells for item in outcome.fits] == [31, 31, 31]
    assert "31 of 31 cells were measured only while other processes" in outcome.fits[0].warnings[0]


def test_lengths_beyond_the_context_are_refused_before_anything_runs(lab: Any) -> None:
    """The bundle's context is 1024."""
    with pytest.raises(UsageError, match=r"600 prompt and 512 new tokens do not fit.*context of 1024"):
        run(lab, Settings(plan_cells((32, 600), (32, 512), 12, 19)))
    assert lab.device.forwards == 0


def test_an_unknown_tier_is_named(lab: Any) -> None:
    """With the nearest one there is."""
    with pytest.raises(BundleError, match=r'no tier "t9"'):
        run(lab, replace(SMALL, tiers=("t9",)))


def test_a_bundle_that_was_rebuilt_meanwhile_keeps_its_own_prices(lab: Any) -> None:
    """The figures belong to the graphs that were measured."""

    def rebuild(device: Any) -> None:
        if device.forwards == 5000:
            manifest = json.loads((lab.bundle_path / "manifest.json").read_text())
            for entry in manifest["files"]:
                if entry["path"] == "weights.bin":
                    entry["sha256"] = "0" * 64
            (lab.bundle_path / "manifest.json").write_text(json.dumps(manifest))

    lab.device.on_forward = rebuild
    with pytest.raises(BundleError, match="built anew meanwhile"):
        run(lab)
    assert prices_of(lab)["source"] == "prior"


# kills

CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec)
sys.modules["fakes"] = fakes
spec.loader.exec_module(fakes)
from eopc_runtime.calibration.calibrate import Settings, calibrate
from eopc_runtime.calibration.plan import plan_cells
lab = fakes.make_lab(Path(sys.argv[2]))
die_at = int(sys.argv[3])
def die(device):
    if device.forwards == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
lab.device.on_forward = die
outcome = calibrate(lab.bundle, lab.rig(), Settings(plan_cells((32, 400), (32, 300), 12, 19, rounds=1)))
print(outcome.reused)
"""


def child(folder: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    """Calibrate in a process of its own, which kills itself at a forward pass."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    command = [sys.executable, "-c", CHILD, str(FAKES), str(folder), str(die_at)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_a_run_that_is_killed_twice_ends_like_one_that_was_not(tmp_path: Path, lab: Any) -> None:
    """kill -9 in the middle of a sequence; the same command goes on, and the prices are equal to the last digit."""
    folder = tmp_path / "killed"
    folder.mkdir()
    for die_at in (6000, 9000):
        dead = child(folder, die_at)
        assert dead.returncode == -signal.SIGKILL, dead.stderr
        assert json.loads((folder / "small.eopc/energy.json").read_text())["source"] == "prior"
    finished = child(folder, -1)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 20
    run(lab)
    assert json.loads((folder / "small.eopc/energy.json").read_text()) == prices_of(lab)


def test_a_kill_from_outside_at_any_time_leaves_a_bundle_that_verifies(tmp_path: Path) -> None:
    """A process that calibrates over and over is killed at odd moments; the bundle opens, verified, every time."""
    folder = tmp_path / "odd"
    folder.mkdir()
    loop = CHILD.replace("outcome = calibrate", "while True: outcome = calibrate")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    command = [sys.executable, "-c", loop, str(FAKES), str(folder), "-1"]
    from eopc_runtime.bundle import Bundle

    for i in range(4):
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        journals = folder / ".small.eopc.calibrate"
        while not (journals.exists() and any(journals.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3 + 0.37 * i)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        assert Bundle.open(folder / "small.eopc").energy.source in ("prior", "calibrated")
