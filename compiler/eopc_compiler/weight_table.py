"""Where every tensor of a ladder lies in its weight files, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eopc_compiler.config import LayerDims
from eopc_compiler.quantize import InputRounding
from eopc_compiler.weights import ColumnMatrix, Entry, Piece, RowMatrix, Stored


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Where every tensor of the ladder lies: by deployment-form name, layers counted in the *source* model."""

    entries: Mapping[str, Entry]

    def of_tier(self, name: str, layers: Sequence[LayerDims]) -> tuple[Entry, LayerDims | None]:
        """The entry behind a tier's initializer, and the dimensions of its layer if it belongs to one."""
        if not name.startswith("model.layers."):
            return self.entries[name], None
        _, _, index, rest = name.split(".", 3)
        dims = layers[int(index)]
        return self.entries[f"model.layers.{dims.source_layer}.{rest}"], dims

    def with_extras(self, extras: WeightTable) -> WeightTable:
        """The table of one tier: its own entries in place of the shared ones."""
        return WeightTable({**self.entries, **extras.entries})

    def to_json(self) -> dict[str, Any]:
        """Entries by name, each with its kind."""
        return {name: {"kind": type(e).__name__, **asdict(e)} for name, e in self.entries.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WeightTable:
        """Read what `to_json` wrote."""
        return cls({name: _entry(dict(fields)) for name, fields in content.items()})


def _entry(fields: dict[str, Any]) -> Entry:
    kind = fields.pop("kind")
    if kind == "Stored":
        return _stored(fields)
    inputs = fields["inputs"] and InputRounding(**fields["inputs"])
    if kind == "RowMatrix":
        codes, scales = _stored(fields["codes"]), _stored_or_none(fields["scales"])
        return RowMatrix(**{**fields, "codes": codes, "scales": scales, "inputs": inputs})
    pieces = [Piece(p["units"], _stored(p["codes"]), _stored_or_none(p["scales"])) for p in fields["pieces"]]
    return ColumnMatrix(tuple(pieces), fields["block"], inputs)


def _stored(fields: dict[str, Any]) -> Stored:
    return Stored(**{**fields, "shape": tuple(fields["shape"])})


def _stored_or_none(fields: dict[str, Any] | None) -> Stored | None:
    return None if fields is None else _stored(fields)


def unit_count(name: str, dims: LayerDims | None) -> int:
    """Units of a column matrix a layer keeps: KV groups for attention, channels for the FFN; 1 outside layers."""
    if dims is None:
        return 1
    return dims.num_key_value_heads if "self_attn" in name else dims.intermediate_size


def row_count(name: str, dims: LayerDims, entry: RowMatrix) -> int:
    """Rows of o_proj or down_proj a layer keeps."""
    if "down_proj" in name:
        return dims.intermediate_size
    return dims.num_key_value_heads * entry.rows_per_unit
