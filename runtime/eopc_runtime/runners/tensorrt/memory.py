"""Memory that tiers share on a GPU: one scratch block, and keys and values in a layout that fits every tier.

**Scratch.** Only one context runs at a time, so one block as large as the largest need serves all of them. It may move
when a tier with a larger need is loaded; `generation` tells a context that what it was given is gone.

**Caches.** A lower tier keeps the first KV heads of some of the upper tier's layers. At batch 1 the first heads of a
buffer [1, heads, slots, head_dim] are its first bytes. So one arena, laid out for the dense tier, holds the cache of
any tier at the same addresses, and handing a sequence down copies nothing.

**Choices.** Behind the caches an arena has room for the largest choice of weights that a tier of the bundle makes by
its prompt (see gather). It is one cache's at a time: what a tier handed down chose means nothing to another.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eopc_runtime.runners.tensorrt.cuda import ALIGNMENT, Device
from eopc_runtime.tier_info import LayerInfo


def aligned(nbytes: int) -> int:
    """The next multiple of 256, and never nothing: an address belongs to one tensor."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class Scratch:
    """Working memory of contexts, shared: the maximum of their needs, not the sum."""

    def __init__(self, device: Device, stream: int) -> None:
        """Own nothing yet."""
        self._device, self._stream = device, stream
        self.address, self.nbytes, self.generation = 0, 0, 0

    def reserve(self, nbytes: int) -> None:
        """Be at least this large; moves when it must grow, once the stream has finished with it."""
        if nbytes <= self.nbytes:
            return
        self._device.wait(self._stream)
        self.release()
        self.address = self._device.allocate(aligned(nbytes), "the scratch memory of engines")
        self.nbytes = aligned(nbytes)

    def release(self) -> None:
        """Free it; contexts that were given it must be given another."""
        if self.address:
            self._device.release(self.address)
        self.address, self.nbytes = 0, 0
        self.generation += 1


@dataclass(eq=False)
class Lease:
    """The right to write into an arena, shared by the caches of one sequence; the last to go gives it back."""

    arena: Arena
    caches: weakref.WeakSet[TensorRtCache] = field(default_factory=weakref.WeakSet)


@dataclass(eq=False)
class TensorRtCache:
    """One tier's view of an arena."""

    tier: str
    length: int
    nbytes: int
    lease: Lease
    stale: bool = False  # another tier's cache has written over tokens this one holds, or over its choice
    choosing: bool = False  # the arena's room for a choice is this cache's
    gathered: bool = False  # and holds the weights

    def __post_init__(self) -> None:
        self.lease.caches.add(self)

    def claim(self) -> None:
        """Prepare to write after this cache's last token; caches of other tiers that hold more become stale.

        Raises:
            ValueError: this cache was written over.
        """
        if self.stale:
            raise ValueError(f"this cache of {self.tier} was handed down and written over; it cannot go on")
        for other in self.lease.caches:
            if other is not self and other.length > self.length:
                other.stale = True

    def take_choice(self) -> None:
        """Take the arena's room for a choice; caches of other tiers whose choice was in it become stale."""
        for other in self.lease.caches:
            other.stale = other.stale or other.choosing
        self.choosing = True


class Arena:
    """Key and value buffers for every layer of the dense tier, and room for a choice, in one allocation."""

    def __init__(
        self, device: Device, layers: Sequence[LayerInfo], slots: int, head_bytes: int, choice_bytes: int = 0
    ) -> None:
        """Allocate for `slots` tokens; `head_bytes` are those of one token's key in one head."""
        self._device = device
        self._offsets: dict[tuple[str, int], int] = {}  # by kind (k or v) and layer of the dense model
        self.nbytes = 0  # of keys and values
        for layer in layers:
            for kind in "kv":
                self._offsets[kind, layer.source_layer] = self.nbytes
                self.nbytes += aligned(layer.kv_heads * slots * head_bytes)
        self.base = device.allocate(self.nbytes + choice_bytes, f"keys and values of {slots} tokens")
        self.choice = self.base + self.nbytes

    def address(self, kind: str, source_layer: int) -> int:
        """Where the first head of a layer's keys (k) or values (v) begins."""
        return self.base + self._offsets[kind, source_layer]

    def clear(self, stream: int) -> None:
        """Zero keys and values: a slot that is masked out still takes part in products, and 0 x NaN is NaN."""
        self._device.zero(self.base, self.nbytes, stream)

    def release(self) -> None:
        """Free it."""
        self._device.release(self.base)


class Arenas:
    """Arenas of a bundle, each leased to one sequence at a time and used again afterwards."""

    def __init__(
        self,
        device: Device,
        stream: int,
        layers: Sequence[LayerInfo],
        slots: int,
        head_dim: int,
        dtype: np.dtype[Any],
        choice_bytes: int = 0,
    ) -> None:
        """Hold the layout of the dense tier's layers; the first arena is made when it is first needed.

        Args:
            choice_bytes: of the largest choice that a tier makes by its prompt.
        """
        self._device, self._stream, self._choice_bytes = device, stream, choice_bytes
        self._layers, self.slots, self.head_bytes = tuple(layers), slots, head_dim * dtype.itemsize
        self._leases: list[tuple[Arena, weakref.ref[Lease] | None]] = []

    def lease(self) -> Lease:
        """An empty arena nobody else writes to."""
        free = [i for i, (_, held) in enumerate(self._leases) if held is None or held() is None]
        if free:
            arena, _ = self._leases.pop(free[0])
        else:
            arena = Arena(self._device, self._layers, self.slots, self.head_bytes, self._choice_bytes)
        lease = Lease(arena)
        self._leases.append((arena, weakref.ref(lease)))
        arena.clear(self._stream)
        return lease

    def __len__(self) -> int:
        return len(self._leases)

    def release(self) -> None:
        """Free every arena."""
        for arena, _ in self._leases:
            arena.release()
        self._leases.clear()


def buffer_block(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of aligned buffers of these sizes in one block, and its size."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += aligned(size)
    return offsets, end
