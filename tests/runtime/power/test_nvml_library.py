"""NVML through the real bindings and a C stand-in for the driver's library, built here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to build the stand-in with")

# Two GPUs of 70 and 90 W that run on the monotonic clock; MODE takes functions away, or slows the counter. The
# layout of a field value is NVML's (nvmlFieldValue_t).
SHIM = r"""
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <time.h>
#define API __attribute__((visibility("default"))) int
typedef union { unsigned ui; double d; } Value;
typedef struct { unsigned id, scope; long long stamp, latency; int type, ret; Value v; } Field;
static int mode(const char *m) { const char *e = getenv("MODE"); return e && strstr(e, m) != NULL; }
static double watts(void *d) { return d == (void *)2 ? 90 : 70; }
API nvmlInit_v2(void) { return mode("no-driver") ? 9 : 0; }
API nvmlInitWithFlags(unsigned f) { return nvmlInit_v2(); }
API nvmlShutdown(void) { return 0; }
API nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
API nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)(i + 1L); return i < 2 ? 0 : 2; }
API nvmlDeviceGetHandleByUUID(const char *u, void **d) { *d = (void *)99; return strcmp(u, "MIG-5e11ce") ? 6 : 0; }
API nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *m, void **d) { *d = (void *)2; return m == (void *)99 ? 0 : 2; }
API nvmlDeviceGetName(void *d, char *s, unsigned n) { snprintf(s, n, "Stand-in"); return 0; }
API nvmlDeviceGetUUID(void *d, char *s, unsigned n) { snprintf(s, n, "GPU-%ldf00d", (long)d - 1); return 0; }
API nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { *mw = watts(d) * 1000; return mode("no-average") ? 3 : 0; }
API nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *mj) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    *mj = (t.tv_sec % 100000 + t.tv_nsec * 1e-9) * watts(d) * (mode("slow") ? 500 : 1000);
    return mode("no-counter") ? 3 : 0;
}
API nvmlDeviceGetFieldValues(void *d, int n, Field *f) {
    f->type = 1; f->ret = f->id == 186 && !mode("no-instant") ? 0 : 3; f->v.ui = watts(d) * 1000 + 1000;
    return 0;
}
const char *nvmlErrorString(int code) {
    return code == 3 ? "Not Supported" : code == 9 ? "Driver Not Loaded" : "Failed";
}
"""

# Measures several GPUs at once with what a real program uses: the bindings, real clocks, threads.
PROGRAM = """
import contextlib, json, sys, time
from eopc_runtime.errors import DeviceError
from eopc_runtime.power.probe import Surroundings, open_meter
kind, seconds, devices = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
try:
    with contextlib.ExitStack() as stack:
        meters = [stack.enter_context(open_meter(kind, Surroundings(gpu=d, wait_s=0.5))) for d in devices]
        [meter.begin("w") for meter in meters]
        time.sleep(seconds)
        windows = [meter.end("w") for meter in meters]
        print(json.dumps([
            {"energy_j": w.energy_j, "duration_s": w.duration_s, "rails": w.rails, "faults": w.faults,
             "notes": w.notes, "details": m.sensor.details}
            for m, w in zip(meters, windows)
        ]))
except DeviceError as error:
    print(json.dumps([{"error": str(error)}]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in, as libnvidia-ml.so.1."""
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "shim.c").write_text(SHIM)
    command = [COMPILER or "cc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "shim.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def measure(
    shim: Path, *devices: str, mode: str = "", kind: str = "nvml", seconds: float = 0.1
) -> list[dict[str, Any]]:
    """Run the program above with the stand-in in the place of the driver's library."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(shim), "MODE": mode, "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM, kind, str(seconds), *devices]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_counter_of_the_library_by_index_uuid_and_mig_id(shim: Path) -> None:
    """Index, UUID, its beginning and a MIG UUID lead to the right GPU's counter; the other GPU is not added."""
    devices = ("0", "1", "GPU-1f", "GPU-0f00d", "MIG-5e11ce")
    for device, found in zip(devices, measure(shim, *devices, seconds=2.2), strict=True):
        second = device in ("1", "GPU-1f", "MIG-5e11ce")
        assert found["details"] == {"gpu": "Stand-in", "reading": "energy counter"}
        assert (found["rails"], found["faults"]) == (["GPU-1f00d" if second else "GPU-0f00d"], [])
        watts = 90 if second else 70
        assert found["energy_j"] == pytest.approx(watts * found["duration_s"], rel=0.01)  # readings take microseconds


def test_the_instant_power_of_the_library(shim: Path) -> None:
    """Without a counter (code 3, not supported) power is polled: field 186, which is 1 W above the average here."""
    (found,) = measure(shim, "0", mode="no-counter", seconds=2.2)
    assert found["details"]["reading"] == "instant power"
    if "gaps" in found["faults"]:  # the machine starved the polling thread, and the window says so
        assert found["energy_j"] is None
    else:
        assert found["energy_j"] == pytest.approx(71 * found["duration_s"], rel=0.02)  # 2 % may be uncovered


def test_the_average_power_of_the_library(shim: Path) -> None:
    """Neither counter nor instant power: the average, with its remark; 0.1 s of it is no measurement."""
    (found,) = measure(shim, "0", mode="no-counter no-instant")
    assert found["details"]["reading"] == "average power"
    assert "the driver averages this power" in " ".join(found["notes"])
    assert (found["energy_j"], "short" in found["faults"]) == (None, True)


def test_nothing_supported_is_an_error_not_zero(shim: Path) -> None:
    """As on a Jetson: the library initialises and answers "not supported" to everything."""
    (found,) = measure(shim, "0", mode="no-counter no-instant no-average")
    assert "no energy counter for Stand-in (Not Supported)" in found["error"]
    assert "gives no power" in found["error"]


def test_a_counter_that_disagrees_is_unverified(shim: Path) -> None:
    """Half the polled power: no joules, and why."""
    (found,) = measure(shim, "0", mode="slow", seconds=2.1)
    assert (found["energy_j"], found["faults"]) == (None, ["suspect"])


@pytest.mark.parametrize(
    ("mode", "device", "says"),
    [("no-driver", "0", "Driver Not Loaded"), ("", "2", "NVML sees 2"), ("", "MIG-other", "NVML cannot be used")],
)
def test_mistakes_of_the_library_are_one_line(shim: Path, mode: str, device: str, says: str) -> None:
    """No driver, no such GPU, no such slice."""
    assert says in measure(shim, device, mode=mode)[0]["error"]
