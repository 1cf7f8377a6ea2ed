"""Which CPUs multiply int8 codes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from eopc_runtime.cpu_features import overflows
from eopc_runtime.runners.ort import rounds_inputs


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fma avx avx2", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("AMD64", "avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_x86_without_vnni_overflows(tmp_path: Path, machine: str, flags: str | None, expected: bool) -> None:
    """So it is taken to do where nothing can be read."""
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert overflows(machine, cpuinfo) is expected


def test_graphs_that_round_inputs_are_told_from_those_that_only_unpack_weights() -> None:
    """By the operator's name; DequantizeLinear alone is how every quantised weight is stored."""
    onnx = pytest.importorskip("onnx")
    nodes = {op: onnx.helper.make_node(op, ["x", "s"], ["y"]) for op in ("QuantizeLinear", "DequantizeLinear")}
    graphs = {op: onnx.helper.make_graph([node], "g", [], []).SerializeToString() for op, node in nodes.items()}
    assert rounds_inputs(graphs["QuantizeLinear"]) and not rounds_inputs(graphs["DequantizeLinear"])
