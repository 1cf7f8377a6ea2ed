"""`eopc doctor`: what this machine has and lacks, each gap with its fix."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.machine import (
    board_model,
    cpu_model,
    installed,
    read_text,
    usable_cores,
    versions,
)
from eopc_runtime.cli.output import format_bytes, print_json
from eopc_runtime.gpu_probe import probe_gpu
from eopc_runtime.memory import memory_bytes

if TYPE_CHECKING:
    from eopc_runtime.power.probe import Surroundings


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked for, what was found (None: nothing), and how to get it."""

    name: str
    found: str | None
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Sensor:
    """A power or energy sensor in sysfs."""

    kind: str  # ina3221, ina238, ..., rapl
    rail: str
    path: str
    readable: bool


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report what this machine has and lacks to build, run and measure, with the fix for each gap."""
    root = Path("/")
    sensors, meter = power_sensors(root), meter_report()
    checks = [
        *software_checks(),
        gpu_check(),
        nvpmodel_check(root),
        sensor_check(sensors),
        meter_check(meter),
        *capacity_checks(root),
    ]
    if as_json:
        found = {"checks": [asdict(check) for check in checks], "sensors": [asdict(s) for s in sensors], "meter": meter}
        print_json(found)
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        click.echo(f"{check.name.ljust(width)}  {check.found or 'not found'}")
        if check.fix:
            click.echo(f"{' ' * width}  -> {check.fix}")
    if meter["passed_over"]:
        click.echo("\nPower meters passed over:")
    for entry in meter["passed_over"]:
        click.echo(f"  {entry['meter']}: {entry['reason']}")


def software_checks() -> list[Check]:
    """Return what is installed, read from package metadata: nothing is imported."""
    known = versions()
    runtime = known["onnxruntime"]
    return [
        Check("eopc", known["eopc"]),
        Check(
            "python",
            known["python"],
            None if sys.version_info >= (3, 10) else "Install Python 3.10 or newer.",
        ),
        Check("onnxruntime", runtime, None if runtime else 'To run bundles: pip install "eopc[ort]"'),
        _package("torch", "To build bundles (not needed to run them)", "compiler", "torch"),
        Check("tensorrt", *_tensorrt()),
        _package(
            "tensorrt_rtx",
            "For engines on RTX targets",
            "tensorrt-rtx",
            "tensorrt-rtx",
            "tensorrt-rtx-cu13-bindings",
        ),
    ]


def gpu_check(probe: Callable[[], str] | None = None) -> Check:
    """Return the CUDA devices the driver reports (cuInit, in a child process)."""
    report = probe_gpu(probe)
    if not report.devices:
        return Check("gpu", None, report.missing)
    names = [
        f"{gpu.name} (sm {gpu.compute_capability / 10:.1f}, {format_bytes(gpu.memory_bytes)})" for gpu in report.devices
    ]
    return Check("gpu", f"{', '.join(names)}, driver for CUDA {report.driver}")


def nvpmodel_check(root: Path) -> Check:
    """Return the Jetson power mode, by the name nvpmodel.conf gives the active id (ids differ by board)."""
    conf, status = read_text(root / "etc/nvpmodel.conf"), read_text(root / "var/lib/nvpmodel/status")
    if conf is None:
        jetson = "nvidia" in (board_model(root) or "").lower() or (root / "etc/nv_tegra_release").exists()
        if jetson:
            return Check("nvpmodel", None, "Run: sudo apt install nvidia-l4t-nvpmodel")
        return Check("nvpmodel", "not needed, this is no Jetson")
    modes = {int(i): name for i, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", conf)}
    active = re.search(r"pmode:(\d+)", status or "")
    if active is None:
        return Check(
            "nvpmodel",
            f"modes {', '.join(modes.values())}",
            "The active mode is unknown; run: sudo nvpmodel -q",
        )
    return Check("nvpmodel", f"{modes.get(int(active[1]), 'id ' + active[1])} (of {', '.join(modes.values())})")


def sensor_check(sensors: list[Sensor]) -> Check:
    """Return the power sensors; without a readable one, joules are estimates."""
    if not sensors:
        return Check("power sensors", None, "None in sysfs. Joules stay `prior` or `proxy`; they rank tiers, no more.")
    found = ", ".join(f"{s.kind} {s.rail}{'' if s.readable else ' (not readable)'}" for s in sensors)
    locked = [s.path for s in sensors if not s.readable]
    return Check("power sensors", found, f"Run: sudo chmod a+r {' '.join(locked)}" if locked else None)


def capacity_checks(root: Path) -> list[Check]:
    """Return board, CPU, memory and free disk."""
    memory = memory_bytes(root)
    total, free = memory["MemTotal"], memory["MemAvailable"]
    disk = shutil.disk_usage(Path.cwd())
    low = free is not None and free < 1 << 30
    return [
        Check("cpu", f"{board_model(root) or cpu_model(root)}, {usable_cores()} cores"),
        Check(
            "memory",
            None if total is None or free is None else f"{format_bytes(free)} free of {format_bytes(total)}",
            "Under 1 GiB is free; close programs or choose a lower tier." if low else None,
        ),
        Check(
            "disk",
            f"{format_bytes(disk.free)} free of {format_bytes(disk.total)} here",
            "Under 2 GiB is free; a bundle takes about as much as its dense model." if disk.free < 2 << 30 else None,
        ),
    ]


def power_sensors(root: Path) -> list[Sensor]:
    """Return INA rails and RAPL packages under `root`/sys, by label: hwmon numbers move between boots."""
    from eopc_runtime.power.boards import list_boards
    from eopc_runtime.power.ina3221 import find_channels
    from eopc_runtime.power.rapl import find_domains

    ignored = {name for board in list_boards() for name in board.rails.ignored}
    rails = [_sensor(c.kind, c.rail, c.paths) for c in find_channels(root) if c.rail not in ignored]
    return rails + [_sensor("rapl", domain.rail, (domain.counter,)) for domain in find_domains(root)]


def _sensor(kind: str, rail: str, paths: tuple[Path, ...]) -> Sensor:
    """A sensor, by the first of its files that may not be read, or else by the first."""
    locked = [path for path in paths if not os.access(path, os.R_OK)]
    return Sensor(kind, rail, str((locked or paths)[0]), not locked)


def meter_report(around: Surroundings | None = None) -> dict[str, Any]:
    """Return the power meter that `auto` means here, and why each one before it was passed over."""
    from eopc_runtime.power.probe import Surroundings, choose_meter
    from eopc_runtime.profiles import load_profile

    choice = choose_meter(around or Surroundings(proxy_w=load_profile("cpu").constant("idle_w")))
    with choice.meter as meter:
        sensor = meter.sensor
        return {
            "meter": sensor.name,
            "source": sensor.source,
            "rails": list(sensor.rails),
            "sub_rails": list(sensor.sub_rails),
            "details": dict(sensor.details),
            "remarks": list(sensor.remarks),
            "passed_over": [asdict(entry) for entry in choice.passed_over],
        }


def meter_check(report: dict[str, Any]) -> Check:
    """Return the meter as one line; without a measuring one, joules are estimates."""
    name, rails = report["meter"], " + ".join(report["rails"])
    if report["source"] != "measured":
        return Check(
            "energy meter",
            f"{name}: {'; '.join(report['remarks'])}",
            "The list below says what each other meter lacks.",
        )
    if name == "none":
        return Check("energy meter", None, "The list below says what each meter lacks.")
    return Check("energy meter", f"{name}, {rails}" + "".join(f"; {remark}" for remark in report["remarks"]))


def _package(name: str, purpose: str, extra: str, *distributions: str) -> Check:
    version = installed(*distributions)
    return Check(name, version, None if version else f'{purpose}: pip install "eopc[{extra}]"')


def _tensorrt() -> tuple[str | None, str | None]:
    version = installed("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    if version:
        return version, None
    return None, (
        "On Jetson it comes with JetPack (sudo apt install nvidia-jetpack; make the venv with "
        '--system-site-packages). Elsewhere: pip install "eopc[tensorrt]"'
    )
