"""Files that survive a kill or a power cut: on the disk when a function returns, and never half-written."""

from __future__ import annotations

import os
from pathlib import Path


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
        replace_synced(path, content, partial)
    finally:
        partial.unlink(missing_ok=True)


def replace_synced(path: Path, content: bytes | memoryview, partial: Path) -> None:
    """Write a file by way of another beside it; when this returns, a power cut leaves the new one."""
    write_synced(partial, content)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
