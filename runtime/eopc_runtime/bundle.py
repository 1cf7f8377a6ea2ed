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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from eopc_runtime.bundle_files import MANIFEST_NAME, FileEntry, check_files, check_only, finish_publication, inside
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BundleError
from eopc_runtime.graph_check import read_graph
from eopc_runtime.jsonfields import Fields, did_you_mean, plain, read_json, shown
from eopc_runtime.mask import MAX_MASK_BYTES, Mask
from eopc_runtime.profiles import COMPUTE_DTYPES, DIALECTS, PRECISIONS
from eopc_runtime.tier_info import TierInfo, check_ladder

MANIFEST_SCHEMA = 1
ENERGY_NAME = "energy.json"
WEIGHTS_NAME = "weights.bin"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_NAME = f"{TOKENIZER_FOLDER}/tokenizer.json"


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
    """The content of manifest.json, schema 1.

    exact_products: products of int8 codes are exact on every CPU, also on those that add two of them in 16 bits.
    """

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
    exact_products: bool = False

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
            exact_products=fields.boolean("exact_products", default=False),
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
