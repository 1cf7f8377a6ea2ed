"""`eopc energy sweetspot`: which answer lengths cost least per token, as a table and a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import print_json, print_table
from eopc_runtime.cli.runners import TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eopc_runtime.energy_model.sources import Priced
    from eopc_runtime.energy_model.sweetspot import SweetSpot


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--by", metavar="COL,COL", default="", help="For a CSV: fit apart for every value of these columns.")
@click.option("--key", metavar="NAME", help="Only this tier of a bundle, or this group. [default: the cheapest]")
@click.option("--prompt-tokens", type=TOKENS, help="The prompt length to advise on. [default: middle]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also draw it into this SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sweetspot(
    source: Path, by: str, key: str | None, prompt_tokens: int | None, plot: Path | None, as_json: bool
) -> None:
    """Show where joules per generated token are lowest for SOURCE, a bundle or a CSV of measurements.

    The optimum n_out* = sqrt((θ0 + θ1 n + θ2 n²) / θ5) is null where the curve has no lowest point within the lengths
    that were measured; the reason says why. Of several power modes the one with the lowest J per token is named.
    """
    from eopc_runtime.cli.energy_fit import columns_of
    from eopc_runtime.energy_model.sources import choose, load_priced
    from eopc_runtime.files import write_output

    items = choose(load_priced(source, columns_of(by)), key)
    content, best, spots = describe(source, items, prompt_tokens)
    if plot is not None:
        write_output(plot, _picture(best, spots).encode())
    if as_json:
        print_json(content)
        return
    _print(content, best, spots)
    if plot is not None:
        click.echo(f"Wrote {plot}.", err=True)


def describe(
    source: Path, items: Sequence[Priced], prompt_tokens: int | None
) -> tuple[dict[str, Any], Priced, list[SweetSpot]]:
    """Return the JSON object of `eopc energy sweetspot --json`, the cheapest item and its sweet spots.

    The keys at the top are those of the cheapest item; `candidates` lists them all at the same prompt length.
    """
    from eopc_runtime.energy_model.sweetspot import advice, grid, round_lengths, sweet_spot

    n_ins = [round_lengths(*item.lengths.n_in) for item in items]
    at = [prompt_tokens or lengths[len(lengths) // 2] for lengths in n_ins]
    if len(set(at)) > 1:
        at = [at[0]] * len(at)  # compared at one prompt length
    candidates = [sweet_spot(item.theta, n, item.lengths.n_out) for item, n in zip(items, at, strict=True)]
    chosen = min(range(len(items)), key=lambda i: candidates[i].j_per_token)
    best, spot = items[chosen], candidates[chosen]
    outside = best.hull is not None and not best.hull.holds(spot.n_in, spot.best_n_out)
    shown = sorted({*n_ins[chosen], spot.n_in})
    spots = [sweet_spot(best.theta, n, best.lengths.n_out) for n in shown]
    content = {
        "source": str(source),
        "name": best.name,
        "mode": best.mode,
        "energy_source": best.tier.source,
        "n_in": spot.n_in,
        "n_out_star": spot.n_out_star,
        "reason": spot.reason,
        "best_n_out": spot.best_n_out,
        "clipped": spot.clipped,
        "extrapolated": outside,
        "j_per_token": spot.j_per_token,
        "advice": advice(spot),
        "hull": None if best.hull is None else asdict(best.hull),
        "sweetspots": [asdict(s) for s in spots],
        "grid": grid(best.theta, shown, round_lengths(*best.lengths.n_out)),
        "candidates": [
            {"name": item.name, "mode": item.mode, **asdict(found)}
            for item, found in zip(items, candidates, strict=True)
        ],
        "warnings": list(best.warnings),
    }
    return content, best, spots


def _picture(best: Priced, spots: Sequence[SweetSpot]) -> str:
    from eopc_runtime.energy_model.svg import sweetspot_svg
    from eopc_runtime.energy_model.sweetspot import round_lengths

    measured = f"measured for {best.hull}" if best.hull else "no range was measured"
    note = f"joules are {best.tier.source}, {measured}; a filled ring is an optimum, a hollow one the range's edge"
    return sweetspot_svg(best.name, note, best.theta, spots, round_lengths(*best.lengths.n_out))


def _print(content: dict[str, Any], best: Priced, spots: Sequence[SweetSpot]) -> None:
    """Write J per token over prompt and answer lengths, the cheapest of each row marked, and the advice."""
    from eopc_runtime.energy_model.sweetspot import advice, j_per_token, round_lengths

    candidates = content["candidates"]
    if len(candidates) > 1:
        rows = [(c["name"], f"{c['j_per_token']:.4g}", str(c["best_n_out"])) for c in candidates]
        print_table(("candidate", f"J per token at n_in {content['n_in']}", "at n_out"), rows)
        where = f"power mode {best.mode}" if best.mode else best.name
        click.echo(f"lowest J per token: {where}, {content['j_per_token']:.4g}")
        click.echo()
    click.echo(f"{best.name} ({best.tier.source}): J per generated token, * cheapest of its row")
    n_outs = round_lengths(*best.lengths.n_out)
    lines = []
    for spot in spots:
        values = [j_per_token(best.theta, spot.n_in, m) for m in n_outs]
        cheapest = min(values)
        star = str(spot.n_out_star) if spot.n_out_star is not None else "-"
        lines.append((str(spot.n_in), *(f"{v:.3g}{'*' if v == cheapest else ' '}" for v in values), star))
    print_table(("n_in \\ n_out", *(f"{m} " for m in n_outs), "n_out*"), lines)
    click.echo()
    for spot in spots:
        why = f" ({spot.reason})" if spot.reason else ""
        click.echo(f"{advice(spot)}{why}")
    if content["extrapolated"]:
        click.echo(f"extrapolated: measured for {best.hull}, not at n_in {content['n_in']}", err=True)
    for warning in content["warnings"]:
        click.echo(f"Warning: {warning}", err=True)
