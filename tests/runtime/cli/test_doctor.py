"""`eopc doctor` and `eopc devices`: what the machine has, and a fix for every gap."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from eopc_runtime.cli import doctor, machine
from eopc_runtime.power.probe import Surroundings

Eopc = Callable[..., Result]


def test_devices_lists_every_profile_with_marks(eopc: Eopc) -> None:
    """The table and the JSON name the same devices, and every constant carries a mark and a source."""
    value = json.loads(eopc("devices", "--json").stdout)
    text = eopc("devices").stdout
    assert "orin" in [device["name"] for device in value["devices"]]
    for device in value["devices"]:
        assert device["name"] in text
        for constant in device["constants"].values():
            assert constant["mark"] in value["marks"]
            assert constant["source"]


def test_doctor_reports_and_gives_a_fix_for_every_gap(eopc: Eopc) -> None:
    """The report is one JSON object; what is missing carries a fix."""
    value = json.loads(eopc("doctor", "--json").stdout)
    names = {check["name"]: check for check in value["checks"]}
    wanted = {"python", "onnxruntime", "torch", "tensorrt", "gpu", "nvpmodel", "energy meter", "memory", "disk"}
    assert wanted <= set(names)
    assert all(check["found"] or check["fix"] for check in value["checks"])
    assert "python" in eopc("doctor").stdout


def test_doctor_reads_power_modes_by_name(tmp_path: Path) -> None:
    """The active id is looked up in nvpmodel.conf; a Jetson without it gets a fix, another machine none."""
    assert doctor.nvpmodel_check(tmp_path).fix is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    assert "nvpmodel" in (doctor.nvpmodel_check(tmp_path).fix or "")
    (tmp_path / "etc/nvpmodel.conf").write_text(
        "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n"
    )
    assert "unknown" in (doctor.nvpmodel_check(tmp_path).fix or "")
    status = tmp_path / "var/lib/nvpmodel/status"
    status.parent.mkdir(parents=True)
    status.write_text("pmode:0002")
    assert doctor.nvpmodel_check(tmp_path).found == "MODE_30W (of MAXN, MODE_30W)"


def test_doctor_finds_rails_by_label_and_rapl_packages(tmp_path: Path) -> None:
    """INA3221 channels with a label and a current are rails; shunt sums, NC and RAPL core domains are not."""
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for name, text in {
        "name": "ina3221",
        "in1_label": "VDD_GPU_SOC",
        "in1_input": "19864",
        "curr1_input": "180",
        "in2_label": "NC",
        "in2_input": "0",
        "curr2_input": "0",
        "in7_label": "sum of shunt voltages",
        "in7_input": "3",
    }.items():
        (chip / name).write_text(text + "\n")
    other = tmp_path / "sys/class/hwmon/hwmon0"
    other.mkdir()
    (other / "name").write_text("coretemp\n")
    for domain, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core"}.items():
        folder = tmp_path / "sys/class/powercap" / domain
        folder.mkdir(parents=True)
        (folder / "name").write_text(name)
        (folder / "energy_uj").write_text("1")
    sensors = doctor.power_sensors(tmp_path)
    assert [(s.kind, s.rail) for s in sensors] == [("ina3221", "VDD_GPU_SOC"), ("rapl", "package-0")]
    assert doctor.sensor_check(sensors).fix is None
    locked = [doctor.Sensor("rapl", "package-0", "/sys/x", readable=False)]
    assert "sudo chmod a+r /sys/x" in (doctor.sensor_check(locked).fix or "")
    assert "None in sysfs" in (doctor.sensor_check([]).fix or "")


def test_doctor_names_the_meter_and_why_others_were_passed_over(tmp_path: Path) -> None:
    """On a Jetson with a monitor that is the meter, with its rails; without one a proxy, and a reason for each."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    here = Surroundings(root=tmp_path, tegrastats_command=("no-such-tegrastats",), proxy_w=30.0, threaded=False)
    report = doctor.meter_report(here)
    assert (report["meter"], report["source"]) == ("proxy", "proxy")
    assert [entry["meter"] for entry in report["passed_over"]][:2] == ["ina3221", "tegrastats"]
    assert all(entry["reason"] for entry in report["passed_over"])
    check = doctor.meter_check(report)
    assert "nothing was measured" in (check.found or "")
    assert check.fix
    assert doctor.meter_check(doctor.meter_report(replace(here, proxy_w=None))).found is None
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "900"}.items():
        (chip / name).write_text(text)
    report = doctor.meter_report(here)
    assert (report["meter"], report["rails"], report["passed_over"]) == ("ina3221", ["VDD_IN"], [])
    assert doctor.meter_check(report) == doctor.Check("energy meter", "ina3221, VDD_IN")


def test_doctor_prints_the_reasons(eopc: Eopc) -> None:
    """Both outputs of the command carry them."""
    report = json.loads(eopc("doctor", "--json").stdout)["meter"]
    text = eopc("doctor").stdout
    assert all(f"{entry['meter']}: " in text for entry in report["passed_over"])


def test_doctor_reads_the_gpu_report() -> None:
    """A device is shown by name; a driver error and a missing driver each get the fix."""
    gpu = {"name": "Orin", "sm": "8.7", "memory_bytes": 8 << 30}
    good = json.dumps({"init": 0, "driver": "12.6", "devices": [gpu]})
    assert doctor.gpu_check(lambda: good).found == "Orin (sm 8.7, 8.0 GiB), driver for CUDA 12.6"
    bad = doctor.gpu_check(lambda: json.dumps({"init": 100, "driver": "0.0", "devices": []}))
    assert bad.found is None
    assert "cuInit returned 100" in (bad.fix or "")

    def no_driver() -> str:
        raise subprocess.CalledProcessError(1, "python")

    assert "No CUDA driver" in (doctor.gpu_check(no_driver).fix or "")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only /proc tells a process from its parent")
def test_peak_memory_is_of_this_process_alone() -> None:
    """A child of a large process is not as large, although getrusage says so."""
    large = np.ones(60 << 20)  # 480 MiB of pages that are there
    code = "from eopc_runtime.cli.machine import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < large.nbytes / 2


def test_machine_facts_come_from_proc(tmp_path: Path) -> None:
    """Board, CPU and memory are read from /proc, and a machine without these files gives None."""
    proc = tmp_path / "proc"
    (proc / "device-tree").mkdir(parents=True)
    (proc / "device-tree/model").write_text("NVIDIA Jetson Orin Nano\0")
    (proc / "cpuinfo").write_text("processor : 0\nmodel name : Fast CPU\n")
    (proc / "meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    info = machine.machine_info(tmp_path)
    assert (info["board"], info["cpu"], info["memory_bytes"]) == (
        "NVIDIA Jetson Orin Nano",
        "Fast CPU",
        1 << 20,
    )
    assert machine.machine_info(tmp_path / "empty")["board"] is None
    assert machine.installed("no-such-distribution", "click")
    assert machine.installed("no-such-distribution") is None
