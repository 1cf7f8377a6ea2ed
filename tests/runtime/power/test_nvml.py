"""NVML through an object that looks like pynvml: every branch, on a fake clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.power.base import Window
from eopc_runtime.power.nvml import find_gpu, import_nvml, open_nvml_counter, open_nvml_power

NOT_SUPPORTED = 3


class NVMLError(Exception):
    """As in pynvml: an error with its code."""

    def __init__(self, value: int) -> None:
        super().__init__({NOT_SUPPORTED: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded"}[value])


class FakeNvml:
    """GPUs at a constant power each; `now` is moved by `sleep`. The counter is updated every 100 ms."""

    NVMLError = NVMLError
    NVML_FI_DEV_POWER_INSTANT = 186

    def __init__(self, *watts: float, **changes: Any) -> None:
        self.watts = watts or (70.0,)
        self.now = 0.0
        self.counter: Any = True  # False: not supported; a number: stuck there
        self.counter_scale = 1.0
        self.instant, self.average, self.driver = True, True, True
        self.field_type, self.as_bytes = 1, False
        for name, value in changes.items():
            setattr(self, name, value)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise NVMLError(9)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.watts)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:  # noqa: N802
        return i

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "MIG-5e11ce":
            raise NVMLError(6)
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        assert handle == "MIG-5e11ce"
        return 1

    def nvmlDeviceGetName(self, i: int) -> str | bytes:  # noqa: N802
        return b"Fake GPU" if self.as_bytes else "Fake GPU"

    def nvmlDeviceGetUUID(self, i: int) -> str | bytes:  # noqa: N802
        uuid = f"GPU-{i}f00d-{i}"
        return uuid.encode() if self.as_bytes else uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, i: int) -> int:  # noqa: N802
        if self.counter is False:
            raise NVMLError(NOT_SUPPORTED)
        if self.counter is not True:
            return int(self.counter)
        return int(self.counter_scale * self.watts[i] * 100 * int(self.now * 10 + 1e-9)) + 123456

    def nvmlDeviceGetPowerUsage(self, i: int) -> int:  # noqa: N802
        if not self.average:
            raise NVMLError(NOT_SUPPORTED)
        return round(self.watts[i] * 1000)

    def nvmlDeviceGetFieldValues(self, i: int, fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [186]
        value = SimpleNamespace(uiVal=round(self.watts[i] * 1000), ullVal=round(self.watts[i] * 1000), dVal=-1.0)
        return [SimpleNamespace(nvmlReturn=0 if self.instant else 3, valueType=self.field_type, value=value)]


def counter_window(library: FakeNvml, device: str = "0", seconds: float = 5.0) -> Window:
    """Open the energy counter and measure some seconds."""
    gpu = find_gpu(library, device)
    with open_nvml_counter(gpu, clock=lambda: library.now, sleep=library.sleep, threaded=False) as meter:
        meter.begin("w")
        library.sleep(seconds)
        return meter.end("w")


def power_window(library: FakeNvml) -> Window:
    """Open polled power and measure three seconds of a power that swings by 1 W."""
    with open_nvml_power(find_gpu(library), clock=lambda: library.now, threaded=False) as meter:
        base = library.watts
        meter.begin("w")
        for i in range(60):
            library.sleep(0.05)
            library.watts = tuple(w + i % 2 for w in base)
            meter.poll()
        return meter.end("w")


def test_the_counter_gives_the_joules_of_one_gpu() -> None:
    """70 W over 5 s are 350 J, within one update of 100 ms; three idle GPUs beside it are not counted."""
    window = counter_window(FakeNvml(60.0, 60.0, 70.0, 60.0), "2")
    assert window.energy_j == pytest.approx(350.0, abs=7.0)
    assert (window.rails, window.verified, window.meter) == (("GPU-2f00d-2",), True, "nvml")
    assert "3 other GPU(s) are not counted" in " ".join(window.notes)


def test_a_counter_window_under_two_seconds_is_unverified() -> None:
    """It may read 0 between two updates: never 0 J."""
    window = counter_window(FakeNvml(), seconds=0.05)
    assert (window.energy_j, window.verified) == (None, False)


def test_a_counter_that_disagrees_with_polled_power_is_unverified() -> None:
    """187 J against 327 J was seen on a real GPU: more than 20 % apart, and no number is given."""
    window = counter_window(FakeNvml(counter_scale=187 / 327))
    assert (window.energy_j, window.verified, window.faults) == (None, False, ("suspect",))
    assert "the energy counter says" in window.notes[0]
    assert counter_window(FakeNvml(counter_scale=0.85)).verified  # 15 % is within what the averaging explains


def test_a_counter_without_power_beside_it_is_taken_and_remarked() -> None:
    """Nothing to compare with: said in every window."""
    window = counter_window(FakeNvml(instant=False, average=False))
    assert window.verified
    assert "could not be compared" in " ".join(window.notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"counter": False}, "no energy counter for Fake GPU (Not Supported)"),
        ({"counter": 5000}, "did not move forward in 2"),
        ({"counter_scale": -1.0}, "did not move forward"),
    ],
)
def test_a_counter_that_cannot_be_used_is_refused(changes: dict[str, Any], says: str) -> None:
    """Not supported, stuck, or running backwards."""
    with pytest.raises(DeviceError) as caught:
        counter_window(FakeNvml(**changes))
    assert says in str(caught.value)


def test_power_is_polled_instant_before_average() -> None:
    """The instant reading where there is one, in whatever type it comes; else the average, which is remarked."""
    for changes in ({}, {"field_type": 3}, {"average": False}):
        window = power_window(FakeNvml(**changes))
        assert window.energy_j == pytest.approx(70.5 * 3, rel=0.01)  # 70 and 71 W in turn
        assert not [note for note in window.notes if "averages" in note]
    window = power_window(FakeNvml(instant=False))
    assert window.energy_j == pytest.approx(70.5 * 3, rel=0.01)
    assert "the driver averages this power" in " ".join(window.notes)


def test_older_bindings_without_field_values_give_the_average() -> None:
    """A library that lacks a function is like one that does not support it."""

    class Old(FakeNvml):
        @property
        def nvmlDeviceGetFieldValues(self) -> Any:  # type: ignore[override]  # noqa: N802
            raise AttributeError("module 'pynvml' has no attribute 'nvmlDeviceGetFieldValues'")

    assert "averages" in " ".join(power_window(Old()).notes)


def test_no_power_at_all_is_an_error() -> None:
    """Both readings refused, with what NVML said."""
    with pytest.raises(DeviceError, match=r"instant: NVML error 3; average: Not Supported"):
        power_window(FakeNvml(instant=False, average=False))


@pytest.mark.parametrize(
    ("device", "rail"),
    [
        ("1", "GPU-1f00d-1"),
        (" 0 ", "GPU-0f00d-0"),
        ("GPU-1f00d-1", "GPU-1f00d-1"),
        ("GPU-1", "GPU-1f00d-1"),
        ("MIG-5e11ce", "GPU-1f00d-1"),
        ("MIG-GPU-1f00d-1/3/0", "GPU-1f00d-1"),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_gpu_is_found_by_index_uuid_or_mig_id(device: str, rail: str, as_bytes: bool) -> None:
    """A MIG slice leads to its GPU, and says whose joules these are."""
    gpu = find_gpu(FakeNvml(60.0, 70.0, as_bytes=as_bytes), device)
    assert (gpu.rail, gpu.name) == (rail, "Fake GPU")
    assert any("whole GPU" in remark for remark in gpu.remarks) == device.startswith("MIG")


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("2", "no GPU 2: NVML sees 2"),
        ("-1", "names no GPU"),
        ("", "names no GPU"),
        ("\u0661", "names no GPU"),
        ("cuda:0", "names no GPU"),
        ("GPU-9", "no GPU has a UUID that begins with GPU-9"),
        ("GPU-", "more than one GPU"),
        ("MIG-unknown", "Not Found"),
    ],
)
def test_a_gpu_that_is_not_there_is_said(device: str, says: str) -> None:
    """With what there is, or how to write it."""
    with pytest.raises(DeviceError, match=says):
        find_gpu(FakeNvml(60.0, 70.0), device)


def test_a_driver_that_does_not_answer_is_one_line() -> None:
    """nvmlInit fails in a container without the driver."""
    with pytest.raises(DeviceError, match="NVML cannot be used: Driver Not Loaded"):
        find_gpu(FakeNvml(driver=False))


def test_a_missing_binding_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py is optional."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(MissingExtraError, match=r"eopc\[nvml\]"):
        import_nvml()
