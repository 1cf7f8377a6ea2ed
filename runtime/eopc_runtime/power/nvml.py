"""NVML, the power of NVIDIA's desktop and server GPUs (nvidia-ml-py; not Jetson, where it answers nothing).

The energy counter is preferred. Before it is trusted it must move, and agree with polled power within 20 %;
on some GPUs the two differ by a factor (187 J against 327 J over 5 s were reported), and then its windows are
`unverified`. Without a counter, power is polled: the instant reading where there is one, else the driver's
average. A GPU is named by index, UUID (or its beginning), or the UUID of a MIG slice, whose joules are those
of the whole GPU. Only that GPU is counted: idle ones beside it are not.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.power.base import Sensor
from eopc_runtime.power.counter import CounterMeter
from eopc_runtime.power.integrate import Sample, integrate
from eopc_runtime.power.sampling import RATE_HZ, PolledMeter, SensorError

NAME = "nvml"
CHECK_S = 2.0  # of polling beside the counter
DISAGREE = 0.2
POLL_S = 0.05

_FI_DEV_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, where the library does not name it
# which member of a field's value holds it, by its type (nvmlValueType_t)
_VALUE_OF_TYPE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU through a library that looks like `pynvml`. Methods raise SensorError when NVML refuses."""

    nvml: Any
    handle: Any
    name: str
    rail: str
    remarks: tuple[str, ...] = ()

    def energy_j(self) -> float:
        """The energy counter in J."""
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption")) / 1e3

    def instant_w(self) -> float:
        """Power now in W."""
        field = getattr(self.nvml, "NVML_FI_DEV_POWER_INSTANT", _FI_DEV_POWER_INSTANT)
        value = self._ask("nvmlDeviceGetFieldValues", [field])[0]
        if value.nvmlReturn != 0:
            raise SensorError(f"NVML error {value.nvmlReturn}")
        return float(getattr(value.value, _VALUE_OF_TYPE[value.valueType])) / 1e3

    def average_w(self) -> float:
        """Power in W as the driver averages it: over 1 s on most GPUs since Ampere."""
        return float(self._ask("nvmlDeviceGetPowerUsage")) / 1e3

    def _ask(self, function: str, *args: object) -> Any:
        try:
            return getattr(self.nvml, function)(self.handle, *args)
        except (self.nvml.NVMLError, AttributeError) as error:  # older bindings lack newer functions
            raise SensorError(str(error)) from None


def import_nvml() -> Any:
    """Return the pynvml module; MissingExtraError names the extra that brings it."""
    try:
        return importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise MissingExtraError("the NVML meter", "nvidia-ml-py", "nvml") from None


def find_gpu(library: Any, device: str = "0") -> Gpu:
    """Return a GPU by index, UUID or MIG UUID; DeviceError says what there is. NVML stays initialised."""
    try:
        library.nvmlInit()
        count = library.nvmlDeviceGetCount()
        handle, remarks = _handle(library, device.strip(), count)
        name, uuid = _text(library.nvmlDeviceGetName(handle)), _text(library.nvmlDeviceGetUUID(handle))
    except library.NVMLError as error:
        raise DeviceError(f"NVML cannot be used: {error}.") from None
    return Gpu(library, handle, name, uuid, remarks)


def open_nvml_counter(
    gpu: Gpu,
    *,
    check_s: float = CHECK_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    threaded: bool = True,
) -> CounterMeter:
    """Open the energy counter after `check_s` of comparing it with polled power.

    Raises DeviceError when it is not supported or does not move. Where the two disagree, every window of the
    meter is unverified and says so.
    """
    suspicion, remark = _compare(gpu, check_s, clock, sleep)
    sensor = _sensor(gpu, "energy counter", (remark,) if remark else ())
    return CounterMeter(sensor, lambda: {gpu.rail: gpu.energy_j()}, suspicion=suspicion, clock=clock, threaded=threaded)


def open_nvml_power(
    gpu: Gpu, *, rate_hz: float = RATE_HZ, clock: Callable[[], float] = time.monotonic, threaded: bool = True
) -> PolledMeter:
    """Open polled power, the instant reading before the average; DeviceError when there is neither."""
    instant, average = _attempt(gpu.instant_w), _attempt(gpu.average_w)
    if isinstance(instant, float):
        sensor, read = _sensor(gpu, "instant power"), gpu.instant_w
    elif isinstance(average, float):
        remark = "the driver averages this power, over 1 s on most GPUs"
        sensor, read = _sensor(gpu, "average power", (remark,)), gpu.average_w
    else:
        raise DeviceError(f"NVML gives no power of {gpu.name} (instant: {instant}; average: {average}).")
    return PolledMeter(sensor, lambda: {gpu.rail: read()}, rate_hz=rate_hz, clock=clock, threaded=threaded)


