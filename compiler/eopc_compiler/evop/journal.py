"""Losses on disk as they are found, so that a search that was killed goes on without finding any of them again.

One JSON object a line: the stage's key (a hash of model, dtype and tokens), the stage, the pattern's bits, the loss. A
line says all it depends on, so one file may serve several searches, seeds, methods and budgets; lines of other models
or tokens are passed over.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from eopc_compiler.evop.fitness import Fitness
from eopc_runtime.errors import UsageError


class Journal:
    """Fills a `Fitness` from a file, and writes its new losses to it, while open."""

    def __init__(self, path: Path, fitness: Fitness) -> None:
        self.path, self.fitness = path, fitness

    def __enter__(self) -> Journal:
        """Read what is there; UsageError if the file cannot be used as a journal."""
        keys = self.fitness.source.keys
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = _drop_torn_line(self.path)
            entries = [_entry(self.path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"The search journal {self.path} cannot be used ({error.strerror}). Give a path that can be written."
            ) from error
        self.fitness.remember(entry for entry in entries if entry[0] in keys)
        self.fitness.on_loss = self._write
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and close the file."""
        self.fitness.on_loss = None
        self._file.close()

    def _write(self, bits: str, stage: int, loss: float) -> None:
        entry = {"key": self.fitness.source.keys[stage], "stage": stage, "bits": bits, "loss": _to_json(loss)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()  # a killed process loses what it has not handed to the system


def _drop_torn_line(path: Path) -> str:
    """The file's complete lines; a last line without its end, cut off by a kill, is removed from the file."""
    if not path.exists():
        return ""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8", errors="replace")


def _entry(path: Path, number: int, line: str) -> tuple[str, str, float]:
    """(stage key, bits, loss) of a line, or UsageError."""
    try:
        record = json.loads(line)
        loss = math.inf if record["loss"] is None else float(record["loss"])
        return str(record["key"]), str(record["bits"]), loss
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"Line {number} of {path} is not one of a search journal. Name another file, or remove this one."
        ) from error


def _to_json(loss: float) -> float | None:
    """Infinity is not JSON."""
    return loss if math.isfinite(loss) else None
