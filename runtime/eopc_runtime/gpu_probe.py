"""Whether a CUDA GPU answers, asked in a child process before anything of NVIDIA's is imported here.

TensorRT's lean runtime segfaults when it deserialises a plan with no GPU, and a broken driver may crash or hang
whoever loads it. So cuInit runs through ctypes in a child: a crash there costs a sentence here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from eopc_runtime.errors import DeviceError

TIMEOUT_S = 30
NO_GPU = "No CUDA driver answers. The CPU runs bundles; for TensorRT install NVIDIA's driver (or JetPack)."

_PROBE = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
code = cuda.cuInit(0)
out = {"init": code, "devices": []}
version, count = ctypes.c_int(), ctypes.c_int()
if code == 0:
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
out["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
for i in range(count.value):
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), i)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    sm = f"{major.value}.{minor.value}"
    out["devices"].append({"name": name.value.decode(), "sm": sm, "memory_bytes": size.value})
print(json.dumps(out))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    compute_capability: int  # 87 is SM 8.7
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class GpuReport:
    """What the driver said; without devices, `missing` says why and what to do."""

    devices: tuple[Gpu, ...]
    driver: str | None  # the CUDA version of the driver, 12.6
    missing: str | None = None


def probe_gpu(run: Callable[[], str] | None = None) -> GpuReport:
    """Ask the driver for its devices, in a child process; never raises, never crashes this process.

    Args:
        run: returns the JSON that the child prints; for tests.
    """
    try:
        content = json.loads((run or run_probe)())
        init, driver = int(content["init"]), str(content["driver"])
        devices = tuple(
            Gpu(d["name"], int(d["sm"].replace(".", "")), int(d["memory_bytes"])) for d in content["devices"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, subprocess.SubprocessError):
        return GpuReport((), None, NO_GPU)
    if init != 0 or not devices:
        return GpuReport((), None, f"{NO_GPU} (cuInit returned {init})")
    return GpuReport(devices, driver)


def require_gpu(what: str, run: Callable[[], str] | None = None) -> tuple[Gpu, str]:
    """Return the first GPU and its driver's CUDA version.

    Args:
        what: opens the message, for example "`eopc engine`".

    Raises:
        DeviceError: no GPU answers.
    """
    report = probe_gpu(run)
    if not report.devices or report.driver is None:
        raise DeviceError(f"{what} needs an NVIDIA GPU. {report.missing or NO_GPU}")
    return report.devices[0], report.driver


def run_probe() -> str:
    """Run the probe in a child process and return what it printed.

    Raises:
        subprocess.SubprocessError: the child failed, crashed or hung; there is no driver, or it is broken.
    """
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout
