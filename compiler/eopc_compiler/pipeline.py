"""The build as one ordered list of passes, each a function from a state to the next one.

The list is the table of contents; the comment beside a pass is the reason for its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean as mean

from eopc_compiler.board.rules import lists_for, require_allowed
from eopc_compiler.board.tensorrt_graph import outline_for_tensorrt
from eopc_compiler.checkpoint import open_checkpoint, with_tensors
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.importance import observe
from eopc_compiler.ladder import full_mask, read_masks
from eopc_compiler.observations_file import load_observations, save_observations
from eopc_compiler.planner import require_reachable
from eopc_compiler.pricing import must_prune, prices, reference_energy, storage_for
from eopc_compiler.proxies import compile_proxies
from eopc_compiler.recover import RECOVERY_TOKENS, RecoverSettings, recover_ladder, training_windows
from eopc_compiler.sequences import mean_loss
from eopc_compiler.shrink import cheapest_mask
from eopc_compiler.stage_bundle import check_and_measure, stage_bundle, write_page, write_plan
from eopc_compiler.stage_plan import plan_tiers, prompt_paths
from eopc_compiler.stage_repair import repair_tiers
from eopc_compiler.stage_selectors import train_selectors
from eopc_compiler.stage_text import read_calibration, read_text
from eopc_compiler.stage_weigh import weigh_groups
from eopc_compiler.state import CompileState, PrecisionTrial
from eopc_compiler.stored_model import (
    added_loss,
    dense_model,
    read_table,
    stored_weights,
)
from eopc_compiler.tier_graphs import write_graphs
from eopc_compiler.weights import WEIGHTS_FILE
from eopc_runtime import __version__
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.memory import release_memory

Pass = Callable[[CompileState], CompileState]

FFN_ALIGNMENT = 64  # channels; tensor cores and MatMulNBits blocks want widths in this step


def load_checkpoint(state: CompileState) -> CompileState:
    """Open the model and check what was asked of it: config, tensor shapes, given masks; no weight is read yet.

    Raises:
        ModelError: the checkpoint or a mask is not sound.
        UsageError: the workload is longer than the model's positions.
    """
    checkpoint = open_checkpoint(state.args.model)
    checkpoint.tokenizer()  # a model without a tokenizer should fail now, not after minutes
    widths = {d.intermediate_size for d in checkpoint.config.layers}
    align = next(a for a in (FFN_ALIGNMENT, 32, 16, 8, 4, 2, 1) if all(w % a == 0 for w in widths))
    read_masks(state.args.masks, checkpoint.config, align)  # a malformed mask should fail now, not after minutes
    work, limit = state.args.workload, checkpoint.config.max_position_embeddings
    if work.prompt_tokens + work.new_tokens > limit:
        raise UsageError(f"the workload {work} does not fit the {limit} positions of {checkpoint.name}. Shorten it.")
    prompt_paths(state.args, len(checkpoint.config.layers))  # nor should a depth that cannot be
    if state.args.context > limit:
        state.say(f"{checkpoint.name} has {limit} positions: prompt plus answer are limited to that")
    return replace(state, checkpoint=checkpoint, align=align)


def choose_dialect(state: CompileState) -> CompileState:
    """The dialect asked for, or the device's first one that carries the precision asked for."""
    profile = state.profile
    explicit = [p for p in state.args.precision if p != "auto"]
    names = [state.args.dialect] if state.args.dialect else list(profile.dialects)
    if not set(names) <= set(profile.dialects):
        raise DeviceError(f"{profile.name} takes the {' or '.join(profile.dialects)} dialect, not {names[0]}.")
    for name in names:
        if all(p in profile.precisions_for(name) for p in explicit):
            if name != profile.dialects[0] and not state.args.dialect:
                state.say(f"{'/'.join(explicit)} needs the {name} dialect on {profile.name} (see eopc devices)")
            return replace(state, dialect=DIALECTS[name])
    for precision in explicit:  # raises for the one that is not to be had, with what is
        profile.precision(precision, names[0])
    raise DeviceError(f"no dialect of {profile.name} carries all of {', '.join(explicit)}.")


