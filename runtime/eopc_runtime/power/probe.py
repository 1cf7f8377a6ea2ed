"""Which meter to use: each kind in order, taken only after it gave a number, with a reason for each passed over.

    on a Jetson   ina3221 -> tegrastats -> proxy
    elsewhere     nvml (energy counter, then power) -> rapl -> proxy

NVML is not asked on a Jetson: there it initialises, and then answers "not supported". A meter that gives
nothing, or nothing but 0 for two seconds, is passed over. Where not even a proxy is wanted, what is left is the
null meter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.jsonfields import did_you_mean
from eopc_runtime.power import ina3221, nvml, rapl, tegrastats
from eopc_runtime.power.base import Meter
from eopc_runtime.power.boards import list_boards
from eopc_runtime.power.counter import CounterMeter
from eopc_runtime.power.null import NullMeter
from eopc_runtime.power.proxy import ProxyMeter
from eopc_runtime.power.rails import RailRule
from eopc_runtime.power.sampling import RATE_HZ, PolledMeter, SampledMeter

WAIT_S = 2.0  # for a number other than 0
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything a meter is opened with; the defaults are this machine."""

    root: Path = Path("/")  # where /sys, /proc and /etc are found
    rules: Sequence[RailRule] = field(default_factory=lambda: [board.rails for board in list_boards()])
    rails: Sequence[str] = ()  # sum exactly these rails
    tegrastats_command: Sequence[str] = tegrastats.COMMAND
    tegrastats_period_s: float = tegrastats.PERIOD_S
    import_nvml: Callable[[], Any] = nvml.import_nvml
    gpu: str = "0"
    proxy_w: float | None = None  # None: no proxy
    rate_hz: float = RATE_HZ
    wait_s: float = WAIT_S
    threaded: bool = True
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A meter that was not taken, and why."""

    meter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The meter to use, open, and those before it."""

    meter: Meter
    passed_over: tuple[PassedOver, ...]


def is_jetson(root: Path = Path("/")) -> bool:
    """True on a Jetson: by L4T's release file, or the device tree."""
    if (root / "etc/nv_tegra_release").exists():
        return True
    try:
        compatible = (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        return False
    return b"nvidia,tegra" in compatible


def choose_meter(around: Surroundings) -> Choice:
    """Return the first meter that gives a number; the null meter when none does."""
    jetson = is_jetson(around.root)
    passed: list[PassedOver] = []
    for name in METERS:
        found = _attempt(name, around, jetson)
        if not isinstance(found, PassedOver):
            return Choice(found, tuple(passed))
        passed.append(found)
    return Choice(NullMeter(around.clock), tuple(passed))


def open_meter(name: str, around: Surroundings) -> Meter:
    """Open one kind of meter by name (`auto` chooses); DeviceError says why it cannot be used here."""
    if name == "auto":
        return choose_meter(around).meter
    if name == "nvml":
        return _open_nvml(around)
    if name not in METERS:
        names = ("auto", "nvml", *METERS)
        raise DeviceError(f'there is no meter "{name}".{did_you_mean(name, names)} Meters: {", ".join(names)}.')
    return METERS[name](around)


def _attempt(name: str, around: Surroundings, jetson: bool) -> Meter | PassedOver:
    try:
        _require_place(name, jetson)
        return METERS[name](around)
    except (DeviceError, MissingExtraError) as error:
        return PassedOver(name, str(error))


def _require_place(name: str, jetson: bool) -> None:
    """DeviceError for a meter that does not belong on this kind of machine."""
    if jetson and name in ("nvml-counter", "nvml-power", "rapl"):
        raise DeviceError("this is a Jetson; its power is not in NVML or RAPL.")
    if not jetson and name in ("ina3221", "tegrastats"):
        raise DeviceError("this is no Jetson (no /etc/nv_tegra_release, no nvidia,tegra in the device tree).")


def _open_ina3221(around: Surroundings) -> Meter:
    meter = ina3221.open_ina3221(
        around.root,
        around.rules,
        around.rails,
        rate_hz=around.rate_hz,
        clock=around.clock,
        threaded=around.threaded,
    )
    return _proved(meter, around)


def _open_tegrastats(around: Surroundings) -> Meter:
    meter = tegrastats.open_tegrastats(
        around.rules,
        around.rails,
        command=around.tegrastats_command,
        period_s=around.tegrastats_period_s,
        clock=around.clock,
    )
    return _proved(meter, around)


def _open_nvml_counter(around: Surroundings) -> Meter:
    gpu = nvml.find_gpu(around.import_nvml(), around.gpu)
    return nvml.open_nvml_counter(
        gpu, check_s=around.wait_s, clock=around.clock, sleep=around.sleep, threaded=around.threaded
    )


def _open_nvml_power(around: Surroundings) -> Meter:
    gpu = nvml.find_gpu(around.import_nvml(), around.gpu)
    meter = nvml.open_nvml_power(gpu, rate_hz=around.rate_hz, clock=around.clock, threaded=around.threaded)
    return _proved(meter, around)


def _open_nvml(around: Surroundings) -> Meter:
    try:
        return _open_nvml_counter(around)
    except DeviceError as error:
        try:
            return _open_nvml_power(around)
        except DeviceError as second:
            raise DeviceError(f"{error} {second}") from None


def _open_rapl(around: Surroundings) -> Meter:
    return _proved(rapl.open_rapl(around.root, clock=around.clock, threaded=around.threaded), around)


def _open_proxy(around: Surroundings) -> Meter:
    if around.proxy_w is None:
        raise DeviceError("a proxy needs an assumed power in watts, and none was given.")
    return ProxyMeter(around.proxy_w, around.clock)


# In the order in which they are tried.
METERS: Mapping[str, Callable[[Surroundings], Meter]] = {
    "ina3221": _open_ina3221,
    "tegrastats": _open_tegrastats,
    "nvml-counter": _open_nvml_counter,
    "nvml-power": _open_nvml_power,
    "rapl": _open_rapl,
    "proxy": _open_proxy,
}


def _proved(meter: SampledMeter | CounterMeter, around: Surroundings) -> Meter:
    """Return the meter once it gave something other than 0; close it and raise DeviceError when it does not."""
    meter.begin("probe")
    until_s = around.clock() + around.wait_s
    while True:
        if isinstance(meter, PolledMeter):
            meter.poll()
        window_j = _so_far_j(meter)
        if window_j:
            meter.end("probe")
            return meter
        if around.clock() >= until_s:
            break
        around.sleep(_PAUSE_S)
    meter.close()
    gave = "nothing but 0" if window_j == 0 else "no number"
    raise DeviceError(f"{meter.sensor.name} gave {gave} for {around.wait_s:.0f} s.")


def _so_far_j(meter: Meter) -> float | None:
    try:
        return meter.energy_so_far_j("probe")
    except DeviceError:
        return None
