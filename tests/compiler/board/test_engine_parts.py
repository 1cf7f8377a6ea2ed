"""The parts of `eopc engine` that need no compiler: child process, memory, timing cache, sets that go together."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import helper

from eopc_compiler.board import engine_job
from eopc_compiler.board.compilers import Compiler
from eopc_compiler.board.engine_job import EngineJob, JobResult, run_job
from eopc_compiler.board.engine_memory import build_bytes, check_memory, graph_bytes
from eopc_compiler.board.engine_set import EngineArgs, build_engines, check_graphs, choose_settings
from eopc_compiler.board.engine_target import BuildTarget, check_target, device_engine
from eopc_compiler.board.rules import RefusedGraphError
from eopc_compiler.board.tensorrt_build import BuilderCrashError, BuildSettings, EngineBuildError
from eopc_runtime.bundle import Bundle, Workload
from eopc_runtime.engines import list_engine_sets, read_engines
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.profiles import list_profiles

from .conftest import gather_graph, with_an_adding_scatter

SETTINGS = BuildSettings(256, 256, 32)
ORIN = BuildTarget("orin", "tensorrt", "10.16.1", 87, gpu="Orin", driver="13.0")


@pytest.fixture
def bundle(make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A native bundle on an Orin."""
    monkeypatch.setattr("eopc_compiler.board.engine_set.resolve_target", lambda device, proxy: ORIN)
    return make_bundle(tmp_path / "b.eopc", "native", "orin")  # type: ignore[no-any-return]


def unsorted(graph: Any) -> Any:
    """A gather graph that takes the channels in any order."""
    graph.graph.node[0].attribute.append(helper.make_attribute("sorted", 0))
    return graph


class Builds:
    """Stands for the child process: writes a plan, or refuses the tiers named."""

    def __init__(self, *refused: str) -> None:
        self.jobs: list[EngineJob] = []
        self.refused = refused

    def __call__(self, job: EngineJob, tick: Any) -> JobResult:
        self.jobs.append(job)
        if any(f"/{tier}/" in job.graph for tier in self.refused):
            raise EngineBuildError("TensorRT did not build this graph for SM87: no")
        tick("Building engine 1/6")
        Path(job.plan or "").write_bytes(b"test")
        sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
        return JobResult("10.16.1", 4, sha256, 40, 1, False, 2.0, 1 << 30)


def build(bundle: Path, builds: Builds, **options: Any) -> Any:
    """Build engines without a compiler."""
    return build_engines(EngineArgs(bundle, **options), lambda _text: None, lambda _text: None, builds)


def test_tiers_share_shapes_and_one_timing_cache(bundle: Path) -> None:
    """Context and workload of the bundle, unless told otherwise."""
    builds = Builds()
    build(bundle, builds, workspace_bytes=1 << 30)
    assert {job.timing_cache for job in builds.jobs} == {str(bundle.resolve() / "engines/orin-sm87/timing.cache")}
    assert {job.settings for job in builds.jobs} == {replace(SETTINGS, workspace_bytes=1 << 30)}
    assert [r.decomposed_attention for r in read_engines(bundle, "orin-sm87")] == [True, True, False]


def test_a_pass_chooses_no_more_tokens_than_a_topk_takes(make_bundle: Any, tmp_path: Path) -> None:
    """32 and half of 7614 more are 3839: a longer prompt runs in several passes, and a longer pass is refused."""
    manifest = Bundle.open(make_bundle(tmp_path / "b.eopc", "native", "orin", apart=True), verify=False).manifest
    t0 = manifest.tiers[0]
    assert t0.prefill is not None
    halved = replace(t0, prefill=replace(t0.prefill, share=0.5))
    long = replace(manifest, context=20_000, workload=Workload(10_000, 16), tiers=(halved, *manifest.tiers[1:]))
    assert choose_settings(long, EngineArgs(Path("b"))).max_prompt_tokens == 7646
    assert choose_settings(replace(long, tiers=manifest.tiers), EngineArgs(Path("b"))).max_prompt_tokens == 10_000
    with pytest.raises(UsageError, match="priced for passes of 256 or more"):
        choose_settings(long, EngineArgs(Path("b"), max_prompt_tokens=128))
    with pytest.raises(UsageError, match="Give at most 7646"):
        choose_settings(long, EngineArgs(Path("b"), max_prompt_tokens=8000))


