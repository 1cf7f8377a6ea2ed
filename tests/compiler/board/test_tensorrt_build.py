"""Every kind of graph for TensorRT devices survives TensorRT's real builder, on machines without a GPU too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from eopc_compiler.board.compilers import open_compiler
from eopc_compiler.board.engine_job import EngineJob, run_job
from eopc_compiler.board.tensorrt_build import (
    BuildSettings,
    BuiltPlan,
    EngineBuildError,
    build_plan,
    layer_lines,
    profile_shapes,
)
from eopc_compiler.board.tensorrt_graph import prepare_for_tensorrt
from eopc_runtime.errors import DeviceError, MissingExtraError

from .conftest import gather_graph

SETTINGS = BuildSettings(128, 64, 32)


@pytest.fixture(scope="module")
def rtx() -> Any:
    """TensorRT-RTX, or a visible skip."""
    pytest.importorskip("tensorrt_rtx_bindings", reason='needs TensorRT-RTX: pip install "eopc[tensorrt-rtx]"')
    return open_compiler("tensorrt_rtx", "a test")


@pytest.mark.parametrize(
    ("precision", "dialect", "tier"),
    [
        ("fp16", "native", "t1"),
        ("int8", "native", "t0"),
        ("int8", "native", "t1"),
        ("int4", "native", "t1"),
        ("fp16", "primitive", "t0"),
        ("fp16", "primitive", "t1"),
        ("int8", "primitive", "t1"),
    ],
)
def test_builds_for_sm86(precision: str, dialect: str, tier: str, make_tier: Any, rtx: Any) -> None:
    """Whole tiers and pruned ones with column pieces, in all precisions of both dialects."""
    plan = _compile(make_tier(precision, dialect, "float16", tier), tier, 86)
    assert plan.bytes > 10_000
    assert plan.seconds > 0
    assert len(plan.layers) > 20  # two layers, head and embedding, for two profiles
    profiles_with_attention = {name for name in ("_myl0_", "_myl1_") if any(name in x for x in plan.layers)}
    assert len(profiles_with_attention) == 2, "both profiles are listed"


def test_builds_for_sm89(make_tier: Any, rtx: Any) -> None:
    """A second architecture, so that nothing hangs on the first."""
    assert _compile(make_tier("int8", "native", "float16", "t0"), "t0", 89).bytes > 10_000


@pytest.mark.parametrize("tier", ["t0", "t1"])
def test_8_bit_floats_are_multiplied_as_such_on_sm89(tier: str, make_tier: Any, rtx: Any) -> None:
    """Products of q/k/v, gate and up read FP8 on both sides; SM86 has no such multiplier and refuses the graph."""
    root = make_tier("fp8", "native", "float16", tier)
    products = [line for line in _compile(root, tier, 89).layers if "gemm" in line and "Datatype: FP8" in line]
    assert len(products) >= 4
    with pytest.raises(EngineBuildError, match="fp8"):
        _compile(root, tier, 86)


def test_builds_from_a_workspace(make_tier: Any, rtx: Any, tmp_path: Path) -> None:
    """TensorRT reads joined constants from their own file and weights.bin through a link."""
    root = make_tier("int8", "native", "float16", "t1")
    model = prepare_for_tensorrt(root, Path("tiers/t1/model.onnx"), SETTINGS.cache_len, workspace=tmp_path)
    assert build_plan(rtx, model, tmp_path, 86, SETTINGS).bytes > 10_000


def test_builds_with_biases_cut_into_pieces(make_tier: Any, rtx: Any) -> None:
    """Qwen2's q, k and v biases are joined like its matrices."""
    _compile(make_tier("int8", "native", "float16", "t1", bias=True), "t1", 86)


def test_attention_of_the_whole_model_is_fused(make_tier: Any, rtx: Any) -> None:
    """Two layers, two profiles: four attention kernels, and no fallback was needed."""
    plan = _compile(make_tier("int8", "native", "float16", "t0"), "t0", 86)
    assert sum("_mha_" in line for line in plan.layers) == 4
    assert (plan.attention_layers, plan.fallback) == (2, False)


