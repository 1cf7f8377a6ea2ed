"""Engines of a bundle: TensorRT plans with a record of what each was built from, by what, and for what.

    BUNDLE/engines/KEY/     KEY is a device and its architecture, `rtx-4090-sm89`, or `proxy-sm86`
        engines.json        schema 1: one record per plan, with what `eopc engine --check` found of it
        t0.plan             both phases, as profiles 0 (prefill) and 1 (decode); or a plan for each graph of the tier,
                            t0.prefill.plan, t0.decode.plan and, where it chooses weights, t0.gather.plan
        timing.cache        what TensorRT measured while building, shared by tiers

The manifest of a bundle does not list them: they are made later, on the board. A plan is bound to its compiler's
version and to the GPU's architecture, and is opaque: what does not fit crashes, or worse, answers wrongly. So a record
is compared with the machine *before* its plan is read. Plans are not reproducible byte by byte; the fingerprint is of
their inputs. A proxy record has no plan: it says that the graph builds for a neighbouring architecture, no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from eopc_runtime.bundle import WEIGHTS_NAME, Bundle
from eopc_runtime.bundle_files import FileEntry, check_file, inside
from eopc_runtime.errors import BundleError, EngineMismatchError
from eopc_runtime.files import write_whole
from eopc_runtime.jsonfields import Fields, read_json
from eopc_runtime.profiles import ENGINE_COMPILERS
from eopc_runtime.tier_info import TierInfo

ENGINES_SCHEMA = 1
ENGINES_FOLDER = "engines"
ENGINES_NAME = "engines.json"
TIMING_CACHE_NAME = "timing.cache"
PHASES = ("both", "prefill", "gather", "decode")
MIN_COSINE = 0.99
MIN_TOP1 = 0.99


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a plan was built by, for and from."""

    compiler: str  # a key of ENGINE_COMPILERS
    version: str
    compute_capability: int  # 86 is SM 8.6
    gpu: str | None  # its name; None when built ahead of time
    driver: str | None  # CUDA version of the driver; None when built ahead of time
    graph_sha256: str  # see `graph_sha256`
    settings_sha256: str  # of the builder's settings

    @classmethod
    def from_fields(cls, fields: Fields) -> Fingerprint:
        """Read a fingerprint strictly."""
        fingerprint = cls(
            compiler=fields.text("compiler", choices=ENGINE_COMPILERS),
            version=fields.text("version"),
            compute_capability=fields.integer("compute_capability", minimum=10),
            gpu=fields.text_or_none("gpu"),
            driver=fields.text_or_none("driver"),
            graph_sha256=fields.text("graph_sha256"),
            settings_sha256=fields.text("settings_sha256"),
        )
        fields.done()
        return fingerprint


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """How near the logits of a tier's engines are to those of its graph (see engine_check)."""

    tokens: int  # positions compared
    cosine_min: float
    top1_agreement: float  # share of positions with the same most likely token

    @property
    def ok(self) -> bool:
        """Whether the engines compute what the graph says, but for rounding."""
        return self.cosine_min >= MIN_COSINE and self.top1_agreement >= MIN_TOP1

    @classmethod
    def from_fields(cls, fields: Fields) -> EngineCheck:
        """Read a check strictly."""
        check = cls(
            tokens=fields.integer("tokens", minimum=1),
            cosine_min=fields.number("cosine_min", minimum=-1),
            top1_agreement=fields.number("top1_agreement", minimum=0),
        )
        fields.done()
        return check


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One plan of a tier, or with `proxy` one build whose plan was not kept."""

    tier: str
    phase: str  # both: profile 0 is prefill, profile 1 decode (one token); else the only profile
    file: str | None  # in the folder of the set; None for a proxy
    bytes: int
    sha256: str | None
    layers: int  # engine layers, all profiles
    attention_layers: int  # fused attention kernels of one profile
    decomposed_attention: bool  # some attention had no fused kernel and was split into plain operators: slower
    seconds: float
    cache_len: int  # slots of every KV cache
    max_prompt_tokens: int  # most tokens of one prefill step
    proxy: bool
    fingerprint: Fingerprint
    check: EngineCheck | None = None  # of all plans of its tier; None: not compared since it was built

    @property
    def target(self) -> str:
        """The architecture, `sm86`."""
        return f"sm{self.fingerprint.compute_capability}"

    @classmethod
    def from_fields(cls, fields: Fields) -> EngineRecord:
        """Read a record strictly."""
        record = cls(
            tier=fields.text("tier"),
            phase=fields.text("phase", choices=PHASES),
            file=fields.text_or_none("file"),
            bytes=fields.integer("bytes", minimum=1),
            sha256=fields.text_or_none("sha256"),
            layers=fields.integer("layers", minimum=0),
            attention_layers=fields.integer("attention_layers", minimum=0),
            decomposed_attention=fields.boolean("decomposed_attention", default=False),
            seconds=fields.number("seconds", minimum=0),
            cache_len=fields.integer("cache_len", minimum=1),
            max_prompt_tokens=fields.integer("max_prompt_tokens", minimum=1),
            proxy=fields.boolean("proxy", default=False),
            fingerprint=Fingerprint.from_fields(fields.child("fingerprint")),
            check=None if fields.raw("check") is None else EngineCheck.from_fields(fields.child("check")),
        )
        fields.done()
        if record.proxy == (record.file is not None) or (record.file is None) != (record.sha256 is None):
            fields.fail('an engine has a "file" and its "sha256"; a proxy has neither.')
        return record


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan would run on, as far as it is known: compiler, version, architecture, GPU, driver."""

    compiler: str
    version: str
    compute_capability: int
    gpu: str | None = None
    driver: str | None = None


