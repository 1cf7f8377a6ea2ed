"""For which device, with which compiler: decided from the device's profile and what this machine has.

rtx-*                  TensorRT-RTX builds ahead of time, on any machine
orin, thor, h100       TensorRT builds on the device itself; no build from x86 for a Jetson exists
any of them, --proxy   TensorRT-RTX compiles the same graphs for the nearest architecture it knows; no plan is kept
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from eopc_compiler.board.compilers import open_compiler
from eopc_runtime.engines import engine_key, proxy_key
from eopc_runtime.errors import DeviceError
from eopc_runtime.gpu_probe import probe_gpu
from eopc_runtime.profiles import ENGINE_COMPILERS, EngineTarget, list_profiles, load_profile

FP8_SINCE = 89  # Ada; the multiplier of 8-bit floats
NATIVE_SINCE = (10, 15)  # Attention, RotaryEmbedding and TensorScatter in TensorRT's parser


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """What engines are built for, and by what."""

    device: str
    compiler: str
    version: str
    compute_capability: int
    proxy: bool = False
    gpu: str | None = None  # known where the build runs on the device
    driver: str | None = None

    @property
    def key(self) -> str:
        """The folder of the set."""
        return proxy_key(self.compute_capability) if self.proxy else engine_key(self.device, self.compute_capability)

    @property
    def release(self) -> tuple[int, ...]:
        """The first two numbers of the compiler's version, (10, 3)."""
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:2])

    @property
    def title(self) -> str:
        """For people: what builds, and for what."""
        how = f"a proxy for {self.device}" if self.proxy else self.gpu or f"{self.device}, ahead of time"
        return f"{ENGINE_COMPILERS[self.compiler]} {self.version} for SM{self.compute_capability} ({how})"


def resolve_target(device: str, proxy: bool, run_probe: Callable[[], str] | None = None) -> BuildTarget:
    """Decide what to build for a device here; a GPU is asked for, in a child process, before TensorRT is imported.

    Raises:
        DeviceError: the device has no engines, or they are built on it and this machine is another.
        MissingExtraError: the compiler is not installed.
    """
    name, engine = device_engine(device)
    if proxy:
        rtx = open_compiler("tensorrt_rtx", "a proxy compile")
        return BuildTarget(name, rtx.name, rtx.version, engine.proxy, proxy=True)
    if engine.compiler == "tensorrt_rtx":
        rtx = open_compiler("tensorrt_rtx", f"building engines for {name}")
        return BuildTarget(name, rtx.name, rtx.version, engine.compute_capability)
    report, capability = probe_gpu(run_probe), engine.compute_capability
    advice = f"Copy the bundle there and run `eopc engine`; here --proxy compiles the same graphs for SM{engine.proxy}."
    if not report.devices:
        raise DeviceError(
            f"Engines for {name} (SM{capability}) are built on the device itself, and there is no NVIDIA GPU here. "
            f"{report.missing} {advice}"
        )
    gpu = report.devices[0]
    if gpu.compute_capability != capability:
        raise DeviceError(
            f"Engines for {name} (SM{capability}) are built on the device itself, and this is {gpu.name} "
            f"(SM{gpu.compute_capability}). {advice}"
        )
    trt = open_compiler("tensorrt", f"building engines for {name}")
    return BuildTarget(name, trt.name, trt.version, capability, gpu=gpu.name, driver=report.driver)


def device_engine(device: str) -> tuple[str, EngineTarget]:
    """The name of a device's profile and what its engines are built with; DeviceError if it has none."""
    profile = load_profile(device)
    if profile.engine is None:
        known = ", ".join(p.name for p in list_profiles() if p.engine)
        raise DeviceError(f"{profile.name} runs ONNX graphs as they are; engines are for {known}. Give one: --device")
    return profile.name, profile.engine


def check_target(target: BuildTarget, dialect: str, precision: str) -> None:
    """Raise DeviceError for graphs that this TensorRT or GPU has no means to run, before minutes are spent on it."""
    if precision == "fp8" and target.compute_capability < FP8_SINCE:
        raise DeviceError(
            f"SM{target.compute_capability} does not multiply 8-bit floats, which need SM{FP8_SINCE}. "
            f"Build a bundle for {target.device} with --precision int8 or fp16."
        )
    if target.compiler == "tensorrt" and dialect == "native" and target.release < NATIVE_SINCE:
        raise DeviceError(
            f"TensorRT {target.version} has no operators for native graphs, which need 10.15 (JetPack 7.2). On the "
            f"build machine run: eopc build --device {target.device} --dialect primitive"
        )
