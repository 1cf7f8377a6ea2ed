"""An engine is compared with its graph, and one that computes something else is found out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from eopc_compiler.board.engine_set import EngineSet
from eopc_compiler.board.engine_target import BuildTarget
from eopc_compiler.board.tensorrt_build import BuildSettings
from eopc_runtime.cli.main import cli
from eopc_runtime.engine_check import check_against_ort, check_engines, cosine, require_passed, summarise
from eopc_runtime.engines import EngineCheck, read_engines, write_checks
from eopc_runtime.errors import EngineMismatchError, PromptError
from eopc_runtime.runners.choose import open_tensorrt

KEY = "orin-sm87"


def test_a_faithful_engine_passes(make_engines: Any, gpu: Any) -> None:
    """Prompts of four lengths, in chunks, then step by step; only rounding differs."""
    bundle = make_engines()
    found = check_against_ort(bundle, "t1", open_tensorrt(bundle).pool, max_tokens=96)
    assert found.tokens == 4 + 48
    assert found.cosine_min > 0.99999
    assert found.top1_agreement == 1.0
    assert found.ok


def test_all_engines_of_a_bundle_are_checked(make_engines: Any, gpu: Any) -> None:
    """Or the tiers that are named; the records keep what was found, and the GPU's memory is free again afterwards."""
    shown: list[str] = []
    bundle = make_engines(apart=("t2",))
    found = check_engines(bundle, KEY, ("t2",), shown.append)
    assert shown == ["check t2 against ONNX Runtime"]
    assert [(r.tier, r.phase) for r in found if r.check] == [("t2", "prefill"), ("t2", "decode")]
    assert all(r.check and r.check.ok for r in check_engines(bundle, KEY))
    assert all(r.check and r.check.tokens == 4 + 128 for r in read_engines(bundle.root, KEY))
    assert gpu.cuda.used == 0


def test_the_set_that_was_built_is_checked(make_engines: Any, gpu: Any) -> None:
    """Not another one that would fit this machine as well."""
    make_engines(key="orin-nano-sm87")
    bundle = make_engines()
    check_engines(bundle, KEY, ("t0",))
    assert [r.check for r in read_engines(bundle.root, "orin-nano-sm87")] == [None] * 3


def test_what_a_check_found_is_shown(make_engines: Any, gpu: Any) -> None:
    """By inspect, and where engines that failed are run: they are not refused, but not passed over in silence."""
    bundle = make_engines()
    write_checks(bundle.root, KEY, {"t0": EngineCheck(132, 0.99981, 1.0), "t1": EngineCheck(132, 0.62, 0.5)})
    text = CliRunner().invoke(cli, ["inspect", str(bundle.root)]).stdout
    rows = {line.split()[0]: line for line in text.splitlines() if ".plan" in line}
    assert rows["t0.plan"].endswith("  cosine 0.9998, top-1 100.0%")
    assert rows["t1.plan"].endswith("  failed: cosine 0.6200, top-1 50.0%")
    assert rows["t2.plan"].endswith("  -")
    notes = open_tensorrt(bundle).notes
    assert len(notes) == 1 and "t1.plan does not compute what its graph says" in notes[0]


@pytest.fixture
def checked(make_engines: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `eopc engine BUNDLE --check` where the engines are there already; the result, and the records afterwards."""
    bundle = make_engines()
    target = BuildTarget("orin", "tensorrt", "10.3.0", 87, gpu="Orin", driver="12.6")

    def build(args: Any, say: Any, tick: Any) -> EngineSet:
        return EngineSet(target, BuildSettings(256, 24, 24), read_engines(bundle.root, KEY), ())

    monkeypatch.setattr("eopc_compiler.board.engine_set.build_engines", build)

    def run(*options: str) -> Any:
        result = CliRunner().invoke(cli, ["engine", str(bundle.root), "--check", *options])
        return result, read_engines(bundle.root, KEY)

    return run


def test_the_command_checks_and_says_what_is_next(checked: Any) -> None:
    """What was found is printed, kept, and part of the JSON; then the engines are worth calibrating."""
    result, records = checked("--tier", "t1")
    assert result.exit_code == 0, result.stderr
    assert "t1: cosine of the logits at least 1.0000, most likely token the same in 100.0% of 132" in result.stdout
    assert "with.eopc" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("what they cost on this device: eopc calibrate ")
    assert [r.check and r.check.tokens for r in records] == [None, 132, None]
    result, records = checked("--json")
    assert [e["check"]["tokens"] for e in json.loads(result.stdout)["engines"]] == [132, 132, 132]


def test_the_command_keeps_a_check_that_failed(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 1 after the figures; nothing is said of calibration."""
    monkeypatch.setattr("eopc_runtime.engine_check.cosine", lambda a, b: 0.5)
    result, records = checked()
    assert result.exit_code == 1
    assert "t2: cosine of the logits at least 0.5000" in result.stdout
    assert "engine of t0 does not compute what its graph says" in result.stderr
    assert "calibrate" not in result.stderr
    assert [r.check.ok for r in records] == [False, False, False]


def test_engine_check_command_needs_plans(tiny_bundle: Any) -> None:
    """--proxy keeps none."""
    result = CliRunner().invoke(cli, ["engine", str(tiny_bundle), "--proxy", "--check"])
    assert result.exit_code == 1
    assert "--proxy keeps none" in result.stderr


def test_an_engine_that_computes_something_else_is_found_out(make_engines: Any, gpu: Any) -> None:
    """A decode engine whose cache is wrong by one slot gives wrong steps after right prompts."""
    bundle = make_engines()
    pool = open_tensorrt(bundle).pool
    decode: Any = pool.get("t0")._decode  # type: ignore[attr-defined]
    run = decode.run
    decode.run = lambda arena, addresses, length, tokens, wanted: run(arena, addresses, length - 1, tokens, wanted)
    found = check_against_ort(bundle, "t0", pool, max_tokens=64)
    assert not found.ok
    with pytest.raises(EngineMismatchError, match=r"engine of t0 does not compute.*at least 0.99.*eopc engine .*--reb"):
        require_passed(write_checks(bundle.root, KEY, {"t0": found}), bundle.root)
    require_passed(write_checks(bundle.root, KEY, {"t0": EngineCheck(132, 1.0, 1.0)}), bundle.root)


def test_a_short_text_is_refused(make_engines: Any, gpu: Any) -> None:
    """Too little to say anything."""
    bundle = make_engines()
    with pytest.raises(PromptError, match="has 3 tokens"):
        check_against_ort(bundle, "t0", open_tensorrt(bundle).pool, text="abc")


def test_agreement_is_counted_and_the_worst_cosine_kept() -> None:
    """One of four positions has another most likely token, and a right angle."""
    up, right = np.array([0.0, 2.0], np.float32), np.array([1.0, 0.0], np.float32)
    found = summarise([(up, up), (up, 3 * up), (up, right), (right, right)])
    assert found == EngineCheck(4, 0.0, 0.75)
    assert not found.ok


def test_a_value_that_is_no_number_fails() -> None:
    """NaN and infinity, which half precision can give."""
    bad = np.array([np.nan, 1.0], np.float32)
    assert cosine(bad, bad) == -1.0
    assert not summarise([(bad, bad)]).ok
