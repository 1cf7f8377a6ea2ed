"""The mask of a tier: which layers, KV groups and FFN channels of the dense model it keeps, by their numbers there.

The runtime does not need it, since graphs have the widths of what is kept; `eopc inspect` and whoever compares tiers
do.
"""

from __future__ import annotations

from dataclasses import dataclass

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields

MASK_SCHEMA = 1
MAX_MASK_BYTES = 64 << 20  # 80 layers of 29,000 channels are 14 MB


@dataclass(frozen=True, slots=True)
class LayerMask:
    """What is kept of one layer of the dense model; numbers are unique, in order of importance."""

    source_layer: int
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> LayerMask:
        """Read a layer strictly."""
        layer = cls(
            fields.integer("source_layer", minimum=0), fields.integers("kv_groups"), fields.integers("ffn_channels")
        )
        fields.done()
        for name, units in (("kv_groups", layer.kv_groups), ("ffn_channels", layer.ffn_channels)):
            if len(set(units)) < len(units) or min(units, default=0) < 0:
                fields.fail(f'"{name}" must name each unit once, by a number of 0 or more.')
        return layer


@dataclass(frozen=True, slots=True)
class Mask:
    """The content of mask.json, schema 1."""

    tier: str
    layers: tuple[LayerMask, ...]

    @classmethod
    def from_json(cls, obj: object, where: str = "mask.json") -> Mask:
        """Read a mask strictly; BundleError on unknown keys, wrong types, a newer schema or layers out of order."""
        fields = Fields(obj, where, BundleError)
        if (schema := fields.integer("schema", minimum=1)) > MASK_SCHEMA:
            fields.fail(f"schema {schema} was written by a newer eopc (this one reads {MASK_SCHEMA}); upgrade eopc.")
        mask = cls(fields.text("tier"), tuple(LayerMask.from_fields(child) for child in fields.children("layers")))
        fields.done()
        sources = [layer.source_layer for layer in mask.layers]
        if not sources or sources != sorted(set(sources)):
            fields.fail('"layers" must name each layer once, in rising order.')
        return mask