def _compare(
    gpu: Gpu, check_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[str | None, str | None]:
    """Run the counter beside polled power; return a suspicion and a remark."""
    first_j = _attempt(gpu.energy_j)
    if not isinstance(first_j, float):
        raise DeviceError(f"NVML has no energy counter for {gpu.name} ({first_j}).")
    read_w = gpu.instant_w if isinstance(_attempt(gpu.instant_w), float) else gpu.average_w
    started_s = now = clock()
    updates, samples = [(now, first_j)], list[Sample]()
    while now - started_s < check_s:
        sleep(POLL_S)
        energy, watts = _attempt(gpu.energy_j), _attempt(read_w)
        now = clock()
        if isinstance(watts, float):
            samples.append((now, (watts,)))
        if isinstance(energy, float) and energy != updates[-1][1]:
            updates.append((now, energy))
    # from one update of the counter to another: what it stood at in the beginning was old already
    (begin_s, begin_j), (end_s, end_j) = updates[min(1, len(updates) - 1)], updates[-1]
    if not end_j > begin_j:
        raise DeviceError(f"the energy counter of {gpu.name} did not move forward in {now - started_s:.1f} s.")
    polled = integrate(samples, max_gap_s=1.0, start_s=begin_s, end_s=end_s)
    if polled.covered_s < 0.5 * (end_s - begin_s):
        return None, "the counter could not be compared: NVML gives no power beside it"
    counted_w, polled_w = (end_j - begin_j) / (end_s - begin_s), sum(polled.joules) / polled.covered_s
    if abs(counted_w - polled_w) <= DISAGREE * max(counted_w, polled_w):
        return None, None
    return f"the energy counter says {counted_w:.3g} W where polled power says {polled_w:.3g} W", None


def _handle(library: Any, device: str, count: int) -> tuple[Any, tuple[str, ...]]:
    """The handle of a GPU; for a MIG slice that of the GPU it is on, since power is not counted per slice."""
    if device.isascii() and device.isdigit():
        if int(device) >= count:
            raise DeviceError(f"there is no GPU {device}: NVML sees {count}, counted from 0.")
        beside = f"{count - 1} other GPU(s) are not counted; NVML's order is that of the PCI bus, not CUDA's"
        return library.nvmlDeviceGetHandleByIndex(int(device)), (beside,) if count > 1 else ()
    if device.startswith("MIG-"):
        remark = f"{device} is a slice: NVML measures its whole GPU, other slices included"
        if device.startswith("MIG-GPU-"):  # MIG-GPU-<uuid>/<gpu instance>/<compute instance>
            return _by_uuid(library, device.removeprefix("MIG-").split("/")[0], count), (remark,)
        slice_handle = library.nvmlDeviceGetHandleByUUID(device)
        return library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_handle), (remark,)
    if device.startswith("GPU-"):
        return _by_uuid(library, device, count), ()
    raise DeviceError(f'"{device}" names no GPU. Write an index, GPU-<uuid> or MIG-<uuid>, as `nvidia-smi -L` shows.')


def _by_uuid(library: Any, uuid: str, count: int) -> Any:
    """The handle of the one GPU whose UUID begins like this."""
    handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    uuids = [_text(library.nvmlDeviceGetUUID(handle)) for handle in handles]
    found = [handle for handle, known in zip(handles, uuids, strict=True) if known.startswith(uuid)]
    if len(found) != 1:
        what = "more than one GPU" if found else "no GPU"
        raise DeviceError(f"{what} has a UUID that begins with {uuid}; NVML sees {', '.join(uuids) or 'none'}.")
    return found[0]


def _sensor(gpu: Gpu, what: str, remarks: tuple[str, ...] = ()) -> Sensor:
    return Sensor(NAME, (gpu.rail,), details={"gpu": gpu.name, "reading": what}, remarks=(*gpu.remarks, *remarks))


def _attempt(read: Callable[[], float]) -> float | SensorError:
    try:
        return read()
    except SensorError as error:
        return error


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value