def test_a_refused_tier_leaves_those_before_it(bundle: Path) -> None:
    """The next run goes on from there; a bundle with half a set verifies."""
    with pytest.raises(EngineBuildError):
        build(bundle, Builds("t1"))
    assert [r.tier for r in read_engines(bundle, "orin-sm87")] == ["t0"]
    builds = Builds()
    result = build(bundle, builds)
    assert [job.graph for job in builds.jobs] == ["tiers/t1/model.onnx", "tiers/t2/model.onnx"]
    assert result.reused == (("t0", "both"),)


def test_a_first_build_that_fails_leaves_nothing(bundle: Path) -> None:
    """No empty set, no empty folder."""
    with pytest.raises(EngineBuildError):
        build(bundle, Builds("t0"))
    assert list_engine_sets(bundle) == ()
    assert not (bundle / "engines").exists()


def test_a_set_never_mixes_cache_lengths(bundle: Path) -> None:
    """A tier built for another cache drops the others, plans and records; the same cache keeps them."""
    build(bundle, Builds())
    build(bundle, Builds(), tiers=("t1",), rebuild=True)
    assert [r.tier for r in read_engines(bundle, "orin-sm87")] == ["t0", "t1", "t2"]
    build(bundle, Builds(), tiers=("t1",), cache_len=128)
    assert [(r.tier, r.cache_len) for r in read_engines(bundle, "orin-sm87")] == [("t1", 128)]
    assert [p.name for p in (bundle / "engines/orin-sm87").glob("*.plan")] == ["t1.plan"]


def test_other_weights_are_other_engines(bundle: Path) -> None:
    """After the bundle was built again, nothing is reused."""
    build(bundle, Builds())
    replace_file(bundle, "weights.bin", (bundle / "weights.bin").read_bytes()[:-1] + b"!")
    assert build(bundle, Builds()).reused == ()


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Give a file of a bundle other content, and list that in the manifest."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["files"] if entry["path"] == name]
    entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def break_graph(bundle: Path, name: str) -> None:
    """Give a graph of a bundle an operator of eopc's in a form that no TensorRT has: a scatter that adds."""
    replace_file(bundle, name, with_an_adding_scatter(bundle / name).SerializeToString())


def test_a_graph_that_breaks_a_rule_is_refused_before_anything_is_compiled(bundle: Path) -> None:
    """Node, rule and remedy; also when it is the last tier's, and engines that were there stay."""
    build(bundle, Builds(), tiers=("t0",))
    break_graph(bundle, "tiers/t2/model.onnx")
    builds = Builds()
    with pytest.raises(RefusedGraphError) as refusal:
        build(bundle, builds)
    assert builds.jobs == []
    for words in (
        "graph of t2 breaks",
        "tail (ScatterElements)",
        "TensorRT 10.15",
        "rule scatter-reduction",
        "scatter the sums",
    ):
        assert words in str(refusal.value)
    assert [r.tier for r in read_engines(bundle, "orin-sm87")] == ["t0"]
    assert build(bundle, builds, tiers=("t1",)).reused == ()


def test_the_graphs_of_both_phases_are_held_against_the_rules(make_bundle: Any, bundle: Path, tmp_path: Path) -> None:
    """Where a tier has a graph per phase, the message says which."""
    apart = make_bundle(tmp_path / "apart.eopc", "native", "orin", apart=True)
    break_graph(apart, "tiers/t0/prefill.onnx")
    with pytest.raises(RefusedGraphError, match="graph of t0 prefill breaks"):
        build(apart, Builds())


