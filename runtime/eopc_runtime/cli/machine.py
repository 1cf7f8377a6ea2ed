"""What this machine is, for reports that carry numbers."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from eopc_runtime import __version__
from eopc_runtime.memory import memory_bytes


def machine_info(root: Path = Path("/")) -> dict[str, Any]:
    """Return board, CPU model, cores, memory and system; `root` is where /proc is found."""
    return {
        "board": board_model(root),
        "cpu": cpu_model(root),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(root)["MemTotal"],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Return the versions a speed depends on; None is not installed. Nothing is imported."""
    return {
        "eopc": __version__,
        "python": platform.python_version(),
        "onnxruntime": installed("onnxruntime", "onnxruntime-gpu"),
        "numpy": installed("numpy"),
    }


def installed(*distributions: str) -> str | None:
    """Return the version of the first installed distribution, without importing it."""
    for name in distributions:
        for found in metadata.distributions(name=name):
            return found.version
    return None


def board_model(root: Path = Path("/")) -> str | None:
    """Return the board name of the device tree (Jetson, Raspberry Pi), None elsewhere."""
    text = read_text(root / "proc/device-tree/model")
    return text.rstrip("\0").strip() if text else None


def cpu_model(root: Path = Path("/")) -> str:
    """Return the CPU's name; ARM kernels give none, so there it is the architecture."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    for line in (read_text(Path("/proc/self/status")) or "").splitlines():
        # preferred to getrusage, whose figure in a child also covers the parent it was forked from
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def read_text(path: Path) -> str | None:
    """Return a file's text, None when it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
