"""The pass that weighs KV groups against FFN channels: by what repaired tiers really lose, not by their curves alone.

Curves are of second order and of one layer at a time. Channels lose about what theirs say, as the map they feed is
fitted anew. Groups were measured to cost several times what theirs say (README), which repair makes up for less. So one
weight for all of them is measured for the model, on two tiers of the same price: one cut as the curves say, one in its
channels alone. It leaves the order of groups among themselves as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean as mean

from eopc_compiler.handover import ContinuationLoss
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.pricing import plan_energy
from eopc_compiler.shrink import group_weight, probe_masks
from eopc_compiler.state import CompileState
from eopc_compiler.stored_model import (
    FINALIST_WINDOWS,
    calibration_walk,
    deployed_model,
    pruned_tiers,
    repair_inputs,
    repaired_loss,
)


def weigh_groups(state: CompileState) -> CompileState:
    """Multiply the curves of KV groups by what removing them costs beside FFN channels, if tiers will be pruned."""
    assert state.observations and state.storage and state.selection
    storage, curves, full = state.storage, state.observations.curves, full_mask(state.config)

    def price(mask: Mask) -> float:
        return plan_energy(state, mask, storage)

    if state.args.masks or not pruned_tiers(state):
        return state
    masks = probe_masks(full, curves, price, state.align)
    if masks is None:
        return state
    inputs = {
        **repair_inputs(state),
        "observed": [asdict(c) for c in curves],
        "selection": state.selection.fingerprint,
        "masks": [asdict(m) for m in masks],
        "windows": FINALIST_WINDOWS,
    }

    def produce(path: Path) -> None:
        assert state.selection
        model = deployed_model(state, storage)
        losses = ContinuationLoss(model, state.selection.batches(), state.args.prompt_part)
        walked, dense = calibration_walk(state, model, FINALIST_WINDOWS), mean(losses.of_mask(full).values())

        def added(mask: Mask) -> float:
            count = state.counter("weighing KV groups")
            return repaired_loss(state, model, losses, [mask], count, walked) - dense

        weight = group_weight(curves, masks, (added(masks[0]), added(masks[1])))
        path.write_text(json.dumps({"kv_groups": weight}), encoding="utf-8")

    path = state.cache.get("weight", inputs, ".json", produce)
    weight = float(json.loads(path.read_text(encoding="utf-8"))["kv_groups"])
    state.say(f"removing KV groups loses {weight:.1f} x what their curves say, beside FFN channels")
    weighed = tuple(c.weighed(weight) for c in curves)
    return replace(state, observations=replace(state.observations, curves=weighed))
