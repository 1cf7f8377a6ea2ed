"""The section about the build: parity, versions, engines, machine."""

from __future__ import annotations

from collections.abc import Mapping

from eopc_runtime.cli.output import format_bytes
from eopc_runtime.report.content import Section, Table
from eopc_runtime.report.facts import Facts


def build_section(facts: Facts) -> Section:
    """How near the graphs are to PyTorch, what made the bundle, and where this page was made."""
    manifest = facts.bundle.manifest
    keys = list(dict.fromkeys(key for tier in manifest.tiers for key in tier.parity))
    parity = Table(
        "Parity: the graphs through the runtime against the PyTorch model, prompt and cached steps",
        ("tier", *(key.replace("_", " ") for key in keys)),
        [(tier.tier, *(shown(tier.parity.get(key)) for key in keys)) for tier in manifest.tiers],
    )
    model = manifest.model
    built = {
        "model": f"{model.name} ({model.model_type}, {model.num_hidden_layers} layers, hidden {model.hidden_size})",
        "source": model.source,
        "device": manifest.device,
        "graphs": f"{manifest.dialect} dialect, opset {manifest.opset}, context {manifest.context}",
        "weights": f"{manifest.precision}, compute {manifest.compute_dtype}",
        "files": f"{len(manifest.files)}, {format_bytes(sum(entry.bytes for entry in manifest.files))}",
        "eopc": manifest.eopc_version,
        **manifest.tools,
        "seed": manifest.seed,
        **{f"calibration text: {key}": value for key, value in manifest.calibration.items()},
        "manifest sha256": facts.manifest_sha256,
    }
    maker = facts.maker
    made = {"when": maker.when, **maker.machine, **{f"version of {k}": v for k, v in maker.versions.items()}}
    tables = [_pairs("The bundle", built), *_engines(facts), _pairs("Where this page was made", made)]
    return Section("build", "Parity, versions, machine", (), (), ((parity,) if keys else ()) + tuple(tables))


def shown(value: object) -> str:
    """Return a value of free content as text; null is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    return str(value)


def _pairs(caption: str, pairs: Mapping[str, object]) -> Table:
    rows = [(key.replace("_", " "), shown(value)) for key, value in pairs.items()]
    return Table(caption, (), rows)


def _engines(facts: Facts) -> list[Table]:
    rows = [
        (
            key,
            record.file or f"{record.tier} {record.phase}, not kept",
            f"{record.fingerprint.compiler} {record.fingerprint.version}",
            record.target,
            str(record.layers),
            format_bytes(record.bytes),
            "-" if record.check is None else f"cosine {record.check.cosine_min:.4f}",
        )
        for key, records in facts.engines.items()
        for record in records
    ]
    headers = ("set", "engine", "compiler", "target", "layers", "size", "check")
    return [Table("Engines", headers, rows)] if rows else []
