"""Files that survive a kill or a power cut: on the disk when a function returns, and never half-written.

What is written into a bundle is written under a new name first, and no link is followed there: a bundle may come from
anywhere, and a link of that name could lead anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from eopc_runtime.errors import UsageError


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file anew, whatever has its name, and see that its bytes are on the disk."""
    path.unlink(missing_ok=True)
    _create(path, content, 0o666)


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


def write_output(path: Path, content: bytes) -> None:
    """Write what a user asked for: a file whole or not at all, through links; /dev/stdout and its kind directly."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_whole(path.resolve(), content)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not be there yet, with these permissions; UsageError if it is."""
    try:
        _create(path, content, mode)
    except FileExistsError:
        raise UsageError(f"{path} exists already; it is not overwritten. Choose another name.") from None
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _create(path: Path, content: bytes | memoryview, mode: int) -> None:
    """Write a new file; FileExistsError if there is one, or a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
