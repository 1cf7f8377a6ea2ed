"""Sessions of ONNX Runtime: held against the manifest when they are loaded, and run with errors a user can read."""

from __future__ import annotations

from typing import Any

from eopc_runtime.bundle import Manifest
from eopc_runtime.errors import BundleError, DeviceError, DeviceMemoryError
from eopc_runtime.jsonfields import shown
from eopc_runtime.tier_info import TierInfo


def execute(session: Any, binding: Any, tier: str) -> None:
    """Run a session on what is bound.

    Raises:
        DeviceError: ONNX Runtime failed; as DeviceMemoryError, for want of memory.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises many types
        reason = shown(str(error).strip())
        if isinstance(error, MemoryError) or "allocate" in reason or "bad_alloc" in reason:
            raise DeviceMemoryError(
                f"no memory was left to run {tier} ({reason}). Give a shorter prompt, or use a lower --tier."
            ) from error
        raise DeviceError(
            f"ONNX Runtime failed while it ran {tier} ({reason}). Try again; if it stays, rebuild the bundle."
        ) from error


def check_interface(session: Any, manifest: Manifest, info: TierInfo, graph: str) -> None:
    """Compare the caches and logits of a loaded graph with what the manifest says of the tier.

    Raises:
        BundleError: they differ, so buffers made after the manifest would not fit the graph.
    """
    of_dtype = f"tensor({'float' if manifest.compute_dtype == 'float32' else 'float16'})"
    caches = [
        (f"{kind}_cache_{i}", layer.kv_heads, manifest.model.head_dim, of_dtype)
        for i, layer in enumerate(info.layers)
        for kind in "kv"
    ]
    found = [(x.name, x.shape[1], x.shape[3], x.type) for x in session.get_inputs() if "_cache_" in x.name]
    vocab = [x.shape[-1] for x in session.get_outputs() if x.name == "logits"]
    expected = [manifest.model.vocab_size] if graph in (info.graph, info.step) else []
    if sorted(caches) != sorted(found) or vocab != expected:
        raise BundleError(
            f"{graph} is not the graph that manifest.json describes as {info.tier} (its layers, heads, vocabulary "
            f"or compute type differ). Copy the bundle again, or rebuild it."
        )


def check_selector(decode: Any, gather: Any, manifest: Manifest, info: TierInfo) -> None:
    """Compare what the gather graph writes with what the decode graph reads, and both with the manifest.

    Raises:
        BundleError: they differ.
    """
    assert info.selector is not None
    hidden, layers = manifest.model.hidden_size, list(enumerate(info.selector.chosen))
    expected = {f"{kind}_rows_{i}": [n, hidden] for i, n in layers if n for kind in ("gate", "up", "down")}
    energies = {f"ffn_energy_{i}": [pool] for i, pool in enumerate(info.selector.pool) if info.selector.chosen[i]}
    writes = {x.name: list(x.shape) for x in gather.get_outputs()}
    reads = {x.name: list(x.shape) for x in decode.get_inputs() if "_rows_" in x.name}
    if not (writes == reads == expected and {x.name: list(x.shape) for x in gather.get_inputs()} == energies):
        raise BundleError(
            f"{info.selector.graph} and {info.graph} do not gather and read what manifest.json says of {info.tier}. "
            "Copy the bundle again, or rebuild it."
        )
