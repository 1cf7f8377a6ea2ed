"""Stage outputs on disk, keyed by the hash of everything they depend on: the same command resumes where it stopped.

A stage writes to a temporary name and is renamed when complete, so a killed build never leaves a half-written output.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


class StageCache:
    """A folder of finished stage outputs; files only, no pickle."""

    def __init__(self, folder: Path, resume: bool = True) -> None:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.reused: list[str] = []

    def get(self, stage: str, inputs: Mapping[str, object], suffix: str, produce: Callable[[Path], None]) -> Path:
        """The output file of a stage, made by `produce(path)` unless one for the same inputs is there.

        Args:
            stage: a short name, part of the file name.
            inputs: everything the output depends on, JSON-serialisable.
        """
        path = self.folder / f"{stage}-{digest({'stage': stage, **inputs})[:16]}{suffix}"
        if path.exists():
            self.reused.append(stage)
            return path
        partial = path.with_name(f"partial-{path.name}")
        produce(partial)
        partial.replace(path)
        return path

    def clear(self) -> None:
        """Remove everything; called once the bundle is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def digest(value: object) -> str:
    """SHA-256 of a JSON-serialisable value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
