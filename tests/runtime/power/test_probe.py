"""Which meter is taken, in which order, and the reason for each that is passed over."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.power.probe import METERS, Surroundings, choose_meter, is_jetson, open_meter


class NotSupportedError(Exception):
    """As pynvml's error."""


def nvml(counter: bool = True, power: bool = True) -> Any:
    """A library with one GPU whose counter moves by 7 J with each reading, and follows 140 W polled at 20 Hz."""
    reads = iter(range(10**6))

    def energy(handle: object) -> int:
        if not counter:
            raise NotSupportedError("Not Supported")
        return next(reads) * 7000

    def usage(handle: object) -> int:
        if not power:
            raise NotSupportedError("Not Supported")
        return 140_000

    return SimpleNamespace(
        NVMLError=NotSupportedError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: "Fake",
        nvmlDeviceGetUUID=lambda h: "GPU-f00d",
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetPowerUsage=usage,
    )


def no_nvml() -> Any:
    raise MissingExtraError("the NVML meter", "nvidia-ml-py", "nvml")


def around(root: Path, library: Any = None, proxy_w: float | None = 30.0, **changes: Any) -> Surroundings:
    """A machine below `root` on a clock that only moves when it is asked to sleep."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    settings: dict[str, Any] = {
        "root": root,
        "import_nvml": (lambda: library) if library is not None else no_nvml,
        "tegrastats_command": ("no-such-tegrastats",),
        "proxy_w": proxy_w,
        "threaded": False,
        "clock": lambda: now[0],
        "sleep": sleep,
    }
    return Surroundings(**{**settings, **changes})


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def jetson(root: Path) -> None:
    write(root / "etc/nv_tegra_release", "# R36 (release)")


def monitor(root: Path, milliamps: int = 900) -> None:
    chip = root / "sys/class/hwmon/hwmon1"
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000"}.items():
        write(chip / name, text)
    write(chip / "curr1_input", str(milliamps))


def rapl(root: Path) -> Path:
    domain = root / "sys/class/powercap/intel-rapl:0"
    write(domain / "name", "package-0")
    write(domain / "max_energy_range_uj", "262143328850")
    write(domain / "energy_uj", "1000")
    return domain / "energy_uj"


def chosen(settings: Surroundings) -> tuple[str, dict[str, str]]:
    choice = choose_meter(settings)
    with choice.meter as meter:
        return meter.sensor.name, {entry.meter: entry.reason for entry in choice.passed_over}


def test_a_jetson_is_known_by_its_release_file_or_device_tree(tmp_path: Path) -> None:
    """Before NVML is asked, which would answer there, and then support nothing."""
    assert not is_jetson(tmp_path)
    write(tmp_path / "proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert not is_jetson(tmp_path)
    write(tmp_path / "proc/device-tree/compatible", "nvidia,p3767-0005\0nvidia,tegra234\0")
    assert is_jetson(tmp_path)
    jetson(tmp_path / "other")
    assert is_jetson(tmp_path / "other")


def test_a_jetson_takes_its_monitor_first(tmp_path: Path) -> None:
    """INA3221 by sysfs, although NVML would be there."""
    jetson(tmp_path)
    monitor(tmp_path)
    assert chosen(around(tmp_path, nvml())) == ("ina3221", {})


def test_a_jetson_without_a_monitor_takes_tegrastats(tmp_path: Path) -> None:
    """The reason for the first is kept."""
    jetson(tmp_path)
    script = tmp_path / "tegrastats"
    write(script, "import time\nwhile True: print('RAM 1/2MB VDD_IN 4000mW/1mW', flush=True); time.sleep(0.05)")
    command = (sys.executable, "-S", str(script))
    import time

    settings = around(tmp_path, nvml(), tegrastats_command=command, clock=time.monotonic, sleep=time.sleep)
    name, passed = chosen(settings)
    assert name == "tegrastats"
    assert "no labelled INA3221" in passed["ina3221"]


def test_a_jetson_without_power_is_a_proxy_and_never_nvml(tmp_path: Path) -> None:
    """Every other meter is named with its reason."""
    jetson(tmp_path)
    name, passed = chosen(around(tmp_path, nvml()))
    assert name == "proxy"
    assert list(passed) == [meter for meter in METERS if meter != "proxy"]
    assert "this is a Jetson" in passed["nvml-counter"]
    assert "not installed or not on PATH" in passed["tegrastats"]


def test_elsewhere_the_counter_comes_before_power_before_rapl(tmp_path: Path) -> None:
    """What a GPU does not support moves the choice one further."""
    rapl(tmp_path)
    assert chosen(around(tmp_path, nvml()))[0] == "nvml"
    name, passed = chosen(around(tmp_path, nvml(counter=False)))
    assert (name, "Not Supported" in passed["nvml-counter"]) == ("nvml", True)
    assert "this is no Jetson" in passed["ina3221"]


def test_rapl_is_taken_when_its_counter_moves(tmp_path: Path) -> None:
    """A counter that stands still for two seconds is passed over: it may be a virtual machine's."""
    counter = rapl(tmp_path)
    name, passed = chosen(around(tmp_path))
    assert name == "proxy"
    assert "rapl gave" in passed["rapl"]
    assert "nvidia-ml-py is not installed" in passed["nvml-power"]
    settings = around(tmp_path)

    def sleep(seconds: float) -> None:
        settings.sleep(seconds)
        write(counter, str(int(counter.read_text()) + 1_000_000))

    assert chosen(around(tmp_path, clock=settings.clock, sleep=sleep))[0] == "rapl"


def test_a_monitor_that_reads_zero_is_passed_over(tmp_path: Path) -> None:
    """Two seconds of 0 W are no power."""
    jetson(tmp_path)
    monitor(tmp_path, milliamps=0)
    name, passed = chosen(around(tmp_path))
    assert (name, passed["ina3221"]) == ("proxy", "ina3221 gave nothing but 0 for 2 s.")


def test_without_a_proxy_nothing_is_left_but_the_null_meter(tmp_path: Path) -> None:
    """Whoever wants no assumption gets no number."""
    name, passed = chosen(around(tmp_path, proxy_w=None))
    assert name == "none"
    assert "none was given" in passed["proxy"]


def test_a_meter_can_be_asked_for_by_name(tmp_path: Path) -> None:
    """`nvml` takes the counter or else power; an unknown name gets the nearest, and a missing one its reason."""
    assert open_meter("proxy", around(tmp_path)).sensor.name == "proxy"
    assert open_meter("auto", around(tmp_path)).sensor.name == "proxy"
    assert open_meter("nvml", around(tmp_path, nvml())).sensor.details["reading"] == "energy counter"
    assert open_meter("nvml", around(tmp_path, nvml(counter=False))).sensor.details["reading"] == "average power"
    with pytest.raises(DeviceError, match="gives no power"):
        open_meter("nvml", around(tmp_path, nvml(counter=False, power=False)))
    with pytest.raises(DeviceError, match='Did you mean "ina3221"'):
        open_meter("ina322", around(tmp_path))
    with pytest.raises(DeviceError, match="no RAPL package"):
        open_meter("rapl", around(tmp_path))