@pytest.fixture
def choosing(make_bundle: Any, bundle: Path, tmp_path: Path) -> Path:
    """A native bundle on an Orin whose t0 chooses channels by its prompts."""
    return make_bundle(tmp_path / "choosing.eopc", "native", "orin", choosing=True)  # type: ignore[no-any-return]


def test_a_tier_that_chooses_has_three_engines(choosing: Path) -> None:
    """Prefill, gather and decode, each with its record; attention is none of the second one's business."""
    builds, said = Builds(), []
    build_engines(EngineArgs(choosing, tiers=("t0",)), said.append, lambda _text: None, builds)
    assert [(job.phase, job.graph) for job in builds.jobs] == [
        ("prefill", "tiers/t0/prefill.onnx"),
        ("gather", "tiers/t0/gather.onnx"),
        ("decode", "tiers/t0/model.onnx"),
    ]
    records = {record.phase: record for record in read_engines(choosing, "orin-sm87")}
    assert {phase: record.file for phase, record in records.items()} == {
        phase: f"t0.{phase}.plan" for phase in ("prefill", "gather", "decode")
    }
    assert not records["gather"].decomposed_attention
    assert len({record.fingerprint.settings_sha256 for record in records.values()}) == 3
    (line,) = [line for line in said if line.startswith("t0 gather")]
    assert "40 engine layers; peak memory" in line and "attention" not in line
    assert len(build(choosing, Builds(), tiers=("t0",)).reused) == 3


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (
            gather_graph(3840, 4096),
            r"most\.TopK \(TopK\): count is 3840; TensorRT 10\.15.*rule topk-size.*larger units",
        ),
        (unsorted(gather_graph()), r"most\.TopK \(TopK\): sorted is 0; .*rule topk-sorted"),
    ],
    ids=["too many", "unsorted"],
)
def test_the_graph_that_gathers_is_held_against_the_rules(graph: Any, words: str, choosing: Path) -> None:
    """TopK has limits, and they are known before anything is compiled."""
    check_graphs(Bundle.open(choosing), Bundle.open(choosing).manifest.tiers, ORIN, SETTINGS)
    replace_file(choosing, "tiers/t0/gather.onnx", graph.SerializeToString())
    builds = Builds()
    with pytest.raises(RefusedGraphError, match=r"graph of t0 gather breaks .*\n.*" + words):
        build(choosing, builds)
    assert builds.jobs == []


def test_a_proxy_keeps_to_the_rules_of_its_device(make_bundle: Any, tmp_path: Path) -> None:
    """Native graphs pass TensorRT-RTX; as a proxy for JetPack 6 they would say nothing."""
    bundle = Bundle.open(make_bundle(tmp_path / "b.eopc", "native", "orin"))
    rtx = BuildTarget("orin", "tensorrt_rtx", "1.7.1.116", 86, proxy=True)
    check_graphs(bundle, bundle.manifest.tiers, rtx, SETTINGS)
    pretended = Bundle(bundle.root, replace(bundle.manifest, dialect="primitive"), bundle.energy)
    with pytest.raises(RefusedGraphError, match=r"TensorRT 10\.3"):
        check_graphs(pretended, bundle.manifest.tiers, rtx, SETTINGS)


def test_graphs_are_held_against_the_rules_without_torch(bundle: Path) -> None:
    """On a board there is none, and no library of checkpoints either."""
    code = (
        "import sys; [sys.modules.__setitem__(n, None) for n in ('torch', 'transformers', 'safetensors', 'onnx_ir')];"
        "from eopc_compiler.board.engine_set import BuildSettings, BuildTarget, Bundle, check_graphs;"
        "b = Bundle.open(sys.argv[1]); target = BuildTarget('orin', 'tensorrt', sys.argv[2], 87);"
        "check_graphs(b, b.manifest.tiers, target, BuildSettings(256, 256, 32))"
    )
    done = [subprocess.run([sys.executable, "-c", code, bundle, version], check=False, capture_output=True, text=True)
            for version in ("10.16.1", "10.3.0")]  # fmt: skip
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 1 and "RefusedGraphError" in done[1].stderr and "rule opset" in done[1].stderr


