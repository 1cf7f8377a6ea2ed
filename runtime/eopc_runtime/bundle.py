"""The bundle: a directory of ONNX tiers and their prices, opened only if it is what its manifest says.

This module defines the format (schema 1 of `manifest.json`); the compiler writes what is read here. Reading
is strict: unknown keys, wrong types, a ladder that does not nest, a path that leaves the bundle and a file
that differs from its recorded size or sha256 are errors, each naming the file or key and what to do. Files
that the manifest does not list (engines built on the board, a report) are left alone, but for those in the
tokenizer's folder: whoever reads that folder opens what is there.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eopc_runtime.bundle_files import FileEntry, check_files, check_only, finish_publication, inside
from eopc_runtime.energy import ENERGY_SOURCES, EnergyTable, TierCost
from eopc_runtime.errors import BundleError
from eopc_runtime.graph_check import read_graph
from eopc_runtime.jsonfields import Fields, did_you_mean, plain, read_json, shown
from eopc_runtime.mask import MAX_MASK_BYTES, Mask
from eopc_runtime.profiles import COMPUTE_DTYPES, DIALECTS, PRECISIONS

MANIFEST_SCHEMA = 1
MANIFEST_NAME = "manifest.json"
ENERGY_NAME = "energy.json"
WEIGHTS_NAME = "weights.bin"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_NAME = f"{TOKENIZER_FOLDER}/tokenizer.json"
KEEP_SHARES = ("layers", "kv_groups", "ffn")


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its directory, manifest and energy table."""

    root: Path
    manifest: Manifest
    energy: EnergyTable

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Open a bundle directory; BundleError says what is wrong with it and how to mend it.

        Every listed file must be there with its recorded size; `verify` also compares its sha256 and looks for hard
        links. No other file of the bundle is opened.
        """
        root = Path(path)
        kind = _kind(root)
        if not stat.S_ISDIR(kind):
            what = "is a file, not a directory" if kind else "does not exist"
            raise BundleError(f"The bundle {root} {what}. Give the directory that `eopc build -o` wrote.")
        if not stat.S_ISREG(_kind(root / MANIFEST_NAME)):
            raise BundleError(f"{root} has no {MANIFEST_NAME}, so it is no bundle. Build one with `eopc build`.")
        manifest = Manifest.from_json(read_json(inside(root, MANIFEST_NAME), MANIFEST_NAME, BundleError))
        listed = {entry.path: entry for entry in manifest.files}
        finish_publication(root, listed[ENERGY_NAME])
        check_files(root, manifest.files, verify)
        check_only(root, TOKENIZER_FOLDER, list(listed))
        energy = EnergyTable.from_json(read_json(root / ENERGY_NAME, ENERGY_NAME, BundleError))
        if (priced := [t.tier for t in energy.tiers]) != [t.tier for t in manifest.tiers]:
            raise BundleError(
                f"{ENERGY_NAME} prices {', '.join(priced)}, but the manifest has "
                f"{', '.join(t.tier for t in manifest.tiers)}. Build or calibrate the bundle again."
            )
        if energy.own_prompts != (own := tuple(t.tier for t in manifest.tiers if t.selector)):
            raise BundleError(
                f"{ENERGY_NAME} says that {', '.join(energy.own_prompts) or 'no tier'} reads its own prompts, the "
                f"manifest {', '.join(own) or 'none'}. Build or calibrate the bundle again."
            )
        return cls(root, manifest, energy)

    def tier_index(self, name: str) -> int:
        """Return the position of a tier in the ladder; BundleError names the nearest tier."""
        names = [tier.tier for tier in self.manifest.tiers]
        if name not in names:
            near = did_you_mean(name, names)
            raise BundleError(f'The bundle has no tier "{name}". It has {", ".join(names)}.{near}')
        return names.index(name)

    def tier(self, name: str) -> TierInfo:
        """Return a tier by name; BundleError names the nearest tier."""
        return self.manifest.tiers[self.tier_index(name)]

    def mask(self, tier: TierInfo) -> Mask:
        """Return what a tier keeps, by number; BundleError unless it is what the manifest says of the tier."""
        where = tier.mask
        mask = Mask.from_json(read_json(self.path(where), where, BundleError, MAX_MASK_BYTES), where)
        kept = [(layer.source_layer, len(layer.kv_groups), len(layer.ffn_channels)) for layer in mask.layers]
        if mask.tier != tier.tier or kept != [(x.source_layer, x.kv_heads, x.ffn) for x in tier.layers]:
            raise BundleError(
                f"{where} keeps other layers, KV groups or FFN channels than {MANIFEST_NAME} says of {tier.tier}. "
                "Copy the bundle again, or rebuild it."
            )
        return mask

    def graph(self, relative: str) -> bytes:
        """Return a graph that may be handed to a runtime; BundleError if it does or reads what it may not."""
        return read_graph(self.root, relative, {entry.path: entry.bytes for entry in self.manifest.files})

    def path(self, relative: str) -> Path:
        """Return the path of a file of the bundle; BundleError if it leads outside."""
        return inside(self.root, relative)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json, schema 1."""

    eopc_version: str
    model: ModelInfo
    device: str
    dialect: str
    opset: int
    precision: str
    compute_dtype: str
    workload: Workload
    context: int
    tiers: tuple[TierInfo, ...]
    files: tuple[FileEntry, ...]
    tools: Mapping[str, str]
    seed: int
    calibration: Mapping[str, object]

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of the compute type: of caches, and of weights that are not quantised."""
        return {"float32": 4, "float16": 2}[self.compute_dtype]

    def to_json(self) -> dict[str, object]:
        """Return the content of manifest.json; `from_json` gives the same manifest back."""
        return plain({"schema": MANIFEST_SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, obj: object) -> Manifest:
        """Read a manifest strictly and check that it is consistent; raises BundleError."""
        fields = Fields(obj, MANIFEST_NAME, BundleError)
        _check_schema(fields)
        manifest = cls(
            eopc_version=fields.text("eopc_version"),
            model=ModelInfo.from_fields(fields.child("model")),
            device=fields.text("device"),
            dialect=fields.text("dialect", choices=DIALECTS),
            opset=fields.integer("opset", minimum=1),
            precision=fields.text("precision", choices=PRECISIONS),
            compute_dtype=fields.text("compute_dtype", choices=COMPUTE_DTYPES),
            workload=Workload.from_fields(fields.child("workload")),
            context=fields.integer("context", minimum=1),
            tiers=tuple(TierInfo.from_fields(child) for child in fields.children("tiers")),
            files=tuple(FileEntry.from_fields(child) for child in fields.children("files")),
            tools=fields.texts_by_name("tools"),
            seed=fields.integer("seed"),
            calibration=fields.mapping("calibration"),
        )
        fields.done()
        check_ladder(manifest.tiers, manifest.model.num_hidden_layers)
        _check_files(manifest)
        return manifest


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The dense model a bundle was built from."""

    name: str
    source: str
    model_type: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    num_hidden_layers: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> ModelInfo:
        """Read the model record strictly."""
        info = cls(
            name=fields.text("name"),
            source=fields.text("source"),
            model_type=fields.text("model_type"),
            vocab_size=fields.integer("vocab_size", minimum=1),
            hidden_size=fields.integer("hidden_size", minimum=1),
            head_dim=fields.integer("head_dim", minimum=1),
            num_hidden_layers=fields.integer("num_hidden_layers", minimum=1),
            max_position_embeddings=fields.integer("max_position_embeddings", minimum=1),
            bos_token_id=fields.integer_or_none("bos_token_id", minimum=0),
            eos_token_ids=fields.integers("eos_token_ids"),
        )
        fields.done()
        return info


