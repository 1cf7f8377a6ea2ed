"""The whole model as it is stored, and tiers repaired on it: weights.bin, written once and read back in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from eopc_compiler.assemble import write_weights
from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.cut import cut_weights
from eopc_compiler.extras import EXTRAS_SHARE, own_matrices, rounding
from eopc_compiler.handover import ContinuationLoss, Met, walk
from eopc_compiler.importance import Report
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.load_tiers import load_tier
from eopc_compiler.model import Llama, build_model
from eopc_compiler.pricing import plan_energy
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import FittedChannels, fit_selector
from eopc_compiler.sequences import mean_loss
from eopc_compiler.state import CompileState
from eopc_compiler.storage import Storage
from eopc_compiler.tier_repair import RepairedTier, repair_tiers
from eopc_compiler.token_fit import fit_token_scorers
from eopc_compiler.token_selector import PromptPath, PrunedPrompt
from eopc_compiler.weight_table import WeightTable
from eopc_compiler.weights import WEIGHTS_FILE, WeightReader
from eopc_runtime import __version__
from eopc_runtime.memory import trim_heap
from eopc_runtime.tier_info import PASS

ROUNDING_WINDOWS = 6  # per domain
FINALIST_WINDOWS = 4  # per domain, to repair on and to measure on: enough to tell candidates apart
TOKEN_WINDOWS = 6  # per domain, forth and back


def deployed_model(state: CompileState, storage: Storage) -> Llama:
    """The whole model as it is stored: deployment form, units sorted, rounded, rotated where quantised; fp32."""
    folder = stored_weights(state, storage, [full_mask(state.config)])
    table, _ = read_table(folder)
    return load_tier(state.config, table, WeightReader(folder / WEIGHTS_FILE), state.args.context)


def added_loss(state: CompileState, storage: Storage) -> dict[str, float]:
    """Nats per token that quantising the dense model adds, by domain, on the selection split."""
    assert state.selection is not None
    model = deployed_model(state, storage)
    added = {}
    for name, windows in state.selection.domains:
        report = state.counter(f"{storage.precision} on {name}", "windows")
        added[name] = mean_loss(model, windows, report) - state.dense_loss[f"selection.{name}"]
    return added


def stored_weights(state: CompileState, storage: Storage, masks: list[Mask]) -> Path:
    """A folder with weights.bin for a ladder and table.json; the model is rounded once, whatever the ladder."""
    assert state.checkpoint and state.calibration
    checkpoint, calibration, config = state.checkpoint, state.calibration, state.config
    full = [full_mask(config)]
    inputs = {
        "version": __version__,
        "model": checkpoint.fingerprint,
        "orders": [asdict(o) for o in state.orders],
        "masks": [asdict(m) for m in masks],
        "storage": asdict(storage),
        "text": calibration.fingerprint,
        "context": state.args.context,
    }

    def produce(path: Path) -> None:
        file = path / WEIGHTS_FILE
        path.mkdir()
        if storage.grid and masks != full:
            whole = stored_weights(state, storage, full)
            table, histogram = cut_weights(
                file, read_table(whole)[0], WeightReader(whole / WEIGHTS_FILE), config, masks
            )
        else:
            tokens, report = rounding_text(calibration), state.counter(f"writing {storage.precision} weights")
            args = (config, checkpoint.tensor, state.orders, masks, storage, state.args.context)
            table, histogram = write_weights(file, *args, state.observations, tokens, report)
        content = {"entries": table.to_json(), "bytes": histogram}
        (path / "table.json").write_text(json.dumps(content), encoding="utf-8")
        trim_heap()  # of what rounding held, before the model is read back

    return state.cache.get("weights", inputs, "", produce)


def read_table(folder: Path) -> tuple[WeightTable, dict[str, int]]:
    """Where everything lies in a folder's weights.bin, and how many bytes each stored type takes."""
    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    return WeightTable.from_json(content["entries"]), content["bytes"]


def dense_model(state: CompileState) -> Llama:
    """The whole model in fp32, checkpoint form."""
    assert state.checkpoint is not None
    tensors = {name: state.checkpoint.tensor(name) for name in state.checkpoint.tensor_names}
    return build_model(state.config, tensors, state.args.context)


def rounding_text(calibration: CalibrationSet) -> list[Tensor]:
    """The windows GPTQ sees: fewer than statistics for pruning need, as its cost grows with every token."""
    return [batch.tokens for batch in calibration.batches(4, most=ROUNDING_WINDOWS)]


