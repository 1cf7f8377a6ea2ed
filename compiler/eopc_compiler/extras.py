"""What a tier has of its own, beside the shared weights: biases and a few repaired matrices, in a small file.

Nesting stays what it was: kept units are prefixes, and a cache restricted to them is valid below. A repaired down_proj
changes none of that, but its bytes are not shared. So a ladder may spend EXTRAS_SHARE of its weight bytes on them, on
the layers where repair matters most; a bias costs next to nothing and goes to every layer that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.model import Llama
from eopc_compiler.quantize import Quantized, gptq
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import FittedChannels
from eopc_compiler.storage import Storage
from eopc_compiler.tier_repair import Repaired, Round
from eopc_compiler.token_selector import PrunedPrompt
from eopc_compiler.weight_table import WeightTable
from eopc_compiler.weights import ColumnMatrix, Entry, Piece, WeightReader, WeightWriter

EXTRAS_FILE = "extras.bin"
EXTRAS_SHARE = 0.12  # of the bytes of weights.bin, all tiers together


@dataclass(frozen=True, slots=True)
class TierExtras:
    """Entries that replace shared ones in one tier, and the file they lie in."""

    path: Path | None
    name: str  # of the file in the bundle
    table: WeightTable
    bytes_by_type: dict[str, int]  # in the file

    @classmethod
    def none(cls) -> TierExtras:
        """A tier that shares everything."""
        return cls(None, "", WeightTable({}), {})

    @classmethod
    def write(cls, folder: Path, name: str, repaired: Sequence[Repaired], storage: Storage) -> None:
        """Write extras.bin and its table into a folder."""
        entries = dict[str, Entry]()
        with WeightWriter(folder / EXTRAS_FILE, name) as writer:
            for r in repaired:
                owner = f"model.layers.{r.source_layer}.mlp.down_proj"
                entries[f"{owner}.bias"] = writer.tensor(r.bias, storage.dtype)
                if r.weight is not None:
                    entries[f"{owner}.weight"] = writer.rows(r.weight, storage.dtype)
        _write_table(folder, entries, writer)

    @classmethod
    def write_prompt(
        cls,
        folder: Path,
        name: str,
        table: WeightTable,
        reader: WeightReader,
        config: LlamaConfig,
        pruned: PrunedPrompt,
    ) -> None:
        """The same for a tier whose prompts skip layers: their keys and values, and what chooses tokens in others."""
        with WeightWriter(folder / EXTRAS_FILE, name) as writer:
            entries = key_value_entries(writer, table, reader, config, pruned.path.running(len(config.layers)))
            for i in pruned.path.chosen(len(config.layers)):
                entries[f"model.layers.{i}.token_scorer.weight"] = writer.tensor(pruned.scorers[i], "float32")
        _write_table(folder, entries, writer)

    @classmethod
    def write_selector(
        cls,
        folder: Path,
        name: str,
        model: Llama,
        selector: Selector,
        fitted: Sequence[FittedChannels],
        storage: Storage,
    ) -> None:
        """The same for a tier that chooses channels: its own down_proj, and pools as rows that can be gathered."""
        entries = dict[str, Entry]()
        with WeightWriter(folder / EXTRAS_FILE, name) as writer:
            for i, (layer, own) in enumerate(zip(model.blocks, fitted, strict=True)):
                owner, core, pool = f"model.layers.{i}.mlp", selector.core[i], selector.pools.get(i)
                entries[f"{owner}.down_proj.bias"] = writer.tensor(own.bias, storage.dtype)
                if core:
                    entries[f"{owner}.down_proj.weight"] = writer.rows(own.core, storage.dtype)
                if pool is None:
                    continue
                for leaf, whole in (("gate", layer.mlp.gate_proj), ("up", layer.mlp.up_proj)):
                    rows = whole.weight[:, core : core + pool.size].t().contiguous()
                    entries[f"{owner}.pool.{leaf}_rows"] = writer.tensor(rows, storage.dtype)
                entries[f"{owner}.pool.down_rows"] = writer.tensor(own.pool, storage.dtype)
                for leaf, value in (("prior", own.prior), ("weight", own.weight)):
                    entries[f"{owner}.pool.{leaf}"] = writer.tensor(value, "float32")
        _write_table(folder, entries, writer)

    @classmethod
    def read(cls, folder: Path, name: str) -> TierExtras:
        """Read what `write` wrote."""
        content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        path = folder / EXTRAS_FILE if content["entries"] else None
        return cls(path, name, WeightTable.from_json(content["entries"]), content["bytes"])

    @property
    def files(self) -> dict[str, Path]:
        """The file by its name in the bundle; none where nothing is in it."""
        return {self.name: self.path} if self.path else {}

    def config(self, config: LlamaConfig) -> LlamaConfig:
        """A tier's config with the biases that the tier has of its own."""
        biased = {name.split(".")[2] for name in self.table.entries if name.endswith(".bias")}
        layers = (replace(d, compensated=str(d.source_layer) in biased) for d in config.layers)
        return replace(config, layers=tuple(layers))