def engine_key(device: str, compute_capability: int) -> str:
    """The folder of a device's engines, `orin-sm87`."""
    return f"{device}-sm{compute_capability}"


def proxy_key(compute_capability: int) -> str:
    """The folder of proxy records, `proxy-sm86`."""
    return engine_key("proxy", compute_capability)


def set_folder(bundle_root: Path, key: str) -> Path:
    """The folder of a set of engines; BundleError if the key leads out of the bundle."""
    return inside(bundle_root, f"{ENGINES_FOLDER}/{key}")


def list_engine_sets(bundle_root: Path) -> tuple[str, ...]:
    """Keys of the sets a bundle has, sorted; none where no engine was built."""
    return tuple(sorted(path.parent.name for path in (bundle_root / ENGINES_FOLDER).glob(f"*/{ENGINES_NAME}")))


def read_engines(bundle_root: Path, key: str) -> tuple[EngineRecord, ...]:
    """Return the records of a set; BundleError says what is wrong with it, or that it is not there."""
    where = f"{ENGINES_FOLDER}/{key}/{ENGINES_NAME}"
    path = set_folder(bundle_root, key) / ENGINES_NAME
    if not path.is_file():
        known = ", ".join(list_engine_sets(bundle_root)) or "none"
        raise BundleError(
            f"{bundle_root} has no engines for {key} (it has {known}). Build them: eopc engine {bundle_root}"
        )
    fields = Fields(read_json(path, where, BundleError), where, BundleError)
    if (schema := fields.integer("schema", minimum=1)) > ENGINES_SCHEMA:
        fields.fail(f"schema {schema} was written by a newer eopc (this one reads {ENGINES_SCHEMA}); upgrade eopc.")
    records = tuple(EngineRecord.from_fields(child) for child in fields.children("engines"))
    fields.done()
    if len({(r.tier, r.phase) for r in records}) < len(records):
        fields.fail(f"it lists a plan twice. Build the engines again: eopc engine {bundle_root}")
    return records


def write_engines(bundle_root: Path, key: str, records: Iterable[EngineRecord]) -> Path:
    """Write the records of a set in one step: a reader sees the old ones or the new ones."""
    folder = set_folder(bundle_root, key)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": ENGINES_SCHEMA, "engines": [asdict(r) for r in records]}
    path = folder / ENGINES_NAME
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def write_checks(bundle_root: Path, key: str, checks: Mapping[str, EngineCheck]) -> tuple[EngineRecord, ...]:
    """Write what was found of some tiers into the records of a set; returns all of them as they are now."""
    records = tuple(replace(r, check=checks.get(r.tier, r.check)) for r in read_engines(bundle_root, key))
    write_engines(bundle_root, key, records)
    return records


