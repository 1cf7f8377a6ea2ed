"""What prices belong to: module, release, power mode, clocks, rails, runner and engine, as far as they can be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from eopc_runtime.bundle import WEIGHTS_NAME, Manifest
from eopc_runtime.calibration.conditions import Conditions, Place
from eopc_runtime.provenance import Identity

_MODULE = re.compile(r"p\d{4}-\d{4}")


def find_identity(
    place: Place,
    conditions: Conditions,
    *,
    runner: str,
    engine: str,
    rails: Sequence[str] | None = None,
    module: str | None = None,
) -> Identity:
    """Return the identity of this device and engine, at batch 1.

    Args:
        runner: what executes the tiers, with its version and threads.
        engine: fingerprint of what it executes (`fingerprint`).
        rails: whose sum the meter reads; None without one.
        module: a name for machines whose device tree has no module id, such as the CPU's.
    """
    return Identity(
        module=read_module(place.root) or module,
        l4t=read_l4t(place.root),
        power_mode=conditions.power_mode,
        clocks=conditions.clocks,
        emc_mhz=_emc_mhz(place.root),
        rails=None if rails is None else tuple(rails),
        runner=runner,
        engine=engine,
        batch=1,
    )


def fingerprint(manifest: Manifest) -> str:
    """Return a hash of the tiers' graphs and weights, which is the same after a calibration."""
    names = {WEIGHTS_NAME, *(tier.graph for tier in manifest.tiers)}
    listed = sorted((entry.path, entry.sha256) for entry in manifest.files if entry.path in names)
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def read_module(root: Path) -> str | None:
    """Return the module id of the device tree, for example p3701-0005; memory size would not tell boards apart."""
    try:
        names = (root / "proc/device-tree/compatible").read_bytes().decode("ascii", "replace").split("\0")
    except OSError:
        return None
    for name in names:  # "nvidia,p3737-0000+p3701-0005": the carrier board, then the module
        if found := _MODULE.findall(name):
            return str(found[-1])
    return None


def read_l4t(root: Path) -> str | None:
    """Return the release of Jetson Linux, for example 36.4.3."""
    try:
        text = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


def _emc_mhz(root: Path) -> float | None:
    """Memory clock limit; readable by root only."""
    try:
        text = (root / "sys/kernel/debug/bpmp/debug/clk/emc/max_rate").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) / 1e6 if text.isdecimal() else None
