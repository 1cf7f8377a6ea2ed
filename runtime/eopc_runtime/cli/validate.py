"""`eopc validate`: predicted against measured joules, sequence by sequence."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.meters import meter_options
from eopc_runtime.cli.output import command_progress, print_json, print_table
from eopc_runtime.cli.runners import THREADS, runner_option

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.validation.compare import Checked, Summary

LAG_S = 0.35  # of an Orin's sensor, over 25 public engine sets


@dataclass(frozen=True, slots=True)
class Report:
    """What was validated, with what, and what was assumed."""

    bundle: Bundle
    meter: str
    checked: list[Checked]
    notes: tuple[str, ...]


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path())
@click.option(
    "--tegrastats",
    "power_log",
    metavar="LOG",
    type=click.Path(path_type=Path),
    help="Check sequences that ran while tegrastats wrote this file, instead of running new ones; needs --log.",
)
@click.option(
    "--log",
    "sequence_log",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The sequences: the file that `eopc run --log` wrote.",
)
@click.option(
    "--interval", type=float, metavar="S", help="Seconds between the log's lines. [default: its printed clock]"
)
@click.option(
    "--start",
    metavar="TIME",
    help="When the first line was written, for example 2026-05-01T10:30:00+02:00. [default: the printed clock]",
)
@click.option(
    "--lag",
    type=click.FloatRange(min=0),
    default=LAG_S,
    show_default=True,
    metavar="S",
    help="How much later the sensor shows what happens.",
)
@click.option("--board", metavar="B", help="Read the log by this board's rails. [default: by the rails that are there]")
@meter_options("auto", text="Live: what measures the energy. [default: auto]")
@click.option("--sequences", type=click.IntRange(min=1), default=20, show_default=True, help="Live: how many to run.")
@runner_option
@click.option("--threads", type=THREADS, help="Live: CPU threads. [default: onnxruntime's choice]")
@click.option("--seed", type=int, default=0, show_default=True, help="Live: which plans and lengths.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Write an SVG, predicted against measured."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def validate(
    path: str,
    power_log: Path | None,
    sequence_log: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare what sequences cost with what BUNDLE's prices say.

    Live, it runs random sequences within the calibrated lengths and measures them. With --tegrastats it takes those
    that `eopc run --log` wrote down and looks them up in a power log. A sequence too short to measure (2 s, 20
    samples) is unverified: it has no error, and is not 0 J.
    """
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.errors import UsageError
    from eopc_runtime.files import write_output
    from eopc_runtime.validation.compare import summarise
    from eopc_runtime.validation.plot import validation_svg

    if (power_log is None) != (sequence_log is None):
        raise UsageError("--tegrastats and --log belong together: the power log, and the sequences that ran meanwhile.")
    bundle = Bundle.open(path, verify=False)
    if power_log is not None and sequence_log is not None:
        report = from_logs(bundle, power_log, sequence_log, **options)
    else:
        report = live(bundle, **options)
    summary = summarise(report.checked)
    if plot is not None:
        title = f"{bundle.manifest.model.name}: predicted and measured joules"
        note = f"{bundle.energy.source} prices, measured by {report.meter}"
        write_output(plot, validation_svg(title, note, report.checked, summary).encode())
    if as_json:
        print_json(describe(report, summary))
    else:
        _print(report, summary)
        if plot is not None:
            click.echo(f"Wrote {plot}.", err=True)


def from_logs(
    bundle: Bundle,
    power_log: Path,
    sequence_log: Path,
    *,
    interval: float | None,
    start: str | None,
    lag: float,
    board: str | None,
    **_: Any,
) -> Report:
    """Return the sequences of a log with the joules of a power log; UsageError when they do not belong together."""
    from eopc_runtime.calibration.identity import fingerprint
    from eopc_runtime.errors import UsageError
    from eopc_runtime.power.boards import board_rails, list_boards
    from eopc_runtime.power.tegrastats_log import read_log
    from eopc_runtime.sequence_record import read_records
    from eopc_runtime.validation.power_log import check_sequences, place_in_time

    records = read_records(_lines(sequence_log, "--log"), str(sequence_log))
    engine = fingerprint(bundle.manifest)
    own = [record for record in records if record.engine == engine]
    if not own:
        raise UsageError(f"None of the {len(records)} sequences in {sequence_log} ran on {bundle.root}.")
    rules = [board_rails(board)] if board else [known.rails for known in list_boards()]
    log = read_log(_lines(power_log, "--tegrastats"), rules, (), interval)
    timeline = place_in_time(log, own[0].utc_offset_s, None if start is None else wall_time_s(start))
    notes = [*timeline.assumptions, f"the sensor shows what happens {lag:g} s later", *log.notes]
    if len(own) < len(records):
        notes.append(f"{len(records) - len(own)} sequence(s) of another bundle are left out")
    return Report(bundle, f"tegrastats ({' + '.join(log.rails)})", check_sequences(timeline, own, lag), tuple(notes))


