"""`eopc energy predict`: the joules of one sequence, before it runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table
from eopc_runtime.cli.runners import TOKENS

if TYPE_CHECKING:
    from eopc_runtime.energy_model.sources import Prediction, Priced


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=TOKENS, required=True, help="Tokens of the prompt.")
@click.option("--new-tokens", type=TOKENS, required=True, help="Tokens to generate.")
@click.option("--key", metavar="NAME", help="Only this tier of a bundle, or this group of a fit. [default: all]")
@click.option("--budget", metavar="ENERGY", help="Also say how many new tokens this energy affords.")
@click.option("--strict", is_flag=True, help="Refuse lengths that were not measured, instead of marking the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def predict(
    source: Path,
    prompt_tokens: int,
    new_tokens: int,
    key: str | None,
    budget: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Predict the energy of a sequence from SOURCE: a bundle, or a file that `eopc energy fit -o` wrote.

    "expected" is what a meter should show, "at most" what a budget is charged: with the margin, and without credit for
    a negative constant. Lengths outside the measured range are marked extrapolated and raised by a stated factor.
    """
    from eopc_runtime.energy_model.sources import choose, load_priced
    from eopc_runtime.energy_model.sources import predict as predict_one
    from eopc_runtime.units import parse_energy

    budget_j = None if budget is None else parse_energy(budget)
    items = choose(load_priced(source), key)
    predictions = [predict_one(item, prompt_tokens, new_tokens, strict) for item in items]
    affords = [None if budget_j is None else _affords(item, prompt_tokens, budget_j) for item in items]
    if as_json:
        print_json(
            {
                "source": str(source),
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "budget_j": budget_j,
                "predictions": [
                    {**asdict(p), **({"affords": a} if a is not None else {})}
                    for p, a in zip(predictions, affords, strict=True)
                ],
            }
        )
        return
    _print(predictions, affords, budget)
    for item in items:
        for warning in item.warnings:
            click.echo(f"Warning: {item.name}: {warning}", err=True)


def _affords(item: Priced, prompt_tokens: int, budget_j: float) -> dict[str, Any]:
    """Return how many new tokens a budget affords, and whether the measured range set the limit."""
    from eopc_runtime.energy_model.sweetspot import token_cap

    limit = item.lengths.n_out[1]
    factor = (1 + (item.margin or 0.0)) * (item.hull.inflation(prompt_tokens, limit) if item.hull else 1.0)
    tokens = token_cap(item.theta, prompt_tokens, budget_j / factor, limit)
    return {"new_tokens": tokens, "limited_by": "range" if tokens == limit else "budget"}


def _print(predictions: list[Prediction], affords: list[dict[str, Any] | None], budget: str | None) -> None:
    from eopc_runtime.units import format_energy

    headers = [
        "name",
        "expected",
        "at most",
        "level",
        "J per token",
        "source",
        *([f"{budget} affords"] if budget else []),
    ]
    rows = []
    for p, a in zip(predictions, affords, strict=True):
        row = [
            p.name,
            format_energy(p.energy_j),
            "-" if p.bound_j is None else format_energy(p.bound_j, round_up=True),
            "-" if p.level is None else f"{p.level:.0%}",
            f"{p.j_per_token:.4g}",
            p.energy_source + (" (extrapolated)" if p.extrapolated else ""),
        ]
        if a is not None:
            row.append(f"{a['new_tokens']}{'+' if a['limited_by'] == 'range' else ''} tokens")
        rows.append(row)
    print_table(headers, rows)
    if any(p.extrapolated for p in predictions):
        factor = max(p.inflation for p in predictions)
        click.echo(
            f'extrapolated: outside the measured lengths; "at most" is raised up to {factor:.3g} times', err=True
        )