def test_native_graphs_are_refused_by_an_old_tensorrt() -> None:
    """TensorRT 10.3 lacks their operators; the message says which bundle to build."""
    with pytest.raises(DeviceError, match=r"TensorRT 10\.3\.0 .* --device orin --dialect primitive"):
        check_target(replace(ORIN, version="10.3.0"), "native", "int8")
    check_target(replace(ORIN, version="10.3.0"), "primitive", "int8")
    check_target(ORIN, "native", "int8")


def test_8_bit_floats_need_an_ada_or_later() -> None:
    """The message names both architectures and what to build instead."""
    with pytest.raises(DeviceError, match=r"SM87 does not multiply 8-bit floats.*SM89.*--precision int8"):
        check_target(ORIN, "native", "fp8")
    check_target(replace(ORIN, compute_capability=89), "native", "fp8")


def test_every_nvidia_profile_has_a_target_and_a_proxy() -> None:
    """Cards compile for themselves, boards and servers for the nearest architecture below."""
    engines = {p.name: p.engine for p in list_profiles() if p.engine}
    targets = {name: (e.compiler, e.compute_capability, e.proxy) for name, e in engines.items()}
    assert targets["orin-nano"] == targets["orin-nx"] == targets["orin"] == ("tensorrt", 87, 86)
    assert targets["h100"] == ("tensorrt", 90, 89)
    assert targets["thor"][0] == "tensorrt"
    assert {n: t[1:] for n, t in targets.items() if t[0] == "tensorrt_rtx"} == {
        "rtx-3060": (86, 86), "rtx-4090": (89, 89), "rtx-5090": (120, 120),
    }  # fmt: skip
    with pytest.raises(DeviceError, match="cpu runs ONNX graphs"):
        device_engine("cpu")


def test_a_build_that_does_not_fit_is_refused_with_the_numbers(bundle: Path) -> None:
    """Swap counts; without a figure from the system nothing is refused."""
    opened = Bundle.open(bundle)
    manifest, tiers = opened.manifest, opened.manifest.tiers
    needed = build_bytes(manifest, tiers[0])
    assert needed > build_bytes(manifest, tiers[2])
    tight = {"MemAvailable": needed - 1, "SwapFree": 0}
    with pytest.raises(DeviceError, match=r"The build of t0 takes about .* MiB .*--no-memory-check"):
        check_memory(manifest, tiers, True, tight)
    assert "takes about" in check_memory(manifest, tiers, False, tight)[0]
    assert "of swap" in check_memory(manifest, tiers, True, {**tight, "SwapFree": 1 << 20})[0]
    check_memory(manifest, tiers, True, {"MemAvailable": None, "SwapFree": None})


def test_the_largest_graph_of_a_tier_decides_on_its_memory(choosing: Path) -> None:
    """Tables to gather from are in the compute type; a prompt that runs through more weights than a step needs more."""
    opened = Bundle.open(choosing)
    manifest, info = opened.manifest, opened.manifest.tiers[0]
    assert graph_bytes(manifest, info, "gather") == 3 * 128 * 128 * 2
    table = manifest.model.vocab_size * 128 * 2
    assert graph_bytes(manifest, info, "decode") == info.cost.weight_bytes + table
    prompts = replace(info.cost, weight_bytes=2 * info.cost.weight_bytes, prefill=None, gather_bytes=0)
    larger = replace(info, cost=replace(info.cost, prefill=prompts))
    assert graph_bytes(manifest, larger, "prefill") == 2 * info.cost.weight_bytes + table
    assert build_bytes(manifest, larger) == build_bytes(manifest, info) + 5 * info.cost.weight_bytes


