"""`eopc engine` on tiny bundles, with the real compiler in child processes, and what `eopc inspect` says afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eopc_runtime.cli.main import cli

NO_GPU = '{"init": 100, "driver": "0.0", "devices": []}'
OTHER_GPU = (
    '{"init": 0, "driver": "12.8", "devices": [{"name": "NVIDIA H100", "sm": "9.0", "memory_bytes": 80000000000}]}'
)
needs_rtx = pytest.mark.usefixtures("rtx")


@pytest.fixture(scope="module")
def rtx() -> None:
    """A visible skip without TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx_bindings", reason='needs TensorRT-RTX: pip install "eopc[tensorrt-rtx]"')


@pytest.fixture(scope="module")
def native(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the RTX 4090."""
    return make_bundle(tmp_path_factory.mktemp("native") / "b.eopc", "native", "rtx-4090")


@pytest.fixture(scope="module")
def primitive(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for Orin on JetPack 6."""
    return make_bundle(tmp_path_factory.mktemp("primitive") / "b.eopc", "primitive", "orin")


@pytest.fixture(scope="module")
def built(native: Path, rtx: None) -> dict[str, Any]:
    """`eopc engine` of all tiers, built once."""
    return eopc("engine", native)


def run(*args: object) -> Any:
    """Run `eopc` in this process."""
    return CliRunner().invoke(cli, [str(a) for a in args])


def eopc(*args: object) -> dict[str, Any]:
    """Run a command that succeeds; its JSON."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_engines_for_a_card_are_built_ahead_of_time(built: dict[str, Any], native: Path) -> None:
    """One plan per tier for SM89, none of them a proxy, with the keys that others rely on."""
    assert [e["tier"] for e in built["engines"]] == ["t0", "t1", "t2"]
    assert {"tier", "phase", "target", "proxy", "layers", "bytes", "seconds"} <= built["engines"][0].keys()
    assert {(e["target"], e["proxy"], e["phase"]) for e in built["engines"]} == {("sm89", False, "both")}
    for engine in built["engines"]:
        plan = native / "engines/rtx-4090-sm89" / engine["file"]
        assert plan.stat().st_size == engine["bytes"] > 10_000


def test_engine_layers_and_bytes_fall_with_pruning(built: dict[str, Any]) -> None:
    """A tier without one of two layers has fewer engine layers and a smaller plan; narrower layers a smaller plan."""
    whole, narrow, short = built["engines"]
    assert short["layers"] < 0.8 * whole["layers"]
    assert short["bytes"] < narrow["bytes"] and short["bytes"] < whole["bytes"]


def test_attention_is_fused_in_every_layer_kept_of_native_graphs(built: dict[str, Any]) -> None:
    """As many fused kernels as layers, also in a layer of two query heads."""
    assert [(e["attention_layers"], e["decomposed_attention"]) for e in built["engines"]] == [
        (2, False), (2, False), (1, False),
    ]  # fmt: skip


def test_inspect_verifies_engines(built: dict[str, Any], native: Path) -> None:
    """They are listed with the bundle's files, for people as well."""
    found = eopc("inspect", native)["engines"]
    assert [(e["key"], e["tier"], e["target"]) for e in found] == [
        ("rtx-4090-sm89", tier, "sm89") for tier in ("t0", "t1", "t2")
    ]
    assert "engines rtx-4090-sm89, TensorRT-RTX" in run("inspect", native).stdout


def test_a_second_run_builds_nothing(built: dict[str, Any], native: Path) -> None:
    """Plans with the right fingerprint are kept; one that was damaged is found by inspect and built again."""
    assert all(e["reused"] for e in eopc("engine", native)["engines"])
    plan = native / "engines/rtx-4090-sm89/t2.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    refused = run("inspect", native)
    assert refused.exit_code == 1
    assert "t2.plan does not match its sha256" in refused.stderr and "eopc engine" in refused.stderr
    assert [e["reused"] for e in eopc("engine", native)["engines"]] == [True, True, False]
    assert run("inspect", native).exit_code == 0


@needs_rtx
def test_a_proxy_is_labelled_and_keeps_no_plan(primitive: Path) -> None:
    """Orin's primitive graphs compile for SM86, attention fused in every layer kept; only records stay."""
    result = run("engine", primitive, "--proxy", "--tier", "t0", "--tier", "t2")
    assert result.exit_code == 0, result.stderr
    assert "a proxy for orin" in result.stderr
    assert "proxy: the graphs build for SM86, in place of orin" in result.stdout
    found = eopc("inspect", primitive)["engines"]
    assert [(e["tier"], e["target"], e["proxy"], e["file"]) for e in found] == [
        ("t0", "sm86", True, None), ("t2", "sm86", True, None),
    ]  # fmt: skip
    assert [e["attention_layers"] for e in found] == [2, 1]
    assert not list(primitive.rglob("*.plan"))


@needs_rtx
def test_graphs_of_two_phases_become_two_plans(make_bundle: Any, tmp_path: Path) -> None:
    """Where prompts run through a graph of their own, each gets a plan of its own with one profile."""
    bundle = make_bundle(tmp_path / "b.eopc", "native", "rtx-4090", apart=True)
    built = eopc("engine", bundle, "--tier", "t0")["engines"]
    assert [(e["phase"], e["file"]) for e in built] == [("decode", "t0.decode.plan"), ("prefill", "t0.prefill.plan")]
    assert [(e["attention_layers"], e["decomposed_attention"]) for e in built] == [(2, False), (1, False)]
    assert [e["phase"] for e in eopc("inspect", bundle)["engines"]] == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "cpu runs ONNX graphs as they are; engines are for h100, orin"),
        (("--device", "rtx-409"), 'Did you mean "rtx-4090"'),
        (("--tier", "t9"), 'no tier "t9"'),
        (("--cache-len", "1000"), "between 2 and the bundle's context, 256"),
        (("--cache-len", "64", "--max-prompt-tokens", "65"), "more than the cache holds, 64"),
    ],
)
@needs_rtx
def test_what_cannot_be_built_is_a_sentence(native: Path, arguments: tuple[str, ...], message: str) -> None:
    """Exit 1 and what to do."""
    result = run("engine", native, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [(NO_GPU, "there is no NVIDIA GPU here"), (OTHER_GPU, r"this is NVIDIA H100 (SM90)")],
)
def test_a_board_builds_its_own_engines(
    primitive: Path, answer: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the answer says where to build, and what can be compiled in its place."""
    monkeypatch.setattr("eopc_runtime.gpu_probe.run_probe", lambda: answer)
    result = run("engine", primitive)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "run `eopc engine`; here --proxy compiles the same graphs for SM86" in result.stderr
    assert not (primitive / "engines/orin-sm87").exists()


@pytest.mark.parametrize("option", [("--device", "rtx-4090"), ("--proxy",)])
def test_without_the_extra_the_install_line_is_named(
    native: Path, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TensorRT-RTX: one sentence, exit 1."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    result = run("engine", native, *option)
    assert result.exit_code == 1
    assert 'pip install "eopc[tensorrt-rtx]"' in result.stderr


def test_on_the_board_without_tensorrt_jetpack_is_named(primitive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, but no TensorRT: the message names JetPack's."""
    orin = '{"init": 0, "driver": "12.6", "devices": [{"name": "Orin", "sm": "8.7", "memory_bytes": 8000000000}]}'
    monkeypatch.setattr("eopc_runtime.gpu_probe.run_probe", lambda: orin)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = run("engine", primitive)
    assert result.exit_code == 1
    assert "tensorrt is not installed" in result.stderr and "sudo apt install nvidia-jetpack" in result.stderr
