"""What the runner uses of TensorRT, as protocols: no more than TensorRT 10.3, 11 and TensorRT-RTX have in common.

The real classes come from whichever of the two modules built the engine and are imported late, after a child process
has seen a GPU: TensorRT's runtime crashes without one.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import BundleError, DeviceError, DeviceMemoryError, EngineMismatchError, MissingExtraError

# by compiler: its module and its extra
MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt_rtx": ("tensorrt_rtx_bindings", "tensorrt-rtx")}
DTYPES: dict[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
}
SHOWN_MESSAGES = 3


class Named(Protocol):
    """A member of one of TensorRT's enumerations."""

    @property
    def name(self) -> str:
        """Its name, for example HALF."""


class Context(Protocol):
    """IExecutionContext: an engine with shapes and addresses."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int, /) -> bool:
        """Choose a profile."""

    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool:
        """Set the shape of an input within its profile."""

    def set_tensor_address(self, name: str, memory: int, /) -> bool:
        """Bind device memory to an input or output."""

    def set_device_memory(self, memory: int, size: int, /) -> None:
        """Give scratch memory to a context that owns none."""

    def execute_async_v3(self, stream_handle: int, /) -> bool:
        """Enqueue one run."""


class Engine(Protocol):
    """ICudaEngine: a plan in the GPU's memory."""

    @property
    def num_io_tensors(self) -> int:
        """Inputs and outputs."""

    @property
    def num_optimization_profiles(self) -> int:
        """Profiles the engine was built with."""

    def get_tensor_name(self, index: int, /) -> str:
        """Name of an input or output."""

    def get_tensor_mode(self, name: str, /) -> Named:
        """INPUT or OUTPUT."""

    def get_tensor_dtype(self, name: str, /) -> Named:
        """Type of the elements."""

    def get_tensor_shape(self, name: str, /) -> Sequence[int]:
        """Shape, -1 where it is open."""

    def get_tensor_profile_shape(self, name: str, profile_index: int, /) -> Sequence[Sequence[int]]:
        """Smallest, usual and largest shape of an input in a profile."""

    def get_device_memory_size_for_profile_v2(self, profile_index: int, /) -> int:
        """Bytes of scratch a profile needs."""

    def create_execution_context(self, strategy: Any, /) -> Context:
        """A context; None when there is no memory for it."""


class Runtime(Protocol):
    """IRuntime: turns plans into engines."""

    def deserialize_cuda_engine(self, serialized_engine: Any, /) -> Engine | None:
        """Read a plan; None when it is refused."""


class Loader:
    """TensorRT's runtime with what it last complained about."""

    def __init__(self, trt: Any) -> None:
        """Start the runtime of a module from `import_compiler`; only where a GPU answers.

        Raises:
            DeviceError: TensorRT does not start, for example because it and the driver do not go together.
        """
        self._messages: list[str] = []
        self._logger = make_logger(trt, self._messages)  # the runtime keeps no reference of its own
        try:
            self._runtime: Runtime = trt.Runtime(self._logger)
        except TypeError as error:  # what a null pointer becomes in Python
            raise DeviceError(
                f"TensorRT {trt.__version__} does not start on this GPU: {self.last_words()}. Check that it goes "
                "together with the driver (`eopc doctor`)."
            ) from error
        self._user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def load(self, plan: Path, command: str) -> Engine:
        """Read a plan file.

        Args:
            command: builds the engine again, for the message.

        Raises:
            BundleError: the file cannot be read.
            DeviceMemoryError: the GPU has no room for its weights.
            EngineMismatchError: TensorRT refuses it.
        """
        self._messages.clear()
        try:
            with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise BundleError(f"{plan} cannot be read ({error}). Build the engine again: {command}") from error
        if engine is None:
            raise self._refusal(f"TensorRT did not load {plan.name}", command)
        return engine

    def new_context(self, engine: Engine, command: str) -> Context:
        """An execution context without scratch memory of its own; errors as those of `load`."""
        self._messages.clear()
        context: Context | None = engine.create_execution_context(self._user_managed)
        if context is None:
            raise self._refusal("TensorRT did not make an execution context", command)
        return context

    def last_words(self) -> str:
        """What TensorRT said of late, for a message; clears it."""
        words = " | ".join(dict.fromkeys(m.strip()[:300] for m in self._messages[:SHOWN_MESSAGES]))
        self._messages.clear()
        return words or "no message was given"

    def _refusal(self, what: str, command: str) -> Exception:
        memory = any("out of memory" in m.lower() or "outofmemory" in m.lower() for m in self._messages)
        said = self.last_words()
        if memory:
            return DeviceMemoryError(
                f"{what}: the GPU has no memory left ({said}). Close other programs that use it, or choose a lower "
                "tier."
            )
        return EngineMismatchError(f"{what}: {said}. Build the engine again: {command}")


def make_logger(trt: Any, messages: list[str]) -> Any:
    """A logger that appends errors to a list."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                messages.append(message)

    return Logger()


def import_compiler(compiler: str) -> Any:
    """The module of a compiler, a key of `profiles.ENGINE_COMPILERS`; call it only once a GPU has answered a probe.

    Raises:
        MissingExtraError: it is not installed.
    """
    name, extra = MODULES[compiler]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("running this bundle's engines", name, extra) from error


def tensor_names(engine: Engine, mode: str) -> tuple[str, ...]:
    """Names of an engine's inputs (INPUT) or outputs (OUTPUT)."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return tuple(name for name in names if engine.get_tensor_mode(name).name == mode)


def numpy_dtype(engine: Engine, name: str) -> np.dtype[Any]:
    """The NumPy type of a tensor; BundleError for one that NumPy or eopc does not know."""
    found = engine.get_tensor_dtype(name).name
    if found not in DTYPES:
        raise BundleError(f"the engine's {name} is {found}; eopc feeds {', '.join(DTYPES)}. Build the bundle again.")
    return np.dtype(DTYPES[found])