def test_attention_that_is_refused_is_allowed_to_be_decomposed(make_tier: Any, rtx: Any) -> None:
    """A native layer with fewer than four query heads is refused at first: it builds all the same, and says so."""
    plan = _compile(make_tier("int8", "native", "float16", "t1"), "t1", 86)
    assert plan.fallback


def test_a_phase_of_its_own_is_half_of_both(make_tier: Any, rtx: Any) -> None:
    """One profile: fewer engine layers, the same attention kernels, a smaller plan."""
    root = make_tier("fp16", "primitive", "float16", "t0")
    both, decode = _compile(root, "t0", 86), _compile(root, "t0", 86, "decode")
    assert (decode.profiles, decode.attention_layers) == (1, 2)
    assert len(decode.layers) < 0.7 * len(both.layers)
    assert decode.bytes < 0.7 * both.bytes


@pytest.mark.parametrize(("dialect", "target"), [("native", 86), ("primitive", 86), ("native", 89)])
def test_a_prompt_that_skips_layers_builds(dialect: str, target: int, make_tier: Any, rtx: Any) -> None:
    """Its graph has no logits, and fused attention in the layers that run only: one of two."""
    root = make_tier("fp16", dialect, "float16", "t0", depth=1)
    model = prepare_for_tensorrt(root, Path("tiers/t0/prefill.onnx"), SETTINGS.cache_len)
    plan = build_plan(rtx, model, root, target, SETTINGS, "prefill")
    assert (plan.profiles, plan.attention_layers) == (1, 1)


@pytest.mark.parametrize(("dialect", "target"), [("native", 86), ("primitive", 86), ("native", 89)])
def test_a_prompt_that_chooses_tokens_builds(dialect: str, target: int, make_tier: Any, rtx: Any) -> None:
    """How many depends on the prompt's length when the plan runs; fused attention in both layers that run."""
    root = make_tier("fp16", dialect, "float16", "t0", depth=1, share=0.5)
    path = Path("tiers/t0/prefill.onnx")
    assert [n.op_type for n in onnx.load(root / path, load_external_data=False).graph.node].count("TopK") == 1
    plan = build_plan(rtx, prepare_for_tensorrt(root, path, SETTINGS.cache_len), root, target, SETTINGS, "prefill")
    assert (plan.profiles, plan.attention_layers) == (1, 2)


