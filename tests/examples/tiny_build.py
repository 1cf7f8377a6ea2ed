"""`eopc build` with the options it is given, of a tiny random model and with little text: seconds, not minutes.

Device, dialect, precision and output are those of the command line; only budgets are others, since the model is. The
checkpoint is named by EOPC_TEST_CHECKPOINT.
"""

from __future__ import annotations

import os
import sys

import click

from eopc_compiler.build import build
from eopc_compiler.cli.build import build as command
from eopc_compiler.cli.build import parse_precision
from eopc_compiler.state import BuildArgs, Workload
from eopc_runtime.units import parse_budgets


def main() -> None:
    """Parse as click does, which refuses what does not exist, and build."""
    params = command.make_context("build", sys.argv[2:]).params
    assert len(parse_budgets(params["budgets"])) == 3
    assert params["model"] is None, "the README builds the default model"
    result = build(
        BuildArgs(
            model=os.environ["EOPC_TEST_CHECKPOINT"],
            device=params["device"],
            budgets_j=(4.0,),  # one tier, since an export takes longer than all else here
            output=params["output"],
            workload=Workload(128, 140),
            precision=parse_precision(params["precision"]),
            dialect=params["dialect"],
            context=512,
            search_seconds=0.0,
            calibration_windows=2,
            repair_windows=2,
            calibration_length=64,
        )
    )
    for tier in result.to_json()["tiers"]:
        click.echo(f"{tier['tier']} {tier['energy_j']:.2f} J {tier['energy_source']}")


if __name__ == "__main__":
    main()