JOB = EngineJob("tensorrt_rtx", 86, "/nowhere", "x.onnx", "both", BuildSettings(64, 32, 32), 1, None, None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "lack of memory.*--tier"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed \\(SIGSEGV\\) inside TensorRT"),
        ("raise RuntimeError('broken')", "failed: RuntimeError: broken"),
        ("print('[1]')", "nothing was said"),
    ],
)
def test_a_child_that_dies_is_a_sentence(command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, crashed, or broken: this process goes on."""
    monkeypatch.setattr(engine_job, "COMMAND", command)
    with pytest.raises(BuilderCrashError, match=message):
        run_job(JOB, lambda _text: None)


def test_the_childs_progress_result_and_refusal_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that native code prints are passed over; a refusal keeps its type."""
    result = JobResult("1.7", 5, "ab", 40, 2, False, 1.5, 1000)
    says = [json.dumps(e) for e in ({"step": ["Optimizing graph", 3, 30]}, {"result": engine_job.asdict(result)})]
    monkeypatch.setattr(engine_job, "COMMAND", f"print('noise'); [print(line) for line in {says!r}]")
    ticks: list[str] = []
    assert run_job(JOB, ticks.append) == result
    assert ticks == ["Optimizing graph 3/30"]
    refusal = json.dumps({"refused": "DeviceError", "message": "no SM87"})
    monkeypatch.setattr(engine_job, "COMMAND", f"print({refusal!r})")
    with pytest.raises(DeviceError, match="no SM87"):
        run_job(JOB, ticks.append)


class FakeConfig:
    """A builder config that takes a timing cache as TensorRT does: not one of another version."""

    def __init__(self) -> None:
        self.cache: SimpleNamespace | None = None

    def create_timing_cache(self, content: bytes) -> SimpleNamespace:
        return SimpleNamespace(content=content, serialize=lambda: content + b"+")

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"old") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> SimpleNamespace | None:
        return self.cache


@pytest.mark.parametrize(("found", "kept"), [(None, b"+"), (b"same", b"same+"), (b"old", b"+")])
def test_a_timing_cache_is_continued_if_it_fits(found: bytes | None, kept: bytes, tmp_path: Path) -> None:
    """A cache of another version or GPU counts as empty; TensorRT-RTX has none."""
    path, config = tmp_path / "timing.cache", FakeConfig()
    if found is not None:
        path.write_bytes(found)
    trt = Compiler("tensorrt", SimpleNamespace(__version__="10.16.1"))
    trt.load_timing_cache(config, path)
    assert trt.timing_cache(config) == kept
    rtx = Compiler("tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    rtx.load_timing_cache(object(), path)
    assert rtx.timing_cache(object()) is None


def test_a_plan_is_looked_into_where_there_is_a_gpu() -> None:
    """The inspector gives records or bare names, by verbosity; both are named layers."""
    text = json.dumps({"Layers": [{"Name": "_gemm_mha_v2", "LayerType": "kgen"}, "plain"]})
    inspector = SimpleNamespace(get_engine_information=lambda kind: text)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    module = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan else None),
        LayerInformationFormat=SimpleNamespace(JSON=0),
    )
    assert Compiler("tensorrt", module).inspect(None, b"plan") == ("Name: _gemm_mha_v2,", "Name: plain,")
    assert Compiler("tensorrt", module).inspect(None, b"") == ()
    assert Compiler("tensorrt_rtx", module).inspect(None, b"plan") == ()


def test_board_modules_are_loaded_by_the_command_without_torch() -> None:
    """`eopc engine` runs where neither torch nor the checkpoint libraries are."""
    code = (
        "import sys; [sys.modules.__setitem__(n, None) for n in ('torch', 'transformers', 'safetensors', 'onnx_ir')];"
        "from eopc_compiler.board import engine_set, engine_job, tensorrt_graph; import eopc_compiler.cli.engine"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
