"""How much memory a build of an engine takes, said before it begins: on a board it is what most often ends one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eopc_runtime.bundle import Manifest
from eopc_runtime.cli.output import format_bytes
from eopc_runtime.engines import phase_graphs
from eopc_runtime.errors import DeviceError
from eopc_runtime.memory import memory_bytes
from eopc_runtime.tier_info import TierInfo

# Fitted to the peak resident memory of TensorRT-RTX 1.7 builds with two profiles, 1 to 6 layers of width 576 and 2048:
# within 10 % for fp16 and for 30 layers in fp32 (3.3 GB), high for int8. int4, fp8 and TensorRT itself: not measured.
BASE_BYTES = 240_000_000
LAYER_BYTES = 16_000_000
MATRICES = 3  # gate, up and down: a channel is a row of each
WEIGHT_FACTOR = {"fp32": 5.0, "fp16": 5.0, "int8": 3.0, "fp8": 5.0, "int4": 5.0}


def check_memory(
    manifest: Manifest, infos: Iterable[TierInfo], refuse: bool, memory: Mapping[str, int | None] | None = None
) -> list[str]:
    """Say what the largest build takes; DeviceError, with the numbers, if `refuse` and it does not fit.

    Args:
        memory: as `memory_bytes` reads it; None asks this machine.
    """
    largest = max(infos, key=lambda info: build_bytes(manifest, info))
    needed = build_bytes(manifest, largest)
    found = memory_bytes() if memory is None else memory
    free, swap = found["MemAvailable"], found["SwapFree"] or 0
    text = f"the build of {largest.tier} takes about {format_bytes(needed)} of memory"
    if free is None:
        return [text]
    text += f"; {format_bytes(free)} are free" + (f", {format_bytes(swap)} of swap" if swap else "")
    if refuse and needed > free + swap:
        raise DeviceError(
            f"{text[0].upper()}{text[1:]}: it would be killed. Close other programs, add swap, build a smaller tier "
            f"with --tier, or try it all the same with --no-memory-check."
        )
    return [text]


def build_bytes(manifest: Manifest, info: TierInfo) -> int:
    """Peak resident memory of the largest build of a tier, bytes.

    BASE_BYTES + layers x LAYER_BYTES + WEIGHT_FACTOR x weights. A tier's graphs are built one after the other.
    """
    weights = max(graph_bytes(manifest, info, phase) for phase in phase_graphs(info))
    return round(BASE_BYTES + LAYER_BYTES * info.cost.layers + WEIGHT_FACTOR[manifest.precision] * weights)


def graph_bytes(manifest: Manifest, info: TierInfo, phase: str) -> int:
    """Weights of the graph of a tier's phase, bytes: tables that rows are gathered from are in the compute type."""
    width = manifest.value_bytes * manifest.model.hidden_size
    if phase == "gather" and info.selector is not None:
        channels = sum(pool for pool, chosen in zip(info.selector.pool, info.selector.chosen, strict=True) if chosen)
        return MATRICES * channels * width
    cost = info.cost.prefill if phase == "prefill" and info.cost.prefill else info.cost
    return cost.weight_bytes + manifest.model.vocab_size * width
