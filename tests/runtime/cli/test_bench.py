"""`eopc bench`: medians of a clock, a process per tier, clear mistakes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result

from eopc_runtime.cli.bench import bench_tier
from eopc_runtime.session import Session

Eopc = Callable[..., Result]
Child = Callable[..., subprocess.CompletedProcess[str]]


def test_bench_medians_come_from_the_clock(bundle: Path) -> None:
    """With a clock that we set, the medians are exact and the warm-up run does not count."""
    # per run: start, first token, end; the warm-up is slow, one timed run is an outlier
    readings = iter([0, 90, 190, 200, 201, 203, 300, 301, 303, 400, 440, 480])
    with Session.open(bundle) as session:
        row = bench_tier(session, "t1", 10, 5, 3, clock=lambda: float(next(readings)))
    assert (row["tier"], row["ttft_s"]) == ("t1", 1.0)
    assert (row["prefill_tokens_per_s"], row["decode_tokens_per_s"]) == (10.0, 2.0)
    assert row["peak_rss_bytes"] > 1 << 20


def test_bench_json_has_speeds_machine_and_versions(eopc: Eopc, bundle: Path) -> None:
    """One tier is measured in this process; the object says on what machine and with which versions."""
    options = ("--tier", "t0", "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 2)
    value = json.loads(eopc("bench", bundle, *options, "--threads", 1, "--json").stdout)
    assert set(value["tiers"][0]) == {
        *("tier", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "peak_rss_bytes", "runner"),
    }
    assert value["machine"]["threads"] == 1
    assert value["machine"]["cpu"]
    assert {"eopc", "onnxruntime"} <= set(value["versions"])
    assert "decode tokens/s" in eopc("bench", bundle, *options).stdout


def test_bench_of_all_tiers_runs_each_in_its_own_process(
    eopc: Eopc, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --tier, every tier is a child `eopc bench --tier`, whose row is passed on."""
    commands = []

    def fake_run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        row = {"tier": command[command.index("--tier") + 1], "ttft_s": 0.5}
        return SimpleNamespace(returncode=0, stdout=json.dumps({"tiers": [row]}).encode())

    monkeypatch.setattr("subprocess.run", fake_run)
    result = eopc("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--threads", 2, "--json")
    assert [row["tier"] for row in json.loads(result.stdout)["tiers"]] == ["t0", "t1"]
    assert all(command[-2:] == ["--threads", "2"] for command in commands)


def test_bench_child_that_fails_gives_its_reason_and_code(child: Child, bare_bundle: Path) -> None:
    """A real child that cannot load its graph says so itself, and the parent exits with its code."""
    pytest.importorskip("onnxruntime", reason="the child needs ONNX Runtime to refuse the graph")
    done = child("-m", "eopc_runtime.cli", "bench", str(bare_bundle), "--prompt-tokens", "8", "--new-tokens", "4")
    assert done.returncode == 1
    assert done.stderr.count("Error: ") == 1
    assert "tiers/t0/model.onnx" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "options",
    [("--prompt-tokens", 60, "--new-tokens", 5), ("--tier", "t5", "--prompt-tokens", 8, "--new-tokens", 4)],
)
def test_bench_mistakes_are_clear(eopc: Eopc, bundle: Path, options: tuple[object, ...]) -> None:
    """More tokens than the context, and an unknown tier, are errors."""
    result = eopc("bench", bundle, *options)
    assert result.exit_code == 1
    assert "context of 64" in result.stderr or "t5" in result.stderr
