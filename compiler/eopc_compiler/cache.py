"""Stage outputs on disk, keyed by the hash of everything they depend on: the same command resumes where it stopped.

A stage writes to a temporary name and is renamed when complete, so a killed build never leaves a half-written output.
Beside it lies the hash of its content: an output that a failing disk or a person changed is made again, not used.
The folder is locked while a build uses it; the system drops the lock of a build that was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from eopc_runtime.bundle_files import sha256_file
from eopc_runtime.errors import UsageError
from eopc_runtime.files import write_whole

PARTIAL = "partial-"  # start of the name of an output that is being written
SUM = ".sha256"  # end of the name of the file that holds the hash of an output


class StageCache:
    """A folder of finished stage outputs; files only, no pickle."""

    def __init__(self, folder: Path, resume: bool = True) -> None:
        """Create and lock the folder; UsageError if another build holds it."""
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]  # deepest first
        self._lock = lock_folder(folder)
        self.folder = folder
        self.reused: list[str] = []  # stages whose outputs an earlier run has left
        self._met = set[Path]()  # outputs that this run has made or counted
        for path in folder.iterdir():
            if not resume or path.name.startswith(PARTIAL):  # half-written by a build that was killed
                remove(path)

    def get(self, stage: str, inputs: Mapping[str, object], suffix: str, produce: Callable[[Path], None]) -> Path:
        """The output file of a stage, made by `produce(path)` unless one for the same inputs is there.

        Args:
            stage: a short name, part of the file name.
            inputs: everything the output depends on, JSON-serialisable.
        """
        path = self.folder / f"{stage}-{digest({'stage': stage, **inputs})[:16]}{suffix}"
        known = path.with_name(f"{path.name}{SUM}")
        if path.exists():
            if known.is_file() and known.read_text(encoding="utf-8") == content_sum(path):
                if path not in self._met:
                    self.reused.append(stage)
                self._met.add(path)
                return path
            remove(path)
        partial = path.with_name(f"{PARTIAL}{path.name}")
        remove(partial)
        produce(partial)
        write_whole(known, content_sum(partial).encode())
        partial.replace(path)
        self._met.add(path)
        return path

    def clear(self) -> None:
        """Remove everything; called once the bundle is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Unlock the folder, and remove it if no stage was finished, with parents that it made and nobody used."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            remove(path)
        for path in self._made or [self.folder]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        os.close(self._lock)


def lock_folder(folder: Path) -> int:
    """Create a folder and lock it for this process; returns the descriptor that holds the lock.

    Raises:
        UsageError: another process holds it.
        OSError: it cannot be created.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another eopc command is writing the same output (it holds {folder}). Wait for it, or choose another "
                f"-o."
            ) from None
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)  # the build that held it finished and removed the folder in between


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def content_sum(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files])


def digest(value: object) -> str:
    """SHA-256 of a JSON-serialisable value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
