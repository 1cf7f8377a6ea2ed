"""The command group: a table of commands whose modules are imported only when one of them runs.

`eopc --help` reads the table and nothing else, so it is fast, and works where only the runtime is installed.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from eopc_runtime import __version__
from eopc_runtime.errors import EopcError, MissingExtraError

INTERRUPTED = 130  # 128 + SIGINT, as shells expect


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives, and its line in the help."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "build": Entry("eopc_compiler.cli.build", "build", "Compile a model into a ladder of tiers for a device."),
    "run": Entry("eopc_runtime.cli.run", "run", "Generate text within a joule budget."),
    "serve": Entry("eopc_runtime.cli.serve", "serve", "Serve a bundle over OpenAI's API, with a budget per request."),
    "inspect": Entry("eopc_runtime.cli.inspect", "inspect", "Show what is in a bundle, and verify it."),
    "eval": Entry("eopc_runtime.cli.evaluate", "evaluate", "Measure the perplexity of a bundle's tiers."),
    "bench": Entry("eopc_runtime.cli.bench", "bench", "Measure the speed and memory of a bundle's tiers."),
    "prune": Entry("eopc_compiler.cli.prune", "prune", "Prune a model into a smaller checkpoint for other tools."),
    "engine": Entry("eopc_compiler.cli.engine", "engine", "Compile a bundle's tiers into TensorRT engines."),
    "calibrate": Entry("eopc_runtime.cli.calibrate", "calibrate", "Measure a bundle's prices on this device."),
    "validate": Entry("eopc_runtime.cli.validate", "validate", "Compare predicted with measured joules."),
    "report": Entry("eopc_runtime.cli.report", "report", "Write a page about a bundle, for a person to look at."),
    "energy": Entry("eopc_runtime.cli.energy", "energy", "Measure, model and predict joules."),
    "devices": Entry("eopc_runtime.cli.devices", "devices", "List the device profiles and their constants."),
    "keygen": Entry("eopc_runtime.cli.signature", "keygen", "Make a key to sign bundles with."),
    "sign": Entry("eopc_runtime.cli.signature", "sign", "Sign a bundle."),
    "verify": Entry("eopc_runtime.cli.signature", "verify", "Check that a bundle is what was signed."),
    "doctor": Entry("eopc_runtime.cli.doctor", "doctor", "Report what this machine has and lacks, with fixes."),
}

# Packages that are not in the base install, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(("onnxruntime",), "ort"),
    **dict.fromkeys(("pynvml",), "nvml"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
    **dict.fromkeys(("cryptography",), "sign"),
    **dict.fromkeys(
        ("torch", "transformers", "safetensors", "huggingface_hub", "onnx", "onnxscript", "onnx_ir", "gguf"),
        "compiler",
    ),
    **dict.fromkeys(("accelerate", "eopc_compiler"), "compiler"),
    **dict.fromkeys(("tensorrt", "polygraphy"), "tensorrt"),
    **dict.fromkeys(("tensorrt_rtx_bindings",), "tensorrt-rtx"),
}


class CommandError(click.ClickException):
    """An EopcError on its way to the terminal: `Error: ...` on stderr, exit code 1."""

    exit_code = 1


class LazyGroup(click.Group):
    """A group that knows its commands from a table, and turns our errors into messages."""

    def __init__(self, *args: Any, table: Mapping[str, Entry], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; CommandError names the extra when a package is missing."""
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        try:
            command = getattr(importlib.import_module(entry.module), entry.attribute)
        except ModuleNotFoundError as error:
            raise _missing(_path(ctx, cmd_name), error) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}.{entry.attribute} is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest name there is."""
        name = args[0] if args else ""
        if name and name not in self.table and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.table, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(self.table)}."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.table.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; user mistakes become one message, Ctrl-C becomes one line."""
        try:
            return super().invoke(ctx)
        except EopcError as error:
            raise CommandError(str(error)) from error
        except ModuleNotFoundError as error:
            raise _missing(_path(ctx, ctx.invoked_subcommand or ""), error) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # `eopc ... | head`: click ends quietly
            where = error.filename or "the output"
            raise CommandError(f"{where} cannot be read or written: {error.strerror or error}.") from error


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eopc")
def cli() -> None:
    """Compile LLaMA-family language models for a device, and run them within a joule budget.

    Every energy takes a unit: 5J, 500mJ, 0.2Wh. Exit codes: 0 done, 1 the request cannot be met, 2 wrong
    usage.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run `eopc` with the given arguments (default: the command line) and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows marks, not a traceback
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="eopc")
    except KeyboardInterrupt:  # before or after the group's own handler
        click.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)


def _path(ctx: click.Context, name: str) -> str:
    """The name of a command with those of its groups, without the program's: `energy read`."""
    names = [name]
    while ctx.parent is not None:
        names.insert(0, ctx.info_name or "")
        ctx = ctx.parent
    return " ".join(names).strip()


def _missing(command: str, error: ModuleNotFoundError) -> CommandError:
    """Return the message for a package that is not installed; a bug of ours stays a traceback."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        raise error
    return CommandError(str(MissingExtraError(f"`eopc {command}`", package, extra)))
