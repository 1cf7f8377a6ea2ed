"""Memory of this machine: what is left of it, and giving back what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def release_memory() -> None:
    """Collect reference cycles (modules hold some) and return free heap pages to the system where glibc can."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return free heap pages to the system where glibc can: what is freed in pieces fits nothing that comes later."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere only the figure for peak memory is larger
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_bytes(root: Path = ROOT) -> dict[str, int | None]:
    """Return MemTotal, MemAvailable and SwapFree in bytes, None where /proc does not tell."""
    found: dict[str, int | None] = {"MemTotal": None, "MemAvailable": None, "SwapFree": None}
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def left_bytes(root: Path = ROOT) -> int | None:
    """Bytes this process can still take, swap included, within the limits of its control groups; None: not known."""
    found = memory_bytes(root)
    if found["MemAvailable"] is None:
        return None
    return min([found["MemAvailable"] + (found["SwapFree"] or 0), *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """What the process's control group and each above it leave; pages of files count as free."""
    own = next((line[3:] for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    path, limits = PurePosixPath(own.strip()), list[int]()
    for folder in (path, *path.parents):
        group = root / "sys/fs/cgroup" / folder.relative_to("/")
        most, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
        if most.isdigit() and used.isdigit():
            rows = [line.split() for line in _text(group / "memory.stat").splitlines()]
            files = sum(int(row[1]) for row in rows if row[0] in ("active_file", "inactive_file"))
            limits.append(max(int(most) - int(used) + files, 0))
    return limits


def _text(path: Path) -> str:
    """A file of the system, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
