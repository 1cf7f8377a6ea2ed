"""RAPL, the energy counters of x86 processors, through the powercap files.

    /sys/class/powercap/intel-rapl:N/name             package-N
    /sys/class/powercap/intel-rapl:N/energy_uj        counter, wraps at max_energy_range_uj
    /sys/class/powercap/intel-rapl:N:M/name           dram, core, uncore

The total is every package, and dram where it is counted. Core and uncore lie inside their package, and psys
holds packages: they are never added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.errors import DeviceError
from eopc_runtime.power.base import Sensor
from eopc_runtime.power.counter import CounterMeter
from eopc_runtime.power.sampling import SensorError

NAME = "rapl"


@dataclass(frozen=True, slots=True)
class Domain:
    """One counter that belongs to the total."""

    rail: str  # package-0, package-0 dram
    counter: Path
    range_j: float | None

    def read_j(self) -> float:
        """Read the counter in J; SensorError when it is no number, OSError when it cannot be read."""
        text = self.counter.read_text(encoding="ascii", errors="replace").strip()
        if not text.isdecimal():
            raise SensorError(f'{self.counter} holds "{text[:20]}", no number')
        return int(text) / 1e6


def find_domains(root: Path = Path("/")) -> list[Domain]:
    """Return packages and their dram below root/sys, readable or not."""
    return list(_domains(root / "sys/class/powercap"))


def open_rapl(root: Path, *, clock: Callable[[], float] = time.monotonic, threaded: bool = True) -> CounterMeter:
    """Open the counters; DeviceError when there is none, or a package may not be read."""
    domains = find_domains(root)
    if not domains:
        raise DeviceError(f"there is no RAPL package below {root / 'sys/class/powercap'}.")
    readable = [domain for domain in domains if _is_readable(domain)]
    left_out = [domain.rail for domain in domains if domain not in readable]
    packages = [domain for domain in domains if not domain.rail.endswith("dram")]
    locked = [str(domain.counter) for domain in packages if domain not in readable]
    if locked:
        raise DeviceError(
            f"energy counters cannot be read (on current kernels only root may). "
            f"Run as root, or: sudo chmod a+r {' '.join(locked)}"
        )
    sensor = Sensor(
        name=NAME,
        rails=tuple(domain.rail for domain in readable),
        remarks=tuple(f"{rail} cannot be read and is left out" for rail in left_out),
    )
    return CounterMeter(
        sensor,
        lambda: _read(readable),
        ranges_j={domain.rail: domain.range_j for domain in readable if domain.range_j},
        clock=clock,
        threaded=threaded,
    )


def _read(domains: list[Domain]) -> Mapping[str, float]:
    return {domain.rail: domain.read_j() for domain in domains}


def _is_readable(domain: Domain) -> bool:
    try:
        domain.read_j()
    except (SensorError, OSError):
        return False
    return True


def _domains(folder: Path) -> Iterator[Domain]:
    for package in sorted(folder.glob("intel-rapl:*")):
        name = _text(package / "name")
        if package.name.count(":") != 1 or not name.startswith("package"):
            continue
        yield _domain(package, name)
        for part in sorted(folder.glob(f"{package.name}:*")):
            if _text(part / "name") == "dram":
                yield _domain(part, f"{name} dram")


def _domain(folder: Path, rail: str) -> Domain:
    limit = _text(folder / "max_energy_range_uj")
    return Domain(rail, folder / "energy_uj", int(limit) / 1e6 if limit.isdecimal() and int(limit) else None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
