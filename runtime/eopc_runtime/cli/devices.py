"""`eopc devices`: the device profiles, each constant with its mark."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table

if TYPE_CHECKING:
    from eopc_runtime.profiles import Constant, DeviceProfile

# Column title -> constant, scale to the unit in the title.
_COLUMNS = {
    "idle W": ("idle_w", 1.0),
    "GB/s": ("bandwidth", 1e-9),
    "TFLOP/s": ("flops", 1e-12),
    "pJ/byte": ("j_per_byte", 1e12),
    "pJ/FLOP": ("j_per_flop", 1e12),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the source of every constant.")
def devices(as_json: bool) -> None:
    """List the devices eopc can price energy for."""
    from eopc_runtime.profiles import MARKS, list_profiles

    profiles = list_profiles()
    if as_json:
        print_json({"devices": [describe(profile) for profile in profiles], "marks": MARKS})
        return
    print_table(("device", *_COLUMNS, "precisions", "energy"), [_row(profile) for profile in profiles])
    click.echo()
    for profile in profiles:
        also = f" (also: {', '.join(profile.aliases)})" if profile.aliases else ""
        click.echo(f"{profile.name}: {profile.description}{also}")
    click.echo()
    click.echo("Marks: " + ", ".join(f"{mark} = {meaning}" for mark, meaning in MARKS.items()) + ".")


def describe(profile: DeviceProfile) -> dict[str, Any]:
    """Return a profile as JSON."""
    return {
        "name": profile.name,
        "aliases": list(profile.aliases),
        "description": profile.description,
        "based_on": profile.based_on,
        "dialects": list(profile.dialects),
        "compute_dtype": profile.compute_dtype,
        "energy_source": profile.energy_source,
        "threads": profile.threads,
        "precisions": {name: asdict(precision) for name, precision in profile.precisions.items()},
        "constants": {name: asdict(constant) for name, constant in profile.constants.items()},
        "rails": asdict(profile.rails) if profile.rails else None,
        "notes": list(profile.notes),
    }


def _row(profile: DeviceProfile) -> tuple[str, ...]:
    cells = (_cell(profile.constants[name], scale) for name, scale in _COLUMNS.values())
    return (profile.name, *cells, ",".join(profile.precisions), profile.energy_source)


def _cell(constant: Constant, scale: float) -> str:
    return f"{constant.value * scale:.4g} {constant.mark}"
