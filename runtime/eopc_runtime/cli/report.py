"""`eopc report`: one page about a bundle, for a person to look at."""

from __future__ import annotations

from pathlib import Path

import click

from eopc_runtime.cli.output import format_bytes, print_json


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write. [default: report.html in the bundle]",
)
@click.option(
    "--log",
    "sequence_log",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also show these sequences: the file that `eopc run --log` wrote.",
)
@click.option(
    "--validation",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also show this validation: what `eopc validate --json` printed.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw quality against joules into this SVG file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(
    path: str,
    output: Path | None,
    sequence_log: Path | None,
    validation: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Write one HTML page about BUNDLE: quality against joules, what each tier removed, energy, calibration.

    The file needs no network and no other file. `eopc build` writes one, `eopc calibrate` makes it anew.
    """
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.report.write import write_report

    written = write_report(Bundle.open(path, verify=False), output, sequence_log, validation, plot)
    size = written.stat().st_size
    if as_json:
        print_json({"bundle": path, "report": str(written), "bytes": size})
    else:
        click.echo(f"Wrote {written} ({format_bytes(size)}).")
