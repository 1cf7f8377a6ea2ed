"""Files that survive a kill or a power cut: on the disk when a function returns, and never half-written."""

from __future__ import annotations

import os
from pathlib import Path

from eopc_runtime.errors import UsageError


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file and see that its bytes are on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one step: a reader sees the old one or the new one, complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(partial, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not be there yet, with these permissions; UsageError if it is."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UsageError(f"{path} exists already; it is not overwritten. Choose another name.") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
