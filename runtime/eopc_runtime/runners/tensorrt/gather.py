"""Weights chosen by a prompt: the part of an arena a choice lies in, and the phase that gathers them.

The prefill phase adds to the energies where they lie; once per sequence the gather phase reads them and writes the rows
of the favoured channels, which every decode step reads. Nothing of it leaves the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from eopc_runtime.bundle import Manifest
from eopc_runtime.errors import BundleError
from eopc_runtime.runners.tensorrt.api import Context, Engine, numpy_dtype, tensor_names
from eopc_runtime.runners.tensorrt.memory import Arena, buffer_block
from eopc_runtime.runners.tensorrt.phase import Workspace, check_tensors
from eopc_runtime.tier_info import TierInfo

ENERGY = "ffn_energy_"
KINDS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output that a choice is made of."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # from where the choice begins


class Choice:
    """What a tier's prompt did in every pool and the rows it chose, by tensor: energies first, rows behind them."""

    def __init__(self, manifest: Manifest, info: TierInfo) -> None:
        """Lay out the choice of a tier that has a selector."""
        assert info.selector is not None and info.prefill is not None
        selector, hidden = info.selector, manifest.model.hidden_size
        chosen = {i: count for i, count in enumerate(selector.chosen) if count}
        energies = {f"{ENERGY}{i}": (selector.pool[i],) for i in chosen}
        rows = {f"{kind}_rows_{i}": (count, hidden) for i, count in chosen.items() for kind in KINDS}
        self.energies, self.rows = tuple(energies), tuple(rows)
        self.recorded = tuple(f"{ENERGY}{i}" for i in chosen if i < info.prefill.depth)  # by the prefill graph
        shapes: dict[str, tuple[int, ...]] = {**energies, **rows}
        dtypes = [np.dtype(np.float32 if name in energies else manifest.compute_dtype) for name in shapes]
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes.values(), dtypes, strict=True)]
        offsets, self.nbytes = buffer_block(sizes)
        self.tensors: Mapping[str, Tensor] = {
            name: Tensor(shape, dtype, offset)
            for (name, shape), dtype, offset in zip(shapes.items(), dtypes, offsets, strict=True)
        }
        self.energy_bytes = self.tensors[self.rows[0]].offset

    def addresses(self, arena: Arena) -> dict[str, int]:
        """Where the tensors lie in an arena, by name."""
        return {name: arena.choice + tensor.offset for name, tensor in self.tensors.items()}


class Gather:
    """Runs a gather engine: all shapes are fixed, and it runs once per sequence, so there is no CUDA graph."""

    def __init__(self, space: Workspace, engine: Engine, name: str, choice: Choice) -> None:
        """Make a context.

        Raises:
            BundleError: the engine has other inputs or outputs than the choice.
            DeviceMemoryError: the GPU has no memory for it.
        """
        check_tensors(engine, name, choice.energies, choice.rows)
        self.name, self.choice, self._space = name, choice, space
        self._engine = engine  # lives as long as its context
        space.scratch.reserve(engine.get_device_memory_size_for_profile_v2(0))
        self._context: Context = space.loader.new_context(engine, space.command)

    def clear(self, arena: Arena) -> None:
        """Set an arena's energies to none, in stream order: by those the calibration's favourites are chosen."""
        self._space.device.zero(arena.choice, self.choice.energy_bytes, self._space.stream)

    def run(self, arena: Arena) -> None:
        """Gather the rows that the energies of an arena favour, beside them.

        Raises:
            DeviceLostError: the GPU is gone.
            DeviceError: TensorRT refused.
        """
        space = self._space
        self._context.set_device_memory(space.scratch.address, space.scratch.nbytes)
        for name, address in self.choice.addresses(arena).items():
            space.require(self._context.set_tensor_address(name, address), f"bind {name}", self.name)
        space.require(self._context.execute_async_v3(space.stream), "gather weights", self.name)
        space.device.wait(space.stream)


def check_choice(engine: Engine, choice: Choice, tier: str, command: str) -> None:
    """Compare an engine's energies and rows with what the manifest says of the tier.

    Raises:
        BundleError: one has another shape or type, so it would read or write beyond its place.
    """
    names = (*tensor_names(engine, "INPUT"), *tensor_names(engine, "OUTPUT"))
    for name, expected in ((n, choice.tensors.get(n.removesuffix("_out"))) for n in names):
        if expected is None:
            continue
        shape, dtype = tuple(engine.get_tensor_shape(name)), numpy_dtype(engine, name)
        if (shape, dtype) != (expected.shape, expected.dtype):
            raise BundleError(
                f"an engine of {tier} has {name} of {shape} {dtype}, where manifest.json says {expected.shape} "
                f"{expected.dtype}. Build the engines again: {command}"
            )
