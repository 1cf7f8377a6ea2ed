"""One phase of a tier: a context that keeps one profile for life, its buffers, and for decode a CUDA graph.

Prefill and decode have a context each, so no context ever changes its profile: a change after a graph was captured is
what crashed others on Orin (CUDA error 700). Inputs are staged in page-locked memory that the graph's copies read, so
a captured step is one launch: copies in, engine, logits out. A graph is captured at the second step on the same
buffers, as TensorRT does lazy work in the first; where capture is refused, steps are enqueued one by one for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import BundleError, DeviceError, DeviceLostError
from eopc_runtime.runners.base import Logits, causal_mask
from eopc_runtime.runners.tensorrt.api import Context, Engine, Loader, numpy_dtype, tensor_names
from eopc_runtime.runners.tensorrt.cuda import Device
from eopc_runtime.runners.tensorrt.memory import Arena, Scratch, buffer_block

FEEDS = ("input_ids", "position_ids", "write_index", "attn_mask", "logits_index")
LOGITS = "logits"
WANTED = "logits_index"
CACHE = "_cache_"


@dataclass(frozen=True, slots=True)
class Workspace:
    """What all phases of all tiers share: a device, its stream, TensorRT's runtime, scratch memory."""

    device: Device
    stream: int
    loader: Loader
    scratch: Scratch
    command: str  # builds the engines again, for messages
    remarks: list[str] = field(default_factory=list)  # what a user should know of how things run

    def require(self, done: bool, what: str, phase: str) -> None:
        """Raise DeviceError, with TensorRT's own words, unless it did what a phase asked for."""
        if not done:
            raise DeviceError(
                f"TensorRT did not {what} in the {phase} phase: {self.loader.last_words()}. "
                f"Build the engine again: {self.command}"
            )


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One input or output: where it lies, and the host memory its copies use."""

    address: int
    memory: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]

    def view(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        """The staged values of a shape, as an array on the same memory."""
        nbytes = int(np.prod(shape)) * self.dtype.itemsize
        return self.memory[:nbytes].view(self.dtype).reshape(shape)


class Phase:
    """Runs tokens of one phase."""

    def __init__(
        self,
        space: Workspace,
        engine: Engine,
        profile: int,
        name: str,
        *,
        graphs: bool,
        updated: Collection[str] = (),
        read: Collection[str] = (),
    ) -> None:
        """Make a context for a profile, and its buffers.

        Args:
            graphs: for the phase that repeats the same step.
            updated: inputs besides the caches that are written in place, by the output of the same name with `_out`.
            read: inputs that lie in the arena too and are only read.

        Raises:
            BundleError: the engine is not one of eopc's graph contract.
            DeviceMemoryError: the GPU has no memory for it.
        """
        check_feeds(engine, name, updated, read)
        self.name, self._space, self._engine, self._profile = name, space, engine, profile
        inputs = tensor_names(engine, "INPUT")
        *_, ids = engine.get_tensor_profile_shape("input_ids", profile)
        self.max_tokens, self.max_logits, self._vocab = int(ids[1]), 0, 0
        self.fills = WANTED not in inputs  # only the caches: a pruned prefill has no logits
        if not self.fills:
            *_, index = engine.get_tensor_profile_shape(WANTED, profile)
            self.max_logits, self._vocab = int(index[0]), int(engine.get_tensor_shape(LOGITS)[2])
        self._feeds = tuple(n for n in FEEDS if n in inputs)
        self._held = tuple(n for n in (*inputs, *tensor_names(engine, "OUTPUT")) if n not in (*FEEDS, LOGITS))
        self.slots = int(engine.get_tensor_shape("attn_mask")[3])
        space.scratch.reserve(engine.get_device_memory_size_for_profile_v2(profile))
        self._context: Context = space.loader.new_context(engine, space.command)
        self._require(self._context.set_optimization_profile_async(profile, space.stream), f"take profile {profile}")
        space.device.wait(space.stream)
        self._graphs = graphs
        self._graph: int | None = None
        self._bound: tuple[object, ...] = ()
        self._steps = 0  # since the context was bound last
        self._block, self._pinned = 0, np.empty(0, np.uint8)
        try:
            self._buffers = self._make_buffers()
        except DeviceError:
            self.close()
            raise

    def run(
        self, arena: Arena, addresses: Mapping[str, int], length: int, tokens: Sequence[int], wanted: Sequence[int]
    ) -> Logits:
        """Append tokens to a cache of `length` tokens; return the logits [len(wanted), vocab] of these positions.

        A phase that only fills the caches wants none and returns none.

        Args:
            arena: what the addresses lie in.
            addresses: of every input that is no feed; the output of the same name is bound to the same place.

        Raises:
            DeviceLostError: the GPU is gone.
            DeviceError: TensorRT refused the step.
        """
        shapes = self._stage(length, tokens, wanted)
        self._bind(arena, addresses, shapes)
        device, stream = self._space.device, self._space.stream
        if self._graph is None and self._steps and self._graphs:
            self._capture()
        if self._graph is None:
            self._enqueue()
        else:
            device.launch(self._graph, stream)
        device.wait(stream)
        self._steps += 1
        if self.fills:
            return np.empty((0, 0), np.float32)
        logits = self._buffers[LOGITS].view(shapes[LOGITS])
        return np.array(logits[0], dtype=np.float32)  # a copy: the next step writes over the staged values

    def close(self) -> None:
        """Free what this phase owns."""
        self._drop_graph()
        if self._block:
            self._space.device.release(self._block)
        if self._pinned.size:
            self._space.device.release_host(self._pinned)
        self._block, self._pinned, self._buffers = 0, np.empty(0, np.uint8), {}

    def _make_buffers(self) -> dict[str, _Buffer]:
        """Device and host memory for the largest step, all inputs and the logits in one block each."""
        shapes = {
            "input_ids": (1, self.max_tokens),
            "position_ids": (1, self.max_tokens),
            "write_index": (1,),
            "attn_mask": (1, 1, self.max_tokens, self.slots),
            **({} if self.fills else {WANTED: (self.max_logits,), LOGITS: (1, self.max_logits, self._vocab)}),
        }
        dtypes = {name: numpy_dtype(self._engine, name) for name in shapes}
        sizes = [int(np.prod(shape)) * dtypes[name].itemsize for name, shape in shapes.items()]
        offsets, total = buffer_block(sizes)
        device = self._space.device
        self._block = device.allocate(total, f"inputs and logits of {self.name}")
        self._pinned = device.allocate_host(total)
        return {
            name: _Buffer(self._block + offset, self._pinned[offset : offset + size], dtypes[name])
            for name, offset, size in zip(shapes, offsets, sizes, strict=True)
        }

    def _stage(self, length: int, tokens: Sequence[int], wanted: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Write the inputs to where the copies read them; return the shapes of inputs and logits."""
        count = len(tokens)
        arrays: dict[str, npt.ArrayLike] = {
            "input_ids": [list(tokens)],
            "position_ids": np.arange(length, length + count)[None],
            "write_index": [length],
            "attn_mask": causal_mask(length, count, self.slots, self._buffers["attn_mask"].dtype),
            **({} if self.fills else {WANTED: list(wanted)}),
        }
        shapes: dict[str, tuple[int, ...]] = {name: np.shape(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            self._buffers[name].view(shapes[name])[...] = array
        return shapes if self.fills else {**shapes, LOGITS: (1, len(wanted), self._vocab)}

    def _bind(self, arena: Arena, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the context its shapes and addresses, unless it has them already."""
        scratch = self._space.scratch
        key = (arena, scratch.generation, *shapes.values())
        if key == self._bound:
            return
        self._drop_graph()
        self._bound, self._steps = (), 0  # nothing is bound if any of this fails
        self._shapes = dict(shapes)
        self._context.set_device_memory(scratch.address, scratch.nbytes)
        for name in self._feeds:
            self._require(self._context.set_input_shape(name, shapes[name]), f"take {name} of shape {shapes[name]}")
        for name, buffer in self._buffers.items():
            self._require(self._context.set_tensor_address(name, buffer.address), f"bind {name}")
        for name in self._held:  # an input and its output have one address: the engine writes the cache where it lies
            address = addresses[name.removesuffix("_out")]
            self._require(self._context.set_tensor_address(name, address), f"bind {name}")
        self._bound = key

    def _enqueue(self) -> None:
        """Copies in, engine, logits out; all in stream order."""
        device, stream = self._space.device, self._space.stream
        for name in self._feeds:
            buffer = self._buffers[name]
            device.copy_in(buffer.address, buffer.view(self._shapes[name]), stream)
        self._require(self._context.execute_async_v3(stream), "enqueue a step")
        if not self.fills:
            logits = self._buffers[LOGITS]
            device.copy_out(logits.view(self._shapes[LOGITS]), logits.address, stream)

    def _capture(self) -> None:
        """Record a step; where that is refused, remember it and say so once."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX compiles kernels as it runs
        if capturable is not None and not capturable(self._space.stream):
            return
        try:
            self._graph = self._space.device.capture(self._space.stream, self._enqueue)
        except DeviceLostError:
            raise
        except DeviceError as error:
            self._graphs = False
            self._space.remarks.append(f"{self.name} runs without a CUDA graph: {error}")

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._space.device.drop(self._graph)
        self._graph = None

    def _require(self, done: bool, what: str) -> None:
        self._space.require(done, what, self.name)


def check_feeds(engine: Engine, name: str, updated: Collection[str] = (), read: Collection[str] = ()) -> None:
    """Raise BundleError unless an engine's inputs and outputs are those of the graph contract; see `Phase`."""
    held = {*updated, *(n for n in tensor_names(engine, "INPUT") if CACHE in n)}
    asked = {LOGITS} & set(tensor_names(engine, "OUTPUT"))  # with them, which ones are wanted
    feeds = FEEDS if asked else [n for n in FEEDS if n != WANTED]
    check_tensors(engine, name, {*feeds, *held, *read}, {*asked, *(f"{n}_out" for n in held)})


def check_tensors(engine: Engine, name: str, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise BundleError unless an engine has exactly these inputs and outputs."""
    found = set(tensor_names(engine, "INPUT")), set(tensor_names(engine, "OUTPUT"))
    if found != (set(inputs), set(outputs)):
        odd = sorted(found[0] ^ set(inputs) | found[1] ^ set(outputs))
        raise BundleError(
            f"the engine for {name} has other inputs and outputs than this eopc binds ({', '.join(odd[:5])}). "
            "Build the bundle and its engines with the same version of eopc."
        )