@pytest.mark.parametrize(("stored", "opset", "target"), [("fp16", 20, 86), ("int8", 24, 86), ("fp16", 24, 89)])
def test_the_graph_that_gathers_weights_builds(stored: str, opset: int, target: int, rtx: Any, tmp_path: Path) -> None:
    """In a child process, with its tables in a file beside it: one plan of fixed shapes, without attention."""
    path = tmp_path / "gather.onnx"
    graph = gather_graph(stored=stored, opset=opset)
    onnx.save(graph, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    job = EngineJob(
        rtx.name, target, str(tmp_path), path.name, "gather", SETTINGS, 100_000, str(tmp_path / "p.plan"), None
    )
    built = run_job(job, lambda _text: None)
    assert (tmp_path / "p.plan").stat().st_size == built.bytes > 3 * 128 * 128  # the tables are in it
    assert (built.attention_layers, built.fallback) == (0, False)
    assert built.layers >= 1


def test_progress_is_tensorrts_own(make_tier: Any, rtx: Any) -> None:
    """Phases with steps that count up to what was announced."""
    seen: list[tuple[str, int, int]] = []
    _compile(make_tier("fp16", "native", "float16", "t2"), "t2", 86, report=lambda *step: seen.append(step))
    assert {"Building engine", "Optimizing graph"} <= {phase for phase, _, _ in seen}
    assert all(1 <= done <= total for _, done, total in seen)


def test_unsupported_target_is_refused(make_tier: Any, rtx: Any) -> None:
    """Orin itself (SM87) is no target of TensorRT-RTX; the message names those that are."""
    with pytest.raises(DeviceError, match=r"does not build for SM87.*SM86"):
        _compile(make_tier("int8", "native", "float16", "t0"), "t0", 87)


def test_parse_refusal_carries_tensorrts_words(tmp_path: Path, rtx: Any) -> None:
    """An operator TensorRT does not know fails in the parser."""
    with pytest.raises(EngineBuildError, match=r"TensorRT-RTX did not parse this graph for SM86: .*[Bb]ernoulli"):
        build_plan(rtx, _graph(helper.make_node("Bernoulli", ["k_cache_0"], ["y"])), tmp_path, 86, SETTINGS)


def test_build_refusal_carries_tensorrts_words(tmp_path: Path, rtx: Any) -> None:
    """TopK of 4096 parses and then does not build: the build is what counts."""
    node = helper.make_node("TopK", ["k_cache_0", "k"], ["y", "i"], axis=-1)
    count = helper.make_tensor("k", TensorProto.INT64, [1], [4096])
    with pytest.raises(EngineBuildError, match=r"did not build this graph for SM86: \S+"):
        build_plan(rtx, _graph(node, count), tmp_path, 86, SETTINGS)


@pytest.mark.parametrize("name", ["tensorrt_rtx_bindings", "onnx"])
def test_missing_packages_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorRT-RTX, or without onnx, the message is an install line."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*eopc\[tensorrt-rtx\]"):
        open_compiler("tensorrt_rtx", "a proxy compile")


def test_profile_shapes_open_only_the_token_dimension() -> None:
    """Prefill ranges over its tokens, one position is asked for logits, decode is fixed."""
    mask = profile_shapes("attn_mask", (1, 1, -1, 128), (1, 32, 64))
    assert mask == ((1, 1, 1, 128), (1, 1, 32, 128), (1, 1, 64, 128))
    assert profile_shapes("logits_index", (-1,), (1, 32, 64)) == ((1,), (1,), (1,))
    assert profile_shapes("input_ids", (1, -1), (1, 1, 1)) == ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("values", [(1, 1, 1), (128, 256, 32), (128, 64, 65), (128, 64, 0)])
def test_settings_that_do_not_fit_together_are_a_programming_error(values: tuple[int, int, int]) -> None:
    """An update longer than the cache would be refused by TensorRT only after minutes."""
    with pytest.raises(ValueError, match="do not fit together"):
        BuildSettings(*values)


def test_attention_kernels_are_counted_by_name_alone() -> None:
    """Inputs that carry the word do not count; the count is of one profile."""
    lines = ("Name: _gemm_mha_v2_myl0_7, Inputs: x", "Name: _gemv_mha_v1_myl1_4, Inputs: y", "Name: a, Inputs: mha")
    assert BuiltPlan(b"", 1.0, lines, 2, False, None).attention_layers == 1


def test_layer_lines_end_before_the_bindings() -> None:
    """The verbose list is cut at its blank line; without a list there are no layers."""
    assert layer_lines("Layers:\nName: a\nName: b\n\nBindings:\nx\n") == ("Name: a", "Name: b")
    assert layer_lines("") == ()


def _compile(root: Path, tier: str, compute_capability: int, phase: str = "both", report: Any = None) -> BuiltPlan:
    model = prepare_for_tensorrt(root, Path("tiers") / tier / "model.onnx", SETTINGS.cache_len)
    compiler = open_compiler("tensorrt_rtx", "a test")
    return build_plan(compiler, model, root, compute_capability, SETTINGS, phase, report=report)


def _graph(node: Any, *constants: Any) -> Any:
    value = helper.make_tensor_value_info("k_cache_0", TensorProto.FLOAT16, [1, 1, 8, 8192])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph([node], "g", [value], [out], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
