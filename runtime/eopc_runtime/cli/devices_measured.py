"""The part of `eopc devices NAME` about public measurements: J per token, sweet spot, error and source of each fit."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_table

if TYPE_CHECKING:
    from eopc_runtime.measured import MeasuredEnergy, MeasuredFit, Source

_SERVING = {
    "single": "one sequence at a time",
    "throughput": "throughput mode, up to {batch} sequences at once",
}
_HEADERS = ("model", "engine", "precision", "J/token", "charged", "n_out*", "error", "margin", "source")


def describe(device: str, n_in: int, n_out: int) -> dict[str, Any] | None:
    """Return the measured energies of a device as JSON, each with its price of n_in + n_out tokens; None without."""
    from eopc_runtime.measured import load_measured

    measured = load_measured(device)
    if measured is None:
        return None
    return {
        "notes": list(measured.notes),
        "sources": {name: asdict(source) for name, source in measured.sources.items()},
        "fits": [_fit(measured, item, n_in, n_out) for item in measured.fits],
    }


def print_measured(device: str, n_in: int, n_out: int) -> None:
    """Write a table per source and way of serving, what limits the figures, and their sources."""
    from eopc_runtime.measured import load_measured

    measured = load_measured(device)
    if measured is None:
        click.echo("No public measurements of this device are shipped.")
        return
    click.echo("Measured in public (calibrated, each for its own model, engine, board and rails only):")
    for group in dict.fromkeys(map(_group, measured.fits)):
        name, serving, batch = group
        rails = "+".join(measured.sources[name].meter.rails) or "rails not stated"
        click.echo(f"\n{n_in} + {n_out} tokens, {_SERVING[serving].format(batch=batch)}; {rails}")
        fits = [item for item in measured.fits if _group(item) == group]
        print_table(_HEADERS, [_row(measured, item, n_in, n_out) for item in fits])
    click.echo()
    click.echo("J/token: as a meter shows it. charged: to a budget, which has no credit for a negative constant.")
    click.echo(f"n_out*: cheapest answer per token at n_in {n_in}. -: outside the lengths measured, or not known.")
    click.echo()
    for note in measured.notes:
        click.echo(note)
    for item in measured.fits:
        if item.coarse:
            click.echo(f"{item.key}: {'; '.join(item.notes)}.")
    click.echo()
    for name, source in measured.sources.items():
        click.echo(f"{name}: {_cite(source)}")


def _group(item: MeasuredFit) -> tuple[str, str, int]:
    """What shares a table: sums of different rails are not to be compared."""
    return item.source, item.serving, item.batch


def _fit(measured: MeasuredEnergy, item: MeasuredFit, n_in: int, n_out: int) -> dict[str, Any]:
    """Return one fit as JSON; prices outside the measured lengths are null, with the reason."""
    from eopc_runtime.energy_model.sweetspot import advice, sweet_spot

    content = {**asdict(item), "key": item.key, "margin": item.margin, "energy_source": "calibrated"}
    content["identity"] = asdict(measured.identity(item))
    reference: dict[str, Any] = {
        "n_in": n_in,
        "n_out": n_out,
        "n_out_star": None,
        "reason": f"measured for {item.hull}",
    }
    if item.hull.n_in[0] <= n_in <= item.hull.n_in[1]:
        spot = sweet_spot(item.theta, n_in, item.hull.n_out)
        reference |= {"n_out_star": spot.n_out_star, "reason": spot.reason, "advice": advice(spot)}
    inside = item.hull.holds(n_in, n_out)
    energy_j = item.tier().expected_j(n_in, n_out) if inside else None
    reference |= {"energy_j": energy_j, "j_per_token": energy_j / n_out if energy_j is not None else None}
    reference |= {"charged_j": item.tier().sequence_j(n_in, n_out) if inside else None}
    return {**content, "reference": reference}


def _row(measured: MeasuredEnergy, item: MeasuredFit, n_in: int, n_out: int) -> tuple[str, ...]:
    found = _fit(measured, item, n_in, n_out)["reference"]
    error = f"{item.mape_cv:.2%} left out" if item.mape_cv is not None else f"{item.mape_in_sample:.2%} in sample"
    margin = "-"
    if item.margin is not None and item.conformal is not None:
        margin = f"{item.margin:.2%} at {item.conformal.level:.0%}"
    charged_j = found["charged_j"]
    return (
        item.model,
        item.engine,
        item.precision,
        "-" if found["j_per_token"] is None else f"{found['j_per_token']:.4g}",
        "-" if charged_j is None else f"{charged_j / n_out:.4g}",
        "-" if found["n_out_star"] is None else str(found["n_out_star"]),
        error,
        margin,
        item.source,
    )


def _cite(source: Source) -> str:
    """One line: title, authors, where to find it, licence, what was done to it, how it was measured."""
    found = [f"doi {source.doi}"] if source.doi else []
    if source.repository:
        found.append(source.repository + (f" at {source.commit[:12]}" if source.commit else ""))
    if source.file:
        found.append(source.file)
    board = [text for text in (source.identity.module, source.identity.power_mode, source.identity.clocks) if text]
    rails = "+".join(source.meter.rails) or "rails not stated"
    return (
        f"{source.title}; {source.authors}; {', '.join(found)}; {source.licence}; {source.changes}. "
        f"Read by {source.meter.name}: {rails}; {', '.join(board) or 'power mode and clocks not stated'}."
    )
