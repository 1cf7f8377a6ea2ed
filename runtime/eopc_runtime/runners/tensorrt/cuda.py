"""The few CUDA calls a runner needs, behind one small interface, each failure in one sentence.

`CudaDevice` speaks to NVIDIA's `cuda.bindings.runtime`. Its functions return a tuple that begins with an error code and
raise nothing; here a code becomes a DeviceError, a DeviceMemoryError where memory ran out, or a DeviceLostError where
the GPU or its context is gone, after which no call succeeds until the process ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import DeviceError, DeviceLostError, DeviceMemoryError, MissingExtraError

ALIGNMENT = 256  # bytes; what TensorRT asks of every address
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver
# unavailable, no device, ECC, NVLink, and the errors after which a context is corrupt: illegal address, launch timeout,
# assert, hardware stack, illegal instruction, misaligned address, address space, program counter, launch failure
LOST = frozenset({46, 100, 214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999})


class Device(Protocol):
    """Memory, one kind of stream, and graphs. Addresses and handles are plain numbers, as TensorRT takes them."""

    def allocate(self, nbytes: int, what: str) -> int:
        """Device memory, aligned to 256 bytes; DeviceMemoryError names what it was for."""

    def release(self, address: int) -> None:
        """Free device memory; a device that is lost has freed it already."""

    def allocate_host(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Page-locked memory, which asynchronous copies read and write while the stream runs."""

    def release_host(self, memory: npt.NDArray[np.uint8]) -> None:
        """Free page-locked memory."""

    def new_stream(self) -> int:
        """A stream that does not wait for the default one."""

    def end_stream(self, stream: int) -> None:
        """Give a stream back."""

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Fill device memory with zeros, in stream order."""

    def copy_in(self, address: int, memory: npt.NDArray[Any], stream: int) -> None:
        """Copy host memory to the device, in stream order."""

    def copy_out(self, memory: npt.NDArray[Any], address: int, stream: int) -> None:
        """Copy device memory to the host, in stream order."""

    def wait(self, stream: int) -> None:
        """Return when everything of the stream is done; errors of what ran show here."""

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what `work` gives to the stream, without running it; returns a graph that can be launched."""

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph, in stream order."""

    def drop(self, graph: int) -> None:
        """Give a graph back."""


class CudaDevice:
    """The first CUDA device, through cuda-python."""

    def __init__(self, runtime: Any = None) -> None:
        """Hold `cuda.bindings.runtime`, imported here unless given; MissingExtraError where it is not installed."""
        self._cuda = runtime or import_cuda()

    def allocate(self, nbytes: int, what: str) -> int:
        """See `Device.allocate`."""
        return int(self._do(f"allocate {nbytes / 1e6:.1f} MB for {what}", self._cuda.cudaMalloc(nbytes)))

    def release(self, address: int) -> None:
        """See `Device.release`."""
        with suppress(DeviceLostError):
            self._do("free memory", self._cuda.cudaFree(address))

    def allocate_host(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """See `Device.allocate_host`."""
        what = f"lock {nbytes / 1e6:.1f} MB of host memory"
        address = self._do(what, self._cuda.cudaHostAlloc(nbytes, self._cuda.cudaHostAllocDefault))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))

    def release_host(self, memory: npt.NDArray[np.uint8]) -> None:
        """See `Device.release_host`."""
        with suppress(DeviceLostError):
            self._do("free host memory", self._cuda.cudaFreeHost(memory.ctypes.data))

    def new_stream(self) -> int:
        """See `Device.new_stream`."""
        flags = self._cuda.cudaStreamNonBlocking
        return int(self._do("create a stream", self._cuda.cudaStreamCreateWithFlags(flags)))

    def end_stream(self, stream: int) -> None:
        """See `Device.end_stream`."""
        with suppress(DeviceLostError):
            self._do("end a stream", self._cuda.cudaStreamDestroy(stream))

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """See `Device.zero`."""
        self._do("clear memory", self._cuda.cudaMemsetAsync(address, 0, nbytes, stream))

    def copy_in(self, address: int, memory: npt.NDArray[Any], stream: int) -> None:
        """See `Device.copy_in`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        done = self._cuda.cudaMemcpyAsync(address, memory.ctypes.data, memory.nbytes, kind, stream)
        self._do("copy to the device", done)

    def copy_out(self, memory: npt.NDArray[Any], address: int, stream: int) -> None:
        """See `Device.copy_out`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        done = self._cuda.cudaMemcpyAsync(memory.ctypes.data, address, memory.nbytes, kind, stream)
        self._do("copy from the device", done)

    def wait(self, stream: int) -> None:
        """See `Device.wait`."""
        self._do("run a step", self._cuda.cudaStreamSynchronize(stream))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """See `Device.capture`; DeviceError when something in `work` cannot be captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("begin a CUDA graph", self._cuda.cudaStreamBeginCapture(stream, mode))
        try:
            work()
        except DeviceError:
            self._cuda.cudaStreamEndCapture(stream)  # the stream leaves capture mode; the half graph is worthless
            self._cuda.cudaGetLastError()
            raise
        graph = self._do("end a CUDA graph", self._cuda.cudaStreamEndCapture(stream))
        try:
            return int(self._do("prepare a CUDA graph", self._cuda.cudaGraphInstantiate(graph, 0)))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        """See `Device.launch`."""
        self._do("launch a CUDA graph", self._cuda.cudaGraphLaunch(graph, stream))

    def drop(self, graph: int) -> None:
        """See `Device.drop`."""
        with suppress(DeviceLostError):
            self._do("drop a CUDA graph", self._cuda.cudaGraphExecDestroy(graph))

    def _do(self, what: str, result: tuple[Any, ...]) -> Any:
        """Return the value of a call; its error as an exception."""
        code = int(result[0])
        if code == 0:
            return result[1] if len(result) > 1 else None
        self._cuda.cudaGetLastError()  # errors that pass are remembered until they are read
        raise cuda_error(what, code, self._words(result[0]))

    def _words(self, code: Any) -> str:
        text = self._cuda.cudaGetErrorString(code)[1]
        return text.decode() if isinstance(text, bytes) else str(text)


def cuda_error(what: str, code: int, words: str) -> DeviceError:
    """The exception for a CUDA error code."""
    said = f"{words}, CUDA error {code}"
    if code == OUT_OF_MEMORY:
        return DeviceMemoryError(
            f"the GPU has no memory left to {what} ({said}). Close other programs that use it, choose a lower tier, "
            "or build engines for a shorter context."
        )
    if code in LOST:
        return DeviceLostError(
            f"the GPU stopped answering when asked to {what} ({said}). Start again; if it happens again, look for Xid "
            "or nvgpu messages in `dmesg`, and at the power supply."
        )
    if code == DRIVER_TOO_OLD:
        return DeviceError(
            f"CUDA cannot {what} ({said}). cuda-bindings is newer than the driver: install the version of the driver's "
            "CUDA, for example `pip install 'cuda-bindings<13'` on JetPack 6."
        )
    return DeviceError(f"CUDA cannot {what} ({said}).")


def import_cuda() -> Any:
    """cuda.bindings.runtime, imported late.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("running TensorRT engines", "cuda-bindings", "tensorrt") from error
    return runtime
