"""weights.bin: alignment, shared bytes of row prefixes, pieces that join to a tier's matrix, int4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eopc_compiler.quantize import FP8, Quantized, round_to_nearest
from eopc_compiler.weights import (
    ALIGNMENT,
    ColumnMatrix,
    Entry,
    RowMatrix,
    Stored,
    WeightReader,
    WeightWriter,
)


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def quantized(rows: int, columns: int, grid: str, block: int | None) -> Quantized:
    return round_to_nearest(random_tensor(rows, columns), grid, block, torch.float16)


def stored_parts(entry: Entry) -> Iterator[Stored]:
    """Every run of bytes of an entry."""
    if isinstance(entry, Stored):
        yield entry
    elif isinstance(entry, RowMatrix):
        yield from (s for s in (entry.codes, entry.scales) if s is not None)
    else:
        yield from (s for p in entry.pieces for s in (p.codes, p.scales) if s is not None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_a_tensor_comes_back_as_written(tmp_path: Path, dtype: str) -> None:
    """Every stored type round-trips, with its bytes counted."""
    tensor = random_tensor(3, 10) if "float" in dtype else torch.arange(-8, 7).repeat(2).view(3, 10).to(torch.int8)
    with WeightWriter(tmp_path / "w") as writer:
        writer.tensor(torch.ones(3), "float32")
        stored = writer.tensor(tensor, dtype)
    expected = tensor.half() if dtype == "float16" else tensor
    assert torch.equal(WeightReader(tmp_path / "w").stored(stored), expected)
    assert stored.nbytes == {"float32": 120, "float16": 60, "int8": 30, "int4": 15}[dtype]
    assert sum(writer.histogram.values()) == stored.nbytes + 12


def test_offsets_are_aligned_and_runs_do_not_overlap(tmp_path: Path) -> None:
    """Every tensor starts on 64 bytes, after the one before it, inside the file."""
    with WeightWriter(tmp_path / "w") as writer:
        entries: list[Entry] = [
            writer.tensor(random_tensor(5), "float32"),
            writer.columns(random_tensor(8, 15), [(3, 3), (3, 1), (3, 1)], [1, 3], "float16"),
            writer.columns(quantized(64, 12, "int4", 32), [(6, 1), (6, 1)], [2, 6], "float16"),
            writer.rows(quantized(64, 7, "int8", 32), "float16"),
            writer.rows(random_tensor(9, 3), "float32", 3),
        ]
    end = 0
    for part in (p for e in entries for p in stored_parts(e)):
        assert part.offset % ALIGNMENT == 0 and 0 <= part.offset - end < ALIGNMENT
        end = part.offset + part.nbytes
    assert (tmp_path / "w").stat().st_size == end


@pytest.mark.parametrize(("grid", "block"), [(None, None), ("int8", None), ("int8", 32), ("int4", 32), (FP8, None)])
def test_prefix_rows_are_the_same_bytes(tmp_path: Path, grid: str | None, block: int | None) -> None:
    """A tier that keeps fewer rows points at the same offset, reads fewer bytes, and gets the matrix's first rows."""
    matrix = random_tensor(96, 6) if grid is None else quantized(96, 6, grid, block)
    dense = matrix if isinstance(matrix, Tensor) else matrix.dequantize()
    with WeightWriter(tmp_path / "w") as writer:
        entry = writer.rows(matrix, "float32", rows_per_unit=32)
    reader = WeightReader(tmp_path / "w")
    whole_codes, whole_scales = entry.kept(96)
    assert torch.equal(reader.rows(entry, 96), dense)
    for count in (32, 64):
        codes, scales = entry.kept(count)
        assert codes.offset == whole_codes.offset and codes.nbytes * 96 == whole_codes.nbytes * count
        assert torch.equal(reader.rows(entry, count), dense[:count])
        if scales is not None and whole_scales is not None:
            assert scales.offset == whole_scales.offset
            assert scales.shape == ((count // 32, 6) if block else (6,))  # a per-channel scale serves any rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([None, ("int8", None), ("int8", 32), ("int4", 32), (FP8, None)]))
def test_column_pieces_join_to_exactly_the_tiers_matrix(
    tmp_path: Path, data: st.DataObject, layout: tuple[str, int | None] | None
) -> None:
    """For any parts side by side and any cuts: the pieces of a tier are the first units of each part, in order."""
    units = data.draw(st.integers(1, 5))
    widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    bounds = sorted(data.draw(st.sets(st.integers(1, units))) | {units})
    total = units * sum(widths)
    matrix = random_tensor(32, total) if layout is None else quantized(32, total, *layout)
    dense = matrix if isinstance(matrix, Tensor) else matrix.dequantize()
    with WeightWriter(tmp_path / "w") as writer:
        entry = writer.columns(matrix, [(units, w) for w in widths], bounds, "float32")
    reader = WeightReader(tmp_path / "w")
    assert len(entry.pieces) == (1 if len(bounds) == 1 else len(bounds) * len(widths))
    for kept in bounds:
        columns, start = list[int](), 0
        for width in widths:
            columns += range(start, start + kept * width)
            start += units * width
        assert torch.equal(reader.columns(entry, kept), dense[:, columns])
        for piece in entry.kept(kept):
            assert piece in entry.pieces  # no bytes of its own


def test_a_bias_is_cut_like_its_matrix(tmp_path: Path) -> None:
    """A vector with two parts gives a tier the first units of both."""
    bias = torch.arange(12.0)
    with WeightWriter(tmp_path / "w") as writer:
        entry = writer.columns(bias, [(3, 3), (3, 1)], [1, 3], "float32")
    reader = WeightReader(tmp_path / "w")
    assert reader.columns(entry, 1).tolist() == [0, 1, 2, 9]
    assert torch.equal(reader.columns(entry, 3).sort().values, bias)


def test_cutting_columns_adds_no_bytes(tmp_path: Path) -> None:
    """A matrix cut for three tiers holds as many bytes of data as one that is not cut."""
    sizes = []
    for bounds in ([6], [1, 2, 6]):
        with WeightWriter(tmp_path / "w") as writer:
            writer.columns(quantized(64, 18, "int8", 32), [(6, 1), (6, 2)], bounds, "float16")
        sizes.append(writer.histogram)
    assert sizes[0] == sizes[1]


def test_int4_is_stored_two_to_a_byte_as_onnx_reads_it(tmp_path: Path) -> None:
    """The bytes of an int4 piece are onnx's INT4 raw data of its codes."""
    onnx = pytest.importorskip("onnx")
    matrix = quantized(32, 6, "int4", 32)
    with WeightWriter(tmp_path / "w") as writer:
        entry = writer.columns(matrix, [(3, 1), (3, 1)], [1, 3], "float16")
    raw = (tmp_path / "w").read_bytes()
    columns = [[0], [1, 2], [3], [4, 5]]
    assert isinstance(entry, ColumnMatrix)
    for piece, mine in zip(entry.pieces, columns, strict=True):
        data = raw[piece.codes.offset : piece.codes.offset + piece.codes.nbytes]
        shape = piece.codes.shape
        proto = onnx.helper.make_tensor("t", onnx.TensorProto.INT4, shape, data, raw=True)
        want = matrix.codes[:, mine].numpy()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), want)


def test_the_writer_closes_its_file_when_something_fails(tmp_path: Path) -> None:
    """An error inside the block leaves no open file behind."""
    writer = WeightWriter(tmp_path / "w")
    with pytest.raises(RuntimeError, match="stop"), writer:
        raise RuntimeError("stop")
    assert writer._file.closed