def repair(
    state: CompileState,
    model: Llama,
    ladders: Sequence[Sequence[Mask]],
    most: int | None = None,
    report: Report | None = None,
    pruned: PrunedPrompt | None = None,
    walked: Sequence[Met] | None = None,
) -> list[RepairedTier]:
    """Tiers repaired on the calibration text, each within its share of bytes of its own.

    Args:
        ladders: of every tier, the pruned tiers from the smallest up to itself.
        most: windows of a domain; None for all.
        pruned: how prompts run in the plan they are repaired for; None for through all layers.
        walked: what `calibration_walk` gives for as many windows, where prompts run through all layers.
    """
    assert state.calibration and state.storage and state.observations
    storage, config, curves = state.storage, state.config, state.observations.curves
    tiers, share = pruned_tiers(state), None if state.args.independent else EXTRAS_SHARE
    jobs = [(ladder[-1], own_matrices(config, ladder, tiers, curves, storage, share)) for ladder in ladders]
    text = state.calibration.batches(most=most)

    def count(done: int, total: int) -> None:
        if report:
            report(done, total)
        trim_heap()  # what one layer leaves free would not fit the next, which takes other pieces

    return repair_tiers(model, jobs, text, state.args.repair_part, rounding(storage), count, pruned, walked)


def repaired_loss(
    state: CompileState,
    model: Llama,
    losses: ContinuationLoss,
    ladder: Sequence[Mask],
    report: Report,
    walked: Sequence[Met] | None = None,
) -> float:
    """Nats per continuation token, mean of the domains, of a ladder's last tier repaired on FINALIST_WINDOWS.

    Args:
        losses: what measures it, and says how prompts run; others as those of `repair`.
    """
    ((tier, _),) = repair(state, model, [ladder], FINALIST_WINDOWS, report, losses.pruned, walked)
    return mean(losses.of_tier(tier, ladder[-1]).values())


def pruned_tiers(state: CompileState) -> int:
    """Tiers that may have matrices of their own: one for every mask, or budget that the dense model exceeds."""
    assert state.storage
    dense_j = plan_energy(state, full_mask(state.config), state.storage)
    return len(state.args.masks) or sum(dense_j > budget_j for budget_j in state.args.budgets_j)


def calibration_walk(state: CompileState, model: Llama, most: int) -> tuple[Met, ...]:
    """What the whole model does with the calibration text, for several repairs: hidden states of every layer."""
    assert state.calibration
    return tuple(met.halved() for met in walk(model, state.calibration.batches(most=most), state.args.repair_part))


def fit(
    state: CompileState,
    model: Llama,
    selector: Selector,
    most: int | None = None,
    report: Report | None = None,
) -> tuple[FittedChannels, ...]:
    """A tier that chooses channels, fitted on the calibration text; arguments as those of `repair`."""
    assert state.calibration and state.storage
    text, dtype = state.calibration.batches(most=most), getattr(torch, state.storage.dtype)
    return fit_selector(model, selector, text, state.args.choice_part, rounding(state.storage), dtype, report)


def pruned_prompt(
    state: CompileState, storage: Storage, path: PromptPath | None, model: Callable[[], Llama]
) -> PrunedPrompt | None:
    """A path with what ranks the tokens where it chooses some; fitted once, for every layer but the last.

    Calibration prompts stand for those of the workload, of which a smaller part may run.

    Args:
        model: what gives `deployed_model`, asked only where nothing is fitted yet.
    """
    if path is None or not path.share:
        return None if path is None else PrunedPrompt(path)
    assert state.calibration
    calibration = state.calibration
    inputs = {**repair_inputs(state), "storage": asdict(storage), "windows": TOKEN_WINDOWS}

    def produce(file: Path) -> None:
        from safetensors.torch import save_file

        count = state.counter("fitting what ranks tokens", "windows")
        found = fit_token_scorers(model(), calibration.batches(1, TOKEN_WINDOWS), state.args.choice_part, count)
        save_file({str(i): w for i, w in found.items()}, file)

    from safetensors.torch import load_file

    fitted = load_file(state.cache.get("token-scorers", inputs, ".safetensors", produce))
    scorers = {i: fitted[str(i)] for i in path.chosen(len(state.config.layers))}
    return PrunedPrompt(path, scorers, min(PASS, state.args.workload.prompt_tokens))


def repair_inputs(state: CompileState) -> dict[str, Any]:
    """What a repair depends on, besides the mask."""
    assert state.checkpoint and state.calibration and state.storage
    return {
        "version": __version__,
        "model": state.checkpoint.fingerprint,
        "text": [state.calibration.fingerprint, state.args.calibration_windows],
        "storage": asdict(state.storage),
        "independent": state.args.independent,
        "tiers": pruned_tiers(state),
        "prompt": [state.args.prompt_part, state.args.repair_part],
    }
