"""`eopc devices`: the device profiles, each constant with its mark; of one device also what was measured in public."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table
from eopc_runtime.cli.runners import TOKENS

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
@click.argument("name", required=False)
@click.option("--prompt-tokens", type=TOKENS, default=512, show_default=True, help="Prompt of J per token.")
@click.option("--new-tokens", type=TOKENS, default=256, show_default=True, help="Answer of J per token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the source of every constant.")
def devices(name: str | None, prompt_tokens: int, new_tokens: int, as_json: bool) -> None:
    """List the devices eopc can price energy for, or show all that is known of the device NAME.

    With NAME: the constants of its prior and their error, and the energy of public measurements there: calibrated for
    the models, engines and boards named, and for no others. J per token is that of --prompt-tokens + --new-tokens.
    """
    from eopc_runtime.cli import devices_measured
    from eopc_runtime.profiles import MARKS, list_profiles, load_profile

    profiles = list_profiles() if name is None else (load_profile(name),)
    if as_json:
        shown = [
            {**describe(profile), "measured": devices_measured.describe(profile.name, prompt_tokens, new_tokens)}
            for profile in profiles
        ]
        print_json({"devices": shown, "marks": MARKS})
    elif name is None:
        _print_list(profiles)
    else:
        _print_one(profiles[0])
        devices_measured.print_measured(profiles[0].name, prompt_tokens, new_tokens)


def _print_list(profiles: tuple[DeviceProfile, ...]) -> None:
    """Write a line of constants per device, then what each is."""
    print_table(("device", *_COLUMNS, "precisions", "energy"), [_row(profile) for profile in profiles])
    click.echo()
    for profile in profiles:
        click.echo(f"{profile.name}: {profile.description}{_aliases(profile)}")
    click.echo()
    click.echo(_marks())
    click.echo("`eopc devices NAME` shows one of them, with the error of its prior and public measurements there.")


def _print_one(profile: DeviceProfile) -> None:
    """Write the constants of a device's prior, and how far it was off."""
    from eopc_runtime.profiles import ENGINE_COMPILERS

    click.echo(f"{profile.name}: {profile.description}{_aliases(profile)}")
    for note in profile.notes:
        click.echo(f"  {note}")
    if profile.engine:
        click.echo(f"  engines: {ENGINE_COMPILERS[profile.engine.compiler]} for SM{profile.engine.compute_capability}")
    click.echo()
    rows = [(name, c) for name, c in profile.constants.items()]
    for name, precision in profile.precisions.items():
        rows.append((f"decode_efficiency, {name}", precision.decode_efficiency))
        if precision.unpack_j is not None:
            rows.append((f"unpack_j, {name}", precision.unpack_j))
    print_table(
        (f"constant of the {profile.energy_source}", "value", "unit", "mark"),
        [(name, f"{c.value:.4g}", c.unit, c.mark) for name, c in rows],
    )
    click.echo(_marks() + " Sources: --json.")
    click.echo()
    error = profile.prior_error
    known = f"error for {error}" if error else "never compared with measurements on this device"
    click.echo(f"Prices of models that were not measured ({profile.energy_source}): {known}.")


def _aliases(profile: DeviceProfile) -> str:
    return f" (also: {', '.join(profile.aliases)})" if profile.aliases else ""


def _marks() -> str:
    from eopc_runtime.profiles import MARKS

    return "Marks: " + ", ".join(f"{mark} = {meaning}" for mark, meaning in MARKS.items()) + "."


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
        "prior_error": profile.prior_error.to_json() if profile.prior_error else None,
        "precisions": {name: asdict(precision) for name, precision in profile.precisions.items()},
        "constants": {name: asdict(constant) for name, constant in profile.constants.items()},
        "rails": asdict(profile.rails) if profile.rails else None,
        "engine": asdict(profile.engine) if profile.engine else None,
        "notes": list(profile.notes),
    }


def _row(profile: DeviceProfile) -> tuple[str, ...]:
    cells = (_cell(profile.constants[name], scale) for name, scale in _COLUMNS.values())
    return (profile.name, *cells, ",".join(profile.precisions), profile.energy_source)


def _cell(constant: Constant, scale: float) -> str:
    return f"{constant.value * scale:.4g} {constant.mark}"
