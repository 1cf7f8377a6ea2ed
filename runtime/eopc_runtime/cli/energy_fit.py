"""`eopc energy fit`: coefficients, held-out error and margin from measured sequences."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eopc_runtime.energy_model.groups import GroupFit, Refusal

FORM_NAMES = ("auto", "quadratic", "phys5", "linear", "flops", "b4", "b2", "b1")


@click.command()
@click.argument("csv", type=click.Path(path_type=Path))
@click.option("--by", metavar="COL,COL", default="", help="Fit apart for every value of these columns.")
@click.option(
    "--form",
    type=click.Choice(FORM_NAMES),
    default="auto",
    show_default=True,
    help="auto is quadratic (SweetSpot's Mem+FLOPs) from 10 cells on, phys5 from 6; the others are for comparison.",
)
@click.option("--compare", is_flag=True, help="Add the held-out error of the six published forms.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of sequences that may cost more than predicted x (1 + margin).",
)
@click.option(
    "--min-new-tokens",
    type=click.IntRange(min=1),
    default=1,
    help="Leave out rows with fewer new tokens, as when a slow sensor cannot resolve them. [default: none]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which cells go into which fold."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the coefficients to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(
    csv: Path,
    by: str,
    form: str,
    compare: bool,
    alpha: float,
    min_new_tokens: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Fit E = θ0 + θ1 n + θ2 n² + θ3 m + θ4 n m + θ5 m² to the rows of CSV (n_in, n_out, energy_j).

    CSV may be gzipped. Errors are on cells left out of the fit: 5 folds, grouped by (n_in, n_out), so that runs of a
    cell are never on both sides. Rows that cannot be fitted are left out and counted.
    """
    from eopc_runtime.energy_model.groups import GroupFit, coefficients_json, compare_forms, fit_group
    from eopc_runtime.energy_model.rows import read_measurements
    from eopc_runtime.errors import UsageError
    from eopc_runtime.files import write_output

    columns = columns_of(by)
    measured = read_measurements(csv, columns, min_new_tokens)
    results = [fit_group(group, form, alpha, seed) for group in measured.groups]
    fits = [item for item in results if isinstance(item, GroupFit)]
    if not fits:
        raise UsageError("\n".join(f"{item.key}: {item.reason}" for item in results if not isinstance(item, GroupFit)))
    compared = {}
    if compare:
        fitted = {item.key for item in fits}
        compared = {g.key: compare_forms(g, seed) for g in measured.groups if g.key in fitted}
    if output is not None:
        from json import dumps

        write_output(output, (dumps(coefficients_json(fits), indent=1) + "\n").encode())
    content = describe(csv, columns, results, measured.left_out, compared)
    if as_json:
        print_json(content)
    else:
        _print(content, results)
        if output is not None:
            click.echo(f"Wrote {output}.", err=True)


def columns_of(by: str) -> tuple[str, ...]:
    """Return the column names of a --by option."""
    return tuple(name.strip() for name in by.split(",") if name.strip())


def describe(
    csv: Path,
    by: tuple[str, ...],
    results: list[GroupFit | Refusal],
    left_out: Mapping[str, int],
    compared: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return the JSON object of `eopc energy fit --json`; errors and margins are shares (0.01 = 1 %)."""
    from eopc_runtime.energy_model.groups import GroupFit, mean_held_out

    mean, count = mean_held_out([item for item in results if isinstance(item, GroupFit)])
    return {
        "csv": str(csv),
        "by": list(by),
        "left_out": dict(left_out),
        "groups": [_group(item, compared.get(item.key)) for item in results],
        "mape_cv_mean": mean,
        "mape_cv_mean_groups": count,
    }


def _group(item: GroupFit | Refusal, compared: Mapping[str, float] | None) -> dict[str, Any]:
    from eopc_runtime.energy_model.groups import Refusal
    from eopc_runtime.energy_model.sweetspot import advice, round_lengths, sweet_spot

    nothing = dict.fromkeys(("coefficients", "mape_cv", "margin", "n_out_star"))
    if isinstance(item, Refusal):
        return {"key": item.key, "by": dict(item.by), **nothing, "reason": item.reason, "warnings": item.warnings}
    spots = [sweet_spot(item.theta, n, item.hull.n_out) for n in round_lengths(*item.hull.n_in)]
    middle = spots[len(spots) // 2]
    return {
        "key": item.key,
        "by": dict(item.by),
        "form": item.form,
        "cells": item.cells,
        "rows": item.rows,
        "coefficients": asdict(item.theta),
        "mape_cv": item.mape_cv,
        "worst_cv": item.worst_cv,
        "mape_in_sample": item.mape_in_sample,
        "margin": item.margin,
        "conformal": None if item.conformal is None else asdict(item.conformal),
        "hull": asdict(item.hull),
        "n_in": middle.n_in,
        "n_out_star": middle.n_out_star,
        "advice": advice(middle),
        "sweetspots": [asdict(spot) for spot in spots],
        "coarse": item.coarse,
        "forms": compared,
        "warnings": item.warnings,
    }


def _print(content: dict[str, Any], results: list[GroupFit | Refusal]) -> None:
    """Write the table, the coefficients, then what is doubtful."""
    from eopc_runtime.energy_model.groups import GroupFit

    fits = [item for item in results if isinstance(item, GroupFit)]
    rows = [
        (
            item.key,
            f"{item.rows}/{item.cells}",
            item.form,
            f"{item.mape_cv:.2%}",
            f"{item.worst_cv:.1%}",
            "-"
            if item.margin is None or item.conformal is None
            else f"{item.margin:.1%} at {item.conformal.level:.0%}",
        )
        for item in fits
    ]
    print_table(("group", "rows/cells", "form", "held-out error", "worst", "margin"), rows)
    mean, count = content["mape_cv_mean"], content["mape_cv_mean_groups"]
    if mean is not None:
        apart = f", {len(fits) - count} sampled too coarsely set apart" if count < len(fits) else ""
        click.echo(f"mean held-out error over {count} groups: {mean:.2%}{apart}")
    click.echo()
    print_table(
        ("group", "θ0 J", "θ1 n", "θ2 n²", "θ3 m", "θ4 n m", "θ5 m²"),
        [(item.key, *(f"{value:.4g}" for value in asdict(item.theta).values())) for item in fits],
    )
    for key, compared in ((group["key"], group.get("forms")) for group in content["groups"]):
        if compared:
            shown = ", ".join(f"{name} {error:.2%}" for name, error in compared.items())
            click.echo(f"{key}: held-out error of {shown}")
    click.echo()
    for group in content["groups"]:
        if group["coefficients"]:
            click.echo(f"{group['key']}: {group['advice']}")
    for item in results:
        if not isinstance(item, GroupFit):
            click.echo(f"Not fitted: {item.key}: {item.reason}", err=True)
        for warning in item.warnings:
            click.echo(f"Warning: {item.key}: {warning}", err=True)
    for reason, count in content["left_out"].items():
        click.echo(f"Left out: {count} rows with {reason}.", err=True)
