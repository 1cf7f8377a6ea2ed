"""The `eopc` command; importing it loads click and nothing heavy."""

from eopc_runtime.cli.main import cli, main

__all__ = ["cli", "main"]