def check_budgets(state: CompileState) -> CompileState:
    """Refuse what no tier could meet in any precision asked for; the planner knows which precision it will be.

    Raises:
        BudgetError: the smallest budget is below what the smallest tier needs.
    """
    if not state.args.masks:
        floor = min(prices(state, cheapest_mask(full_mask(state.config), state.align)).values())
        require_reachable(min(state.args.budgets_j), floor)
    return state


def observe_dense(state: CompileState) -> CompileState:
    """One pass of the calibration text through the dense model: unit scores, input peaks, held-out loss."""
    assert state.checkpoint and state.calibration and state.heldout
    assert state.selection is not None
    calibration, heldout, selection = state.calibration, state.heldout, state.selection
    most = state.args.calibration_windows
    inputs = {
        "version": __version__,
        "model": state.checkpoint.fingerprint,
        "text": [calibration.fingerprint, most],
        "heldout": heldout.fingerprint,
        "selection": selection.fingerprint,
        "parcel": state.align,
        "seed": state.args.seed,
        "rank": (rank := must_prune(state)),
    }

    def produce(path: Path) -> None:
        model = dense_model(state)
        report = state.counter("observing the dense model")
        metric_report = state.counter("sensitivity of the loss", "sequences")
        seen = observe(model, calibration.batches(most=most), state.align, state.args.seed, report, rank, metric_report)
        windows = [(f"{split.split}.{name}", t) for split in (heldout, selection) for name, t in split.domains]
        losses = {name: mean_loss(model, t, state.counter(f"loss on {name}", "windows")) for name, t in windows}
        save_observations(path, seen, losses)

    path = state.cache.get("observe", inputs, ".npz", produce)
    observations, losses = load_observations(path)
    orders = tuple(c.order() for c in observations.curves)
    return replace(state, observations=observations, orders=orders, dense_loss=losses)


def choose_precision(state: CompileState) -> CompileState:
    """The cheapest precision in joules whose added loss on held-out-from-calibration text is within the bound."""
    assert state.dialect is not None
    allowed = state.profile.precisions_for(state.dialect.name)
    wanted = allowed if "auto" in state.args.precision else state.args.precision
    full = full_mask(state.config)
    priced = []
    for precision in wanted:
        storage = storage_for(state, precision)
        if precision == "int4" and storage.block is None:
            continue  # no block divides this model's widths
        priced.append((reference_energy(state, full, storage), precision, storage))
    if not priced:
        raise UsageError("int4 needs input widths that are multiples of 16; choose --precision int8.")
    trials, chosen = [], None
    for energy_j, precision, storage in sorted(priced, key=lambda row: row[0]):
        if chosen is not None or len(priced) == 1 or storage.grid is None:
            added = None  # needless: already decided, nothing to decide, or exact
        else:
            state.say(f"trying {precision} ({energy_j:.3g} J dense at the reference workload)")
            added = added_loss(state, storage)
            release_memory()  # of this precision's model, before the next one's is loaded
        take = chosen is None and (added is None or max(added.values()) <= state.args.max_added_loss)
        if take:
            chosen = storage
        trials.append(PrecisionTrial(precision, energy_j, added, take))
    if chosen is None:
        raise UsageError(
            f"no precision of {', '.join(wanted)} stays within {state.args.max_added_loss} nats of the dense model. "
            f"Add int8 or fp16 to --precision, or raise --max-added-loss."
        )
    return replace(state, storage=chosen, trials=tuple(trials))


def write_plan_only(state: CompileState) -> CompileState:
    """Write plan.json; with --dry-run the build ends here."""
    write_plan(state)
    return state


