"""One tier on TensorRT: prompts in chunks the engine was built for, then one token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eopc_runtime.bundle import Manifest
from eopc_runtime.errors import BundleError
from eopc_runtime.runners.base import Logits, Wanted, adoption, check_room
from eopc_runtime.runners.tensorrt.api import Engine, numpy_dtype, tensor_names
from eopc_runtime.runners.tensorrt.gather import Gather
from eopc_runtime.runners.tensorrt.memory import Arena, Arenas, TensorRtCache
from eopc_runtime.runners.tensorrt.phase import CACHE, LOGITS, Phase
from eopc_runtime.tier_info import LayerInfo, TierInfo


class TensorRtTier:
    """Executes one tier; see `TierRunner`."""

    def __init__(
        self,
        manifest: Manifest,
        info: TierInfo,
        prefill: Phase,
        decode: Phase,
        arenas: Arenas,
        gather: Gather | None = None,
    ) -> None:
        """Hold the phases of a tier, which may belong to one engine or to two, and what gathers weights for it."""
        self.tier, self._prefill, self._decode, self._arenas = info.tier, prefill, decode, arenas
        self._gather = gather
        self._ladder = {t.tier: t.layers for t in manifest.tiers}
        self._layers = info.layers
        self._context = min(manifest.context, arenas.slots)
        heads = sum(layer.kv_heads for layer in info.layers)
        self._cache_bytes = 2 * heads * arenas.slots * arenas.head_bytes + (gather.choice.nbytes if gather else 0)

    def new_cache(self) -> TensorRtCache:
        """See `TierRunner.new_cache`."""
        return TensorRtCache(self.tier, 0, self._cache_bytes, self._arenas.lease())

    def forward(self, cache: TensorRtCache, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        """See `TierRunner.forward`; besides, DeviceError and its kinds when the GPU fails."""
        if cache.tier != self.tier:
            raise ValueError(f"a cache of {cache.tier} was given to {self.tier}; adopt() it first")
        check_room(cache.length, len(tokens), self._context)
        cache.claim()
        if self._gather is not None:
            self._choose(cache, self._gather)
        longest = min(self._prefill.max_tokens, self._prefill.max_logits if logits == "all" else self._context)
        if self._prefill.fills:
            longest = 1  # the whole model is in the decode phase only
        parts = [
            self._append(cache, tokens[start : start + longest], logits) for start in range(0, len(tokens), longest)
        ]
        return np.concatenate(parts) if logits == "all" else parts[-1]

    def prefill(self, cache: TensorRtCache, tokens: Sequence[int]) -> Logits:
        """See `TierRunner.prefill`; errors as those of `forward`."""
        if not self._prefill.fills:
            return self.forward(cache, tokens)
        check_room(cache.length, len(tokens), self._context)
        cache.claim()
        if self._gather is not None:
            self._begin_choice(cache, self._gather)
        longest, skipping = self._prefill.max_tokens, tokens[:-1]
        for start in range(0, len(skipping), longest):
            chunk = skipping[start : start + longest]
            self._prefill.run(cache.lease.arena, self._addresses(cache), cache.length, chunk, ())
            cache.length += len(chunk)
        return self.forward(cache, tokens[-1:])

    def adopt(self, cache: TensorRtCache) -> TensorRtCache:
        """See `TierRunner.adopt`; nothing is copied, and the given cache goes stale once this one is written to."""
        if cache.tier == self.tier:
            return cache
        adoption(self._ladder[cache.tier], self._layers)
        if cache.stale:
            raise ValueError(f"this cache of {cache.tier} was written over; it cannot be handed down")
        return TensorRtCache(self.tier, cache.length, self._cache_bytes, cache.lease)

    def close(self) -> None:
        """Free the phases."""
        self._prefill.close()
        self._decode.close()

    def _append(self, cache: TensorRtCache, tokens: Sequence[int], logits: Wanted) -> Logits:
        phase = self._decode if len(tokens) == 1 else self._prefill
        wanted = range(len(tokens)) if logits == "all" else (len(tokens) - 1,)
        out = phase.run(cache.lease.arena, self._addresses(cache), cache.length, tokens, wanted)
        cache.length += len(tokens)
        return out

    def _begin_choice(self, cache: TensorRtCache, gather: Gather) -> None:
        """Let a cache choose by energies of its own, which begin with none."""
        if not cache.choosing:
            cache.take_choice()
            gather.clear(cache.lease.arena)

    def _choose(self, cache: TensorRtCache, gather: Gather) -> None:
        """Gather the weights of a sequence, unless it has them already."""
        self._begin_choice(cache, gather)
        if not cache.gathered:
            gather.run(cache.lease.arena)
            cache.gathered = True

    def _addresses(self, cache: TensorRtCache) -> Mapping[str, int]:
        """Where everything lies that the phases read and write of a sequence, by input."""
        arena = cache.lease.arena
        caches = cache_addresses(arena, self._layers)
        return {**caches, **self._gather.choice.addresses(arena)} if self._gather else caches


def cache_addresses(arena: Arena, layers: Sequence[LayerInfo]) -> Mapping[str, int]:
    """Where a tier's cache inputs lie in an arena, by name."""
    return {
        f"{kind}_cache_{i}": arena.address(kind, layer.source_layer) for i, layer in enumerate(layers) for kind in "kv"
    }


def check_caches(engine: Engine, manifest: Manifest, info: TierInfo, slots: int, command: str) -> None:
    """Compare an engine's caches and logits with what the manifest says of the tier.

    Raises:
        BundleError: they differ, so buffers made after the manifest would not fit.
    """
    shapes = {n: tuple(engine.get_tensor_shape(n)) for n in tensor_names(engine, "INPUT") if CACHE in n}
    expected = {
        f"{kind}_cache_{i}": (1, layer.kv_heads, slots, manifest.model.head_dim)
        for i, layer in enumerate(info.layers)
        for kind in "kv"
    }
    # a layer without attention has a cache of no heads, which a builder may leave out
    missing = [n for n, shape in expected.items() if shape[1] and n not in shapes]
    wrong = [n for n, shape in shapes.items() if expected.get(n) != shape]
    wrong += [n for n in shapes if numpy_dtype(engine, n) != np.dtype(manifest.compute_dtype)]
    if LOGITS in tensor_names(engine, "OUTPUT") and engine.get_tensor_shape(LOGITS)[2] != manifest.model.vocab_size:
        wrong.append(LOGITS)
    if missing or wrong:
        raise BundleError(
            f"the engine of {info.tier} is not of the graph that manifest.json describes ({(missing + wrong)[0]} "
            f"differs). Build the engines again: {command}"
        )
