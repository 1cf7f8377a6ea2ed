"""The shipped ladder measured: handover and repair, the planner against simple ladders, and the price of nesting.

    python benchmarks/ladder.py --corpora FOLDER --device orin --budgets 9,7,5J

For every budget, continuation losses (nats per token added to the dense model's, after a prompt of 128 of 256 tokens)
on documents that neither calibration nor the search has seen, all at predicted joules within the same budget:

    throughout   the tier's layers run prompt and answer, repaired for that, as wide as what the prompt saves allows
    handed over  the same tier answers behind the cache of t0
    repaired     the tier repaired on the cache it inherits: what a bundle ships
    depth, width, uniform   only layers / only FFN and KV units by their curves / the same share everywhere, repaired
    independent  the same search without nesting, every matrix its own

"repaired, all" has a matrix of its own in every layer that needs one, "repaired" within the bytes a bundle allows.
Behind ± stands half of the 95 % interval, over sequences, of a row's difference from "repaired, all": two rows that
differ by less cannot be told apart.

Calibrated on the built-in text, as in `eopc build`; with --calibrate own on what the model writes itself too, as with
`eopc build --own-text`; with --calibrate corpora on other documents of the same three corpora, as much text of each.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import click
import torch
from corpora import add_corpora_option, calibration_set, evaluation_windows
from torch import Tensor

from eopc_compiler.cache import StageCache
from eopc_compiler.calibration import Batch, CalibrationSet, Split, by_domain
from eopc_compiler.handover import ContinuationLoss
from eopc_compiler.ladder import Mask, full_mask, keep_shares
from eopc_compiler.model import Llama
from eopc_compiler.pipeline import PASSES, read_calibration, run_passes
from eopc_compiler.planner import up_to
from eopc_compiler.pricing import plan_energy, reference_energy
from eopc_compiler.sequences import fast_math, next_token_losses, run_blocks
from eopc_compiler.shrink import shrink_to_budget
from eopc_compiler.stage_plan import plan_tiers
from eopc_compiler.stage_text import window_counts
from eopc_compiler.state import BuildArgs, CompileState
from eopc_compiler.stored_model import deployed_model, repair
from eopc_compiler.tier_model import tier_view
from eopc_compiler.tier_repair import apply_repair, repair_tier
from eopc_runtime.profiles import load_profile
from eopc_runtime.units import format_energy, parse_budgets

DOMAINS, LENGTH, PROMPT = ("wiki", "code", "maths"), 256, 128
REPAIRED = "repaired, all"
PLANNED = PASSES[: PASSES.index(plan_tiers) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, budgets="9,7,5J", windows=24)
    parser.add_argument("--rows", choices=["all", "handover"], default="all", help="handover: the first four only")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    state = start(build_args(options), options)
    assert state.checkpoint and state.storage
    model = deployed_model(state, state.storage)
    text = evaluation_windows(state.checkpoint.tokenizer(), options.corpora, DOMAINS, options.windows, LENGTH)
    held_out = ContinuationLoss(model, text.batches(), PROMPT)
    full = full_mask(state.config)
    dense = held_out.by_batch(model, full)
    click.echo(f"  dense          {reference_energy(state, full, state.storage):6.3f} J")
    for index, tier in enumerate(state.plan[1:], start=1):
        assert tier.budget_j is not None
        click.echo(f"t{index}, {format_energy(tier.budget_j)}: {_kept(state, tier.mask)}")
        ladder = up_to(state.plan, index)
        rows = variants(state, model, ladder, tier.budget_j, held_out, options.rows == "handover")
        base = next(losses for name, _, losses in rows if name == REPAIRED)
        for name, mask, losses in rows:
            price = reference_energy if name == "throughout" else plan_energy
            added, apart = (_more(held_out.batches, losses, others) for others in (dense, base))
            _row(name, price(state, mask, state.storage), added, apart, _kept(state, mask))


def add_options(parser: argparse.ArgumentParser, budgets: str, windows: int) -> None:
    """What every measurement of planned tiers can be told."""
    add_corpora_option(parser)
    parser.add_argument("--model")
    parser.add_argument("--device", default="orin")
    parser.add_argument("--budgets", default=budgets)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--search-seconds", type=float, default=40.0)
    parser.add_argument("--windows", type=int, default=windows, help=f"of evaluation, per domain [{windows}]")
    parser.add_argument("--work", type=Path, help="keeps stages between runs")
    parser.add_argument("--calibrate", choices=["built-in", "own", "corpora"], default="built-in")


def build_args(options: argparse.Namespace) -> BuildArgs:
    """The build that these options describe."""
    return BuildArgs(
        model=options.model,
        device=options.device,
        budgets_j=parse_budgets(options.budgets),
        output=(options.work or Path(tempfile.mkdtemp())) / "ladder.eopc",
        precision=(options.precision,),
        search_seconds=options.search_seconds,
        prefill_depth="all",
        own_text=options.calibrate == "own",
    )


def start(args: BuildArgs, options: argparse.Namespace) -> CompileState:
    """A build up to its plan, stages kept beside its output."""
    cache = StageCache(args.output.parent / ".work", True)
    state = CompileState(args, cache, load_profile(args.device), click.echo, lambda _text: None)
    if options.calibrate != "corpora":
        return run_passes(state, PLANNED)

    def read_corpora(state: CompileState) -> CompileState:
        """In the place of `read_calibration`: windows of the corpora, from its three splits."""
        assert state.checkpoint
        tokenizer, length, counts = state.checkpoint.tokenizer(), args.calibration_length, window_counts(args)

        def windows(split: Split) -> CalibrationSet:
            return calibration_set(
                tokenizer, options.corpora, DOMAINS, counts[split] * length, length, args.seed, split
            )

        return replace(
            state,
            calibration=windows("calibration"),
            selection=windows("selection"),
            heldout=windows("heldout"),
        )

    return run_passes(state, tuple(read_corpora if step is read_calibration else step for step in PLANNED))


def variants(
    state: CompileState,
    model: Llama,
    ladder: Sequence[Mask],
    budget_j: float,
    held_out: ContinuationLoss,
    handover_only: bool,
) -> list[tuple[str, Mask, list[Tensor]]]:
    """(name, mask, losses of every batch's continuations) of all compared at a budget, above the same smaller tiers.

    Args:
        handover_only: leave out the simple ladders and the search without nesting.
    """
    (*smaller, mask) = ladder
    assert state.storage and state.observations and state.calibration
    storage, batches = state.storage, state.calibration.batches()
    every = range(len(model.blocks))

    def price(candidate: Mask) -> float:
        return plan_energy(state, candidate, storage)

    def shipped(candidate: Mask) -> list[Tensor]:
        return held_out.by_batch(repair(state, model, [(*smaller, candidate)])[0][0], candidate)

    full = full_mask(state.config)
    deep = Mask(tuple(full.layers[d.source_layer] for d in mask.layers))
    curves = state.observations.curves
    alone = shrink_to_budget(deep, budget_j, curves, lambda m: reference_energy(state, m, storage), state.align)
    assert alone is not None  # wider than the mask, whose plan fits with a dearer prompt
    _, changes = repair_tier(model, mask, batches, 0, every)
    repaired, _ = repair_tier(model, mask, batches, state.args.repair_part, every)
    rows = [
        ("throughout", alone, throughout(repair_tier(model, alone, batches, 0, every)[0], held_out.batches)),
        ("handed over", mask, held_out.by_batch(apply_repair(tier_view(model, mask), mask, changes), mask)),
        (REPAIRED, mask, held_out.by_batch(repaired, mask)),
        ("repaired", mask, shipped(mask)),
    ]
    if handover_only:
        return rows
    for name, candidate in simple_ladders(state, budget_j).items():
        if candidate is None:
            click.echo(f"  {name:14} cannot reach {format_energy(budget_j)}")
        else:
            assert price(candidate) <= budget_j
            rows.append((name, candidate, shipped(candidate)))
    free = replace(state, args=replace(state.args, budgets_j=(budget_j,), independent=True))
    own = plan_tiers(free).plan[-1].mask
    rows.append(("independent", own, held_out.by_batch(repair(free, model, [[own]])[0][0], own)))
    return rows


def simple_ladders(state: CompileState, budget_j: float) -> dict[str, Mask | None]:
    """Masks within the budget: by depth alone, by width alone, and with the same share of width everywhere."""
    assert state.storage and state.observations
    curves, storage, full = state.observations.curves, state.storage, full_mask(state.config)

    def price(mask: Mask) -> float:
        return plan_energy(state, mask, storage)

    def fits(mask: Mask) -> bool:
        return price(mask) <= budget_j

    order = sorted(full.layers, key=lambda d: curves[d.source_layer].influence)
    depths = [Mask(tuple(d for d in full.layers if d not in order[:k])) for k in range(len(order))]
    align = state.align
    steps = range(max(d.intermediate_size for d in full.layers) // align)
    widths = [
        Mask(tuple(replace(d, intermediate_size=max(align, d.intermediate_size - k * align)) for d in full.layers))
        for k in steps
    ]
    return {
        "depth": next((m for m in depths if fits(m)), None),
        "width": shrink_to_budget(full, budget_j, curves, price, align),
        "uniform": next((m for m in widths if fits(m)), None),
    }


def throughout(tier: Llama, batches: Sequence[Batch]) -> list[Tensor]:
    """Losses [n, S - PROMPT - 1] of every batch's continuations on a tier that has run the prompts itself."""
    found = list[Tensor]()
    for batch in batches:
        with fast_math():
            hidden = run_blocks(tier, batch.tokens)
            found.append(next_token_losses(tier, hidden[:, PROMPT:], batch.tokens[:, PROMPT:]))
    return found


def _kept(state: CompileState, mask: Mask) -> str:
    shares = keep_shares(state.config, mask)
    return f"{len(mask.layers)} layers, {shares['kv_groups']:.0%} of KV groups, {shares['ffn']:.0%} of FFN"


def _more(batches: Sequence[Batch], losses: Sequence[Tensor], others: Sequence[Tensor]) -> dict[int, Tensor]:
    """By domain, nats per token that every window [windows] loses beyond other losses of the same text, fp64."""
    differences = [(a.double() - b.double()).mean(1) for a, b in zip(losses, others, strict=True)]
    return by_domain(batches, differences)


def _row(name: str, joules: float, added: dict[int, Tensor], apart: dict[int, Tensor], kept: str) -> None:
    """One line: nats added by domain and in their mean, and how far that can be told from the base's."""
    means = {d: float(windows.mean()) for d, windows in added.items()}
    cells = "  ".join(f"{DOMAINS[d]} +{v:.3f} ±{_half_interval([apart[d]]):.3f}" for d, v in means.items())
    whole = _half_interval(list(apart.values()))
    click.echo(f"  {name:14} {joules:6.3f} J  {cells}  mean +{fmean(means.values()):.3f} ±{whole:.3f}  {kept}")


def _half_interval(differences: Sequence[Tensor]) -> float:
    """Half of the 95 % interval of the mean over domains of differences [windows], normal."""
    variances = [float(d.var()) / len(d) for d in differences]
    return 1.96 * math.sqrt(sum(variances)) / len(differences)


if __name__ == "__main__":
    main()