@dataclass(frozen=True, slots=True)
class Workload:
    """The sequence the budgets were planned for."""

    prompt_tokens: int
    new_tokens: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Workload:
        """Read the workload record strictly."""
        workload = cls(fields.integer("prompt_tokens", minimum=1), fields.integer("new_tokens", minimum=1))
        fields.done()
        return workload


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What a tier keeps of one layer: the first kv_heads KV groups and the first ffn units of that layer."""

    source_layer: int
    kv_heads: int
    ffn: int

    @classmethod
    def from_fields(cls, fields: Fields) -> LayerInfo:
        """Read a layer record strictly."""
        layer = cls(
            fields.integer("source_layer", minimum=0),
            fields.integer("kv_heads", minimum=0),
            fields.integer("ffn", minimum=0),
        )
        fields.done()
        return layer


@dataclass(frozen=True, slots=True)
class PrefillInfo:
    """Prefill-only pruning (POP, arXiv 2602.03295): prompts run through the first `depth` layers, by this graph.

    It fills the caches of all layers with all tokens but the last, which is a step of the tier's own graph. A `share`
    of those tokens, chosen anew in every layer, runs through the other layers but the last as well.
    """

    depth: int
    graph: str
    share: float = 0.0

    def attending(self, layers: int) -> int:
        """How many of so many layers all or some of the tokens run through: the first ones."""
        return max(self.depth, layers - 1) if self.share else self.depth

    @classmethod
    def from_fields(cls, tier: Fields) -> PrefillInfo | None:
        """Read the record of a tier strictly; null for none."""
        if tier.raw("prefill") is None:
            return None
        fields = tier.child("prefill")
        share = fields.number("share", minimum=0) if "share" in fields else 0.0  # bundles of earlier versions have none
        info = cls(fields.integer("depth", minimum=1), fields.text("graph"), share)
        if share >= 1:
            fields.fail(f'"share" is {share:g}, but of a prompt\'s tokens less than all can skip a layer.')
        fields.done()
        return info


@dataclass(frozen=True, slots=True)
class SelectorInfo:
    """FFN channels chosen once per sequence, by what the prompt did in them (EOP-style).

    Of every layer the first `core` channels always run. Of the `pool` behind them `graph` gathers the `chosen` ones
    that the prompt's energies favour, between prefill and decode: the choice depends on the prompt, its size does not.
    """

    graph: str
    core: tuple[int, ...]
    pool: tuple[int, ...]
    chosen: tuple[int, ...]

    @classmethod
    def from_fields(cls, tier: Fields, layers: Sequence[LayerInfo]) -> SelectorInfo | None:
        """Read the record of a tier strictly; null for none."""
        if tier.raw("selector") is None:
            return None
        fields = tier.child("selector")
        info = cls(fields.text("graph"), fields.integers("core"), fields.integers("pool"), fields.integers("chosen"))
        if not len(info.core) == len(info.pool) == len(info.chosen) == len(layers):
            fields.fail(f"core, pool and chosen have one number for each of the {len(layers)} layers.")
        for layer, core, pool, chosen in zip(layers, info.core, info.pool, info.chosen, strict=True):
            if min(core, chosen) < 0 or chosen > pool or core + pool != layer.ffn:
                fields.fail(
                    f"layer {layer.source_layer} cannot choose {chosen} of {pool} channels beside {core}, of "
                    f"{layer.ffn} in all."
                )
        fields.done()
        return info


@dataclass(frozen=True, slots=True)
class TierInfo:
    """One rung of the ladder; `keep` are shares of layers, KV groups and FFN units kept, 0 to 1."""

    tier: str
    budget_j: float | None
    energy_j: float
    energy_source: str
    perplexity: float | None
    perplexity_dense: float | None
    perplexity_by_domain: Mapping[str, float]
    params: int
    keep: Mapping[str, float]
    layers: tuple[LayerInfo, ...]
    cost: TierCost
    graph: str
    mask: str
    note: str
    parity: Mapping[str, object]
    proxy: Mapping[str, object] = field(default_factory=dict)  # of a build by TensorRT-RTX, or why there was none
    prefill: PrefillInfo | None = None  # where prompts run through a graph of their own
    selector: SelectorInfo | None = None  # where some channels are chosen after the prompt

    @property
    def graphs(self) -> tuple[str, ...]:
        """Paths of all graphs of the tier."""
        own = (self.prefill, self.selector)
        return (self.graph, *(part.graph for part in own if part is not None))

    @classmethod
    def from_fields(cls, fields: Fields) -> TierInfo:
        """Read a tier record strictly."""
        layers = tuple(LayerInfo.from_fields(child) for child in fields.children("layers"))
        tier = cls(
            tier=fields.text("tier"),
            budget_j=fields.number_or_none("budget_j", minimum=0),
            energy_j=fields.number("energy_j", minimum=0),
            energy_source=fields.text("energy_source", choices=ENERGY_SOURCES),
            perplexity=fields.number_or_none("perplexity", minimum=0),
            perplexity_dense=fields.number_or_none("perplexity_dense", minimum=0),
            perplexity_by_domain=fields.numbers_by_name("perplexity_by_domain"),
            params=fields.integer("params", minimum=1),
            keep=_read_keep(fields.child("keep")),
            layers=layers,
            cost=TierCost.from_fields(fields.child("cost")),
            graph=fields.text("graph"),
            mask=fields.text("mask"),
            note=fields.text("note"),
            parity=fields.mapping("parity"),
            proxy=fields.mapping("proxy") if "proxy" in fields else {},
            prefill=PrefillInfo.from_fields(fields) if "prefill" in fields else None,
            selector=SelectorInfo.from_fields(fields, layers) if "selector" in fields else None,
        )
        fields.done()
        if (tier.prefill is None) != (tier.cost.prefill is None):
            fields.fail("a tier whose prompts run through another graph has its path and its cost, both or neither.")
        if (tier.selector is None) != (not tier.cost.gather_bytes) or (tier.selector and tier.prefill is None):
            fields.fail("a tier that chooses channels records its prompts by a graph of its own, and gathers weights.")
        deepest = len(tier.layers) - (tier.selector is None)
        if tier.prefill is not None and tier.prefill.depth > deepest:
            fields.fail(f"prompts cannot run through {tier.prefill.depth} of {len(tier.layers)} layers and skip some.")
        return tier


def check_ladder(tiers: tuple[TierInfo, ...], num_hidden_layers: int) -> None:
    """Raise BundleError unless tiers are t0, t1, ... and each keeps a subset of the tier that hands down to it."""
    if not tiers:
        raise BundleError(f"{MANIFEST_NAME} has no tier. Build the bundle again.")
    for i, tier in enumerate(tiers):
        if tier.tier != f"t{i}":
            raise BundleError(
                f"{MANIFEST_NAME} has the tier {shown(tier.tier)} where t{i} belongs. Build the bundle again."
            )
        indexes = [layer.source_layer for layer in tier.layers]
        if not indexes or indexes != sorted(set(indexes)) or indexes[-1] >= num_hidden_layers:
            raise BundleError(
                f"{MANIFEST_NAME}: the layers of {tier.tier} must be rising numbers below "
                f"{num_hidden_layers}, not {shown(str(indexes))}. Build the bundle again."
            )
        if i:  # nobody goes down to a tier that reads its own prompts, but everybody may go down from one
            handing_down = [tiers[0], *(t for t in tiers[1:i] if not t.selector)]
            _check_nested(tiers[0] if tier.selector else handing_down[-1], tier)
        if tier.selector and len(tier.layers) != len(tiers[0].layers):
            raise BundleError(f"{MANIFEST_NAME}: {tier.tier} chooses channels, but leaves layers out. Build it again.")


def _kind(path: Path) -> int:
    """The mode bits of a file, 0 where there is none or its name cannot be one."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _check_schema(fields: Fields) -> None:
    if "schema" not in fields:
        fields.fail('it has no "schema" number, so it is not the manifest of a bundle. Build one with `eopc build`.')
    schema = fields.integer("schema", minimum=1)
    if schema > MANIFEST_SCHEMA:
        fields.fail(
            f"schema {schema} was written by a newer eopc (this one reads schema {MANIFEST_SCHEMA}); upgrade eopc."
        )


