"""List the Python API of a TensorRT release from its bindings alone: no GPU, no TensorRT libraries.

    pip download --no-deps tensorrt-cu12-bindings==10.3.0
    python -m zipfile -e tensorrt_cu12_bindings-*.whl unpacked
    python tools/tensorrt_api.py unpacked > tests/runtime/trt/api/tensorrt-10.3.json

TensorRT's wheels carry no type stubs. But its bindings are one extension module that takes nine functions from
TensorRT's libraries, and calls none of them when it is imported. So empty libraries of the same names are compiled
(with `cc`), the real module is imported in a child process, and its classes are read: members, and the signatures in
their docstrings. The runner's and the builder's tests compare what they use with these lists.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "IHostMemory",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
)
KEPT = ("add_optimization_profile",)
_READ = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
out = {}
for name in sys.argv[2:]:
    found = getattr(trt, name, None)
    if found is not None:
        out[name] = {m: getattr(getattr(found, m), "__doc__", None) for m in dir(found) if not m.startswith("_")}
print(json.dumps({"version": trt.__version__, "docs": out}))
"""


def main() -> None:
    """Print the API of the bindings in a folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheel was unpacked")
    parser.add_argument("--module", default="tensorrt_bindings")
    args = parser.parse_args()
    sys.stdout.write(json.dumps(read_api(args.folder, args.module), indent=1) + "\n")


def read_api(folder: Path, module: str) -> dict[str, object]:
    """The version, and for every class of `CLASSES` its members, methods with their signatures."""
    soname = next((folder / module).glob("*.so")).read_bytes()
    versions = sorted({int(m) for m in re.findall(rb"libnvinfer\.so\.(\d+)", soname)})
    with tempfile.TemporaryDirectory() as made:
        for library in LIBRARIES:
            compile_empty(Path(made), f"{library}.so.{versions[-1]}", FUNCTIONS if library == "libnvinfer" else ())
        env = {**os.environ, "LD_LIBRARY_PATH": made, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", _READ, module, *CLASSES]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    content = json.loads(done.stdout)
    classes = {
        name: {
            m: signatures(m, doc or "", module) for m, doc in members.items() if not m.startswith("add_") or m in KEPT
        }
        for name, members in content["docs"].items()  # what adds single layers is not used: networks are parsed
    }
    return {"version": content["version"], "classes": classes}


def compile_empty(folder: Path, name: str, functions: tuple[str, ...]) -> None:
    """A shared library whose functions return nothing."""
    source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name), f"-Wl,-soname,{name}"]
    subprocess.run(command, input=source, text=True, check=True)


def signatures(member: str, doc: str, module: str) -> list[str]:
    """The lines of a docstring that are signatures of a method; none for a property."""
    plain = re.sub(rf"\b{module}\.[a-z_]+\.", "", doc)
    found = re.findall(rf"^(?:\d+\. )?({re.escape(member)}\(.*)$", plain, re.MULTILINE)
    return [line for line in found if "*args, **kwargs" not in line]


if __name__ == "__main__":
    main()
