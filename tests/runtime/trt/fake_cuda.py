# ruff: noqa: N802, N815  # the names are CUDA's own
"""A stand-in for `cuda.bindings.runtime` that keeps CUDA's rules: stream order, page-locked copies, graphs, errors.

What is given to a stream runs when the stream is waited for, not before: a host buffer that is changed or read too
early shows. Device addresses are numbers that no host code can follow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

Work = Callable[[], None]
BASE = 0x7F00_0000_0000
OUT_OF_MEMORY, INVALID, NOT_PERMITTED, LAUNCH_FAILURE, ILLEGAL_ADDRESS = 2, 1, 900, 719, 700


class Error(IntEnum):
    """The codes that occur here."""

    success = 0
    invalid = INVALID
    out_of_memory = OUT_OF_MEMORY
    illegal_address = ILLEGAL_ADDRESS
    launch_failure = LAUNCH_FAILURE
    capture_unsupported = NOT_PERMITTED
    capture_invalidated = 901


class CudaFaultError(Exception):
    """Raised by work that runs on a stream; the stream reports its code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


@dataclass
class Stream:
    """Work in order; while it captures, work is recorded instead."""

    queue: list[Work] = field(default_factory=list)
    recorded: list[Work] | None = None
    broken: bool = False  # the capture holds something that cannot be captured


class Kinds:
    """cudaMemcpyKind."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Modes:
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeThreadLocal = 1


class FakeCuda:
    """The functions a runner calls, with their tuples of results; one instance is one device."""

    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = Kinds
    cudaStreamCaptureMode = Modes

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.memory_bytes = memory_bytes
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.lost_code = 0  # from now on every call fails with it
        self.poisoned_graphs: dict[int, str] = {}
        self.launches = self.captures = 0
        self.why = ""
        self._next, self._handle = BASE, 0x1000

    # memory

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        if self.lost_code:
            return (self._lost(),)
        if self.used + nbytes > self.memory_bytes:
            return Error.out_of_memory, None
        address = self._next
        self._next += -(-nbytes // 256) * 256 + 4096  # a gap, so that an overrun meets nothing
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)  # NaN in every float type, as memory may hold anything
        return Error.success, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        if self.lost_code:
            return (self._lost(),)
        assert all(not s.queue for s in self.streams.values()), "freed while a stream still had work"
        return (Error.success if self.blocks.pop(address, None) is not None else Error.invalid,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        memory = (ctypes.c_uint8 * nbytes)()
        self.host[ctypes.addressof(memory)] = memory
        return Error.success, ctypes.addressof(memory)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        if self.lost_code:
            return (self._lost(),)
        return (Error.success if self.host.pop(address, None) is not None else Error.invalid,)

    @property
    def used(self) -> int:
        """Bytes allocated."""
        return sum(block.nbytes for block in self.blocks.values())

    def at(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Device memory; an illegal address where it is not all of one block."""
        for base, block in self.blocks.items():
            if base <= address and address + nbytes <= base + block.nbytes:
                return block[address - base : address - base + nbytes]
        raise CudaFaultError(ILLEGAL_ADDRESS, f"{nbytes} bytes at {address:#x} are no device memory")

    # streams

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        return Error.success, self._new(self.streams, Stream())

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (Error.success,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return self.enqueue(stream, lambda: self.at(address, nbytes).fill(value))

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[Any, ...]:
        device, memory = (to, source) if kind == Kinds.cudaMemcpyHostToDevice else (source, to)
        held = [m for a, m in self.host.items() if a <= memory and memory + nbytes <= a + ctypes.sizeof(m)]
        assert held, "asynchronous copies need page-locked memory"

        def copy() -> None:
            block = self.at(device, nbytes)
            if kind == Kinds.cudaMemcpyHostToDevice:
                ctypes.memmove(block.ctypes.data, memory, nbytes)
            else:
                ctypes.memmove(memory, block.ctypes.data, nbytes)

        return self.enqueue(stream, copy)

    def enqueue(self, stream: int, work: Work) -> tuple[Any, ...]:
        """Give work to a stream, or record it."""
        if self.lost_code:
            return (self._lost(),)
        held = self.streams[stream]
        (held.queue if held.recorded is None else held.recorded).append(work)
        return (Error.success,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if self.lost_code:
            return (self._lost(),)
        held = self.streams[stream]
        assert held.recorded is None, "a stream that captures cannot be waited for"
        work, held.queue = held.queue, []
        try:
            for item in work:
                item()
        except CudaFaultError as fault:
            self.lost_code, self.why = fault.code, fault.why
            return (self._lost(),)
        return (Error.success,)

    # graphs

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        held = self.streams[stream]
        held.recorded, held.broken = [], False
        return (Error.success,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        held = self.streams[stream]
        assert held.recorded is not None
        work, held.recorded = held.recorded, None
        if held.broken:
            return Error.capture_invalidated, None
        self.captures += 1
        return Error.success, tuple(work)

    def cudaGraphInstantiate(self, graph: tuple[Work, ...], flags: int) -> tuple[Any, ...]:
        return Error.success, self._new(self.graphs, list(graph))

    def cudaGraphDestroy(self, graph: tuple[Work, ...]) -> tuple[Any, ...]:
        return (Error.success,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        if self.lost_code:
            return (self._lost(),)
        del self.graphs[graph]
        return (Error.success,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        for work in self.graphs[graph]:
            done = self.enqueue(stream, work)
            if done[0]:
                return done
        return (Error.success,)

    # errors

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Error.success,)

    def cudaGetErrorString(self, code: Any) -> tuple[Any, ...]:
        return Error.success, f"fake {Error(int(code)).name}".encode()

    def lose(self) -> None:
        """Lose the device: nothing works any more."""
        self.lost_code = LAUNCH_FAILURE

    def _lost(self) -> Error:
        return Error(self.lost_code)

    def _new(self, table: dict[int, Any], value: Any) -> int:
        self._handle += 1
        table[self._handle] = value
        return self._handle
