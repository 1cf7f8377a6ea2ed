"""Whether a tier fits into what memory this machine has left, said before it is loaded.

The estimate is a lower bound: weights as they are stored, caches, one row of logits. What ONNX Runtime takes beside
them (unpacked copies while it loads, scratch memory) is not in it, so what is refused could not have run.
"""

from __future__ import annotations

from eopc_runtime.bundle import Manifest
from eopc_runtime.errors import DeviceMemoryError
from eopc_runtime.tier_info import TierInfo
from eopc_runtime.units import format_bytes


def weight_bytes(info: TierInfo) -> int:
    """Weights a loaded tier holds, those of a prefill graph of its own included."""
    return info.cost.weight_bytes + (info.cost.prefill.weight_bytes if info.cost.prefill else 0)


def step_bytes(info: TierInfo) -> int:
    """Weights it holds beside them for single tokens, where those and prompts have a graph each; it answers without."""
    return 0 if info.step is None or info.prefill is not None else info.cost.weight_bytes


def cache_bytes(manifest: Manifest, info: TierInfo, tokens: int) -> int:
    """Keys and values of so many tokens."""
    return 2 * tokens * manifest.value_bytes * manifest.model.head_dim * sum(layer.kv_heads for layer in info.layers)


def tier_bytes(manifest: Manifest, info: TierInfo, tokens: int) -> int:
    """The least memory in which a tier answers, with a cache of so many tokens."""
    return weight_bytes(info) + cache_bytes(manifest, info, tokens) + 4 * manifest.model.vocab_size


def require_fit(manifest: Manifest, info: TierInfo, tokens: int, left: int | None) -> None:
    """Raise DeviceMemoryError, with the estimate and what to do, if a tier does not fit into `left` bytes."""
    needed = tier_bytes(manifest, info, tokens)
    if left is None or needed <= left:
        return
    sizes = {tier.tier: tier_bytes(manifest, tier, tokens) for tier in manifest.tiers}
    fitting = [name for name, size in sizes.items() if size <= left]
    remedy = f"Use --tier {fitting[0]} ({format_bytes(sizes[fitting[0]])})" if fitting else "Build for smaller budgets"
    raise DeviceMemoryError(
        f"{info.tier} needs at least {format_bytes(needed)} of memory ({format_bytes(weight_bytes(info))} of weights, "
        f"a cache of {tokens} tokens), but {format_bytes(left)} are left. {remedy}, or close other programs."
    )


def require_room(manifest: Manifest, info: TierInfo, tokens: int, left: int | None) -> None:
    """Raise DeviceMemoryError if a cache cannot grow to so many tokens within `left` bytes."""
    needed = cache_bytes(manifest, info, tokens)
    if left is not None and needed > left:
        raise DeviceMemoryError(
            f"the cache of {tokens} tokens on {info.tier} needs {format_bytes(needed)} of memory, but "
            f"{format_bytes(left)} are left. Give a shorter prompt or fewer --max-new-tokens, or use a lower --tier."
        )
