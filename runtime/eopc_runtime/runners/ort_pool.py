"""Tiers in ONNX Runtime, loaded when they are asked for and let go when there are too many bytes of them."""

from __future__ import annotations

from collections import OrderedDict

from eopc_runtime.bundle import Bundle
from eopc_runtime.memory import left_bytes, release_memory
from eopc_runtime.runners.fit import require_fit, step_bytes, tier_bytes, weight_bytes
from eopc_runtime.runners.ort import GROWTH, OrtTier
from eopc_runtime.tier_info import TierInfo

NO_VNNI = (
    "this CPU has no VNNI, without which int8 products of this bundle's codes overflow, so they run in floating point: "
    "slower, and in more memory. Build it anew: bundles now hold codes that never overflow."
)
STEPS_DO_NOT_FIT = (
    "the memory left does not hold this bundle's weights a second time, as single tokens need them, so these run "
    "through the graph of prompts: the same answers but for rounding, slower. Close other programs for the full speed."
)

RESIDENT_FACTOR = 1.4  # loaded weights may reach this multiple of the largest tier's
KEPT_SHARE = 0.5  # of the memory left, that all tiers may take where a server keeps them loaded


class OrtPool:
    """Loads tiers on demand and keeps the recently used within a byte limit."""

    def __init__(self, bundle: Bundle, threads: int | None = None, max_resident_bytes: int | None = None) -> None:
        self._bundle, self._threads = bundle, threads
        self._loaded: OrderedDict[str, OrtTier] = OrderedDict()
        self._bytes = {t.tier: self._loaded_bytes(t) for t in bundle.manifest.tiers}
        self._limit = max_resident_bytes or int(RESIDENT_FACTOR * max(self._bytes.values()))
        self._require(min(bundle.manifest.tiers, key=lambda t: tier_bytes(bundle.manifest, t, GROWTH)))

    def get(self, tier: str) -> OrtTier:
        """The runner of a tier; least recently used tiers are let go *before* a new one is loaded."""
        runner = self._loaded.get(tier)
        if runner is None:
            info = self._bundle.tier(tier)
            while self._loaded and sum(map(self._bytes.__getitem__, (*self._loaded, tier))) > self._limit:
                self._loaded.popitem(last=False)
            self._require(info)
            runner = self._loaded[tier] = self._load(info)
        self._loaded.move_to_end(tier)
        return runner

    def keep_loaded(self) -> bool:
        """Load every tier and let none go, unless they would take more than half of the memory left; whether they are.

        For servers, whose sequences go back and forth between tiers: loading one takes longer than many a sequence.
        """
        left, needed = left_bytes(), sum(self._bytes.values())
        if left is None or needed > KEPT_SHARE * left:
            return False
        self._limit = max(self._limit, needed)
        for tier in self._bytes:
            self.get(tier)
        return True

    def _load(self, info: TierInfo) -> OrtTier:
        left, needed = left_bytes(), tier_bytes(self._bundle.manifest, info, GROWTH) + step_bytes(info)
        fits = left is None or needed <= left
        return OrtTier(self._bundle, info, self._threads, own_steps=fits)

    def _loaded_bytes(self, info: TierInfo) -> int:
        return weight_bytes(info) + step_bytes(info)

    def _require(self, info: TierInfo) -> None:
        """Refuse a tier that does not fit; whatever is freed only by the collector is freed first."""
        left = left_bytes()
        if left is not None and tier_bytes(self._bundle.manifest, info, GROWTH) > left:
            release_memory()
        require_fit(self._bundle.manifest, info, GROWTH, left_bytes())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the loaded tiers run."""
        slow = any(tier.in_floating_point for tier in self._loaded.values())
        steps = any(not tier.own_steps for tier in self._loaded.values())
        return (NO_VNNI,) * slow + (STEPS_DO_NOT_FIT,) * steps

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the loaded tiers, least recently used first."""
        return tuple(self._loaded)

    def close(self) -> None:
        """Release every session."""
        self._loaded.clear()
