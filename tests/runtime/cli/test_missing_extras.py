"""Every command with the base install alone and no CUDA driver does its work, or says what to install.

Each runs in a child process: a crash in native code would end this one.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from eopc_runtime.cli.main import COMMANDS, EXTRAS

Done = subprocess.CompletedProcess[str]
Child = Callable[..., Done]

NO_DRIVER = """
import sys
from eopc_runtime import gpu_probe
assert "libcuda.so.1" in gpu_probe._PROBE
gpu_probe._PROBE = gpu_probe._PROBE.replace("libcuda.so.1", "libcuda-of-no-machine.so.1")
"""
NO_EXTRAS = f"sys.modules.update(dict.fromkeys({sorted({*EXTRAS, 'cuda'} - {'eopc_compiler'})}))\n"
# TensorRT's lean runtime crashes where there is no GPU; these packages crash as soon as they are looked for
CRASHING = """
import os, signal
class Crash:
    def find_spec(name, path, target=None):
        if name in ("tensorrt", "cuda"):
            os.kill(os.getpid(), signal.SIGSEGV)
sys.meta_path.insert(0, Crash)
"""
RUN = "from eopc_runtime.cli.main import main\nmain(sys.argv[1:])\n"

NO_ORT = 'pip install "eopc[ort]"'
NO_COMPILER = 'pip install "eopc[compiler]"'
NO_RTX = 'pip install "eopc[tensorrt-rtx]"'
NO_SERVE = 'pip install "eopc[serve]"'
NO_SIGN = 'pip install "eopc[sign]"'
NO_GPU = "No CUDA driver answers"
REFUSED = {
    "build --budgets 5J": NO_COMPILER,
    "prune model --ratio 0.2 -o out": NO_COMPILER,
    "run BUNDLE --prompt hi --raw": NO_ORT,
    "run BUNDLE --prompt hi --raw --runner ort-cuda": NO_ORT,
    "run BUNDLE --prompt hi --raw --runner tensorrt": "Build them: eopc engine",
    "eval BUNDLE --text TEXT": NO_ORT,
    "bench BUNDLE --tier t0 --prompt-tokens 8 --new-tokens 8": NO_ORT,  # several tiers run in children of their own
    "calibrate BUNDLE --meter proxy": NO_ORT,
    "validate BUNDLE --meter proxy": NO_ORT,
    "engine BUNDLE --device orin": NO_GPU,
    "engine BUNDLE --device h100 --check": NO_GPU,
    "engine BUNDLE --device rtx-4090": NO_RTX,
    "engine BUNDLE --device orin --proxy": NO_RTX,
    "serve BUNDLE": NO_SERVE,
    "keygen key": NO_SIGN,
    "sign BUNDLE --key TEXT": NO_SIGN,
    "verify BUNDLE --key TEXT": NO_SIGN,
}
DONE = {
    "inspect BUNDLE": "all verified",
    "report BUNDLE": "Wrote",
    "devices orin": "idle_w",
    "doctor": NO_GPU,
    "energy predict BUNDLE --prompt-tokens 8 --new-tokens 4": "t1",
    "energy sweetspot BUNDLE": "t1",
}


@pytest.fixture
def eopc_after(child: Child, bare_bundle: Path, tmp_path: Path) -> Callable[[str, str], Done]:
    """Runs a command line after some Python; BUNDLE and TEXT in it become paths."""
    (tmp_path / "text.txt").write_text("abcdef")
    places = {"BUNDLE": str(bare_bundle), "TEXT": str(tmp_path / "text.txt")}

    def run(before: str, line: str) -> Done:
        return child("-c", NO_DRIVER + before + RUN, *(places.get(word, word) for word in line.split()))

    return run


@pytest.mark.parametrize("line", REFUSED)
def test_a_command_says_what_to_install(eopc_after: Callable[[str, str], Done], line: str) -> None:
    """Exit 1, nothing on stdout, and one message without a traceback."""
    done = eopc_after(NO_EXTRAS, line)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("Error: ")
    assert REFUSED[line] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", DONE)
def test_a_command_that_needs_nothing_works(eopc_after: Callable[[str, str], Done], line: str) -> None:
    """The twins: the base install is enough."""
    done = eopc_after(NO_EXTRAS, line)
    assert done.returncode == 0, done.stderr
    assert DONE[line] in done.stdout


def test_no_command_is_left_out() -> None:
    """A new command gets a line above."""
    assert {line.split()[0] for line in (*REFUSED, *DONE)} == set(COMMANDS)


@pytest.mark.parametrize("line", ["run BUNDLE --prompt hi --raw --runner tensorrt", "engine BUNDLE --device orin"])
def test_without_a_gpu_tensorrt_is_not_even_looked_for(
    eopc_after: Callable[[str, str], Done], bare_bundle: Path, line: str
) -> None:
    """Although it is installed, and the bundle has a plan for it."""
    (bare_bundle / "engines/orin-sm87").mkdir(parents=True)
    (bare_bundle / "engines/orin-sm87/t0.plan").write_bytes(b"plan")
    done = eopc_after(CRASHING, line)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert NO_GPU in done.stderr


def test_the_crash_would_be_seen(child: Child) -> None:
    """The negative twin: an import of it ends the process."""
    assert child("-c", f"import sys{CRASHING}import tensorrt").returncode == -signal.SIGSEGV
