"""`eopc calibrate`: measured prices for a bundle, on the device it runs on."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.meters import meter_options
from eopc_runtime.cli.output import command_progress, print_json, print_table
from eopc_runtime.cli.runners import THREADS, runner_option, show_notes

if TYPE_CHECKING:
    from eopc_runtime.calibration.calibrate import Outcome
    from eopc_runtime.calibration.fitting import TierFit
    from eopc_runtime.calibration.plan import CellPlan


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path())
@meter_options("auto", text="What measures the energy; auto takes the first that works here. [default: auto]")
@click.option(
    "--tier", "tiers", metavar="TIER", multiple=True, help="Only this tier; may be given again. [default: all]"
)
@click.option(
    "--prompt-range", metavar="LOW:HIGH", default="32:512", show_default=True, help="Prompt lengths to calibrate for."
)
@click.option(
    "--new-range", metavar="LOW:HIGH", default="32:512", show_default=True, help="Answer lengths to calibrate for."
)
@click.option("--fit-cells", type=click.IntRange(min=6), help="Pairs of lengths to fit. [default: 14; quick 8]")
@click.option(
    "--conformal-cells",
    type=click.IntRange(min=1),
    help="Further pairs, kept out of the fit: the margin holds k/(k+1), up to 95 %. [default: 19; quick 9]",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), help="Visits of every pair. [default: 3, with the proxy 5; quick 1]"
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="MIN",
    help="Minutes to spend, in all, on waiting for other processes and on measuring again what they disturbed.",
)
@click.option(
    "--quick", is_flag=True, help="Fewer pairs and one round: a rougher fit, and a margin that holds for 90 %."
)
@click.option(
    "--seconds-per-window",
    type=click.FloatRange(min=0, min_open=True),
    help="Shortest measurement; short sequences are repeated. [default: 3; with the proxy 1]",
)
@click.option(
    "--max-temperature",
    type=float,
    metavar="C",
    help="Pause above it. [default: 5 C below the device's own limits]",
)
@runner_option
@click.option("--threads", type=THREADS, help="CPU threads. [default: onnxruntime's choice]")
@click.option("--seed", type=int, default=0, show_default=True, help="Which lengths, and in which order.")
@click.option("--no-resume", is_flag=True, help="Measure everything anew, also what an interrupted run has measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    path: str,
    meter: str,
    proxy_w: float | None,
    tiers: tuple[str, ...],
    prompt_range: str,
    new_range: str,
    seconds_per_window: float | None,
    max_temperature: float | None,
    runner: str,
    threads: int | None,
    patience: float,
    seed: int,
    no_resume: bool,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Measure the tiers of BUNDLE on this device, fit their prices, and write them into the bundle.

    Nothing else should run meanwhile. An interrupted run goes on with the same command. Prices belong to this device,
    its power mode and clocks; those of other power modes are kept beside them. The report in the bundle is made anew.
    With the proxy meter joules stay time x an assumed power, but the times are real ones.
    """
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.calibration.calibrate import Rig, Settings
    from eopc_runtime.calibration.calibrate import calibrate as run_calibration
    from eopc_runtime.cli.machine import cpu_model
    from eopc_runtime.cli.meters import open_meter_for, runner_name
    from eopc_runtime.power.base import MEASURED
    from eopc_runtime.report.write import refresh_report
    from eopc_runtime.runners.choose import open_pool

    bundle = Bundle.open(path)
    progress = command_progress()
    chosen = open_pool(bundle, runner, threads)
    with closing(chosen.pool) as pool, open_meter_for(bundle, meter, proxy_w, on_gpu=chosen.on_gpu) as opened:
        measuring = opened.sensor.source == MEASURED
        settings = Settings(
            plan=make_plan(prompt_range, new_range, seed, measuring=measuring, **numbers),
            tiers=tiers or None,
            seconds=seconds_per_window,
            limit_c=max_temperature,
            patience_s=60 * patience,
            resume=not no_resume,
        )
        name = runner_name(threads, chosen)
        rig = Rig(pool, name, opened, module=cpu_model(), show=progress.update, tell=progress.done)
        progress.done(settings_line(rig, settings, bundle.root.name))
        for remark in (*chosen.notes, *opened.sensor.remarks):
            progress.done(remark)
        outcome = run_calibration(bundle, rig, settings)
        show_notes(tuple(note for note in chosen.remarks if note not in chosen.notes))
    if reason := refresh_report(outcome.bundle):
        progress.done(reason)
    if as_json:
        print_json(describe(outcome))
    else:
        _print(outcome)


def make_plan(
    prompt_range: str,
    new_range: str,
    seed: int,
    *,
    fit_cells: int | None,
    conformal_cells: int | None,
    rounds: int | None,
    quick: bool,
    measuring: bool,
) -> CellPlan:
    """Return the plan of the options; what was given goes before what --quick or the kind of meter means."""
    from eopc_runtime.calibration import plan

    usual = (plan.FIT_CELLS, plan.CONFORMAL_CELLS, plan.ROUNDS if measuring else plan.PROXY_ROUNDS)
    usual = plan.QUICK if quick else usual
    given = (fit_cells, conformal_cells, rounds)
    fit, conformal, turns = (use if number is None else number for number, use in zip(given, usual, strict=True))
    n_in, n_out = plan.parse_range(prompt_range, "--prompt-range"), plan.parse_range(new_range, "--new-range")
    return plan.plan_cells(n_in, n_out, fit, conformal, turns, seed)


