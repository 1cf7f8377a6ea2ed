"""A workstation and a board in a folder: what only a Jetson has is played by small programs at the front of PATH."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "jetson"
FENCE = re.compile(r"^```sh(?: (?P<tag>\w+))?\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS_GPU = "# needs the GPU"

NVPMODEL_CONF = """\
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_1 1
< POWER_MODEL ID=1 NAME=MODE_15W >
CPU_ONLINE CORE_1 0
< POWER_MODEL ID=2 NAME=MODE_30W >
CPU_ONLINE CORE_1 1
< PM_CONFIG DEFAULT=0 >
"""

# Mode 1 needs a reboot, as modes with another number of GPU units do; a file called `stuck` makes every change fail.
NVPMODEL = r"""
status="$EOPC_TEST_BOARD/var/lib/nvpmodel/status"
names=(MAXN MODE_15W MODE_30W)
case "$1" in
-q) id=$((10#$(cut -d: -f2 "$status"))); echo "NV Power Mode: ${names[$id]}"; echo "$id" ;;
-m)
    echo "$2" >> "$EOPC_TEST_BOARD/nvpmodel.log"
    if [ -e "$EOPC_TEST_BOARD/stuck" ]; then echo "NVPM ERROR: failed to set power mode!"; exit 1; fi
    if [ "$2" = 1 ]; then
        echo "NVPM WARN: Reboot required for changing to this power mode: 1"
        echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"
        read -r reply
        [ "${reply,,}" != yes ] || { echo "the test board was rebooted" >&2; exit 70; }
        exit 255
    fi
    printf 'pmode:%04d' "$2" > "$status" ;;
*) echo "nvpmodel: $*?" >&2; exit 64 ;;
esac
"""

# Prints as r36 does on an AGX Orin: clock, three rails; 30 ms apart, since the windows of the tests are short.
TEGRASTATS = """
import os, re, sys, time
words = sys.argv[1:]
pid = os.environ["EOPC_TEST_BOARD"] + "/tegrastats.pid"
if words == ["--stop"]:
    os.kill(int(open(pid).read()), 15)
    sys.exit(0)
assert words[:2] == ["--interval", "100"] and words[2:3] in ([], ["--logfile"]), words
out = open(words[3], "w", buffering=1) if words[2:] else sys.stdout
if words[2:]:
    open(pid, "w").write(str(os.getpid()))
line = (
    "RAM 3054/62838MB (lfb 4x4MB) CPU [1%@729,0%@729] GR3D_FREQ 0% cpu@46C tj@47C "
    "VDD_GPU_SOC {}mW/2790mW VDD_CPU_CV {}mW/400mW VIN_SYS_5V0 {}mW/3500mW"
)
try:
    for i in range(600 if words[2:] else 10**6):
        rails = line.format(2785 + i % 7, 398 + i % 3, 3510 + i % 5)
        print(time.strftime("%m-%d-%Y %H:%M:%S"), rails, file=out, flush=True)
        time.sleep(0.1 if words[2:] else 0.03)
except (BrokenPipeError, KeyboardInterrupt):
    sys.exit(0)
"""

# Does what systemd does with a connection: runs ExecStart with the settings, the socket as stdin and stdout.
ASK = """
import os, pathlib, shlex, socket, string, subprocess, sys
board = os.environ["EOPC_TEST_BOARD"]
def read(name):
    return pathlib.Path(board, "etc", name).read_text().replace("/opt/", board + "/opt/")
lines = [line for line in read("default/eopc-assistant").splitlines() if "=" in line and line[0] != "#"]
settings = dict(line.split("=", 1) for line in lines)
unit = read("systemd/system/eopc-assistant@.service")
(command,) = [line.split("=", 1)[1] for line in unit.splitlines() if line.startswith("ExecStart=")]
os.makedirs(board + "/var/lib/eopc-assistant", exist_ok=True)
words = shlex.split(string.Template(command.replace("%S", board + "/var/lib")).substitute(settings))
ours, theirs = socket.socketpair()
service = subprocess.Popen(words, stdin=theirs, stdout=theirs)
theirs.close()
ours.sendall(sys.stdin.buffer.read())
ours.shutdown(socket.SHUT_WR)
while data := ours.recv(4096):
    sys.stdout.buffer.write(data)
sys.exit(service.wait())
"""

PROGRAMS = {
    "eopc": """
if [ "$1" = build ]; then exec "$PYTHON" "$TINY_BUILD" "$@"; fi
exec "$PYTHON" "$BOARD_PYTHON" eopc "$@" """,
    # `-m venv` makes a folder that looks like one; scripts run as on the board
    "python3": """
while [[ "$1" == --* ]]; do shift; done
if [ "$1" = -m ]; then
    [ "$2" = venv ] || exit 64
    folder="${@: -1}"; mkdir -p "$folder/bin"; : > "$folder/bin/activate"
    ln -sf "$(command -v pip)" "$folder/bin/pip"; ln -sf "$0" "$folder/bin/python"
