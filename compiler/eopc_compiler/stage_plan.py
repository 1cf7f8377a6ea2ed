"""The pass that plans the ladder: what every tier keeps, and what its prompts skip or choose, within its budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean as mean

from eopc_compiler.calibration import domain_means
from eopc_compiler.handover import ContinuationLoss, Met, losses_of_tiers
from eopc_compiler.ladder import Mask, full_mask, read_masks
from eopc_compiler.planner import Objective, TierPlan, plan_ladder, plan_masks
from eopc_compiler.prefill_planner import Behind, paths_to_try, plan_prefill
from eopc_compiler.pricing import plan_energy, selector_energy
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import selected_losses
from eopc_compiler.selector_planner import Choosing, plan_selectors
from eopc_compiler.state import BuildArgs, CompileState
from eopc_compiler.stored_model import (
    FINALIST_WINDOWS,
    calibration_walk,
    deployed_model,
    fit,
    pruned_prompt,
    pruned_tiers,
    repair,
    repair_inputs,
    repaired_loss,
)
from eopc_compiler.token_selector import PARTS, PromptPath, PrunedPrompt
from eopc_runtime.errors import UsageError

SHARES = (0.0, 5 / 16)  # of a prompt's tokens in the layers that others skip


def plan_tiers(state: CompileState) -> CompileState:
    """Decide what every tier keeps, so that its price at the reference workload is within its budget."""
    assert state.storage and state.observations and state.selection and state.checkpoint
    storage, full = state.storage, full_mask(state.config)

    def price(mask: Mask) -> float:
        return plan_energy(state, mask, storage)

    if state.args.masks:
        if asks_for_a_path(state.args):
            raise UsageError(
                "--mask gives every tier, so --prefill-depth and --prefill-tokens have no place. Leave one of them out."
            )
        orders, masks = read_masks(state.args.masks, state.config, state.align)
        return replace(state, orders=orders, plan=plan_masks(full, masks, state.args.budgets_j, price))
    asked = asks_for_a_path(state.args) or state.args.selectors == "on"
    if not pruned_tiers(state) and not asked:
        return replace(state, plan=plan_masks(full, (), state.args.budgets_j, price))  # nothing to search
    inputs = {
        **repair_inputs(state),
        "observed": [asdict(c) for c in state.observations.curves],
        "selection": state.selection.fingerprint,
        "budgets": state.args.budgets_j,
        "dense_j": price(full),  # stands for device, workload, precision and dialect
        "halves_j": price(Mask(full.layers[::2])),
        "search_seconds": state.args.search_seconds,
        "prefill": [state.args.prefill_depth, state.args.prefill_tokens],
        "selectors": state.args.selectors,
        "seed": state.args.seed,
    }

    def produce(path: Path) -> None:
        assert state.selection and state.observations
        model, args, prompt = deployed_model(state, storage), state.args, state.args.prompt_part
        all_text, text = state.selection.batches(), state.selection.batches(most=FINALIST_WINDOWS)
        selection = ContinuationLoss(model, text, prompt)

        def repaired(losses: ContinuationLoss, ladder: Sequence[Mask], walked: tuple[Met, ...] | None = None) -> float:
            return repaired_loss(state, model, losses, ladder, state.counter("repairing a candidate"), walked)

        def measured(mask: Mask) -> float:
            return mean(selection.of_mask(mask).values())

        walk = lru_cache(lambda: calibration_walk(state, model, FINALIST_WINDOWS))  # once, where there are finalists

        def finalist(ladder: Sequence[Mask]) -> float:
            return repaired(selection, ladder, walk())

        def shipped(ladders: Sequence[Sequence[Mask]]) -> list[float]:
            walk.cache_clear()  # it holds hidden states of every layer, and so many windows take as much again
            count = state.counter("repairing the best candidates")
            tiers = repair(state, model, ladders, args.calibration_windows, count)
            masked = [(tier, ladder[-1]) for (tier, _), ladder in zip(tiers, ladders, strict=True)]
            return [mean(losses.values()) for losses in losses_of_tiers(model, all_text, prompt, masked)]

        objective = Objective(state.observations.curves, price, measured, finalist, state.align, shipped)
        tiers = plan_ladder(full, args.budgets_j, objective, args.search_seconds, args.seed, state.tick)
        walk.cache_clear()

        def pruned(path: PromptPath | None) -> PrunedPrompt | None:
            return pruned_prompt(state, storage, path, lambda: model)

        def behind(path: PromptPath) -> Behind:
            def losses() -> ContinuationLoss:  # made when it is asked for, and not kept: it holds every layer's inputs
                return ContinuationLoss(model, text, prompt, pruned(path))

            return Behind(
                price=lambda mask: plan_energy(state, mask, storage, path),
                whole=lru_cache(lambda: mean(losses().of_mask(full).values())),
                repaired=lambda ladder: repaired(losses(), ladder),
            )

        paths = {path: behind(path) for path in prompt_paths(args, len(full.layers))}
        always = asks_for_a_path(args)
        tiers = plan_prefill(tiers, paths, state.observations.curves, state.align, state.say, always)

        def chosen_loss(selector: Selector) -> float:
            count = state.counter("fitting a choosing tier")
            fitted = fit(state, model, selector, FINALIST_WINDOWS, count)
            return mean(domain_means(text, selected_losses(model, selector, fitted, text, args.choice_part)).values())

        def fixed_loss(ladder: Sequence[Mask], path: PromptPath | None) -> float:
            return repaired(ContinuationLoss(model, text, args.choice_part, pruned(path)), ladder)

        if args.selectors == "on" or (args.selectors == "auto" and storage.grid is None):
            choosing = Choosing(
                price, lambda core, selector: selector_energy(state, core, storage, selector), chosen_loss, fixed_loss
            )
            always = args.selectors == "on"
            tiers = plan_selectors(tiers, choosing, state.observations.curves, state.align, state.say, always)
        path.write_text(json.dumps([asdict(t) for t in tiers]), encoding="utf-8")

    path = state.cache.get("plan", inputs, ".json", produce)
    return replace(state, plan=tuple(TierPlan.from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))))


def asks_for_a_path(args: BuildArgs) -> bool:
    """Whether some tier is to prune its prompts, whether or not that wins."""
    return isinstance(args.prefill_depth, int) or isinstance(args.prefill_tokens, float)


def prompt_paths(args: BuildArgs, layers: int) -> tuple[PromptPath, ...]:
    """What prompts may skip: as far as the paper goes by layers or by tokens, nothing, or what was asked for.

    Raises:
        UsageError: there are no so many layers to skip some, or no such share of the tokens.
    """
    depth, share = args.prefill_depth, args.prefill_tokens
    if isinstance(share, float) and (not 0 < share < 1 or share * PARTS % 1):
        raise UsageError(
            f"--prefill-tokens {share:g} must be a multiple of 1/{PARTS} between 0 and 1, for example 0.5."
        )
    if depth == "all":
        if isinstance(share, float):
            raise UsageError("--prefill-tokens needs layers that tokens can skip, and --prefill-depth all has none.")
        return ()
    if depth == "auto":
        return paths_to_try(layers, SHARES if share == "auto" else (share,) if isinstance(share, float) else (0.0,))
    if not 1 <= depth < layers:
        raise UsageError(f"--prefill-depth {depth} must be between 1 and {layers - 1}, one less than the layers.")
    return (PromptPath(depth, share if isinstance(share, float) else 0.0),)