def _write_table(folder: Path, entries: dict[str, Entry], writer: WeightWriter) -> None:
    content = {"entries": WeightTable(entries).to_json(), "bytes": writer.histogram}
    (folder / "table.json").write_text(json.dumps(content), encoding="utf-8")


def key_value_entries(
    writer: WeightWriter, table: WeightTable, reader: WeightReader, config: LlamaConfig, depth: int
) -> dict[str, Entry]:
    """Write the keys' and values' columns of q/k/v of every layer from `depth` on: the same codes, copied.

    A graph that skips queries reads only these, and columns of a stored matrix are no run of bytes.
    """
    entries = dict[str, Entry]()
    for dims in config.layers[depth:]:
        queries = dims.num_key_value_heads * config.query_group_size * config.head_dim
        for leaf in ("weight", "bias") if config.attention_bias else ("weight",):
            owner = f"model.layers.{dims.source_layer}.self_attn"
            entry = table.entries[f"{owner}.qkv_proj.{leaf}"]
            assert isinstance(entry, ColumnMatrix)
            pieces = entry.kept(dims.num_key_value_heads)
            codes = torch.cat([reader.stored(p.codes) for p in pieces], -1)[..., queries:]
            stored, scales = [p.scales for p in pieces if p.scales is not None], None
            if stored:
                joined = torch.cat([reader.stored(s) for s in stored], -1)
                scales = writer.tensor(joined[..., queries:], stored[0].dtype)
            piece = Piece(dims.num_key_value_heads, writer.tensor(codes, pieces[0].codes.dtype), scales)
            entries[f"{owner}.kv_proj.{leaf}"] = ColumnMatrix((piece,), entry.block, entry.inputs)
    return entries


def own_matrices(
    config: LlamaConfig,
    ladder: Sequence[Mask],
    tiers: int,
    curves: Sequence[LayerCurves],
    storage: Storage,
    share: float | None,
) -> frozenset[int]:
    """Source layers that get a down_proj of their own in the last of some tiers.

    All have the same part of the share, and what a smaller tier leaves of its part goes to the larger ones.

    Args:
        ladder: tiers from the smallest up to the one that is asked for.
        tiers: that share, in all; those not in the ladder are larger.
        share: of the bytes of the whole model's weights that they may spend together; None for no limit.
    """
    own = frozenset[int]()
    left = float("inf") if share is None else share * storage.cost(config, full_mask(config)).weight_bytes
    for position, mask in enumerate(ladder):
        sizes = _matrix_bytes(config, mask, storage)
        own = _within(left / max(1, tiers - position), config, mask, curves, sizes)
        left -= sum(sizes[source] for source in own)
    return own


def _matrix_bytes(config: LlamaConfig, mask: Mask, storage: Storage) -> dict[int, float]:
    """Stored bytes of down_proj in every layer of a tier, by source layer."""
    return {
        d.source_layer: config.hidden_size
        * d.intermediate_size
        * storage.bytes_per_weight("mlp.down_proj", d.source_layer)
        for d in mask.layers
    }


def _within(
    left: float, config: LlamaConfig, mask: Mask, curves: Sequence[LayerCurves], sizes: dict[int, float]
) -> frozenset[int]:
    """Matrices of a tier that take so many bytes at most: most loss to repair per byte first.

    A layer in front of a gap makes up for whole layers and comes before all others.
    """
    following = [*(d.source_layer for d in mask.layers[1:]), len(config.layers)]
    gaps = {d.source_layer for d, after in zip(mask.layers, following, strict=True) if after > d.source_layer + 1}
    worth = dict[int, tuple[bool, float]]()
    for d in mask.layers:
        loss, source = curves[d.source_layer].added(d), d.source_layer
        if loss > 0 or source in gaps:
            worth[source] = (source in gaps, loss / sizes[source])
    own = set[int]()
    for source in sorted(worth, key=lambda s: worth[s], reverse=True):
        if sizes[source] <= left:
            own.add(source)
            left -= sizes[source]
    return frozenset(own)


def rounding(storage: Storage) -> Round:
    """How a repaired down_proj is stored: as the shared one is, rounded with GPTQ on the tier's own inputs."""

    def round_weight(source: int, weight: Tensor, covariance: Tensor) -> Tensor | Quantized:
        grid = storage.grid_of("mlp.down_proj", source)
        if grid is None:
            return weight.to(getattr(torch, storage.dtype)).float()
        rounded = gptq(
            weight, covariance, grid, storage.block_of("mlp.down_proj", source), getattr(torch, storage.dtype)
        )
        return replace(rounded, inputs=storage.token_inputs("mlp.down_proj", source))

    return round_weight
