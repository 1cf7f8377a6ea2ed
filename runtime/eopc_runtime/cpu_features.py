"""Whether this CPU multiplies int8 codes by int8 codes exactly."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

X86 = ("x86_64", "amd64", "i386", "i686")
VNNI = {"avx512_vnni", "avx_vnni"}  # dot products of bytes, summed in 32 bits


@lru_cache(maxsize=1)
def int8_products_overflow() -> bool:
    """True on x86 without VNNI, or where that cannot be seen.

    There ONNX Runtime's kernels add two products of bytes in 16 bits. They overflow unless the weights' codes are
    chosen so that they do not, which a manifest says (`exact_products`). ONNX Runtime's own way out, its option
    `session.x64quantprecision`, does not take blocked weights.
    """
    return overflows(platform.machine(), Path("/proc/cpuinfo"))


def overflows(machine: str, cpuinfo: Path) -> bool:
    """The same for a machine type, as `platform.machine()` names it, and its list of features."""
    if machine.lower() not in X86:
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return not VNNI & set(flags)
