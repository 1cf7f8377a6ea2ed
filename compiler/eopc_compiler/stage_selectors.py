"""The pass of --train-selectors: scorers of every choosing tier, in a file of their own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean as mean

import torch

from eopc_compiler.planner import TierPlan
from eopc_compiler.recover import RECOVERY_TOKENS, training_windows
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import Scorer, Scorers
from eopc_compiler.selector_train import ScorerText, TrainedScorers, scorer_settings, train_scorers
from eopc_compiler.stage_bundle import write_plan
from eopc_compiler.state import CompileState
from eopc_compiler.stored_model import deployed_model, fit, repair_inputs


@dataclass(frozen=True, slots=True)
class StoredScorers:
    """What a file of scorers holds."""

    start: Selector  # the tier that they were trained on, and is fitted
    selector: Selector  # the tier that chooses by them
    scorers: Scorers
    gain: float  # nats on the selection text


def train_selectors(state: CompileState) -> CompileState:
    """With --train-selectors: train what ranks the channels of every tier that chooses some.

    Counts may move between layers; their sum, and so a tier's price, does not. plan.json is written anew.
    """
    choosing = {i: tier.selector for i, tier in enumerate(state.plan) if tier.selector is not None}
    if not state.args.train_selectors_minutes:
        return state
    if not choosing:
        state.say("no tier chooses channels, so there is nothing to train; --selectors on makes them choose")
        return state
    plan, files = list(state.plan), dict[int, Path]()
    for index, selector in choosing.items():
        files[index] = _trained(state, index, selector)
        plan[index] = _with_counts(plan[index], files[index])
    state = replace(state, plan=tuple(plan), scorers=files)
    write_plan(state)
    return state


def read_scorers(path: Path) -> StoredScorers:
    """What `_trained` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    core, pool, before, after = (tuple(tensors[name].tolist()) for name in ("core", "pool", "before", "after"))
    scorers = tuple(Scorer(tensors[f"{i}.prior"], tensors[f"{i}.weight"]) if n else None for i, n in enumerate(after))
    return StoredScorers(Selector(core, pool, before), Selector(core, pool, after), scorers, float(tensors["gain"]))


def _trained(state: CompileState, index: int, selector: Selector) -> Path:
    """The file of a tier's scorers."""
    assert state.checkpoint and state.selection and state.calibration and state.storage and state.weights
    args, checkpoint, selection, calibration = state.args, state.checkpoint, state.selection, state.calibration
    storage, minutes = state.storage, state.args.train_selectors_minutes
    inputs = {
        **repair_inputs(state),
        "selector": asdict(selector),
        "weights": state.weights.parent.name,
        "selection": selection.fingerprint,
        "minutes": minutes,
        "seed": args.seed,
    }

    def produce(path: Path) -> None:
        model = deployed_model(state, storage)
        tokenizer, length = checkpoint.tokenizer(), args.calibration_length
        text = training_windows(tokenizer, state.domains, RECOVERY_TOKENS, length, args.seed)
        start = fit(state, model, selector, args.calibration_windows, state.counter(f"fitting t{index}"))
        settings = scorer_settings(minutes, seed=args.seed)
        folder = state.cache.folder / "scorers"
        texts = ScorerText(
            text, calibration.batches(most=args.calibration_windows), selection.domains, args.choice_part
        )
        found = train_scorers(model, selector, start, texts, settings, folder=folder, report=state.tick)
        _save(path, selector, found)
        before, after = mean(found.before.values()), mean(found.after.values())
        state.say(f"t{index}: {before:.3f} -> {after:.3f} nats on selection text, {found.state.step} steps")

    state.say(f"training what ranks the channels of t{index} for {minutes:g} minutes")
    return state.cache.get(f"scorers-t{index}", inputs, ".safetensors", produce)


def _save(path: Path, start: Selector, found: TrainedScorers) -> None:
    from safetensors.torch import save_file

    counts = {"core": start.core, "pool": start.pool, "before": start.chosen, "after": found.selector.chosen}
    tensors = {name: torch.tensor(values) for name, values in counts.items()}
    tensors["gain"] = torch.tensor(mean(found.before.values()) - mean(found.after.values()))
    for i, scorer in enumerate(found.scorers):
        if scorer is not None:
            tensors |= {f"{i}.prior": scorer.prior, f"{i}.weight": scorer.weight}
    save_file(tensors, path)


def _with_counts(tier: TierPlan, path: Path) -> TierPlan:
    stored = read_scorers(path)
    return replace(tier, selector=stored.selector, loss=tier.loss - stored.gain, note=f"{tier.note}, trained")
