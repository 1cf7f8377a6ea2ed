"""The one weight file of a bundle: which bytes of weights.bin every tensor of every tier is made of.

Matrices are stored in deployment form [in, out], units sorted by importance. Where a tier keeps fewer *rows* (o_proj,
down_proj) its tensor is a prefix of the stored one: same offset, shorter length. Where it keeps fewer *columns*
(qkv_proj, gate_proj, up_proj) the stored matrix is cut into pieces at the ladder's widths, and a tier joins the pieces
it keeps by a Concat of constants, which loaders fold. No byte is stored twice for a second tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from eopc_compiler.quantize import InputRounding, Quantized, pack_int4

WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 64  # bytes; a cache line, and what vector loads want


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in weights.bin, or in a tier's own file: dtype is float32, float16, or what a grid is stored as."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: str = WEIGHTS_FILE  # relative to the bundle's root

    def rows(self, count: int) -> Stored:
        """The prefix of `count` rows: the same bytes, fewer."""
        return replace(self, shape=(count, *self.shape[1:]), nbytes=self.nbytes * count // self.shape[0])


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of columns that a tier keeps when it keeps at least `units` units."""

    units: int
    codes: Stored
    scales: Stored | None


@dataclass(frozen=True, slots=True)
class ColumnMatrix:
    """A matrix whose units are columns; `block` is None for per-channel scales or none at all."""

    pieces: tuple[Piece, ...]
    block: int | None
    inputs: InputRounding | None = None

    def kept(self, units: int) -> tuple[Piece, ...]:
        """The pieces of a tier that keeps `units` units, in column order."""
        return tuple(p for p in self.pieces if p.units <= units)


@dataclass(frozen=True, slots=True)
class RowMatrix:
    """A matrix whose units are runs of rows."""

    codes: Stored
    scales: Stored | None
    block: int | None
    rows_per_unit: int = 1
    inputs: InputRounding | None = None

    def kept(self, rows: int) -> tuple[Stored, Stored | None]:
        """Codes and scales of the first `rows` rows."""
        scales = self.scales
        if scales is not None and self.block is not None:
            scales = scales.rows(rows // self.block)
        return self.codes.rows(rows), scales


Entry = ColumnMatrix | RowMatrix | Stored


class WeightWriter:
    """Appends tensors to weights.bin, or to a tier's own `file`, aligned; use as a context manager."""

    def __init__(self, path: Path, file: str = WEIGHTS_FILE) -> None:
        self._path, self._name = path, file
        self._file: BinaryIO
        self.histogram: dict[str, int] = {}  # bytes by dtype

    def __enter__(self) -> WeightWriter:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def tensor(self, tensor: Tensor, dtype: str) -> Stored:
        """Write one tensor; int4 expects int8 codes in [-8, 7]."""
        data = pack_int4(tensor) if dtype == "int4" else tensor.to(getattr(torch, dtype)).contiguous()
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        raw = data.view(torch.uint8).numpy().tobytes()  # NumPy has no 8-bit floats
        self._file.write(raw)
        self.histogram[dtype] = self.histogram.get(dtype, 0) + len(raw)
        return Stored(dtype, tuple(tensor.shape), offset, len(raw), self._name)

    def columns(
        self, matrix: Tensor | Quantized, parts: Sequence[tuple[int, int]], bounds: Sequence[int], dtype: str
    ) -> ColumnMatrix:
        """Write a column-cut matrix.

        Args:
            matrix: [in, out], or a 1-D bias [out], or its quantised form.
            parts: (units, columns per unit) of each part that lies side by side, e.g. queries, keys, values.
            bounds: ascending unit counts the ladder keeps of this layer, the last being all.
            dtype: of unquantised values.
        """
        pieces, start = [], 0
        single = len(bounds) == 1
        for units, width in [(sum(u * w for u, w in parts), 1)] if single else parts:
            below = 0
            for bound in [units] if single else bounds:
                columns = slice(start + below * width, start + bound * width)
                pieces.append(self._piece(matrix, columns, bounds[0] if single else bound, dtype))
                below = bound
            start += units * width
        if isinstance(matrix, Tensor):
            return ColumnMatrix(tuple(pieces), None)
        return ColumnMatrix(tuple(pieces), matrix.block, matrix.inputs)

    def rows(self, matrix: Tensor | Quantized, dtype: str, rows_per_unit: int = 1) -> RowMatrix:
        """Write a matrix of which tiers keep a prefix of rows."""
        if isinstance(matrix, Tensor):
            return RowMatrix(self.tensor(matrix, dtype), None, None, rows_per_unit)
        codes = self.tensor(matrix.codes, matrix.stored)
        scales = self.tensor(matrix.scales, _name(matrix.scales))
        return RowMatrix(codes, scales, matrix.block, rows_per_unit, matrix.inputs)

    def _piece(self, matrix: Tensor | Quantized, columns: slice, units: int, dtype: str) -> Piece:
        if isinstance(matrix, Tensor):
            return Piece(units, self.tensor(matrix[..., columns], dtype), None)
        codes = self.tensor(matrix.codes[:, columns], matrix.stored)
        return Piece(units, codes, self.tensor(matrix.scales[..., columns], _name(matrix.scales)))


class WeightReader:
    """Reads tensors of weights.bin back, dequantised, through a memory map.

    Args:
        path: of weights.bin.
        others: paths of tiers' own files, by the name that entries carry.
    """

    def __init__(self, path: Path, others: Mapping[str, Path] | None = None) -> None:
        files = {WEIGHTS_FILE: path, **(others or {})}
        self._maps = {name: np.memmap(file, dtype=np.uint8, mode="r") for name, file in files.items()}

    def stored(self, entry: Stored) -> Tensor:
        """The stored tensor; int4 comes back as int8 codes."""
        raw = np.array(self._maps[entry.file][entry.offset : entry.offset + entry.nbytes])
        if entry.dtype == "int4":
            pairs = torch.from_numpy(raw)
            codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten().to(torch.int8)
            return torch.where(codes > 7, codes - 16, codes).view(entry.shape)
        return torch.from_numpy(raw).view(getattr(torch, entry.dtype)).view(entry.shape)

    def columns(self, entry: ColumnMatrix, units: int) -> Tensor:
        """A tier's column-cut matrix, fp32."""
        kept = entry.kept(units)
        return torch.cat([self._dense(p.codes, p.scales, entry.block) for p in kept], -1)

    def rows(self, entry: RowMatrix, count: int) -> Tensor:
        """A tier's row-cut matrix, fp32."""
        return self._dense(*entry.kept(count), entry.block)

    def _dense(self, codes: Stored, scales: Stored | None, block: int | None) -> Tensor:
        values = self.stored(codes).float()
        if scales is None:
            return values
        spread = self.stored(scales).float()
        return values * (spread if block is None else spread.repeat_interleave(block, 0))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
