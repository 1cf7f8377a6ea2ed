"""The graphs eopc writes keep to the rules of the TensorRT they are for, and a build stops where one does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from eopc_compiler import pipeline
from eopc_compiler.board.rules import RefusedGraphError, all_lists, check_graph, list_of, lists_for
from eopc_compiler.board.tensorrt_graph import outline_for_tensorrt, prepare_for_tensorrt
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.tier_graphs import TierGraphs
from eopc_runtime.errors import BundleError
from eopc_runtime.profiles import list_profiles

from .conftest import with_a_foreign_operator

CACHE_LEN = 48
EMITTED = [  # no device has int4 in the primitive dialect, see the test below
    *((precision, "native", "t1") for precision in ("fp32", "fp16", "fp8", "int8", "int4")),
    *((precision, "primitive", "t1") for precision in ("fp32", "fp16", "int8")),
    ("int8", "native", "t0"),
    ("int4", "native", "t0"),  # its int4 pieces are joined after their products
    ("fp8", "native", "t0"),  # and so are its 8-bit floats
    ("fp16", "primitive", "t0"),
]
LISTS = {rules.name: rules for rules in all_lists()}


def tier(make_tier: Any, precision: str, dialect: str, name: str = "t0") -> Path:
    """The graph of a tiny tier, its weights.bin two folders above."""
    root: Path = make_tier(precision, dialect, "float32" if precision == "fp32" else "float16", name)
    return root / "tiers" / name / "model.onnx"


@pytest.mark.parametrize("kind", EMITTED, ids="-".join)
def test_every_graph_we_write_passes_its_lists(kind: tuple[str, str, str], make_tier: Any) -> None:
    """Primitive graphs pass 10.3, native ones 10.15 and 11.4, and both TensorRT-RTX, as TensorRT gets them."""
    precision, dialect, name = kind
    model = outline_for_tensorrt(tier(make_tier, precision, dialect, name), CACHE_LEN)
    meant_for = [rules for rules in LISTS.values() if dialect in rules.dialects]
    assert len(meant_for) == {"native": 3, "primitive": 2}[dialect]
    for rules in meant_for:
        assert check_graph(model, rules) == ()


@pytest.mark.parametrize(("precision", "dialect"), [("fp16", "primitive"), ("int8", "native"), ("fp16", "native")])
def test_a_prompt_that_chooses_tokens_passes_its_lists(precision: str, dialect: str, make_tier: Any) -> None:
    """Scores, TopK of a length that is known when it runs, and rows scattered back, without a reduction."""
    root = make_tier(precision, dialect, "float16", "t0", depth=1, share=0.5)
    model = outline_for_tensorrt(root / "tiers" / "t0" / "prefill.onnx", CACHE_LEN)
    assert {"TopK", "ScatterND", "Where"} <= {n.op_type for n in model.graph.node}
    for rules in LISTS.values():
        assert dialect not in rules.dialects or check_graph(model, rules) == ()


def test_int4_in_the_primitive_dialect_is_refused(make_tier: Any) -> None:
    """INT4 comes with ONNX opset 21, TensorRT 10.3 is documented to 20: unproven, so refused, and no profile has it."""
    model = outline_for_tensorrt(tier(make_tier, "int4", "primitive", "t1"), CACHE_LEN)
    found = check_graph(model, LISTS["tensorrt-10.3"])
    assert {(v.op, v.rule) for v in found} == {("DequantizeLinear", "int4")}
    assert "--precision int8" in found[0].remedy
    for profile in list_profiles():
        assert "int4" not in profile.precisions_for("primitive")


@pytest.mark.parametrize("kind", [("int8", "native", "t1"), ("int4", "native", "t0"), ("int8", "primitive", "t1")])
def test_the_outline_is_the_prepared_graph_without_weights(
    kind: tuple[str, str, str], make_tier: Any, tmp_path: Path
) -> None:
    """Same operators, same names, same types and shapes of constants; no weights.bin is there to be read."""
    path = tier(make_tier, *kind)
    outline = outline_for_tensorrt(Path(shutil.copy(path, tmp_path)), CACHE_LEN)
    prepared = prepare_for_tensorrt(path.parents[2], path, CACHE_LEN)
    assert outline.graph.node == prepared.graph.node
    assert [v.name for v in outline.graph.input] == [v.name for v in prepared.graph.input]
    constants = [{t.name: (t.data_type, tuple(t.dims)) for t in m.graph.initializer} for m in (outline, prepared)]
    assert constants[0] == constants[1]
    assert len(constants[0]) > 20
    assert outline.ByteSize() < prepared.ByteSize() - 10_000  # the joined constants
    assert check_graph(prepared, LISTS["tensorrt-rtx-1.7"]) == check_graph(outline, LISTS["tensorrt-rtx-1.7"]) == ()


def test_a_graph_not_yet_prepared_is_refused(make_tier: Any) -> None:
    """The bundle's own graph joins int8 pieces and has an open cache: what is judged has to be what TensorRT gets."""
    model = onnx.load(str(tier(make_tier, "int8", "native", "t0")), load_external_data=False)
    assert {"operand-type", "cache-static"} <= {v.rule for v in check_graph(model, LISTS["tensorrt-10.15"])}


