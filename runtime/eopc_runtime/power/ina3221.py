"""Jetson's power monitors through sysfs: INA3221 (three rails a chip) and INA238 (Thor's input).

Layouts (Linux hwmon documentation, and the iio driver of JetPack 4):

    hwmon   in{1,2,3}_label, in{1,2,3}_input [mV], curr{1,2,3}_input [mA]     W = mV x mA / 1e6
            power{N}_input [uW] and `label` on chips with one channel
    iio     rail_name_{0,1,2}, in_power{0,1,2}_input [mW]

hwmonN moves between boots, so rails are found by label. Channels 4 to 7 of an INA3221 are shunt voltages and
sums: no rails. Its step is 40 uV over the shunt (data sheet).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.errors import DeviceError
from eopc_runtime.power.base import Sensor
from eopc_runtime.power.rails import RailRule, asked_for, candidates, choose
from eopc_runtime.power.sampling import RATE_HZ, PolledMeter, SensorError

NAME = "ina3221"
STEP_V = 40e-6
SLOW_AVERAGE_MS = 100.0

_CHANNELS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Channel:
    """One rail: the files to read, back to back, and the factor that turns their product into W."""

    rail: str
    kind: str  # ina3221, ina238, ...
    device: str  # as on the bus, 1-0040
    paths: tuple[Path, ...]
    factor: float
    folder: Path
    shunt_ohm: float | None = None

    def read_w(self) -> float:
        """Read the power in W; SensorError when it is no number or negative, OSError when it cannot be read."""
        watts = self.factor
        for path in self.paths:
            text = path.read_text(encoding="ascii", errors="replace").strip()
            try:
                value = int(text)
            except ValueError:
                raise SensorError(f'{self.rail}: {path.name} holds "{text[:20]}", no number') from None
            if value < 0:
                raise SensorError(f"{self.rail}: {path.name} is negative ({value})")
            watts *= value
        return watts


def find_channels(root: Path = Path("/")) -> list[Channel]:
    """Return the labelled channels of all INA chips below root/sys, readable or not."""
    sys = root / "sys"
    folders = [*sys.glob("class/hwmon/hwmon*"), *sys.glob("bus/i2c/drivers/ina*/*/hwmon/hwmon*")]
    folders += sys.glob("bus/i2c/drivers/ina*/*/iio*device*")
    # one chip has many paths: links in class/, and on TX2 both iio:device0 and iio_device
    unique = {(f.parent if f.name.startswith("iio") else f).resolve(): f for f in sorted(folders)}
    return [channel for folder in unique.values() for channel in _channels(folder)]


def open_ina3221(
    root: Path,
    rules: Sequence[RailRule],
    rails: Sequence[str] = (),
    *,
    rate_hz: float = RATE_HZ,
    clock: Callable[[], float] = time.monotonic,
    threaded: bool = True,
) -> PolledMeter:
    """Open the monitors of this board; every rail of the total must give a number now.

    Args:
        root: where /sys is found.
        rules: the rails of the board, or of every known board in the order in which they are tried.
        rails: sum exactly these instead.

    Raises DeviceError when there is no monitor, a rail cannot be read, or no total is complete.
    """
    ignored = {name for rule in rules for name in rule.ignored}
    channels = [c for c in find_channels(root) if c.rail not in ignored]
    if not channels:
        raise DeviceError(f"there is no labelled INA3221 or INA238 channel below {root / 'sys'}.")
    repeated = [rail for rail, n in Counter(c.rail for c in channels).items() if n > 1]
    read, failed = _try(channels)
    option, reason = choose(
        asked_for(rails) if rails else candidates(rules), read.keys() - set(repeated), {*failed, *repeated}
    )
    if option is None:
        raise DeviceError(_refusal(reason, failed, repeated, channels))
    used = [c for c in channels if c.rail in option.names]
    others = [c for c in channels if c.rail in read and c.rail not in {*option.names, *repeated}]
    sensor = Sensor(
        name=NAME,
        rails=option.names,
        sub_rails=tuple(c.rail for c in others),
        steps_w=dict(_steps_w([*used, *others])),
        details=dict(_settings(used)),
        remarks=tuple(dict.fromkeys(_slow_averages(used))),
    )
    return PolledMeter(sensor, lambda: _sweep(used, others), rate_hz=rate_hz, clock=clock, threaded=threaded)


def _sweep(used: Iterable[Channel], others: Iterable[Channel]) -> dict[str, float]:
    """Read every rail; one of the total that fails fails the sweep, a sub-rail is left out."""
    watts = {channel.rail: channel.read_w() for channel in used}
    read, _ = _try(others)
    return watts | read


def _try(channels: Iterable[Channel]) -> tuple[dict[str, float], dict[str, Exception]]:
    """Read what can be read: watts by rail, and errors by rail."""
    read: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    for channel in channels:
        watts = _attempt(channel)
        if isinstance(watts, Exception):
            failed[channel.rail] = watts
        else:
            read[channel.rail] = watts
    return read, failed


def _attempt(channel: Channel) -> float | Exception:
    try:
        return channel.read_w()
    except (SensorError, OSError) as error:
        return error


def _refusal(reason: str, failed: Mapping[str, Exception], repeated: Sequence[str], channels: Sequence[Channel]) -> str:
    locked = [str(p) for c in channels if isinstance(failed.get(c.rail), PermissionError) for p in c.paths]
    if locked:
        return f"power rails may not be read (permission denied). Run as root, or: sudo chmod a+r {' '.join(locked)}"
    details = [f"{rail}: {error}" for rail, error in failed.items()]
    details += [f"two channels are labelled {rail}" for rail in repeated]
    found = ", ".join(sorted({c.rail for c in channels}))
    return f"{reason} ({'; '.join([f'sysfs has {found}', *details])})."


def _channels(folder: Path) -> Iterator[Channel]:
    """The labelled channels of one chip."""
    driver = next((part for part in reversed(folder.parts) if part.startswith("ina")), "")
    kind = _text(folder / "name") or driver
    if not kind.startswith("ina"):
        return
    device = (folder / "device").resolve().name if (folder / "device").exists() else _bus_name(folder)
    for i in range(3):  # iio
        label, power = _text(folder / f"rail_name_{i}"), folder / f"in_power{i}_input"
        if label and power.exists():
            yield Channel(label, kind, device, (power,), 1e-3, folder)
    for i in _CHANNELS:
        label = _text(folder / f"in{i}_label")
        volts, amps = folder / f"in{i}_input", folder / f"curr{i}_input"
        if label and volts.exists() and amps.exists():
            shunt = _text(folder / f"shunt{i}_resistor") or ""  # micro-ohm
            ohm = int(shunt) * 1e-6 if shunt.isdecimal() and int(shunt) else None
            yield Channel(label, kind, device, (volts, amps), 1e-6, folder, ohm)
    for power in sorted(folder.glob("power*_input")):
        label = _text(folder / power.name.replace("_input", "_label")) or _text(folder / "label")
        if label:
            yield Channel(label, kind, device, (power,), 1e-6, folder)


def _bus_name(folder: Path) -> str:
    """`1-0040` from .../1-0040/hwmon/hwmon3 or .../1-0040/iio:device0."""
    return folder.parent.parent.name if folder.parent.name == "hwmon" else folder.parent.name


def _steps_w(channels: Iterable[Channel]) -> Iterator[tuple[str, float]]:
    """The step of each rail at its present voltage, where the shunt is known."""
    for channel in channels:
        if channel.kind.startswith("ina3221") and channel.shunt_ohm:
            millivolts = _text(channel.paths[0]) or ""
            if millivolts.isdecimal():
                yield channel.rail, STEP_V / channel.shunt_ohm * int(millivolts) / 1000


def _settings(channels: Iterable[Channel]) -> Iterator[tuple[str, str]]:
    """On-chip averaging of each chip, which may explain the sensor's lag."""
    for channel in channels:
        for name in ("samples", "update_interval"):
            if value := _text(channel.folder / name):
                yield f"{channel.device} {name}", value


def _slow_averages(channels: Iterable[Channel]) -> Iterator[str]:
    for channel in channels:
        text = _text(channel.folder / "update_interval") or ""
        if text.isdecimal() and int(text) > SLOW_AVERAGE_MS:
            yield f"{channel.kind} {channel.device} gives a new value every {text} ms only"


def _text(path: Path) -> str | None:
    """A file's text without white space around it, None when it is missing or may not be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip("\0 \n\t")
    except OSError:
        return None
