"""The state of the device while it is measured: power mode, clocks, temperature; and when that is a reason to stop.

Everything is read below a root folder or from a command, and both are parameters. Mode ids differ from board to board
and release to release, so modes are known by their names in nvpmodel.conf. What cannot be read is None.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.errors import DeviceError

COOL_BELOW_C = 5.0  # after a pause the zone must be this much below its limit
HEAT_LIMIT_C = 85.0  # for a zone without a trip point; Jetsons throttle at 95 to 99
BELOW_TRIP_C = 5.0
LONGEST_PAUSE_S = 600.0
LOOK_AGAIN_S = 5.0

_GPU_NAMES = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")
_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
_PLAUSIBLE_C = (1.0, 150.0)  # a zone that is off reads -256 or 0


def run_command(command: Sequence[str]) -> str | None:
    """Return what a command prints, None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the state of a device is read."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = run_command


@dataclass(frozen=True, slots=True)
class Conditions:
    """Power mode, clocks ("jetson_clocks", "pinned" or "dvfs"), and the zone that is nearest to its limit."""

    power_mode: str | None = None
    clocks: str | None = None
    zone: str | None = None
    temperature_c: float | None = None
    limit_c: float | None = None

    @property
    def too_hot(self) -> bool:
        """True above the limit."""
        return self.temperature_c is not None and self.limit_c is not None and self.temperature_c > self.limit_c


def read_conditions(place: Place, limit_c: float | None = None) -> Conditions:
    """Read the state now; `limit_c` replaces the limits that follow from the zones' trip points."""
    zone = max(_zones(place.root, limit_c), key=lambda z: z[1] - z[2], default=(None, None, None))
    return Conditions(read_power_mode(place), read_clocks(place.root), *zone)


def read_power_mode(place: Place) -> str | None:
    """Return the name of the active nvpmodel mode."""
    names: dict[str, str] = dict(_MODE.findall(_text(place.root / "etc/nvpmodel.conf") or ""))
    status = re.search(r"pmode:(\d+)", _text(place.root / "var/lib/nvpmodel/status") or "")
    if status and (found := names.get(str(int(status[1])))):
        return found
    if not (place.root / "etc/nvpmodel.conf").exists() and not (place.root / "etc/nv_tegra_release").exists():
        return None
    match = re.search(r"NV Power Mode:\s*(\S+)", place.run(("nvpmodel", "-q")) or "")
    return match[1] if match else None


def read_clocks(root: Path) -> str | None:
    """Return how clocks are set: pinned where every minimum equals its maximum, else dvfs."""
    gpus = [g for g in sorted(root.glob("sys/class/devfreq/*")) if any(name in g.name for name in _GPU_NAMES)]
    cores = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    pairs = [(gpu / "min_freq", gpu / "max_freq") for gpu in gpus]
    pairs += [(core / "scaling_min_freq", core / "scaling_max_freq") for core in cores]
    read = [(low, high) for a, b in pairs if (low := _text(a)) and (high := _text(b))]
    if not read:
        return None
    if any(low.strip() != high.strip() for low, high in read):
        return "dvfs"
    return "jetson_clocks" if (root / "etc/nv_tegra_release").exists() else "pinned"


def check_same(start: Conditions, now: Conditions) -> None:
    """Raise DeviceError if the power mode or the clocks are no longer those of the start."""
    for what, before, after in (
        ("power mode", start.power_mode, now.power_mode),
        ("clock setting", start.clocks, now.clocks),
    ):
        if before != after:
            raise DeviceError(
                f"The {what} changed from {before or 'unknown'} to {after or 'unknown'} while calibrating, and prices "
                f"belong to one. What was measured before is kept: set {before or 'it'} again and run the same command "
                "to go on."
            )


def wait_until_cool(
    read: Callable[[], Conditions],
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    longest_s: float = LONGEST_PAUSE_S,
) -> Conditions:
    """Return the conditions once no zone is too hot, at once or after a pause; DeviceError if it does not cool down."""
    now, waited_s = read(), 0.0
    if not now.too_hot:
        return now
    while now.temperature_c is not None and now.limit_c is not None:
        if now.temperature_c <= now.limit_c - COOL_BELOW_C:
            break
        if waited_s >= longest_s:
            raise DeviceError(
                f"{now.zone} is at {now.temperature_c:.0f} C after a pause of {waited_s / 60:.0f} minutes, and "
                f"{now.limit_c:.0f} C is the limit: a throttled device has other prices. Cool it, then run the same "
                "command to go on."
            )
        tell(f"pausing: {now.zone} is at {now.temperature_c:.0f} C, the limit is {now.limit_c:.0f} C")
        sleep(LOOK_AGAIN_S)
        waited_s += LOOK_AGAIN_S
        now = read()
    return now


def _zones(root: Path, limit_c: float | None) -> list[tuple[str, float, float]]:
    """Name, temperature and limit of every zone that reads something plausible."""
    found = []
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        celsius = _celsius(zone / "temp")
        if celsius is not None:
            name = (_text(zone / "type") or zone.name).strip()
            found.append((name, celsius, limit_c if limit_c is not None else _limit(zone)))
    return found


def _limit(zone: Path) -> float:
    """Below the lowest trip point at which the device slows down or shuts off."""
    trips = []
    for kind in sorted(zone.glob("trip_point_*_type")):
        celsius = _celsius(kind.with_name(kind.name.replace("_type", "_temp")))
        if celsius is not None and (_text(kind) or "").strip() in ("passive", "hot", "critical"):
            trips.append(celsius - BELOW_TRIP_C)
    return min(trips, default=HEAT_LIMIT_C)


def _celsius(path: Path) -> float | None:
    text = (_text(path) or "").strip()
    if not re.fullmatch(r"-?\d+", text):
        return None
    celsius = int(text) / 1000
    return celsius if _PLAUSIBLE_C[0] <= celsius <= _PLAUSIBLE_C[1] else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
