"""Lay the quantised weights of the whole model out again, cut where a ladder's tiers cut them.

Rounding a model takes minutes, and its result does not depend on the ladder: columns are rounded without regard to each
other, and rows are cut at the end. So it is done once, for the trial of a precision, and copied here for the ladder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.ladder import Cut, Mask, column_cuts
from eopc_compiler.quantize import Quantized
from eopc_compiler.weight_table import WeightTable
from eopc_compiler.weights import Entry, RowMatrix, Stored, WeightReader, WeightWriter


def cut_weights(
    path: Path, whole: WeightTable, reader: WeightReader, config: LlamaConfig, masks: Sequence[Mask]
) -> tuple[WeightTable, dict[str, int]]:
    """Write weights.bin for a ladder from that of its dense tier; values, and bytes by type, stay the same.

    Args:
        whole: where everything lies in the file that `reader` reads, no matrix cut.
        masks: of all tiers.
    """
    cuts = {
        f"model.layers.{source}.{owner}": cut
        for source, dims in enumerate(config.layers)
        for owner, cut in column_cuts(config, dims, masks).items()
    }
    with WeightWriter(path) as writer:
        owners = {name: name.rpartition(".")[0] for name in whole.entries}
        entries = {n: _copy(writer, reader, entry, cuts.get(owners[n])) for n, entry in whole.entries.items()}
        return WeightTable(entries), dict(writer.histogram)


def _copy(writer: WeightWriter, reader: WeightReader, entry: Entry, cut: Cut | None) -> Entry:
    def stored(part: Stored) -> Stored:
        return writer.tensor(reader.stored(part), part.dtype)

    if isinstance(entry, Stored):
        return stored(entry)
    if isinstance(entry, RowMatrix):
        return replace(entry, codes=stored(entry.codes), scales=stored(entry.scales) if entry.scales else None)
    (piece,) = entry.pieces
    codes = reader.stored(piece.codes)
    matrix: Tensor | Quantized = codes
    if piece.scales is not None:
        matrix = Quantized(codes, reader.stored(piece.scales), piece.codes.dtype, entry.block, entry.inputs)
    cut = cut or Cut(((1, piece.codes.shape[-1]),), (1,))  # the head stays whole
    return writer.columns(matrix, cut.parts, cut.bounds, piece.codes.dtype)
