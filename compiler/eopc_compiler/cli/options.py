"""Options that several commands of the compiler share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def calib_select_option(command: F) -> F:
    """Add --calib-select to a command."""
    return click.option(
        "--calib-select",
        type=click.Choice(["domains", "ccds"]),
        default="domains",
        show_default=True,
        help="Calibrate on every domain by weight, or alike on clusters found in all their text.",
    )(command)
