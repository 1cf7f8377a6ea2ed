"""Every kind of graph for TensorRT devices survives TensorRT's real builder, on machines without a GPU too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from eopc_compiler.board.tensorrt_graph import prepare_for_tensorrt
from eopc_compiler.board.tensorrt_rtx import (
    EngineBuildError,
    compile_proxy,
    import_tensorrt_rtx,
    layer_lines,
    profile_shapes,
)
from eopc_runtime.errors import DeviceError, MissingExtraError

CACHE_LEN = 128


@pytest.fixture(scope="module")
def rtx() -> Any:
    """TensorRT-RTX, or a visible skip."""
    return pytest.importorskip("tensorrt_rtx_bindings", reason='needs TensorRT-RTX: pip install "eopc[tensorrt-rtx]"')


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
    assert plan.plan_bytes > 10_000
    assert plan.seconds > 0
    assert len(plan.layers) > 20  # two layers, head and embedding, for two profiles
    profiles_with_attention = {name for name in ("_myl0_", "_myl1_") if any(name in x for x in plan.layers)}
    assert len(profiles_with_attention) == 2, "both profiles are listed"


def test_builds_for_sm89(make_tier: Any, rtx: Any) -> None:
    """A second architecture, so that nothing hangs on the first."""
    plan = _compile(make_tier("int8", "native", "float16", "t0"), "t0", 89)
    assert plan.compute_capability == 89


def test_builds_from_a_workspace(make_tier: Any, rtx: Any, tmp_path: Path) -> None:
    """TensorRT reads joined constants from their own file and weights.bin through a link."""
    root = make_tier("int8", "native", "float16", "t1")
    model = prepare_for_tensorrt(root, Path("tiers/t1/model.onnx"), CACHE_LEN, workspace=tmp_path)
    assert compile_proxy(model, tmp_path, 86, prompt_tokens=64).plan_bytes > 10_000


def test_builds_with_biases_cut_into_pieces(make_tier: Any, rtx: Any) -> None:
    """Qwen2's q, k and v biases are joined like its matrices."""
    _compile(make_tier("int8", "native", "float16", "t1", bias=True), "t1", 86)


def test_attention_of_the_whole_model_is_fused(make_tier: Any, rtx: Any) -> None:
    """Two layers, two profiles: four attention kernels, and no fallback was needed."""
    plan = _compile(make_tier("int8", "native", "float16", "t0"), "t0", 86)
    assert plan.fused_attention == 4
    assert not plan.decomposed_attention


def test_attention_without_a_kernel_is_decomposed_and_reported(make_tier: Any, rtx: Any) -> None:
    """A layer with fewer than four query heads has no fused kernel: it builds all the same, and says so."""
    plan = _compile(make_tier("int8", "native", "float16", "t1"), "t1", 86)
    assert plan.decomposed_attention


def test_unsupported_target_is_refused(make_tier: Any, rtx: Any) -> None:
    """Orin itself (SM87) is no target of TensorRT-RTX; the message names those that are."""
    with pytest.raises(DeviceError, match=r"does not build for SM87.*SM86"):
        _compile(make_tier("int8", "native", "float16", "t0"), "t0", 87)


def test_parse_refusal_carries_tensorrts_words(tmp_path: Path, rtx: Any) -> None:
    """An operator TensorRT does not know fails in the parser."""
    with pytest.raises(EngineBuildError, match=r"did not parse this graph for SM86: .*[Bb]ernoulli"):
        compile_proxy(_graph(helper.make_node("Bernoulli", ["k_cache_0"], ["y"])), tmp_path, 86)


def test_build_refusal_carries_tensorrts_words(tmp_path: Path, rtx: Any) -> None:
    """TopK of 4096 parses and then does not build: the build is what counts."""
    node = helper.make_node("TopK", ["k_cache_0", "k"], ["y", "i"], axis=-1)
    count = helper.make_tensor("k", TensorProto.INT64, [1], [4096])
    with pytest.raises(EngineBuildError, match=r"did not build this graph for SM86: \S+"):
        compile_proxy(_graph(node, count), tmp_path, 86)


def test_missing_bindings_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorRT-RTX the message is an install line."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(MissingExtraError, match=r"eopc\[tensorrt-rtx\]"):
        import_tensorrt_rtx()


def test_profile_shapes_open_only_the_token_dimension() -> None:
    """Prefill ranges over its tokens, one position is asked for logits unless all are wanted, decode is fixed."""
    assert profile_shapes("attn_mask", (1, 1, -1, 128), 64) == ((1, 1, 1, 128), (1, 1, 64, 128), (1, 1, 64, 128))
    assert profile_shapes("logits_index", (-1,), 64) == ((1,), (1,), (1,))
    assert profile_shapes("logits_index", (-1,), 64, eval_logits=True) == ((1,), (64,), (64,))
    assert profile_shapes("input_ids", (1, -1), 1) == ((1, 1), (1, 1), (1, 1))


def test_layer_lines_end_before_the_bindings() -> None:
    """The verbose list is cut at its blank line; without a list there are no layers."""
    assert layer_lines("Layers:\nName: a\nName: b\n\nBindings:\nx\n") == ("Name: a", "Name: b")
    assert layer_lines("") == ()


def _compile(root: Path, tier: str, compute_capability: int) -> Any:
    model = prepare_for_tensorrt(root, Path("tiers") / tier / "model.onnx", CACHE_LEN)
    return compile_proxy(model, root, compute_capability, prompt_tokens=64)


def _graph(node: Any, *constants: Any) -> Any:
    value = helper.make_tensor_value_info("k_cache_0", TensorProto.FLOAT16, [1, 1, 8, 8192])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph([node], "g", [value], [out], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