def recover_shared(state: CompileState) -> CompileState:
    """With --recover: distil the weights that the tiers share from the dense model, all tiers together.

    By the sandwich rule, so that nesting holds; t0 stays within `RecoverSettings.t0_bound` nats of the dense model.
    """
    static = {
        f"t{i}": tier.mask for i, tier in enumerate(state.plan) if not tier.fills
    }  # the others share their weights
    minutes, masks = state.args.recover_minutes, list(static.values())
    if not minutes or all(mask == full_mask(state.config) for mask in masks):
        return state
    assert state.checkpoint and state.selection and state.calibration
    checkpoint, selection, args = state.checkpoint, state.selection, state.args
    inputs = {
        "version": __version__,
        "model": checkpoint.fingerprint,
        "text": state.calibration.fingerprint,
        "selection": selection.fingerprint,
        "masks": [asdict(m) for m in masks],
        "orders": [asdict(o) for o in state.orders],
        "minutes": minutes,
        "seed": args.seed,
    }

    def produce(path: Path) -> None:
        from safetensors.torch import save_file

        tokenizer, length = checkpoint.tokenizer(), args.calibration_length
        text = training_windows(tokenizer, state.domains, RECOVERY_TOKENS, length, args.seed)
        model = dense_model(state)
        settings = RecoverSettings(minutes=minutes, seed=args.seed)
        folder = state.cache.folder / "recovery"
        report = recover_ladder(
            model, model, masks, state.orders, text, selection.domains, settings, folder=folder, report=state.tick
        )
        save_file(report.tensors, path)
        for tier, before, after in zip(static, report.before, report.after, strict=True):
            state.say(f"{tier}: {mean(before.values()):.3f} -> {mean(after.values()):.3f} nats on selection text")

    state.say(f"recovering the shared weights for {minutes:g} minutes")
    path = state.cache.get("recover", inputs, ".safetensors", produce)
    return replace(state, checkpoint=with_tensors(checkpoint, path))


def store_weights(state: CompileState) -> CompileState:
    """Write weights.bin: every tensor of the ladder once."""
    assert state.storage is not None
    folder = stored_weights(state, state.storage, [t.mask for t in state.plan])
    table, histogram = read_table(folder)
    return replace(state, weights=folder / WEIGHTS_FILE, table=table, bytes_by_type=histogram)


def export_graphs(state: CompileState) -> CompileState:
    """Trace and write every tier's graphs."""
    assert state.dialect
    for index in range(len(state.plan)):
        state.say(f"exporting t{index} of t0..t{len(state.plan) - 1} ({state.dialect.name} dialect)")
        state = replace(state, graphs=(*state.graphs, write_graphs(state, index)))
    return state


def check_operators(state: CompileState) -> CompileState:
    """Hold every graph, as its TensorRT will get it, against what that version takes; weights are not read.

    Raises:
        RefusedGraphError: an operator breaks a rule; the message names it, the rule and the remedy.
    """
    assert state.dialect
    if lists := lists_for(state.profile.name, state.dialect.name):
        for index, graphs in enumerate(state.graphs):
            for graph in graphs.in_bundle(index).values():
                slots = None if graph == graphs.gather else state.args.context
                require_allowed(outline_for_tensorrt(graph, slots), lists, f"t{index}")
    return state


PASSES: tuple[Pass, ...] = (
    load_checkpoint,
    choose_dialect,  # before any work: a precision the device cannot carry is refused here
    check_budgets,  # and here a budget that nothing can meet
    read_text,
    read_calibration,
    observe_dense,  # before slicing: scores refer to original units
    choose_precision,  # before planning: joules depend on bytes per weight
    weigh_groups,  # before planning: the curves of KV groups and of FFN channels do not err alike
    plan_tiers,
    write_plan_only,  # the end of --dry-run
    recover_shared,  # before storing: every tier gains from it
    store_weights,  # before graphs: they point into it
    train_selectors,  # after storing, before fitting: channels are ranked on the maps as they will be fitted
    repair_tiers,  # after storing: what rounding did is repaired too
    export_graphs,
    check_operators,  # before staging: a refusal on the board would come too late to change the graph
    stage_bundle,  # before checks: what is checked is the bundle as it ships
    check_and_measure,  # parity gate, then perplexity through the runtime itself
    compile_proxies,  # an export bug is cheaper to see in the parity gate
    write_page,  # last: it shows what all passes before it have found
)


def run_passes(state: CompileState, passes: tuple[Pass, ...] = PASSES) -> CompileState:
    """Run the list in order; --dry-run stops after the plan is written."""
    for step in passes:
        state.say(step.__name__.replace("_", " "))
        state = step(state)
        release_memory()
        if state.args.dry_run and step is write_plan_only:
            break
    return state
