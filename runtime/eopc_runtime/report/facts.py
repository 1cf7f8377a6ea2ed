"""What a report is made from: read once from a bundle and what lies beside it, then only looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.bundle import Bundle
from eopc_runtime.bundle_files import MANIFEST_NAME, sha256_file
from eopc_runtime.calibration.identity import fingerprint
from eopc_runtime.engines import EngineRecord, list_engine_sets, read_engines
from eopc_runtime.errors import BundleError, DeviceError, UsageError
from eopc_runtime.prior_error import PriorError
from eopc_runtime.profiles import load_profile
from eopc_runtime.report.plan_file import PlanFile, read_plan
from eopc_runtime.report.residuals import Residual, read_residuals
from eopc_runtime.sequence_record import SequenceRecord, read_records
from eopc_runtime.validation.compare import Validation


@dataclass(frozen=True, slots=True)
class Maker:
    """Where and when a report is made: local time, the machine, the versions in use (null: not installed)."""

    when: str
    machine: Mapping[str, object]
    versions: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a page shows; `notes` say what could not be read and why."""

    bundle: Bundle
    manifest_sha256: str
    plan: PlanFile | None
    prior_error: PriorError | None
    residuals: tuple[Residual, ...]
    engines: Mapping[str, tuple[EngineRecord, ...]]
    sequences: tuple[SequenceRecord, ...]
    validation: Validation | None
    maker: Maker
    notes: tuple[str, ...]


def gather(bundle: Bundle, maker: Maker, log: Path | None = None, validation: Path | None = None) -> Facts:
    """Read what belongs to a bundle.

    Args:
        log: what `eopc run --log` wrote; sequences of other bundles are left out, UsageError if there are no others.
        validation: what `eopc validate --json` printed; UsageError if it is of another bundle.
    """
    notes, engine = [], fingerprint(bundle.manifest)
    plan: PlanFile | None = None
    try:
        plan = read_plan(bundle.root)
    except BundleError as error:
        notes.append(f"What was decided is not shown: {error}")
    sequences: tuple[SequenceRecord, ...] = ()
    if log is not None:
        records = read_records(_text(log).splitlines(keepends=True), str(log))
        sequences = tuple(record for record in records if record.engine == engine)
        if not sequences:
            raise UsageError(f"None of the {len(records)} sequences in {log} ran on {bundle.root}.")
        if len(sequences) < len(records):
            notes.append(f"{len(records) - len(sequences)} sequences of other bundles in the log are left out.")
    checked = None
    if validation is not None:
        checked = Validation.from_json(_json(validation), str(validation))
        if checked.engine != engine:
            raise UsageError(f"{validation} is of another bundle. Run `eopc validate {bundle.root} --json` again.")
    return Facts(
        bundle=bundle,
        manifest_sha256=sha256_file(bundle.root / MANIFEST_NAME),
        plan=plan,
        prior_error=_prior_error(bundle.energy.device),
        residuals=read_residuals(bundle.root, bundle.manifest, bundle.energy),
        engines=_engines(bundle.root, notes),
        sequences=sequences,
        validation=checked,
        maker=maker,
        notes=tuple(notes),
    )


def _prior_error(device: str) -> PriorError | None:
    try:
        return load_profile(device).prior_error
    except DeviceError:  # a device of a newer eopc
        return None


def _engines(root: Path, notes: list[str]) -> dict[str, tuple[EngineRecord, ...]]:
    try:
        return {key: read_engines(root, key) for key in list_engine_sets(root)}
    except BundleError as error:
        notes.append(f"Engines are not shown: {error}")
        return {}


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path))
    except ValueError:
        raise UsageError(f"{path} is no JSON. Give the file that `eopc validate --json` printed into.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None
