"""The --runner and --key options and the types of others, the same for every command that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from eopc_runtime.runners.choose import RUNNERS

THREADS = click.IntRange(1, 1024)
TOKENS = click.IntRange(1, 1_000_000_000)  # far beyond any sequence, and still a number for every formula
F = TypeVar("F", bound=Callable[..., Any])


def runner_option(command: F) -> F:
    """Add --runner to a command."""
    return click.option(
        "--runner",
        type=click.Choice(RUNNERS),
        default="auto",
        help="What executes the tiers: onnxruntime on the CPU (ort), the bundle's engines (tensorrt), or "
        "onnxruntime-gpu (ort-cuda, ort-tensorrt). [default: engines that fit this machine, else the CPU]",
    )(command)


def key_option(command: F) -> F:
    """Add --key to a command."""
    return click.option(
        "--key",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Refuse a bundle that was not signed with the private half of this public key (prices and engines of this "
        "device aside).",
    )(command)


def show_notes(notes: tuple[str, ...]) -> None:
    """Print what a user should know of the runner, on stderr."""
    for note in notes:
        click.echo(f"Note: {note}", err=True)
