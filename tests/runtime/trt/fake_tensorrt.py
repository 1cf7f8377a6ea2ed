"""A stand-in for `tensorrt` whose engines run a tier's ONNX graph in ONNX Runtime, and which keeps the API's rules.

A plan is JSON: the graph, the shapes of the profiles, the version that built it. Broken rules are what TensorRT makes
of them: False and a message where it checks, an illegal address on the stream where it does not.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ORT_DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class DataType(IntEnum):
    """Element types."""

    FLOAT = 0
    HALF = 1
    INT64 = 5


class TensorIOMode(IntEnum):
    """Input or output."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    """Who owns scratch memory."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class ILogger:
    """Base of loggers."""

    ERROR = 1

    def __init__(self) -> None:
        self.started = True

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


def make_plan(bundle_root: Path, graph: str, slots: int, profiles: list[dict[str, int]], **changes: Any) -> bytes:
    """A plan of a tier's graph.

    Args:
        profiles: for each the most tokens, and the most logits.
        changes: `version` that built it, `scratch` bytes by profile, `weights` bytes.
    """
    content = {
        "root": str(bundle_root), "graph": graph, "slots": slots, "profiles": profiles, "version": "10.3.0",
        "scratch": [4096] * len(profiles), "weights": 1000, "rename": {},
    }  # fmt: skip
    return json.dumps({**content, **changes}).encode()


class FakeTensorRt:
    """The module; `cuda` is the device its engines run on."""

    DataType = DataType
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger

    def __init__(self, cuda: Any, version: str = "10.3.0") -> None:
        self.cuda, self.__version__ = cuda, version
        self.capture_refused = False
        self.fault = ""  # what it says when it refuses to enqueue
        self.profile_switches = 0
        self.runs: list[tuple[str, int]] = []  # graph and tokens of every execution
        self.live_engines = 0
        self.imported_runtime = 0

    def Runtime(self, logger: ILogger) -> FakeRuntime:  # noqa: N802
        """As the class of this name."""
        assert logger.started, "ILogger.__init__ was not called"
        self.imported_runtime += 1
        if self.fault:
            logger.log(ILogger.ERROR, self.fault)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return FakeRuntime(self, logger)


