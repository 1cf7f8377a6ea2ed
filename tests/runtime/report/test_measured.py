"""What the page shows of calibrations, logs and validations."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eopc_runtime.calibration.calibrate import Settings, calibrate
from eopc_runtime.calibration.identity import fingerprint
from eopc_runtime.calibration.journal import journal_folder
from eopc_runtime.calibration.plan import plan_cells
from eopc_runtime.cli import cli
from eopc_runtime.power.base import PROXY
from eopc_runtime.report.residuals import read_residuals
from eopc_runtime.sequence_record import SequenceRecord
from eopc_runtime.validation.compare import Checked

PLAN = plan_cells((32, 400), (32, 300), 12, 19, rounds=1)


@pytest.fixture
def calibrated(lab: Any, planned: Path) -> Any:
    """The lab after a calibration."""
    calibrate(lab.bundle, lab.rig(), Settings(PLAN))
    return lab


def page_of(bundle: Path, *options: object) -> str:
    """The report of a bundle."""
    result = CliRunner().invoke(cli, ["report", str(bundle), *map(str, options)])
    assert result.exit_code == 0, result.output
    return (bundle / "report.html").read_text(encoding="utf-8")


def test_every_cell_of_the_calibration_has_a_residual(calibrated: Any) -> None:
    """31 cells of three tiers, 12 of them fitted; the device is exact, so errors are rounding."""
    bundle = calibrated.bundle
    found = read_residuals(bundle.root, bundle.manifest, bundle.energy)
    assert len(found) == 3 * 31
    assert sum(r.fitted for r in found) == 3 * 12
    assert {(r.n_in, r.n_out) for r in found} == set(PLAN.cells)
    assert max(abs(r.error) for r in found) < 1e-5
    page = page_of(bundle.root)
    assert len(re.findall(r"<title>t\d, \d+ \+ \d+ tokens: ", page)) == 3 * 31
    assert "31 pairs of lengths, 32 to 400 prompt and 32 to 300 new tokens." in page
    assert "holds for 95% of sequences" in page and "fake (VDD_A + VDD_B); idle power 5.00 W" in page


def test_a_device_that_costs_more_shows_it_in_its_residuals(lab: Any, planned: Path) -> None:
    """One visit in two 30 % dearer: residuals on both sides of the price, up to about that."""
    dear = iter(range(10**9))

    def sometimes(device: Any) -> None:
        device.factor = 1.3 if next(dear) // 400 % 2 else 1.0

    lab.device.on_forward = sometimes
    calibrate(lab.bundle, lab.rig(), Settings(PLAN))
    errors = [r.error for r in read_residuals(lab.bundle.root, lab.bundle.manifest, lab.bundle.energy)]
    assert min(errors) < -0.02 and max(errors) > 0.02


def test_a_copy_without_its_journal_says_so(calibrated: Any, tmp_path: Path) -> None:
    """The errors per tier are in the table; the visits are not."""
    copy = shutil.copytree(calibrated.bundle_path, tmp_path / "copy.eopc")
    page = page_of(copy)
    assert "Residuals are not shown" in page and '<th scope="row">t2</th>' in page


def test_journals_of_other_bundles_and_damaged_ones_are_left_out(calibrated: Any) -> None:
    """Another engine, a torn file: as if they were not there."""
    bundle = calibrated.bundle
    (path,) = journal_folder(bundle.root).glob("*.done.jsonl")
    text = path.read_text()
    for bad in (text.replace(fingerprint(bundle.manifest), "0" * 16), text[:-9], "", '{"belongs_to": 3}\n'):
        path.write_text(bad)
        assert read_residuals(bundle.root, bundle.manifest, bundle.energy) == ()


def test_sources_are_named_and_never_mixed(calibrated: Any) -> None:
    """After a calibration plans are in calibrated joules, and what was removed stays in those it was priced with."""
    page = page_of(calibrated.bundle_path)
    assert "sequence (calibrated)" in page and "saves of t0 (prior)" in page
    assert "Joules are calibrated, as charged" in page
    calibrate(calibrated.bundle, calibrated.rig(meter=calibrated.meter(source=PROXY)), Settings(PLAN))
    page = page_of(calibrated.bundle_path)
    assert "sequence (proxy)" in page and "sequence (calibrated)" not in page


def test_sequences_of_a_log_are_added_up_by_plan(planned: Path, lab: Any, tmp_path: Path) -> None:
    """Those of other bundles are left out and counted; overspends are counted against budgets."""
    own = SequenceRecord(
        fingerprint(lab.bundle.manifest), 0.0, 4.0, 0.0, 0.0, 4.0, "t0>t1", ("t0", "t1"), 64, 100, 80.0, 84.0, 100.0,
        84.0, "prior", None, "length", "model",
    )  # fmt: skip
    records = [own, replace(own, energy_j=116.0, finish_reason="stop"), replace(own, engine="other")]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    page = page_of(planned, "--log", log)
    for cell in ("ledger (prior)", "200 J", "1 J", "1 of 2", "1 length, 1 stop"):
        assert f">{cell}</t" in page, cell
    assert "1 sequences of other bundles in the log are left out." in page
    log.write_text(json.dumps(records[2].to_json()) + "\n")
    refused = CliRunner().invoke(cli, ["report", str(planned), "--log", str(log)])
    assert refused.exit_code == 1 and "None of the 1 sequences" in refused.stderr


def test_a_validation_is_shown_only_for_its_own_bundle(planned: Path, lab: Any, tmp_path: Path) -> None:
    """A point per verified sequence, the summary, and the reasons of the others; the meter is the source."""
    good = Checked("1", "t0>t1", 64, 100, 80.0, 84.0, None, 90.0, 4.0, 80, True, None, ())
    bad = replace(good, name="2", measured_j=None, verified=False, notes=("it has gaps",))
    content: dict[str, Any] = {
        "engine": fingerprint(lab.bundle.manifest), "meter": "ina3221 (VDD_IN)", "energy_source": "calibrated",
        "sequences": [asdict(good), asdict(bad)], "notes": ["a note"],
    }  # fmt: skip
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(content))
    page = page_of(planned, "--validation", path)
    assert "1 of 2 sequences verified; mean error 11.1%, 1 above price or budget" in page
    assert "1: t0&gt;t1, 64 + 100 tokens, 90 J" in page
    assert "Sequence 2 is unverified: it has gaps" in page and "meter: ina3221 (VDD_IN)" in page
    path.write_text(json.dumps({**content, "engine": "another"}))
    refused = CliRunner().invoke(cli, ["report", str(planned), "--validation", str(path)])
    assert refused.exit_code == 1 and "is of another bundle" in refused.stderr


def test_eopc_calibrate_makes_the_report_anew(
    lab: Any, planned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The page shows the new prices; if it cannot be written, the calibration stands all the same."""
    monkeypatch.setattr("eopc_runtime.runners.ort_pool.OrtPool", lambda bundle, threads=None: lab.rig().pool)
    monkeypatch.setattr("eopc_runtime.runners.ort.import_onnxruntime", lambda: None)
    ranges = ["--prompt-range", "8:64", "--new-range", "8:64", "--seconds-per-window", "0.001", "--patience", "0"]
    command = ["calibrate", str(planned), "--meter", "proxy", "--proxy-w", "10", "--quick", *ranges]
    page_of(planned)
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert "8 to 64 prompt and 8 to 64 new tokens" in (planned / "report.html").read_text(encoding="utf-8")

    def full(*_: Any) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eopc_runtime.report.write.write_whole", full)
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0 and "report.html was not written" in result.stderr
