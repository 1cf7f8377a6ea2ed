"""The pass of `eopc build` that shows tiers to TensorRT's optimiser, on a staged bundle."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eopc_compiler import proxies
from eopc_compiler.board.engine_job import JobResult
from eopc_compiler.board.engine_set import build_engine
from eopc_compiler.board.engine_target import BuildTarget
from eopc_compiler.board.tensorrt_build import BuilderCrashError, EngineBuildError
from eopc_compiler.build import bundle_files
from eopc_compiler.cache import StageCache
from eopc_compiler.pipeline import PASSES
from eopc_compiler.state import BuildArgs, CompileState
from eopc_runtime.bundle import Bundle
from eopc_runtime.profiles import load_profile

PROXY = BuildTarget("orin", "tensorrt_rtx", "1.7.1", 86, proxy=True)


@pytest.fixture
def compiled(make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Runs the pass with a stand-in for the child process; returns what the manifest says of each tier."""
    root = make_bundle(tmp_path / "b.eopc", "native", "orin", **getattr(request, "param", {}))
    jobs: list[str] = []

    def run(outcome: Any = None, device: str = "orin", proxy: str = "ends") -> tuple[list[dict[str, Any]], list[str]]:
        def child(job: Any, tick: Any) -> JobResult:
            jobs.append(job.graph)
            assert job.plan is None, "a proxy's plan is not kept"
            if outcome is not None:
                raise outcome
            return JobResult("1.7.1", 5000, "ab", 40, 1, False, 2.0, 1 << 30)

        monkeypatch.setattr(proxies, "build_engine", partial(build_engine, run=child))
        cache = StageCache(tmp_path / "work")
        state = CompileState(
            BuildArgs(device=device, proxy=proxy), cache, load_profile(device), lambda _t: None, lambda _t: None,
            staged=root,
        )  # fmt: skip
        try:
            tiers = proxies.compile_proxies(state).tiers
        finally:
            cache.close()
        read = [dict(t.proxy) for t in Bundle.open(root).manifest.tiers]
        assert not tiers or [t["proxy"] for t in tiers] == read
        return read, jobs

    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX is there, or seems to be."""
    monkeypatch.setattr(proxies, "resolve_target", lambda device, proxy: PROXY)


@pytest.mark.usefixtures("installed")
def test_the_largest_and_the_smallest_tier_are_compiled(compiled: Any) -> None:
    """The manifest has their engine layers, bytes and attention kernels, labelled, and why the other has none."""
    first, second, third = compiled()[0]
    assert first["target"] == third["target"] == "sm86"
    assert first["engines"] == [
        {"phase": "both", "layers": 40, "attention_layers": 1, "decomposed_attention": True, "bytes": 5000,
         "seconds": 2.0}
    ]  # fmt: skip
    assert second == {"skipped": "--proxy ends"}


@pytest.mark.usefixtures("installed")
def test_a_second_build_takes_finished_proxies_from_the_cache(compiled: Any) -> None:
    """All tiers once; then nothing is compiled again."""
    assert len(compiled(proxy="all")[1]) == 3
    assert len(compiled(proxy="all")[1]) == 3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("compiled", [{"choosing": True}], indirect=True)
def test_all_three_graphs_of_a_tier_that_chooses_are_compiled(compiled: Any) -> None:
    """The one that gathers weights has no attention to fuse."""
    notes, jobs = compiled()
    assert jobs[:3] == [f"tiers/t0/{name}.onnx" for name in ("prefill", "gather", "model")]
    assert [(e["phase"], e["decomposed_attention"]) for e in notes[0]["engines"]] == [
        ("prefill", False), ("gather", False), ("decode", True),
    ]  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_a_refused_graph_ends_the_build(compiled: Any) -> None:
    """A bundle that its device cannot build is not written; the message names the way round."""
    with pytest.raises(EngineBuildError, match=r"t0 computes what PyTorch computes, but .*no TopK.*--proxy none"):
        compiled(EngineBuildError("TensorRT-RTX did not build this graph for SM86: no TopK."))


@pytest.mark.usefixtures("installed")
def test_a_crash_says_nothing_of_the_graph(compiled: Any) -> None:
    """It is noted, and the build goes on."""
    assert compiled(BuilderCrashError("the engine builder was killed"))[0][0] == {
        "skipped": "the engine builder was killed"
    }


def test_without_the_extra_the_reason_is_noted(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and the manifest names the extra."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    notes, jobs = compiled()
    assert jobs == []
    assert "tensorrt_rtx_bindings is not installed" in notes[0]["skipped"]


def test_nothing_is_compiled_where_nothing_is_wanted(compiled: Any) -> None:
    """--proxy none, and a device without engines."""
    assert compiled(proxy="none") == ([{"skipped": "--proxy none"}] * 3, [])
    assert PASSES[-2] is proxies.compile_proxies  # the page about the bundle comes after it
    before = compiled(proxy="none")[0]
    assert compiled(device="cpu") == (before, [])


def test_a_bundles_engines_are_files_of_the_bundle(make_bundle: Any, tmp_path: Path) -> None:
    """A build may replace a bundle with engines, and still not one with something else in it."""
    root = make_bundle(tmp_path / "b.eopc", "native", "orin")
    folder = root / "engines" / "orin-sm87"
    folder.mkdir(parents=True)
    for name in ("engines.json", "t0.plan", "timing.cache"):
        (folder / name).write_bytes(b"{}")
    (root / "engines" / "notes.txt").write_text("mine")
    found = bundle_files(root) or set()
    assert {"engines/orin-sm87/t0.plan", "engines/orin-sm87/timing.cache"} <= found
    assert "engines/notes.txt" not in found
