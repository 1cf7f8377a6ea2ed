"""`eopc energy`: a group whose commands are imported only when one of them runs."""

from __future__ import annotations

import difflib
import importlib

import click

# name -> module under eopc_runtime.cli, attribute, line in the help
COMMANDS = {
    "fit": ("energy_fit", "fit", "Fit the energy model to measurements in a CSV file."),
    "predict": ("energy_predict", "predict", "Predict the joules of a sequence, with the margin."),
    "sweetspot": ("energy_sweetspot", "sweetspot", "Find the answer lengths that cost least per token."),
}


class EnergyGroup(click.Group):
    """Knows its commands from COMMANDS; `eopc energy --help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"eopc_runtime.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest name there is."""
        name = args[0] if args else ""
        if name and name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=EnergyGroup)
def energy() -> None:
    """Measure, model and predict joules."""
