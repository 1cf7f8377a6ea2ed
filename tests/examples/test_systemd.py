"""The units: systemd's own check where it is installed, and what they promise field by field everywhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import EXAMPLES, load_script

FOLDER = EXAMPLES / "04-systemd"
SERVICE, SOCKET = "eopc-assistant@.service", "eopc-assistant.socket"


def fields(text: str) -> dict[str, dict[str, list[str]]]:
    """Read a unit: sections, keys, and every value of a key in order; comments are left out."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(match[1], {})
        elif line and line[0] not in "#;":
            key, equals, value = line.partition("=")
            assert equals, line
            section.setdefault(key, []).append(value)
    return found


def read(name: str) -> dict[str, dict[str, list[str]]]:
    return fields((FOLDER / name).read_text(encoding="utf-8"))


def test_the_service_is_shut_in() -> None:
    """No privileges, no network, a read-only file system but for its state, a user of its own, one socket."""
    service = read(SERVICE)["Service"]
    wanted = {
        "DynamicUser": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
        "PrivateDevices": "yes", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "PrivateNetwork": "yes",
        "SystemCallFilter": "@system-service", "RestrictAddressFamilies": "AF_UNIX",
        "StateDirectory": "eopc-assistant", "StandardInput": "socket", "StandardOutput": "socket",
        "StandardError": "journal",
    }  # fmt: skip
    assert {key: service[key] for key in wanted} == {key: [value] for key, value in wanted.items()}
    socket = read(SOCKET)["Socket"]
    assert (socket["Accept"], socket["MaxConnections"], socket["SocketMode"]) == (["yes"], ["1"], ["0660"])


def test_the_meter_and_the_device_stay_readable() -> None:
    """Nothing hides /sys (INA3221), /proc/device-tree, /proc/stat or nvpmodel's files."""
    service = read(SERVICE)["Service"]
    assert service.get("ProcSubset", ["all"]) == ["all"]
    hidden = " ".join(value for key in ("InaccessiblePaths", "TemporaryFileSystem") for value in service.get(key, []))
    assert not re.search("/(sys|proc|etc|var)", hidden)


def test_the_drop_in_opens_the_gpu_only() -> None:
    """What gpu.conf changes is a device policy and groups."""
    assert read("gpu.conf") == {"Service": {"PrivateDevices": ["no"], "SupplementaryGroups": ["video render"]}}


def test_every_setting_is_used_and_every_variable_set() -> None:
    """The variables of ExecStart are those of the .env file, and the assistant knows its options."""
    settings = dict(
        line.split("=", 1)
        for line in (FOLDER / "eopc-assistant.env").read_text(encoding="utf-8").splitlines()
        if line and line[0] != "#"
    )
    (command,) = read(SERVICE)["Service"]["ExecStart"]
    assert set(re.findall(r"\$\{(\w+)\}", command)) == set(settings)
    script = (EXAMPLES / "02-assistant" / "assistant.py").read_text(encoding="utf-8")
    assert all(f'"{word}"' in script for word in shlex.split(command) if word.startswith("--"))
    from eopc_runtime.units import parse_energy

    assert parse_energy(settings["EOPC_PER_ANSWER"]) < parse_energy(settings["EOPC_PER_DAY"])


@pytest.mark.parametrize("drop_in", [False, True])
def test_systemd_accepts_the_units(tmp_path: Path, drop_in: bool) -> None:
    """`systemd-analyze verify`, with a program in place of the board's Python; it finds nothing to say."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    verified = [copy_unit(name, tmp_path) for name in (SOCKET, SERVICE)]
    if drop_in:
        shutil.copytree(
            FOLDER, tmp_path / f"{SERVICE}.d", ignore=lambda _, names: [n for n in names if n != "gpu.conf"]
        )
    done = subprocess.run([analyze, "verify", *verified], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_would_notice_a_mistake(tmp_path: Path) -> None:
    """The negative twin: a misspelt key, and a program that is not there."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = copy_unit(SERVICE, tmp_path)
    text = unit.read_text(encoding="utf-8").replace("ProtectSystem=", "ProtectSytem=")
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert "ProtectSytem" in done.stderr
    done = subprocess.run([analyze, "verify", FOLDER / SERVICE], capture_output=True, text=True, check=False)
    assert "/opt/eopc/venv/bin/python" in done.stderr


def copy_unit(name: str, folder: Path) -> Path:
    """A unit whose program exists on this machine."""
    text = (FOLDER / name).read_text(encoding="utf-8").replace("/opt/eopc/venv/bin/python", sys.executable)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_assistant_of_the_service_can_be_imported() -> None:
    """The script ExecStart names is the one of 02."""
    assert callable(load_script(EXAMPLES / "02-assistant" / "assistant.py").main)
