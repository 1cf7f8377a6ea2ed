"""Graphs prepared for TensorRT compute what the bundle's graphs compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from eopc_compiler.board import tensorrt_graph
from eopc_compiler.board.tensorrt_graph import prepare_for_tensorrt
from eopc_runtime.errors import BundleError

from .conftest import gather_graph

CACHE_LEN = 48
KINDS = [
    ("int8", "native", "float16"),
    ("int8", "native", "float32"),
    ("int8", "primitive", "float16"),
    ("fp32", "native", "float32"),
    ("int4", "native", "float16"),
    ("fp8", "native", "float16"),
]
CODES = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN)
GRAPH = Path("tiers/t1/model.onnx")


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_prepared_graph_gives_the_same_logits_and_caches(kind: tuple[str, str, str], make_tier: Any) -> None:
    """A prompt of five tokens, then one decoded token: same logits and caches before and after."""
    root = make_tier(*kind, "t1")
    before = _prefill_and_decode((root / GRAPH).read_bytes(), root)
    after = _prefill_and_decode(prepare_for_tensorrt(root, GRAPH, CACHE_LEN).SerializeToString(), root)
    # the same kernels should run on the same values (observed error 0); fp16 may round in another order elsewhere
    tolerance = 1e-6 if kind[2] == "float32" else 5e-3
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert np.ptp(before["logits"]) > 1, "logits that hardly differ would prove nothing"


def test_cache_dimension_becomes_a_number_everywhere(make_tier: Any) -> None:
    """No input or output keeps the symbol, the tokens stay open."""
    root = make_tier("int8", "native", "float16", "t1")
    model = prepare_for_tensorrt(root, GRAPH, CACHE_LEN)
    shapes = {v.name: _shape(v) for v in (*model.graph.input, *model.graph.output)}
    assert shapes["k_cache_0"] == shapes["k_cache_0_out"] == [1, 1, CACHE_LEN, 64]
    assert shapes["attn_mask"] == [1, 1, "seq", CACHE_LEN]
    assert "cache_len" not in str(model.graph.value_info)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_quantised_constant_feeds_a_dequantize(kind: tuple[str, str, str], make_tier: Any) -> None:
    """What TensorRT demands of int8 and int4 constants, and that no Concat joins constants any more."""
    model = prepare_for_tensorrt(make_tier(*kind, "t1"), GRAPH, CACHE_LEN)
    quantised = {t.name for t in model.graph.initializer if t.data_type in CODES and t.dims}
    constants = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            assert not quantised & set(node.input), f"{node.op_type} reads a quantised constant"
        if node.op_type == "Concat" and set(node.input) <= constants:
            joined = [t for t in model.graph.initializer if t.name in node.input]
            assert all(t.data_type == TensorProto.INT64 for t in joined), "only shapes may be joined at build time"
    assert bool(quantised) == (kind[0] != "fp32")


def test_untouched_weights_stay_in_the_file(make_tier: Any) -> None:
    """Matrices that tiers cut by rows, the embedding and the head remain external."""
    root = make_tier("int8", "native", "float16", "t1")
    model = prepare_for_tensorrt(root, GRAPH, CACHE_LEN)
    inline = {t.name for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL}
    assert any("qkv_proj" in name for name in inline)
    assert not any(word in name for name in inline for word in ("o_proj", "down_proj", "embed_tokens", "lm_head"))


def test_a_workspace_takes_the_joined_constants(make_tier: Any, tmp_path: Path) -> None:
    """With a workspace the graph holds shapes alone, and TensorRT's loader finds the same values beside it."""
    root = make_tier("int8", "native", "float16", "t1")
    inline = {t.name: t for t in prepare_for_tensorrt(root, GRAPH, CACHE_LEN).graph.initializer}
    model = prepare_for_tensorrt(root, GRAPH, CACHE_LEN, workspace=tmp_path)
    assert model.ByteSize() < 100_000
    assert (tmp_path / "weights.bin").resolve() == (root / "weights.bin").resolve()
    moved = 0
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") == tensorrt_graph.JOINED_FILE:
            start = int(where["offset"])
            data = (tmp_path / where["location"]).read_bytes()[start : start + int(where["length"])]
            assert data == inline[tensor.name].raw_data
            moved += 1
    assert moved == 2  # codes and scales of qkv_proj of the layer that keeps one of two groups


@pytest.mark.parametrize("dialect", ["native", "primitive"])
def test_every_cache_is_written_into_its_own_buffer(dialect: str, make_tier: Any) -> None:
    """TensorRT updates caches in place: output k_cache_0_out must come from input k_cache_0 and no other."""
    model = prepare_for_tensorrt(make_tier("int8", dialect, "float16", "t1"), GRAPH, CACHE_LEN)
    writers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        if output.name.endswith("_out"):
            writer = writers[output.name]
            assert (writer.op_type, writer.input[0]) in {
                ("TensorScatter", output.name.removesuffix("_out")),
                ("ScatterND", output.name.removesuffix("_out")),
            }


