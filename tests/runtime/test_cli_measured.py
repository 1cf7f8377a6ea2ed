"""eopc calibrate, eopc validate, and eopc run with a meter and a log, without hardware."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eopc_runtime.calibration.calibrate import Settings, calibrate
from eopc_runtime.calibration.identity import fingerprint
from eopc_runtime.calibration.plan import plan_cells
from eopc_runtime.cli import cli
from eopc_runtime.cli import meters as cli_meters
from eopc_runtime.cli.meters import open_meter_for
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.power.probe import Surroundings
from eopc_runtime.reconcile import Guard
from eopc_runtime.session import Session
from eopc_runtime.tokenizer import Tokenizer

SMALL = ("--prompt-range", "8:64", "--new-range", "8:64", "--seconds-per-window", "0.001", "--patience", "0")
PROXY = ("--meter", "proxy", "--proxy-w", "10")
LINE = (
    "{clock} RAM 2513/7620MB (lfb 1x4MB) CPU [11%@729,8%@729] GR3D_FREQ 0% "
    "VDD_IN {mw}mW/6179mW VDD_CPU_GPU_CV 1273mW/2369mW VDD_SOC 1234mW/1392mW\n"
)


def eopc(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def box(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lab, whose runners stand where those of ONNX Runtime stand."""
    monkeypatch.setattr("eopc_runtime.runners.ort_pool.OrtPool", lambda bundle, threads=None: lab.rig().pool)
    monkeypatch.setattr("eopc_runtime.runners.ort.import_onnxruntime", lambda: None)
    return lab


