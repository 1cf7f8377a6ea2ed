"""`eopc energy`: a group of its own; like the main group it imports a command only when it runs."""

from __future__ import annotations

import click

from eopc_runtime.cli.main import Entry, LazyGroup

ENERGY_COMMANDS = {
    "read": Entry("eopc_runtime.cli.energy_read", "read", "Turn a tegrastats log into watts and joules."),
    "fit": Entry("eopc_runtime.cli.energy_fit", "fit", "Fit the energy model to measurements in a CSV file."),
    "predict": Entry("eopc_runtime.cli.energy_predict", "predict", "Predict the joules of a sequence and the margin."),
    "sweetspot": Entry(
        "eopc_runtime.cli.energy_sweetspot", "sweetspot", "Find the answer lengths that cost least per token."
    ),
}


@click.group(cls=LazyGroup, table=ENERGY_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def energy() -> None:
    """Measure, model and predict joules."""
