"""The pass that plans the ladder: what every tier keeps, and what its prompts skip or choose, within its budget."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

from eopc_compiler.handover import ContinuationLoss, Met
from eopc_compiler.ladder import Mask, full_mask, read_masks
from eopc_compiler.planner import Objective, TierPlan, plan_ladder, plan_masks
from eopc_compiler.prefill_planner import Behind, depths_to_try, plan_prefill
from eopc_compiler.pricing import plan_energy, selector_energy
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import domain_means, selected_losses
from eopc_compiler.selector_planner import Choosing, plan_selectors
from eopc_compiler.state import CompileState
from eopc_compiler.stored_model import calibration_walk, deployed_model, fit, repair, repair_inputs
from eopc_runtime.errors import UsageError

FINALIST_WINDOWS = 4  # per domain: enough to tell candidates apart


def plan_tiers(state: CompileState) -> CompileState:
    """Decide what every tier keeps, so that its price at the reference workload is within its budget."""
    assert state.storage and state.observations and state.selection and state.checkpoint
    storage, full = state.storage, full_mask(state.config)

    def price(mask: Mask) -> float:
        return plan_energy(state, mask, storage)

    if state.args.masks:
        if isinstance(state.args.prefill_depth, int):
            raise UsageError("--mask gives every tier, so --prefill-depth has no place. Leave one of them out.")
        orders, masks = read_masks(state.args.masks, state.config, state.align)
        return replace(state, orders=orders, plan=plan_masks(full, masks, state.args.budgets_j, price))
    asked = isinstance(state.args.prefill_depth, int) or state.args.selectors == "on"
    if price(full) <= min(state.args.budgets_j) and not asked:
        return replace(state, plan=plan_masks(full, (), state.args.budgets_j, price))  # nothing to search
    inputs = {
        **repair_inputs(state),
        "observed": [asdict(c) for c in state.observations.curves],
        "selection": state.selection.fingerprint,
        "budgets": state.args.budgets_j,
        "dense_j": price(full),  # stands for device, workload, precision and dialect
        "halves_j": price(Mask(full.layers[::2])),
        "search_seconds": state.args.search_seconds,
        "prefill_depth": state.args.prefill_depth,
        "selectors": state.args.selectors,
        "seed": state.args.seed,
    }

    def produce(path: Path) -> None:
        assert state.selection and state.observations
        model, text, args = deployed_model(state, storage), state.selection.batches(), state.args
        selection = ContinuationLoss(model, text, args.prompt_part)

        def repaired(losses: ContinuationLoss, mask: Mask, walked: tuple[Met, ...] | None = None) -> float:
            count = state.counter("repairing a candidate")
            tier, _ = repair(state, model, mask, FINALIST_WINDOWS, count, losses.depth, walked)
            return mean(losses.of_tier(tier, mask).values())

        def measured(mask: Mask) -> float:
            return mean(selection.of_mask(mask).values())

        walk = lru_cache(lambda: calibration_walk(state, model, FINALIST_WINDOWS))  # once, where there are finalists

        def finalist(mask: Mask) -> float:
            return repaired(selection, mask, walk())

        objective = Objective(state.observations.curves, price, measured, finalist, state.align)
        tiers = plan_ladder(full, args.budgets_j, objective, args.search_seconds, args.seed, state.tick)
        walk.cache_clear()  # it holds hidden states of every layer

        def behind(depth: int) -> Behind:
            def losses() -> ContinuationLoss:  # made when it is asked for, and not kept: it holds every layer's inputs
                return ContinuationLoss(model, text, args.prompt_part, depth)

            return Behind(
                price=lambda mask: plan_energy(state, mask, storage, depth),
                whole=lru_cache(lambda: mean(losses().of_mask(full).values())),
                repaired=lambda mask: repaired(losses(), mask),
            )

        depths = {d: behind(d) for d in prefill_depths(args.prefill_depth, len(full.layers))}
        asked = isinstance(args.prefill_depth, int)
        tiers = plan_prefill(tiers, depths, state.observations.curves, state.align, state.say, asked)

        def chosen_loss(selector: Selector) -> float:
            count = state.counter("fitting a choosing tier")
            fitted = fit(state, model, selector, FINALIST_WINDOWS, count)
            return mean(domain_means(text, selected_losses(model, selector, fitted, text, args.choice_part)).values())

        def fixed_loss(mask: Mask, depth: int | None) -> float:
            return repaired(ContinuationLoss(model, text, args.choice_part, depth), mask)

        if args.selectors == "on" or (args.selectors == "auto" and storage.grid is None):
            choosing = Choosing(
                price, lambda core, selector: selector_energy(state, core, storage, selector), chosen_loss, fixed_loss
            )
            always = args.selectors == "on"
            tiers = plan_selectors(tiers, choosing, state.observations.curves, state.align, state.say, always)
        path.write_text(json.dumps([asdict(t) for t in tiers]), encoding="utf-8")

    path = state.cache.get("plan", inputs, ".json", produce)
    return replace(state, plan=tuple(TierPlan.from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))))


def prefill_depths(asked: int | Literal["auto", "all"], layers: int) -> tuple[int, ...]:
    """Depths of prefill to try: those of the paper's range, none, or the one asked for.

    Raises:
        UsageError: the model has no so many layers to skip some.
    """
    if asked == "auto":
        return depths_to_try(layers)
    if asked == "all":
        return ()
    if not 1 <= asked < layers:
        raise UsageError(f"--prefill-depth {asked} must be between 1 and {layers - 1}, one less than the layers.")
    return (asked,)
