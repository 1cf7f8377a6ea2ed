"""Engines of a bundle, loaded on demand; what is shared by tiers lives here.

Engines do not share weights, so loaded tiers cost the sum of theirs. The least recently used go when the plans exceed
a byte limit, and all of them when the GPU has no memory left for the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.engines import EngineRecord, check_plan_file, set_folder
from eopc_runtime.errors import BundleError, DeviceLostError, DeviceMemoryError
from eopc_runtime.runners.tensorrt.api import Engine, Loader
from eopc_runtime.runners.tensorrt.cuda import Device
from eopc_runtime.runners.tensorrt.gather import Choice, Gather, check_choice
from eopc_runtime.runners.tensorrt.memory import Arenas, Scratch
from eopc_runtime.runners.tensorrt.phase import Phase, Workspace
from eopc_runtime.runners.tensorrt.tier import TensorRtTier, check_caches
from eopc_runtime.tier_info import TierInfo

RESIDENT_SHARE = 0.5  # of the GPU's memory for loaded plans; a Jetson's is also the system's


class TensorRtPool:
    """Hands out TensorRT tiers; see `RunnerPool`."""

    def __init__(
        self,
        bundle: Bundle,
        key: str,
        records: Sequence[EngineRecord],
        loader: Loader,
        device: Device,
        max_resident_bytes: int,
    ) -> None:
        """Hold a set of engines that fits this machine (see `engines.check_engine`); nothing is loaded yet.

        Raises:
            BundleError: a tier has no engine, or engines differ in the length of their caches.
        """
        command = f"eopc engine {bundle.root}"
        self._bundle, self._key, self._limit = bundle, key, max_resident_bytes
        self._records = records_by_tier(records)
        self.slots = check_set(bundle, key, self._records, command)
        self._device, stream = device, device.new_stream()
        self._space = Workspace(device, stream, loader, Scratch(device, stream), command)
        manifest = bundle.manifest
        dtype = np.dtype(manifest.compute_dtype)
        self._choices = {info.tier: Choice(manifest, info) for info in manifest.tiers if info.selector}
        room = max((choice.nbytes for choice in self._choices.values()), default=0)
        layers, head_dim = manifest.tiers[0].layers, manifest.model.head_dim
        self._arenas = Arenas(device, stream, layers, self.slots, head_dim, dtype, room)
        self._loaded: OrderedDict[str, TensorRtTier] = OrderedDict()
        self._verified: set[str] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the tiers run, for example that a CUDA graph was refused."""
        return tuple(dict.fromkeys(self._space.remarks))

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the loaded tiers, least recently used first."""
        return tuple(self._loaded)

    def get(self, tier: str) -> TensorRtTier:
        """The runner of a tier; DeviceMemoryError when it does not fit even alone."""
        runner = self._loaded.get(tier)
        if runner is None:
            info = self._bundle.tier(tier)
            while self._loaded and sum(map(self._plan_bytes, (*self._loaded, tier))) > self._limit:
                self._unload()
            runner = self._loaded[tier] = self._load_making_room(info)
        self._loaded.move_to_end(tier)
        return runner

    def close(self) -> None:
        """Free everything; a device that is lost has freed it already."""
        while self._loaded:
            self._unload()
        with suppress(DeviceLostError):
            self._arenas.release()
            self._space.scratch.release()
            self._device.end_stream(self._space.stream)

    def _plan_bytes(self, tier: str) -> int:
        return sum(record.bytes for record in self._records[tier].values())

    def _unload(self) -> None:
        _, runner = self._loaded.popitem(last=False)
        runner.close()

    def _load_making_room(self, info: TierInfo) -> TensorRtTier:
        try:
            return self._load(info)
        except DeviceMemoryError:
            if not self._loaded:
                raise
        while self._loaded:
            self._unload()
        return self._load(info)

    def _load(self, info: TierInfo) -> TensorRtTier:
        records, choice = self._records[info.tier], self._choices.get(info.tier)
        gather = self._load_gather(records["gather"], choice) if choice else None
        phases: dict[str, Phase] = {}
        try:
            for phase, record in records.items():
                if phase != "gather":
                    phases.update(self._load_phases(info, phase, record, choice))
        except Exception:
            for made in phases.values():
                made.close()
            raise
        return TensorRtTier(self._bundle.manifest, info, phases["prefill"], phases["decode"], self._arenas, gather)

    def _load_plan(self, record: EngineRecord) -> Engine:
        """Read a plan whose file is whole."""
        assert record.file is not None, "proxies were refused when the set was chosen"
        check_plan_file(self._bundle.root, self._key, record, verify=record.file not in self._verified)
        self._verified.add(record.file)
        plan = set_folder(self._bundle.root, self._key) / record.file
        return self._space.loader.load(plan, self._space.command)

    def _load_gather(self, record: EngineRecord, choice: Choice) -> Gather:
        """The engine that gathers what a prompt favours."""
        engine = self._load_plan(record)
        check_choice(engine, choice, record.tier, self._space.command)
        return Gather(self._space, engine, f"{record.tier} gather", choice)

    def _load_phases(self, info: TierInfo, phase: str, record: EngineRecord, choice: Choice | None) -> dict[str, Phase]:
        """The phases of one plan, each with a context of its own."""
        space, engine = self._space, self._load_plan(record)
        check_caches(engine, self._bundle.manifest, info, self.slots, space.command)
        if choice is not None:
            check_choice(engine, choice, info.tier, space.command)
        held = {"prefill": {"updated": choice.recorded}, "decode": {"read": choice.rows}} if choice else {}
        names = ("prefill", "decode") if phase == "both" else (phase,)
        made: dict[str, Phase] = {}
        try:
            for profile, name in enumerate(names):
                title, graphs = f"{info.tier} {name}", name == "decode"
                made[name] = Phase(space, engine, profile, title, graphs=graphs, **held.get(name, {}))
        except Exception:
            for part in made.values():
                part.close()
            raise
        return made


def records_by_tier(records: Sequence[EngineRecord]) -> dict[str, dict[str, EngineRecord]]:
    """Records by tier, then by phase."""
    tiers: dict[str, dict[str, EngineRecord]] = {}
    for record in records:
        tiers.setdefault(record.tier, {})[record.phase] = record
    return tiers


def check_set(bundle: Bundle, key: str, tiers: dict[str, dict[str, EngineRecord]], command: str) -> int:
    """Return the cache slots of a complete set; BundleError when it is not complete or engines do not go together."""
    for info in bundle.manifest.tiers:
        complete = [{"prefill", "gather", "decode"}] if info.selector else [{"both"}, {"prefill", "decode"}]
        found = set(tiers.get(info.tier, ()))
        if found not in complete:
            lacking = [f"{info.tier} {phase}" for phase in sorted(complete[-1] - found) if found] or [info.tier]
            raise BundleError(f"the engines of {key} have none for {' and '.join(lacking)}. Build them: {command}")
    slots = {record.cache_len for phases in tiers.values() for record in phases.values()}
    if len(slots) > 1:
        raise BundleError(
            f"the engines of {key} were built for caches of {' and '.join(map(str, sorted(slots)))} tokens, so a "
            f"sequence could not change its tier. Build them again: {command}"
        )
    return slots.pop()