def _read_keep(fields: Fields) -> dict[str, float]:
    keep = {name: fields.number(name, minimum=0) for name in KEEP_SHARES}
    fields.done()
    for name, share in keep.items():
        if share > 1:
            fields.fail(f'"{name}" is {share}, but a share kept lies between 0 and 1.')
    return keep


def _check_nested(above: TierInfo, tier: TierInfo) -> None:
    """Refuse a tier whose restricted KV cache of `above` would be no valid cache."""
    kept = {layer.source_layer: layer for layer in above.layers}
    for layer in tier.layers:
        where = f"{MANIFEST_NAME}: layer {layer.source_layer} of {tier.tier}"
        old = kept.get(layer.source_layer)
        if old is None:
            raise BundleError(f"{where} is not kept by {above.tier}, but tiers must nest. Build the bundle again.")
        if layer.kv_heads > old.kv_heads or layer.ffn > old.ffn:
            raise BundleError(
                f"{where} keeps {layer.kv_heads} KV heads and {layer.ffn} FFN units, more than {above.tier} "
                f"({old.kv_heads} and {old.ffn}), but tiers must nest. Build the bundle again."
            )


def _check_files(manifest: Manifest) -> None:
    """Every file the manifest relies on is listed once."""
    paths = Counter(entry.path for entry in manifest.files)
    for path, count in paths.items():
        if count > 1:
            raise BundleError(f"{MANIFEST_NAME} lists {shown(path)} twice. Build the bundle again.")
    needed = [
        ENERGY_NAME,
        WEIGHTS_NAME,
        TOKENIZER_NAME,
        *(p for tier in manifest.tiers for p in (*tier.graphs, tier.mask)),
    ]
    for path in needed:
        if path not in paths:
            near = did_you_mean(path, paths)
            raise BundleError(
                f"{MANIFEST_NAME} uses {shown(path)} but does not list it in files.{near} Build it again."
            )