def settings_line(rig: Any, settings: Any, name: str) -> str:
    """Return what is about to be done, in one line."""
    plan = settings.plan
    what = ", ".join(settings.tiers) if settings.tiers else "all tiers"
    sensor = rig.meter.sensor
    return (
        f"calibrating {what} of {name} with {sensor.name} ({' + '.join(sensor.rails)}): "
        f"{len(plan.fit)} cells to fit, {len(plan.conformal)} for the margin, {plan.rounds} visits each, "
        f"prompts {plan.n_in[0]}-{plan.n_in[1]}, answers {plan.n_out[0]}-{plan.n_out[1]} tokens; {rig.runner}"
    )


def describe(outcome: Outcome) -> dict[str, Any]:
    """Return the JSON object of `eopc calibrate --json`; errors, margins and spreads are shares (0.01 = 1 %)."""
    table, calibration = outcome.bundle.energy, outcome.bundle.energy.calibration
    assert calibration is not None and calibration.conformal is not None
    return {
        "bundle": str(outcome.bundle.root),
        "meter": outcome.basis.meter.name,
        "energy_source": table.source,
        "power_mode": table.mode,
        "other_modes": [other.mode for other in table.other_modes],
        "cells": len(outcome.plan.cells),
        "fit_cells": len(outcome.plan.fit),
        "conformal_cells": len(outcome.plan.conformal),
        "rounds": outcome.plan.rounds,
        "statistic": statistic(outcome),
        "mape_cv": max(item.mape_cv for item in outcome.fits),
        "margin": table.margin,
        "level": calibration.conformal.level,
        "k": calibration.conformal.k,
        "idle_w": outcome.basis.meter.idle_w,
        "hull": asdict(outcome.basis.hull),
        "identity": asdict(outcome.basis.identity),
        "workload": asdict(outcome.bundle.manifest.workload),
        "tiers": [_tier(outcome, item) for item in outcome.fits],
        "visits_reused": outcome.reused,
        "journal": str(outcome.journal),
        "elapsed_s": outcome.elapsed_s,
    }


def statistic(outcome: Outcome) -> str:
    """Say what stands for a cell."""
    rounds = outcome.plan.rounds
    if rounds == 1:
        return "one visit per cell"
    if rounds < 4:
        return f"median of {rounds} visits per cell"
    return f"mean of {rounds} visits per cell without the lowest and the highest"


def _tier(outcome: Outcome, item: TierFit) -> dict[str, Any]:
    bundle = outcome.bundle
    work, index = bundle.manifest.workload, bundle.tier_index(item.tier)
    n, m = work.prompt_tokens, work.new_tokens
    inside = outcome.basis.hull.holds(n, m)
    energy_j = bundle.energy.tiers[index].expected_j(n, m, measured=inside)
    return {
        "tier": item.tier,
        "energy_j": energy_j,
        "j_per_token": energy_j / m,
        "price_j": bundle.energy.plan_price_j(index, index, n, m),
        "extrapolated": not inside,
        "mape_cv": item.mape_cv,
        "worst_cv": item.worst_cv,
        "margin": max(item.conformal.q, 0.0),
        "level": item.conformal.level,
        "k": item.conformal.k,
        "form": item.form,
        "coefficients": asdict(item.theta),
        "spread": item.spread,
        "worst_spread": item.worst_spread,
        "idle_share": item.idle_share,
        "visits": item.visits,
        "disturbed": item.disturbed,
        "noisy_cells": item.noisy_cells,
        "warnings": list(item.warnings),
    }


def _print(outcome: Outcome) -> None:
    """Write the table, what stands behind it, and what to do next."""
    from eopc_runtime.units import format_energy

    content = describe(outcome)
    work = content["workload"]
    length = f"{work['prompt_tokens']} + {work['new_tokens']} tokens"
    print_table(
        ("tier", length, "J per token", "held-out error", "worst", "margin", "visits differ", "disturbed"),
        [
            (
                tier["tier"],
                format_energy(tier["energy_j"]) + (" (extrapolated)" if tier["extrapolated"] else ""),
                f"{tier['j_per_token']:.4g}",
                f"{tier['mape_cv']:.2%}",
                f"{tier['worst_cv']:.1%}",
                f"{tier['margin']:.1%} at {tier['level']:.0%} (k = {tier['k']})",
                "-" if tier["spread"] is None else f"{tier['spread']:.1%} (at most {tier['worst_spread']:.0%})",
                f"{tier['disturbed']} of {tier['visits']}",
            )
            for tier in content["tiers"]
        ],
    )
    mode = f", power mode {content['power_mode']}" if content["power_mode"] else ""
    idle = f", idle {content['idle_w']:.2f} W" if content["idle_w"] is not None else ""
    click.echo(
        f"{content['energy_source']} joules from {content['meter']}{mode}{idle}; {content['statistic']}, "
        f"{content['fit_cells']} cells fitted, errors on {content['conformal_cells']} others"
    )
    click.echo(f"Prices now include {content['margin']:.1%}, which holds for {content['level']:.0%} of sequences.")
    if content["other_modes"]:
        click.echo(f"Kept beside it: {', '.join(content['other_modes'])}.")
    for tier in content["tiers"]:
        for warning in tier["warnings"]:
            click.echo(f"Warning: {tier['tier']}: {warning}", err=True)
    click.echo(f"Next: eopc validate {content['bundle']}, eopc energy sweetspot {content['bundle']}", err=True)
