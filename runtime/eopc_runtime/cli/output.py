"""What commands write: one JSON object or a table on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click

from eopc_runtime.units import format_bytes as format_bytes  # commands look for it here


def print_json(value: dict[str, Any]) -> None:
    """Write exactly one JSON object to stdout; numbers that JSON does not know become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a plain table: the first column to the left, the others to the right, two spaces between."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]]
        click.echo("  ".join(cells).rstrip())


class Progress:
    """Progress on stderr: a line that is rewritten on a terminal, elsewhere one line per finished part."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._width = 0

    def update(self, text: str) -> None:
        """Show what is going on now (terminals only)."""
        if self._live:
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def done(self, text: str) -> None:
        """Write a line that stays."""
        if self._live:
            text = "\r" + text.ljust(self._width)
            self._width = 0
        click.echo(text.rstrip(), file=self._stream)

    def close(self) -> None:
        """End a line that is still being rewritten: it says where a command stopped, and what follows has its own."""
        if self._width:
            click.echo(file=self._stream)
            self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def command_progress() -> Progress:
    """Progress of the command that runs, closed before its error or its interruption is told."""
    return click.get_current_context().with_resource(Progress())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