def test_an_outline_needs_a_tier(tmp_path: Path) -> None:
    """A file that is no graph is named."""
    (tmp_path / "x.onnx").write_bytes(b"no protobuf")
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        outline_for_tensorrt(tmp_path / "x.onnx", CACHE_LEN)


@pytest.mark.parametrize(
    ("device", "dialect", "expected"),
    [
        ("orin", "primitive", ["tensorrt-10.3"]),
        ("orin-nano", "native", ["tensorrt-10.15", "tensorrt-11.4"]),
        ("h100", "native", ["tensorrt-10.15", "tensorrt-11.4"]),
        ("rtx-4090", "native", ["tensorrt-rtx-1.7"]),
        ("cpu", "native", []),
    ],
)
def test_device_and_dialect_choose_the_lists(device: str, dialect: str, expected: list[str]) -> None:
    """JetPack 6 has 10.3, JetPack 7 has 10.16 or 11.4 and one graph serves both."""
    assert [rules.name for rules in lists_for(device, dialect)] == expected


@pytest.mark.parametrize(
    ("compiler", "release", "expected"),
    [
        ("tensorrt", (10, 3), "tensorrt-10.3"),
        ("tensorrt", (10, 14), "tensorrt-10.3"),
        ("tensorrt", (10, 16), "tensorrt-10.15"),
        ("tensorrt", (11, 0), "tensorrt-10.15"),
        ("tensorrt", (12, 1), "tensorrt-11.4"),
        ("tensorrt", (8, 6), "tensorrt-10.3"),
        ("tensorrt_rtx", (1, 7), "tensorrt-rtx-1.7"),
        ("tensorrt_rtx", (1, 6), "tensorrt-rtx-1.7"),
    ],
)
def test_a_compiler_found_somewhere_is_held_to_the_newest_list_it_is_not_older_than(
    compiler: str, release: tuple[int, int], expected: str
) -> None:
    """Between two lists nothing is known of what was added; before the first one its rules are the best guess."""
    assert list_of(compiler, release).name == expected


def test_primitive_graphs_pass_later_versions_too(make_tier: Any) -> None:
    """A bundle for JetPack 6 may be compiled on JetPack 7 as well."""
    for precision in ("fp16", "int8"):
        model = outline_for_tensorrt(tier(make_tier, precision, "primitive", "t1"), CACHE_LEN)
        assert [check_graph(model, list_of("tensorrt", release)) for release in ((10, 16), (11, 4))] == [(), ()]


def test_every_gpu_profile_has_a_list() -> None:
    """A new device without one would be built unchecked."""
    for profile in list_profiles():
        for dialect in profile.dialects:
            assert bool(lists_for(profile.name, dialect)) == (profile.name != "cpu"), (profile.name, dialect)


def test_a_build_stops_at_a_graph_that_the_device_refuses(make_tier: Any, tmp_path: Path) -> None:
    """The pass right after export: an operator of another dialect is named with rule and remedy; the cpu takes it."""
    assert pipeline.PASSES.index(pipeline.check_operators) == pipeline.PASSES.index(pipeline.export_graphs) + 1
    sound = tier(make_tier, "fp16", "primitive")
    broken = tmp_path / "model.onnx"
    onnx.save(with_a_foreign_operator(sound), str(broken))

    def check(device: str, *graphs: Path, **prompts: Path) -> None:
        args, profile = SimpleNamespace(context=CACHE_LEN), SimpleNamespace(name=device)
        tiers = [TierGraphs(graph, prompts.get(f"t{i}")) for i, graph in enumerate(graphs)]
        pipeline.check_operators(
            SimpleNamespace(  # type: ignore[arg-type]
                args=args, profile=profile, dialect=DIALECTS["primitive"], graphs=tiers
            )
        )

    check("orin", sound, sound)
    check("cpu", broken)
    with pytest.raises(
        RefusedGraphError, match=r"graph of t1 breaks.*\n.*tail \(QuickGelu\).*rule domain.*standard ONNX"
    ):
        check("orin", sound, broken)
    with pytest.raises(RefusedGraphError, match="graph of t0 breaks"):
        check("orin", sound, t0=broken)


def test_every_emitted_violation_is_listed_up_to_a_limit(make_tier: Any) -> None:
    """A native graph given to 10.3: the message shows the first findings and counts the rest."""
    model = outline_for_tensorrt(tier(make_tier, "fp16", "native", "t1"), CACHE_LEN)
    found = check_graph(model, LISTS["tensorrt-10.3"])
    assert {v.op for v in found} == {"model", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention"}
    message = str(RefusedGraphError("t0", found))
    assert f"and {len(found) - 8} more" in message
    assert message.count("\n") == 9
    assert "more" not in str(RefusedGraphError("t0", [replace(v, remedy="") for v in found[:8]]))