def live(
    bundle: Bundle,
    *,
    meter: str,
    proxy_w: float | None,
    sequences: int,
    runner: str,
    threads: int | None,
    seed: int,
    **_: Any,
) -> Report:
    """Run random sequences and measure them."""
    from eopc_runtime.calibration.contention import QUIET_SHARE
    from eopc_runtime.cli.meters import identity_here, open_meter_for
    from eopc_runtime.runners.choose import open_pool
    from eopc_runtime.validation.live import draw_sequences, lengths_of, run_sequences

    progress = command_progress()
    chosen = open_pool(bundle, runner, threads)
    with closing(chosen.pool) as pool, open_meter_for(bundle, meter, proxy_w, on_gpu=chosen.on_gpu) as opened:
        table = bundle.energy.on(identity_here(bundle, threads, opened.sensor.rails, chosen))
        draws = draw_sequences(lengths_of(table, bundle.manifest.context), len(table.tiers), sequences, seed)
        checked = run_sequences(bundle, table, pool, opened, draws, show=progress.update, seed=seed)
        name = f"{opened.sensor.name} ({' + '.join(opened.sensor.rails)})"
        notes = [*chosen.remarks, *opened.sensor.remarks]
    disturbed = sum((item.others_share or 0.0) > QUIET_SHARE for item in checked)
    if disturbed:
        notes.append(f"during {disturbed} of {len(checked)} sequences other processes used the CPU")
    return Report(bundle, name, checked, tuple(notes))


def wall_time_s(text: str) -> float:
    """Return seconds since 1970 (UTC) of an ISO 8601 time with a zone; UsageError without one."""
    from datetime import datetime

    from eopc_runtime.errors import UsageError

    example = "Write it with its zone, for example 2026-05-01T10:30:00+02:00."
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise UsageError(f'--start "{text}" is no time. {example}') from None
    if found.tzinfo is None:
        raise UsageError(f'--start "{text}" has no zone. {example}')
    return found.timestamp()


def describe(report: Report, summary: Summary) -> dict[str, Any]:
    """Return the JSON object of `eopc validate --json`; errors are shares, and null where unverified."""
    from eopc_runtime.calibration.identity import fingerprint

    table = report.bundle.energy
    conformal = table.calibration.conformal if table.calibration else None
    figures = asdict(summary)
    del figures["sequences"]
    return {
        "bundle": str(report.bundle.root),
        "engine": fingerprint(report.bundle.manifest),
        "meter": report.meter,
        "energy_source": table.source,
        **figures,
        "unverified": summary.sequences - summary.verified,
        "margin": table.margin,
        "level": conformal.level if conformal else None,
        "sequences": [
            {**asdict(item), "error": item.error, "over_price": item.over_price, "over_budget": item.over_budget}
            for item in report.checked
        ],
        "notes": list(report.notes),
    }


def _print(report: Report, summary: Summary) -> None:
    from eopc_runtime.units import format_energy

    def joules(value: float | None) -> str:
        return "-" if value is None else format_energy(value)

    print_table(
        ("sequence", "plan", "tokens", "predicted", "price", "budget", "measured", "error", "window"),
        [
            (
                item.name,
                item.plan,
                f"{item.prompt_tokens} + {item.new_tokens}",
                joules(item.predicted_j),
                joules(item.price_j),
                joules(item.budget_j),
                joules(item.measured_j) if item.verified else "unverified",
                "-"
                if item.error is None
                else f"{item.error:+.1%}" + (" !" if item.over_price or item.over_budget else ""),
                f"{item.seconds:.1f} s",
            )
            for item in report.checked
        ],
    )
    click.echo()
    if summary.mape is None or summary.coverage is None or summary.bias is None:
        click.echo(f"None of {summary.sequences} sequences could be verified.")
    else:
        click.echo(
            f"{summary.verified} of {summary.sequences} sequences verified by {report.meter}: mean error "
            f"{summary.mape:.2%}, in the mean {summary.bias:+.2%} against the prediction"
        )
        click.echo(
            f"above the price: {summary.over_price}; above the budget: {summary.over_budget}" + _level(report, summary)
        )
    for item in report.checked:
        if not item.verified:
            click.echo(f"unverified: sequence {item.name}: {'; '.join(item.notes)}", err=True)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)


def _level(report: Report, summary: Summary) -> str:
    calibration = report.bundle.energy.calibration
    if calibration is None or calibration.conformal is None or summary.coverage is None:
        return ""
    return f"; {summary.coverage:.0%} within the price, which is to hold for {calibration.conformal.level:.0%}"


def _lines(path: Path, option: str) -> list[str]:
    """The lines of a file with their ends; bytes that are no text become marks."""
    from eopc_runtime.errors import UsageError

    try:
        return path.read_bytes().decode("utf-8-sig", "replace").splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror}).") from None
