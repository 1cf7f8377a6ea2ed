"""The two compilers behind one builder: TensorRT on the device, TensorRT-RTX ahead of time. All differences are here.

Their Python classes mirror each other. TensorRT builds for the GPU it runs on, keeps a timing cache and can look into
its own plans; TensorRT-RTX is told the architecture, needs no GPU, and tunes nothing at build time (its timing cache
does nothing, so none is kept). Polygraphy's loaders wrap the same calls, but reach neither the architecture, nor a
progress monitor, nor the fallback for attention without a kernel, and would be one more package to have on a board:
the API is used directly.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.profiles import ENGINE_COMPILERS

MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
JETPACK = (
    ". On a Jetson TensorRT comes with JetPack instead: sudo apt install nvidia-jetpack, and make the virtual "
    "environment with --system-site-packages"
)


@dataclass(frozen=True, slots=True)
class Compiler:
    """One of the compilers, imported."""

    name: str  # a key of ENGINE_COMPILERS
    trt: Any  # its module

    @property
    def title(self) -> str:
        """Its name and version, for people."""
        return f"{ENGINE_COMPILERS[self.name]} {self.version}"

    @property
    def version(self) -> str:
        """Its version; plans of another one are refused."""
        return str(self.trt.__version__)

    def network_flags(self) -> int:
        """Strongly typed: the graph's types are kept. TensorRT 11 knows nothing else, and may drop the flag."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def set_target(self, config: Any, compute_capability: int) -> None:
        """Name the architecture to build for; TensorRT builds for the GPU it finds.

        Raises:
            DeviceError: TensorRT-RTX does not build for it.
        """
        if self.name == "tensorrt":
            return
        target = getattr(self.trt.ComputeCapability, f"SM{compute_capability}", None)
        config.num_compute_capabilities = 1
        if target is None or not config.set_compute_capability(target, 0):
            known = ", ".join(n for n in dir(self.trt.ComputeCapability) if n.startswith("SM"))
            raise DeviceError(
                f"TensorRT-RTX {self.version} does not build for SM{compute_capability}. It knows {known}; "
                "take the nearest below (SM86 for Orin) and treat the result as a proxy."
            )

    def load_timing_cache(self, config: Any, path: Path | None) -> None:
        """Start from what an earlier build measured; a cache of another version or GPU counts as empty."""
        if path is None or self.name != "tensorrt":
            return
        known = path.read_bytes() if path.is_file() else b""
        cache = config.create_timing_cache(known)
        if known and not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)

    def timing_cache(self, config: Any) -> bytes | None:
        """What was measured in this and earlier builds, to be kept."""
        cache = config.get_timing_cache() if self.name == "tensorrt" else None
        return None if cache is None else bytes(cache.serialize())

    def inspect(self, logger: Any, plan: Any) -> tuple[str, ...]:
        """One line per engine layer, from the plan itself; none where that takes a GPU that is not there."""
        if self.name != "tensorrt":
            return ()
        engine = self.trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            return ()
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", ())
        return tuple(f"Name: {layer['Name'] if isinstance(layer, dict) else layer}," for layer in layers)


def open_compiler(name: str, what: str) -> Compiler:
    """Import a compiler, late, and see that onnx is there, which reads the graphs.

    Args:
        name: a key of ENGINE_COMPILERS.
        what: opens the message where it is not installed, for example "a proxy compile".

    Raises:
        MissingExtraError: one of them is not installed.
    """
    hint = JETPACK if name == "tensorrt" else ""
    try:
        importlib.import_module("onnx")
        return Compiler(name, importlib.import_module(MODULES[name]))
    except ImportError as error:
        package = "onnx" if error.name == "onnx" else MODULES[name]
        raise MissingExtraError(what, package, EXTRAS[name], hint) from error