class FakeRuntime:
    """IRuntime."""

    def __init__(self, trt: FakeTensorRt, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
        plan = json.loads(bytes(serialized_engine))
        if plan["version"] != self._trt.__version__:
            said = f"The engine plan file is not compatible with this version of TensorRT, expecting {plan['version']}"
            self._logger.log(ILogger.ERROR, said)
            return None
        code, weights = self._trt.cuda.cudaMalloc(plan["weights"])
        if code:
            self._logger.log(ILogger.ERROR, "Requested size was not allocated. OutOfMemory (no further information)")
            return None
        return FakeEngine(self._trt, self._logger, plan, weights)


class FakeEngine:
    """ICudaEngine."""

    def __init__(self, trt: FakeTensorRt, logger: ILogger, plan: dict[str, Any], weights: int) -> None:
        self._trt, self._logger, self._plan, self._weights = trt, logger, plan, weights
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", plan["root"])
        content = (Path(plan["root"]) / plan["graph"]).read_bytes()
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        rename = plan["rename"]
        self.inputs = {rename.get(x.name, x.name): x for x in self.session.get_inputs()}
        self.outputs = {x.name: x for x in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.has_open_shapes = any(-1 in self.get_tensor_shape(name) for name in self.inputs)
        self.num_optimization_profiles = len(plan["profiles"])
        trt.live_engines += 1

    def __del__(self) -> None:
        self._trt.live_engines -= 1
        self._trt.cuda.blocks.pop(self._weights, None)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[ORT_DTYPES[self._of(name).type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._dim(d) for d in self._of(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name in self.inputs, "profiles are of inputs"
        profile = self._plan["profiles"][profile_index]
        largest = profile["logits"] if name == "logits_index" else profile["tokens"]
        return [tuple(n if d == -1 else d for d in self.get_tensor_shape(name)) for n in (1, largest, largest)]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self._plan["scratch"][profile_index])

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "scratch is to be shared"
        return FakeContext(self._trt, self._logger, self)

    def _of(self, name: str) -> Any:
        return {**self.inputs, **self.outputs}[name]

    def _dim(self, dim: Any) -> int:
        if isinstance(dim, int):
            return dim
        return int(self._plan["slots"]) if dim == "cache_len" else -1


class FakeContext:
    """IExecutionContext."""

    def __init__(self, trt: FakeTensorRt, logger: ILogger, engine: FakeEngine) -> None:
        self._trt, self._logger, self._engine = trt, logger, engine
        # an engine of fixed shapes has one profile, which need not be set
        self._profile: int | None = None if engine.has_open_shapes else 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._captured = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if self._captured:  # what crashed on Orin: graphs captured before hold what the switch gives away
            self._trt.cuda.lost_code = 700
        if self._profile not in (None, profile_index):
            self._trt.profile_switches += 1
        self._profile, self._shapes, self._addresses = profile_index, {}, {}
        return self._trt.cuda.enqueue(stream_handle, lambda: None)[0] == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "a profile comes first"
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"setInputShape: {name} of {shape} is outside the profile's {low} to {high}")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine.inputs or name in self._engine.outputs, f"no tensor {name}"
        if memory % 256:
            return self._refuse(f"setTensorAddress: {name} is not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle, "the default stream makes TensorRT wait for the device"
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        error = self._trt.fault or self._mistake(shapes, addresses)
        if error:
            return self._refuse(error)
        stream = self._trt.cuda.streams[stream_handle]
        if stream.recorded is not None:
            if self._trt.capture_refused:
                stream.broken = True
                return self._refuse("operation not permitted when stream is capturing")
            self._captured = True
        scratch = self._scratch
        done = self._trt.cuda.enqueue(stream_handle, lambda: self._run(shapes, addresses, scratch))
        return bool(done[0] == 0)

    def _mistake(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> str | None:
        engine = self._engine
        for name in engine.inputs:
            if -1 in engine.get_tensor_shape(name) and name not in shapes:
                return f"enqueueV3: the shape of {name} is not set"
        for name in (*engine.inputs, *engine.outputs):
            if name not in addresses:
                return f"enqueueV3: the address of {name} is not set"
        for name in engine.outputs:
            if name.endswith("_out") and addresses[name] != addresses[name.removesuffix("_out")]:
                return f"enqueueV3: {name} is an update of {name.removesuffix('_out')} and must lie at its address"
        assert self._profile is not None
        if self._scratch[1] < engine.get_device_memory_size_for_profile_v2(self._profile):
            return "enqueueV3: the device memory is too small"
        return None

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        """What the stream does when its turn comes."""
        engine, at = self._engine, self._trt.cuda.at
        at(*scratch).fill(0xAA)  # whoever else keeps something in there loses it
        feeds = {}
        for name, value in engine.inputs.items():
            shape = shapes.get(name, engine.get_tensor_shape(name))
            dtype = np.float32 if value.type == "tensor(float)" else np.dtype(engine_dtype(value.type))
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            feeds[value.name] = at(addresses[name], nbytes).view(dtype).reshape(shape)
        results = engine.session.run(None, feeds)
        tokens = feeds["input_ids"].shape[1] if "input_ids" in feeds else 0  # none are read where weights are gathered
        self._trt.runs.append((engine._plan["graph"], tokens))
        for name, array in zip(engine.outputs, results, strict=True):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            at(addresses[name], flat.nbytes)[:] = flat

    def _refuse(self, message: str) -> bool:
        self._logger.log(ILogger.ERROR, message)
        return False


def engine_dtype(ort_type: str) -> str:
    """The NumPy name of an ONNX Runtime type."""
    return {"tensor(float16)": "float16", "tensor(int64)": "int64"}[ort_type]
