"""Engines of every tier without a GPU: seconds, bytes, engine layers and fused attention, by dialect and precision.

    python benchmarks/engines.py --work FOLDER

Bundles of the default model are built once per dialect and precision, all with the tiers of --like (a bundle), or of
the first one, which is planned for the budgets. Then every tier is compiled by TensorRT-RTX for SM86 in place of Orin
(SM87) and for SM89 in place of an H100 (SM90). Both phases are in each plan, prefill as profile 0, decode as profile 1.
The figures are of the compiler, on the CPU it runs on: they say that graphs build, that attention is fused and that
plans shrink with the tiers; nothing of speed or joules. A second run with the same --work reads what is there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from eopc_compiler.board.engine_set import EngineArgs, attention_count, build_engines
from eopc_compiler.build import build
from eopc_compiler.state import BuildArgs, Workload
from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.output import format_bytes
from eopc_runtime.errors import EopcError
from eopc_runtime.units import parse_budgets

COLUMNS = "| dialect | precision | tier | target | seconds | plan | engine layers | attention fused |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--budgets", default="20,10,5J")
    parser.add_argument("--like", type=Path, help="bundle whose tiers are kept instead of planning new ones")
    parser.add_argument(
        "--windows", type=int, default=4, help="of calibration, per domain: these bundles answer nobody"
    )
    parser.add_argument("--workload", default="128:140")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dialects", default="native,primitive")
    parser.add_argument("--precisions", default="fp16,int8,int4")
    parser.add_argument("--devices", default="orin,h100")
    parser.add_argument("--work", type=Path, help="keeps bundles and results between runs")
    options = parser.parse_args()
    folder = options.work or Path(tempfile.mkdtemp())
    click.echo(COLUMNS)
    click.echo("|---|---|---|---|---|---|---|---|")
    for dialect in options.dialects.split(","):
        for precision in options.precisions.split(","):
            for row in rows(options, folder, dialect, precision):
                click.echo(row)


def rows(options: argparse.Namespace, folder: Path, dialect: str, precision: str) -> Iterator[str]:
    """One line of the table per tier and target, or the reason there is none."""
    try:
        bundle = Bundle.open(built(options, folder, dialect, precision))
        for device in options.devices.split(","):
            args = EngineArgs(bundle.root, device, proxy=True)
            for record in build_engines(args, _to_stderr, lambda _text: None).records:
                cells = (
                    dialect,
                    precision,
                    record.tier,
                    f"{record.target.upper()} for {device}",
                    f"{record.seconds:.0f}",
                    format_bytes(record.bytes),
                    str(record.layers),
                    f"{record.attention_layers} of {attention_count(bundle.tier(record.tier))}",
                )
                yield f"| {' | '.join(cells)} |"
    except EopcError as error:
        yield f"| {dialect} | {precision} | - | - | - | - | - | {error} |"


def built(options: argparse.Namespace, folder: Path, dialect: str, precision: str) -> Path:
    """The bundle of a dialect and precision, built if it is not there."""
    output = folder / f"{dialect}-{precision}.eopc"
    if not (output / "manifest.json").is_file():
        pattern = options.like or next(folder.glob("*.eopc"), None)
        masks = () if pattern is None else tuple(sorted(pattern.glob("tiers/t[1-9]/mask.json")))
        args = BuildArgs(
            model=options.model,
            device="orin",
            # what the tiers cost in another precision is not the question
            budgets_j=(1e9,) if masks else parse_budgets(options.budgets),
            masks=masks,
            prefill_depth="all",
            calibration_windows=options.windows,
            repair_windows=options.windows,
            output=output,
            workload=Workload(*map(int, options.workload.split(":"))),
            dialect=dialect,
            precision=(precision,),
            context=options.context,
            proxy="none",
        )
        build(args, _to_stderr)
    return output


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