def check_engine(record: EngineRecord, machine: Machine, graph: str, bundle: str | Path = "BUNDLE") -> None:
    """Raise EngineMismatchError unless a record's plan may be loaded here; nothing is read from the plan.

    Args:
        machine: what is found here; its GPU and driver are compared where both sides know them.
        graph: `graph_sha256` of the bundle as it is now.
        bundle: how the command that rebuilds names the bundle.
    """
    command = f"eopc engine {bundle}"
    if record.proxy:
        raise EngineMismatchError(
            f"{record.tier} was compiled for {record.target} as a proxy, which leaves no plan to run. "
            f"On the device run: {command}"
        )
    built = record.fingerprint
    pairs = (
        ("compiler", ENGINE_COMPILERS[built.compiler], ENGINE_COMPILERS.get(machine.compiler, machine.compiler)),
        ("version", built.version, machine.version),
        ("architecture", f"SM{built.compute_capability}", f"SM{machine.compute_capability}"),
        ("GPU", built.gpu, machine.gpu),
        ("driver (CUDA)", built.driver, machine.driver),
        ("graph or weights (sha256)", built.graph_sha256[:12], graph[:12]),
    )
    differences = [f"{what}: built for {a}, found {b}" for what, a, b in pairs if a and b and a != b]
    if differences:
        raise EngineMismatchError(
            f"the engine {record.file} of {record.tier} does not fit. {'; '.join(differences)}. "
            f"Build it again: {command}"
        )


def verify_engines(bundle: Bundle) -> dict[str, tuple[EngineRecord, ...]]:
    """Return the engines of a bundle by key, after checking that every plan is whole and made from these graphs.

    Raises:
        BundleError: a plan is missing or damaged, or belongs to a tier that is not there.
        EngineMismatchError: the bundle was built again since.
    """
    sets = {key: read_engines(bundle.root, key) for key in list_engine_sets(bundle.root)}
    for key, record in ((key, record) for key, records in sets.items() for record in records):
        check_plan_file(bundle.root, key, record)
        if record.fingerprint.graph_sha256 != graph_sha256(bundle, bundle.tier(record.tier)):
            raise EngineMismatchError(
                f"{ENGINES_FOLDER}/{key} was built from other graphs or weights of {record.tier} than the bundle has "
                f"now. Build it again: eopc engine {bundle.root}{' --proxy' if record.proxy else ''}"
            )
    return sets


def check_plan_file(bundle_root: Path, key: str, record: EngineRecord, verify: bool = True) -> None:
    """Raise BundleError unless a record's plan is there with its size and, with `verify`, its sha256."""
    if record.file is None or record.sha256 is None:
        return
    try:
        check_file(bundle_root, FileEntry(f"{ENGINES_FOLDER}/{key}/{record.file}", record.sha256, record.bytes), verify)
    except BundleError as error:
        raise BundleError(f"{error} To build the engine alone: eopc engine {bundle_root}") from error


def graph_sha256(bundle: Bundle, info: TierInfo) -> str:
    """The hash of what a tier's plan is made from: its graphs, its extras and the shared weights, by the manifest."""
    folder = PurePosixPath(info.graph).parent
    listed = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    own = {path: sha for path, sha in listed.items() if PurePosixPath(path).parent == folder and path != info.mask}
    content = {**own, WEIGHTS_NAME: listed[WEIGHTS_NAME]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def phase_graphs(info: TierInfo) -> dict[str, str]:
    """The graphs of a tier by phase: one for both, or more where prompts run through a graph of their own."""
    if info.prefill is None:
        return {"both": info.graph}
    gather = {"gather": info.selector.graph} if info.selector else {}
    return {"prefill": info.prefill.graph, **gather, "decode": info.graph}


def plan_name(tier: str, phase: str) -> str:
    """The file name of a plan: t0.plan, or t0.prefill.plan."""
    return f"{tier}.plan" if phase == "both" else f"{tier}.{phase}.plan"