else
    case "$1" in *calibrate_modes.py) set -- "$@" $EOPC_TEST_CALIBRATE ;; esac
    exec "$PYTHON" "$BOARD_PYTHON" "$@"
fi""",
    "pip": """
printf '%s\\n' "$*" >> "$EOPC_TEST_HOME/pip.log"
case "$1" in
wheel) mkdir -p dist; : > dist/eopc-0.0.0-py3-none-any.whl ;;
install) ;;
*) exit 64 ;;
esac""",
    "apt-get": '[ "$1" = install ]',
    "sudo": """
while [[ "$1" == -* ]]; do shift; done
exec "$@" """,
    "ssh": 'shift; cd "$EOPC_TEST_BOARD/home" && HOME="$PWD" exec bash -c "$*"',
    "scp": """
target="${@: -1}"; [[ "$target" == orin:* ]] || exit 64
exec cp "${@:1:$#-1}" "$EOPC_TEST_BOARD/home/${target#orin:}" """,
    "nvpmodel": NVPMODEL,
    "tegrastats": 'exec "$PYTHON" -S "$EOPC_TEST_HOME/tegrastats.py" "$@"',
    "systemctl": 'printf \'%s\\n\' "$*" >> "$EOPC_TEST_HOME/systemctl.log"',
    "systemd-analyze": 'printf \'%s\\n\' "$*" >> "$EOPC_TEST_HOME/systemd-analyze.log"',  # test_systemd.py runs it
    "journalctl": ":",
    "nc": '[ "$1 $2" = "-N -U" ] && exec "$PYTHON" "$EOPC_TEST_HOME/ask.py"',
}


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands: for the workstation, the `board`, or `jetpack7` instead of 6."""

    tag: str
    text: str


def blocks(readme: Path) -> list[Block]:
    """Return the shell blocks of a README, in order."""
    return [Block(m["tag"] or "", m["text"]) for m in FENCE.finditer(readme.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Place:
    """The sandbox: `work` is the source tree on the workstation, `board` the root of the board's file system."""

    home: Path

    @property
    def work(self) -> Path:
        return self.home / "work"

    @property
    def board(self) -> Path:
        return self.home / "board"

    def run(self, block: Block, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a block to its end or to the first command that fails, as root paths of the board below `board`."""
        text = re.sub(r"(?<![\w.])/(opt|etc|run)/", rf"{self.board}/\1/", block.text)
        script = "\n".join(_must_stop(line) if NEEDS_GPU in line else line for line in text.splitlines())
        on_board = block.tag == "board"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.board / "home" if on_board else self.work,
            env={**self.environment(on_board), **changes},
            capture_output=True,
            text=True,
            timeout=1200,  # seconds on a machine of one's own
            check=False,
        )

    def environment(self, on_board: bool = True) -> dict[str, str]:
        """What the commands see."""
        return {
            "PATH": f"{self.home / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'compiler'}",
            "HOME": str(self.board / "home" if on_board else self.home),
            "USER": "someone",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "BOARD_PYTHON": str(Path(__file__).with_name("board_python.py")),
            "TINY_BUILD": str(Path(__file__).with_name("tiny_build.py")),
            "EOPC_TEST_HOME": str(self.home),
            "EOPC_TEST_BOARD": str(self.board),
            "EOPC_TEST_CALIBRATE": "",
        }


def _must_stop(line: str) -> str:
    """The line, which has to end with exit code 1 and a message, not with a traceback."""
    command = line.split(NEEDS_GPU)[0].strip()
    return f'code=0; {command} 2> stopped.txt || code=$?; cat stopped.txt >&2; echo "stopped with $code"'


def make_place(home: Path) -> Place:
    """Lay out the workstation, the board and the programs."""
    place = Place(home)
    (home / "bin").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        program = home / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        program.chmod(0o755)
    (home / "tegrastats.py").write_text(TEGRASTATS, encoding="utf-8")
    (home / "ask.py").write_text(ASK, encoding="utf-8")
    place.work.mkdir()
    shutil.copytree(EXAMPLES, place.work / "examples" / "jetson")
    _write_board(place.board)
    return place


def _write_board(root: Path) -> None:
    """An AGX Orin with JetPack 6.2: device tree, release, power modes, one INA3221."""
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n",
        "etc/nvpmodel.conf": NVPMODEL_CONF,
        "var/lib/nvpmodel/status": "pmode:0000",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    }
    chip = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    files[f"{chip}/name"] = "ina3221\n"
    for i, (label, millivolts, milliamps) in enumerate(
        [("VDD_GPU_SOC", 19864, 180), ("VDD_CPU_CV", 19864, 20), ("VIN_SYS_5V0", 5000, 800)], start=1
    ):
        files |= {f"{chip}/in{i}_label": label, f"{chip}/in{i}_input": str(millivolts)}
        files |= {f"{chip}/curr{i}_input": str(milliamps)}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("home", "opt", "run", "etc/default", "etc/systemd/system", "etc/sudoers.d"):
        (root / name).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A sandbox of one's own."""
    return make_place(tmp_path)


def load_script(path: Path) -> ModuleType:
    """Import an example's script under its own name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
