"""`eopc inspect`: what is in a bundle, and whether its files are what the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import format_bytes, print_json, print_table
from eopc_runtime.profiles import ENGINE_COMPILERS

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.energy import EnergyTable
    from eopc_runtime.engines import EngineRecord
    from eopc_runtime.signature import Signature
    from eopc_runtime.tier_info import TierInfo


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: str, as_json: bool) -> None:
    """Show the tiers, files, engines and signature of BUNDLE, and verify every file's size and sha256.

    Exits with 1 and the reason when a file is missing or damaged.
    """
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.engines import verify_engines
    from eopc_runtime.signature import read_signature

    bundle = Bundle.open(path, verify=True)
    for tier in bundle.manifest.tiers:
        bundle.mask(tier)
    engines = verify_engines(bundle)
    signature = read_signature(bundle.root)
    if as_json:
        print_json(describe(bundle, engines, signature))
    else:
        _print(bundle)
        click.echo(_signed(bundle, signature))
        _print_engines(engines)


def describe(
    bundle: Bundle, engines: Mapping[str, tuple[EngineRecord, ...]], signature: Signature | None
) -> dict[str, Any]:
    """Return the JSON object of `eopc inspect --json`; bundle and engines are verified already."""
    manifest = bundle.manifest
    prices = {tier.tier: asdict(tier) for tier in bundle.energy.tiers}
    return {
        "bundle": str(bundle.root),
        "ok": True,
        "model": asdict(manifest.model),
        "device": manifest.device,
        "dialect": manifest.dialect,
        "opset": manifest.opset,
        "precision": manifest.precision,
        "compute_dtype": manifest.compute_dtype,
        "context": manifest.context,
        "workload": asdict(manifest.workload),
        "energy": {
            "device": bundle.energy.device,
            "source": bundle.energy.source,
            "margin": bundle.energy.margin,
            "mode": bundle.energy.mode,
            "modes": [table.mode for table in bundle.energy.modes() if table.mode is not None],
            "calibration": None if bundle.energy.calibration is None else asdict(bundle.energy.calibration),
        },
        "tiers": [{**asdict(tier), "prices": prices[tier.tier]} for tier in manifest.tiers],
        "files": [asdict(entry) for entry in manifest.files],
        "engines": [
            {"key": key, **asdict(record), "target": record.target} for key, rows in engines.items() for record in rows
        ],
        "signature": None if signature is None else {"key": signature.fingerprint},
        "eopc_version": manifest.eopc_version,
        "tools": dict(manifest.tools),
        "seed": manifest.seed,
        "calibration": dict(manifest.calibration),
    }


def _signed(bundle: Bundle, signature: Signature | None) -> str:
    """Return whether the bundle carries a signature; without the signer's key nothing is said of its worth."""
    if signature is None:
        return "not signed"
    return f"signed with key {signature.fingerprint}; to check it: eopc verify {bundle.root} --key FILE"


def _print(bundle: Bundle) -> None:
    from eopc_runtime.units import format_energy

    manifest, energy = bundle.manifest, bundle.energy
    work = manifest.workload
    click.echo(f"{manifest.model.name} ({manifest.model.model_type}) for {manifest.device}")
    click.echo(
        f"{manifest.precision} weights, {manifest.compute_dtype} compute, {manifest.dialect} graphs, "
        f"context {manifest.context}"
    )
    click.echo(
        f"planned for {work.prompt_tokens} + {work.new_tokens} tokens; energy is {energy.source}, "
        f"prices include a margin of {energy.margin:.0%}"
    )
    if energy.calibration is not None:
        click.echo(f"calibrated{_calibrated(energy)}")
    click.echo()
    print_table(
        ("tier", "budget", "energy", "source", "perplexity", "params", "layers", "kv", "ffn"),
        [
            (
                tier.tier,
                "-" if tier.budget_j is None else format_energy(tier.budget_j),
                format_energy(tier.energy_j),
                tier.energy_source,
                _perplexity(tier),
                f"{tier.params / 1e6:.1f} M",
                *(f"{tier.keep[part]:.0%}" for part in ("layers", "kv_groups", "ffn")),
            )
            for tier in manifest.tiers
        ],
    )
    for tier in manifest.tiers:
        if tier.note:
            click.echo(f"{tier.tier}: {tier.note}")
    click.echo()
    print_table(("file", "size", "sha256"), [(f.path, format_bytes(f.bytes), f.sha256[:12]) for f in manifest.files])
    total = sum(entry.bytes for entry in manifest.files)
    click.echo(f"{len(manifest.files)} files, {format_bytes(total)}, all verified")


def _print_engines(engines: Mapping[str, tuple[EngineRecord, ...]]) -> None:
    """Write a table per set of engines, all verified."""
    for key, records in engines.items():
        built = records[0].fingerprint if records else None
        what = f", {ENGINE_COMPILERS[built.compiler]} {built.version} for {records[0].target}" if built else ""
        click.echo(f"\nengines {key}{what}")
        print_table(
            ("engine", "layers", "attention", "cache", "prompt", "size", "check"),
            [
                (
                    r.file or f"{r.tier} {r.phase} (proxy, not kept)",
                    str(r.layers),
                    f"{r.attention_layers}{' + plain' if r.decomposed_attention else ''}",
                    str(r.cache_len),
                    str(r.max_prompt_tokens),
                    format_bytes(r.bytes),
                    _check(r),
                )
                for r in records
            ],
        )


def _check(record: EngineRecord) -> str:
    """Return what `eopc engine --check` found of an engine, if it was asked."""
    check = record.check
    if check is None:
        return "-"
    found = f"cosine {check.cosine_min:.4f}, top-1 {check.top1_agreement:.1%}"
    return found if check.ok else f"failed: {found}"


def _calibrated(energy: EnergyTable) -> str:
    """Return where the prices hold, and how often."""
    calibration = energy.calibration
    assert calibration is not None
    mode = f" in power mode {energy.mode}" if energy.mode else ""
    hull = f" for {calibration.hull}" if calibration.hull else ""
    level = f"; the margin holds for {calibration.conformal.level:.0%} of sequences" if calibration.conformal else ""
    return f"{mode}{hull}{level}"


def _perplexity(tier: TierInfo) -> str:
    """Return the perplexity, beside the dense model's where both are known."""
    if tier.perplexity is None:
        return "-"
    dense = "" if tier.perplexity_dense is None else f" (dense {tier.perplexity_dense:.2f})"
    return f"{tier.perplexity:.2f}{dense}"
