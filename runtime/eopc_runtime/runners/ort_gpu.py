"""ONNX Runtime on an NVIDIA GPU: the CUDA or the TensorRT execution provider, with caches in the GPU's memory.

onnxruntime-gpu lists providers it cannot load, and falls back to the CPU without raising. So what a session really
got is read back, and anything but what was asked for is an error.

Bound inputs are copied to the device when they are bound, not when the session runs, so a step binds anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.errors import DeviceError
from eopc_runtime.runners.base import Logits, adoption
from eopc_runtime.runners.fit import weight_bytes
from eopc_runtime.runners.ort import OrtCache, OrtTier
from eopc_runtime.runners.ort_pool import OrtPool
from eopc_runtime.tier_info import TierInfo

# what the providers are named by; each may hand operators it lacks to those after it
PROVIDERS = {
    "ort-cuda": ("CUDAExecutionProvider",),
    "ort-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}


@dataclass(slots=True)
class OrtGpuCache(OrtCache):
    """Keys and values as OrtValues [1, kv_heads, capacity, head_dim] in the device's memory."""

    @property
    def nbytes(self) -> int:
        return sum(int(b.tensor_size_in_bytes()) for b in (*self.keys, *self.values)) + self.chosen_nbytes


class OrtGpuTier(OrtTier):
    """One tier in ONNX Runtime on another execution provider."""

    def __init__(
        self, bundle: Bundle, info: TierInfo, threads: int | None, providers: Sequence[str], device: str = "cuda"
    ) -> None:
        """Load a tier; `device` is where ONNX Runtime keeps the caches.

        Raises:
            DeviceError: ONNX Runtime loaded other providers than the first that was asked for.
        """
        self.device = device
        super().__init__(bundle, info, threads, providers=providers)
        check_providers(self._session.get_providers(), providers, self._ort)

    def new_cache(self) -> OrtGpuCache:
        """See `TierRunner.new_cache`."""
        return OrtGpuCache(self.tier, 0, 0, [], [])

    def adopt(self, cache: OrtCache) -> OrtCache:
        """See `TierRunner.adopt`; the kept heads travel through the host's memory."""
        if cache.tier == self.tier:
            return cache
        rows = adoption(self._ladder[cache.tier], self._layers)
        fresh = OrtGpuCache(self.tier, cache.length, cache.capacity, [], [])
        for new, old in ((fresh.keys, cache.keys), (fresh.values, cache.values)):
            for theirs, heads in rows:
                new.append(self._buffer(np.ascontiguousarray(self._read(old[theirs])[:, :heads])))
        return fresh

    def _decode(self, cache: OrtCache, token: int) -> Logits:
        return self._run(cache, [token], "last")

    def _shared(self, buffer: Any) -> Any:
        return buffer  # an OrtValue already

    def _buffer(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _read(self, buffer: Any) -> Any:
        return buffer.numpy()  # copied to the host's memory


class OrtGpuPool(OrtPool):
    """Loads tiers on demand, as `OrtPool` does."""

    def __init__(self, bundle: Bundle, runner: str, threads: int | None = None) -> None:
        """Hold a bundle for a runner of `PROVIDERS`."""
        super().__init__(bundle, threads)
        self._providers = PROVIDERS[runner]

    def keep_loaded(self) -> bool:
        """No: what memory is left is known of this machine, not of its GPU."""
        return False

    def _load(self, info: TierInfo) -> OrtTier:
        return OrtGpuTier(self._bundle, info, self._threads, self._providers)

    def _loaded_bytes(self, info: TierInfo) -> int:
        return weight_bytes(info)


def check_providers(found: Sequence[str], asked: Sequence[str], ort: Any) -> None:
    """Compare what a session got with what it was asked for.

    Raises:
        DeviceError: the first provider that was asked for is not the first it got.
    """
    if found[:1] == list(asked[:1]):
        return
    raise DeviceError(
        f"onnxruntime {ort.__version__} was asked for {asked[0]} and loaded {', '.join(found)} (this build offers "
        f"{', '.join(ort.get_available_providers())}). On an NVIDIA GPU: pip uninstall onnxruntime, then "
        '`pip install "eopc[gpu]"`, with the CUDA and cuDNN its release notes name; without one use --runner ort.'
    )