def test_unused_pieces_are_gone(make_tier: Any) -> None:
    """A joined constant replaces its pieces; none is stored twice."""
    model = prepare_for_tensorrt(make_tier("int8", "native", "float16", "t1"), GRAPH, CACHE_LEN)
    used = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= used


def test_a_graph_without_caches_is_refused(tmp_path: Path) -> None:
    """An ONNX file that is no tier is named, and what was expected."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    with pytest.raises(BundleError, match="no dimension 'cache_len'"):
        prepare_for_tensorrt(tmp_path, Path("x.onnx"), CACHE_LEN)


def test_rows_are_gathered_from_a_dequantised_table(tmp_path: Path) -> None:
    """As the embedding's: TensorRT gathers no int8 constant; the rows are the same, in the order of their energies."""
    path = tmp_path / "gather.onnx"
    onnx.save(gather_graph(stored="int8"), str(path))
    model = prepare_for_tensorrt(tmp_path, Path("gather.onnx"), None)
    assert [node.op_type for node in model.graph.node] == ["TopK", *["DequantizeLinear", "Gather"] * 3]
    energies = np.random.default_rng(5).permutation(128).astype(np.float32)
    before, after = (run({"ffn_energy_0": energies}, content) for content in (path.read_bytes(), model))
    for name, rows in before.items():
        np.testing.assert_array_equal(after[name], rows, err_msg=name)
        assert rows.shape == (32, 128)
    table = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "up_table_0"))
    best = np.argsort(-energies)[:32]
    assert (np.sign(before["up_rows_0"]) == np.sign(table[best])).all()


def test_a_graph_that_gathers_has_no_open_shape(make_tier: Any) -> None:
    """A tier's graph is not one, and neither is the other way round."""
    with pytest.raises(BundleError, match=r"model\.onnx has input_ids of an open shape.*gathers weights"):
        prepare_for_tensorrt(make_tier("fp16", "native", "float16", "t1"), GRAPH, None)


def test_damaged_files_are_refused(tmp_path: Path, make_tier: Any) -> None:
    """A file that is not ONNX, and a weights.bin that is too short, give one sentence each."""
    (tmp_path / "x.onnx").write_bytes(b"no protobuf")
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        prepare_for_tensorrt(tmp_path, Path("x.onnx"), CACHE_LEN)
    root = make_tier("int8", "native", "float16", "t1")
    (tmp_path / "model.onnx").write_bytes((root / GRAPH).read_bytes())
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64)
    with pytest.raises(BundleError, match=r"weights\.bin does not hold"):
        prepare_for_tensorrt(tmp_path, Path("model.onnx"), CACHE_LEN)


def test_joined_constants_beyond_one_file_are_refused(make_tier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More inline bytes than protobuf takes are refused with a way out, before TensorRT sees them."""
    monkeypatch.setattr(tensorrt_graph, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(BundleError, match="with a workspace folder"):
        prepare_for_tensorrt(make_tier("int8", "native", "float16", "t1"), GRAPH, CACHE_LEN)


def test_one_cache_slot_is_a_programming_error(tmp_path: Path) -> None:
    """TensorRT would squeeze a dimension of one."""
    with pytest.raises(ValueError, match="at least two"):
        prepare_for_tensorrt(tmp_path, GRAPH, 1)


def run(feeds: dict[str, Any], model: Any) -> dict[str, Any]:
    """Outputs of a model without files beside it, by name."""
    import onnxruntime as ort

    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _shape(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _prefill_and_decode(model: bytes, root: Path) -> dict[str, Any]:
    """Outputs of five tokens and a sixth after them, the second run on the caches of the first."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in session.get_inputs()}
    dtype = np.float16 if inputs["attn_mask"].type == "tensor(float16)" else np.float32
    caches = {n: np.zeros((1, i.shape[1], CACHE_LEN, 64), dtype) for n, i in inputs.items() if "_cache_" in n}
    outputs = {}
    for start, tokens in ((0, [3, 1, 4, 1, 5]), (5, [9])):
        positions = np.arange(start, start + len(tokens))
        mask = np.where(np.arange(CACHE_LEN)[None] <= positions[:, None], 0, -30000).astype(dtype)
        feeds = {
            "input_ids": np.array([tokens]),
            "position_ids": positions[None],
            "write_index": np.array([start]),
            "attn_mask": mask[None, None],
            "logits_index": np.arange(len(tokens)),
        }
        names = [o.name for o in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feeds, **caches}), strict=True))
        caches = {name: outputs[f"{name}_out"] for name in caches}
    return outputs