@pytest.fixture
def metered(box: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lab with its meter in place of whatever this machine has."""

    def opened(bundle: Any, name: str, proxy_w: float | None = None, **options: Any) -> Any:
        return box.meter()

    monkeypatch.setattr(cli_meters, "open_meter_for", opened)
    monkeypatch.setattr("eopc_runtime.calibration.measure.METER_WINDOW_S", 0.01)  # of the machine's own clock
    monkeypatch.setattr("eopc_runtime.calibration.measure.LEAD_IN_S", 0.0)
    return box


def calibrated_here(box: Any, **changes: Any) -> None:
    """Calibrate the bundle as this machine, with the lab's meter."""
    found = cli_meters.identity_here(box.bundle, None)
    rig = box.rig(runner=found.runner, module=found.module, **changes)
    calibrate(box.bundle, rig, Settings(plan_cells((32, 400), (32, 300), 12, 19, rounds=1)))


# eopc calibrate


def test_calibrate_prints_the_documented_object_and_the_bundle_verifies(box: Any) -> None:
    """Meter, cells, error and margin, per tier too; progress is on stderr; `eopc inspect` finds the new prices."""
    result = eopc("calibrate", box.bundle_path, *PROXY, *SMALL, "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["meter"], found["energy_source"], found["cells"]) == ("proxy", "proxy", 17)
    assert (found["level"], found["k"], found["statistic"]) == (0.9, 9, "one visit per cell")
    assert found["mape_cv"] == max(tier["mape_cv"] for tier in found["tiers"])
    assert found["margin"] == max(0.0, *(tier["margin"] for tier in found["tiers"]))
    assert [tier["tier"] for tier in found["tiers"]] == ["t0", "t1", "t2"]
    assert found["tiers"][0]["extrapolated"]  # the workload of 64 + 100 tokens is outside 8 to 64
    assert "17 cells" not in result.stdout.split("{")[0]
    assert "8 cells to fit, 9 for the margin" in result.stderr
    assert "51 of 51 visits" in result.stderr
    inspected = json.loads(eopc("inspect", box.bundle_path, "--json").stdout)
    assert (inspected["ok"], inspected["energy"]["source"]) == (True, "proxy")


def test_calibrate_writes_a_table_that_a_person_can_read(box: Any) -> None:
    """Joules of the reference workload, error, margin with its level and k; what is doubtful is on stderr."""
    result = eopc("calibrate", box.bundle_path, *PROXY, *SMALL, "--quick", "--conformal-cells", "19")
    assert result.exit_code == 0, result.stderr
    header, first = result.stdout.splitlines()[:2]
    assert header.split()[:5] == ["tier", "64", "+", "100", "tokens"]
    assert "at 95% (k = 19)" in first
    assert "which holds for 95% of sequences" in result.stdout
    assert "Next: eopc validate" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--meter", "proxy"), "a proxy needs an assumed power in watts"),
        ((*PROXY, "--prompt-range", "32"), "--prompt-range"),
        ((*PROXY, "--new-range", "8:2000"), "do not fit this bundle's context of 1024"),
        ((*PROXY, "--tier", "t7"), 'no tier "t7"'),
        ((*PROXY, "--tier", "t1"), "--tier leaves out t0, t2"),
        (("--meter", "nvml"), "NVML reads the power of a GPU"),
        (("--meter", "proxy", "--proxy-w", "-3"), "give a positive number of watts"),
    ],
)
def test_calibrate_mistakes_are_one_error_on_stderr(box: Any, options: tuple[str, ...], words: str) -> None:
    """Exit code 1, the reason, no traceback, and the bundle as it was."""
    result = eopc("calibrate", box.bundle_path, *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert box.bundle.energy.source == "prior"


def test_without_any_meter_the_reasons_are_listed(lab: Any, tmp_path: Path) -> None:
    """Every meter that was passed over says why, and what to do instead is named."""
    with pytest.raises(DeviceError) as caught:
        open_meter_for(lab.bundle, "auto", around=Surroundings(root=tmp_path, threaded=False))
    text = str(caught.value)
    for words in ("ina3221: this is no Jetson", "nvml-counter: NVML reads", "rapl:", "--meter proxy --proxy-w WATTS"):
        assert words in text


# eopc validate


def test_validate_runs_sequences_and_prints_the_documented_object(metered: Any) -> None:
    """Error, violations and every sequence, with a plot; the device is as it was calibrated."""
    calibrated_here(metered)
    plot = metered.root / "plot.svg"
    result = eopc("validate", metered.bundle_path, "--sequences", 6, "--plot", plot, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (len(found["sequences"]), found["violations"], found["verified"], found["unverified"]) == (6, 0, 6, 0)
    assert found["mape"] < 1e-5
    assert {"predicted_j", "measured_j", "error", "price_j", "verified"} <= set(found["sequences"][0])
    assert plot.read_text().startswith("<svg")


def test_validate_from_logs_gives_known_joules(box: Any) -> None:
    """Two sequences of one log: 20 W for 4 s, and one of 1 s that cannot be told."""
    calibrated_here(box)
    start_s = 1_780_000_000.0
    power, sequences = box.root / "power.log", box.root / "sequences.jsonl"
    lines = []
    for i in range(300):
        clock = time.strftime("%m-%d-%Y %H:%M:%S", time.gmtime(start_s + i // 10))
        lines.append(LINE.format(clock=clock, mw=20_100 if i % 2 else 19_900))
    power.write_text("".join(lines))
    engine = fingerprint(box.bundle.manifest)
    rows = [sequence_line(engine, start_s + 5.05, 4.0), sequence_line(engine, start_s + 12.05, 1.0)]
    sequences.write_text("".join([*rows, sequence_line("another", start_s + 20, 4.0)]))
    result = eopc("validate", box.bundle_path, "--tegrastats", power, "--log", sequences, "--lag", 0, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    first, second = found["sequences"]
    assert first["measured_j"] == pytest.approx(80.0)
    assert first["error"] == pytest.approx(80.0 / 64.0 - 1)
    assert (second["verified"], second["measured_j"]) == (False, None)
    assert (found["violations"], found["verified"], found["unverified"]) == (1, 1, 1)
    assert found["mape"] == pytest.approx(16.0 / 80.0)
    assert "1 sequence(s) of another bundle are left out" in found["notes"]
    assert any("1 s coarse" in note for note in found["notes"])
    shown = eopc("validate", box.bundle_path, "--tegrastats", power, "--log", sequences, "--lag", 0)
    assert "unverified" in shown.stdout
    assert "unverified: sequence 2: 1.00 s" in shown.stderr


def sequence_line(engine: str, start_s: float, seconds: float) -> str:
    """One line of a sequence log, of a sequence that was predicted to cost 64 J and charged 70 J."""
    record = {
        "schema": 1, "kind": "eopc sequence", "engine": engine, "start_wall_s": start_s,
        "end_wall_s": start_s + seconds, "utc_offset_s": 0.0, "start_s": 50.0, "end_s": 50.0 + seconds, "plan": "t0",
        "tiers_used": ["t0"], "prompt_tokens": 64, "completion_tokens": 100, "predicted_j": 64.0, "price_j": 70.0,
        "budget_j": None, "energy_j": 70.0, "energy_source": "calibrated", "power_mode": None,
        "finish_reason": "length", "enforced_by": None, "decisions": None,
    }  # fmt: skip
    return json.dumps(record) + "\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tegrastats", "power.log"), "belong together"),
        (("--tegrastats", "no.log", "--log", "no.jsonl"), "--log no.jsonl cannot be read"),
    ],
)
def test_validate_mistakes_are_one_error_on_stderr(box: Any, options: tuple[str, ...], words: str) -> None:
    """Exit code 1 and the reason."""
    result = eopc("validate", box.bundle_path, *options)
    assert (result.exit_code, words in result.stderr) == (1, True)


def test_a_start_needs_a_zone(box: Any) -> None:
    """A time without one may be hours off."""
    from eopc_runtime.cli.validate import wall_time_s

    assert wall_time_s("2026-05-01T10:30:00+02:00") == wall_time_s("2026-05-01T08:30:00Z") == 1777624200.0
    for text in ("2026-05-01T10:30:00", "half past ten"):
        with pytest.raises(UsageError, match="with its zone"):
            wall_time_s(text)


# eopc run


def test_run_with_a_meter_says_who_kept_the_budget(metered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget is given, so the meter is opened without asking; --meter none leaves it out."""
    calibrated_here(metered)
    monkeypatch.setattr("eopc_runtime.session.Guard", lambda: Guard(lag_s=0.0, settle_s=0.0))  # a fake does not lag
    arguments = ("run", metered.bundle_path, "--prompt", "x" * 40, "--raw", "--budget", "150J", "--max-new-tokens", 250)
    result = eopc(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["enforced_by"] == "meter"
    assert "kept by the meter" in eopc(*arguments).stderr
    assert json.loads(eopc(*arguments, "--meter", "none", "--json").stdout)["enforced_by"] == "model"


@pytest.mark.parametrize(("source", "kept_by"), [("measured", "meter"), ("proxy", "model")])
def test_time_x_watts_keeps_no_budget_as_a_meter(lab: Any, source: str, kept_by: str) -> None:
    """A proxy corrects the account, but what it says is a model all the same."""
    bundle = lab.bundle
    calibrate(bundle, lab.rig(), Settings(plan_cells((32, 400), (32, 300), 12, 19, rounds=1)))
    box = Session(
        lab.bundle,
        lab.rig().pool,
        Tokenizer.open(bundle.root / "tokenizer"),
        clock=lab.device.clock,
        meter=lab.meter(source=source),
        guard=Guard(lag_s=0.0),
    )
    assert box.generate("x" * 40, budget="150J", max_new_tokens=250, raw=True).enforced_by == kept_by


def test_run_appends_to_a_log_that_validate_reads(box: Any) -> None:
    """One line per sequence, with the fingerprint of the bundle."""
    from eopc_runtime.sequence_record import read_records

    log = box.root / "sequences.jsonl"
    for tokens in (5, 9):
        done = eopc("run", box.bundle_path, "--prompt", "hello", "--raw", "--max-new-tokens", tokens, "--log", log)
        assert done.exit_code == 0, done.stderr
    first, second = read_records(log.read_text().splitlines(keepends=True), "log")
    assert (first.completion_tokens, second.completion_tokens) == (5, 9)
    assert first.engine == fingerprint(box.bundle.manifest)
    assert first.end_wall_s >= first.start_wall_s
    assert first.predicted_j == pytest.approx(box.bundle.energy.tiers[0].expected_j(5, 5))
    assert first.decisions is not None


def test_run_refuses_assumed_watts_under_measured_prices(box: Any) -> None:
    """Proxy joules do not correct an account in measured ones; under proxy prices they may."""
    calibrated_here(box)
    result = eopc("run", box.bundle_path, "--prompt", "hi", "--raw", "--budget", "100J", *PROXY)
    assert (result.exit_code, "a proxy counts others" in result.stderr) == (1, True)


def test_prices_of_another_device_warn_and_under_a_strict_budget_refuse(box: Any) -> None:
    """A bundle that was calibrated on another board runs, and says that its prices are of another."""
    calibrate(box.bundle, box.rig(), Settings(plan_cells((32, 400), (32, 300), 12, 19, rounds=1)))
    arguments = ("run", box.bundle_path, "--prompt", "x" * 40, "--raw", "--budget", "100J", "--max-new-tokens", 40)
    loose = eopc(*arguments)
    assert loose.exit_code == 0, loose.stderr
    assert "Warning: The prices were calibrated elsewhere (module: a fake board" in loose.stderr
    strict = eopc(*arguments, "--strict")
    assert (strict.exit_code, "calibrated elsewhere" in strict.stderr) == (1, True)


def test_prices_of_this_device_run_without_a_word(box: Any) -> None:
    """The negative twin."""
    calibrated_here(box)
    arguments = ("run", box.bundle_path, "--prompt", "x" * 40, "--raw", "--budget", "100J", "--max-new-tokens", 40)
    result = eopc(*arguments, "--meter", "none", "--strict")
    assert result.exit_code == 0, result.stderr
    assert "Warning" not in result.stderr
