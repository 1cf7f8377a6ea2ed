"""The runtime imports without torch and friends: every module, in a child process that blocks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER_ONLY = ["torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "gguf"]
LATE = [
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "cuda",
    "polygraphy",
    "pynvml",
]  # runners and meters import these when they open
IMPORT_ALL = """
import importlib, pkgutil, sys
package, blocked = sys.argv[1], sys.argv[2:]
for name in blocked:
    sys.modules[name] = None
def fail(name):
    raise
top = importlib.import_module(package)
names = [m.name for m in pkgutil.walk_packages(top.__path__, package + ".", onerror=fail)]
for name in names:
    importlib.import_module(name)
print("\\n".join(names))
"""


def import_all(package: str, blocked: list[str], *paths: Path) -> subprocess.CompletedProcess[str]:
    """Import every module of a package in a child where the blocked names cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, *blocked],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(map(str, paths)), "PATH": "/usr/bin:/bin"},
        check=False,
    )


def test_every_runtime_module_imports_without_the_compiler_and_its_packages() -> None:
    """Nothing under eopc_runtime needs torch, transformers, onnx or the compiler, nor an engine at import."""
    done = import_all("eopc_runtime", [*COMPILER_ONLY, *LATE, "eopc_compiler"], ROOT / "runtime")
    assert done.returncode == 0, done.stderr
    assert {
        "eopc_runtime.session",
        "eopc_runtime.cli.main",
        "eopc_runtime.runners.ort",
        "eopc_runtime.power.probe",
    } <= set(done.stdout.split())


def test_every_board_module_imports_without_torch() -> None:
    """What runs on the device from the compiler's side needs no torch either; onnx comes with the TensorRT extras."""
    blocked = [name for name in COMPILER_ONLY if name != "onnx"]
    done = import_all("eopc_compiler.board", [*blocked, *LATE], ROOT / "runtime", ROOT / "compiler")
    assert done.returncode == 0, done.stderr
    assert {
        "eopc_compiler.board.rules",
        "eopc_compiler.board.tensorrt_graph",
        "eopc_compiler.board.tensorrt_build",
    } <= set(done.stdout.split())


@pytest.mark.parametrize("line", ["import torch", "from transformers import AutoConfig", "import eopc_compiler"])
def test_the_check_sees_a_violation(tmp_path: Path, line: str) -> None:
    """The negative twin: one forbidden import in a nested module is caught."""
    inner = tmp_path / "sample_package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "sample_package" / "__init__.py").touch()
    (inner / "__init__.py").touch()
    (inner / "leaf.py").write_text(line + "\n")
    done = import_all("sample_package", [*COMPILER_ONLY, "eopc_compiler"], tmp_path)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
