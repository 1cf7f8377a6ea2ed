"""Quality at equal joules by kind of tier: static throughout, handed over, prompts pruned, channels chosen.

    python benchmarks/front.py --corpora FOLDER --device orin --workload 128:256 --budgets 16,14,12J
    python benchmarks/front.py --corpora FOLDER --device orin --workload 2048:64 --budgets 5,4.5,4J

For every budget, continuation losses (nats per token added to the dense model's) on documents that neither calibration
nor the search has seen, each kind planned for the same joules of the same workload by the planner of `eopc build`:

    throughout   a static tier that runs prompt and answer
    handed over  t0 runs the prompt, a static tier the answer, repaired on the cache it inherits
    pruned       the same behind prompts that skip layers (--prefill-depth auto), where that frees enough joules
    chosen       t0 runs the prompt, which chooses a part of the FFN channels of the answer (--selectors on)

The lowest of a budget is marked. Calibrated on the built-in text, as in `eopc build`, unless told otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import click
import torch
from corpora import evaluation_windows
from ladder import DOMAINS, add_options, build_args, start, throughout

from eopc_compiler.calibration import Batch, domain_means
from eopc_compiler.handover import ContinuationLoss
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.model import Llama
from eopc_compiler.planner import TierPlan
from eopc_compiler.pricing import reference_energy
from eopc_compiler.selector_fit import selected_losses
from eopc_compiler.shrink import shrink_to_budget
from eopc_compiler.stage_plan import plan_tiers
from eopc_compiler.state import CompileState, Workload
from eopc_compiler.stored_model import deployed_model, fit, pruned_prompt, repair
from eopc_compiler.tier_repair import repair_tier
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.units import format_energy


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of tier at one budget: its joules, and the loss it adds by domain."""

    kind: str
    energy_j: float
    added: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over domains."""
        return sum(self.added) / len(self.added)


@dataclass(frozen=True, slots=True)
class Judge:
    """The whole model as it is stored, and held-out text behind whole prompts."""

    state: CompileState
    model: Llama
    text: tuple[Batch, ...]
    prompt: int
    dense: Mapping[int, float]

    def entry(self, kind: str, energy_j: float, losses: Mapping[int, float]) -> Entry:
        """A row, from losses by domain."""
        return Entry(kind, energy_j, tuple(losses[d] - self.dense[d] for d in sorted(self.dense)))

    def throughout(self, tier: TierPlan) -> Entry:
        """A tier's layers, as wide as its budget allows where they run the prompt too."""
        state, full = self.state, full_mask(self.state.config)
        assert state.storage and state.observations and state.calibration and tier.budget_j
        storage = state.storage
        deep = Mask(tuple(full.layers[d.source_layer] for d in tier.mask.layers))

        def price(mask: Mask) -> float:
            return reference_energy(state, mask, storage)

        mask = shrink_to_budget(deep, tier.budget_j, state.observations.curves, price, state.align)
        assert mask is not None
        repaired = repair_tier(self.model, mask, state.calibration.batches(), 0, range(len(full.layers)))[0]
        return self.entry("throughout", price(mask), domain_means(self.text, throughout(repaired, self.text)))

    def static(self, kind: str, tier: TierPlan, path: PromptPath | None = None) -> Entry:
        """A tier's answers behind prompts of this path, repaired for them."""
        assert self.state.storage
        pruned = pruned_prompt(self.state, self.state.storage, path, lambda: self.model)
        behind = ContinuationLoss(self.model, self.text, self.prompt, pruned)
        whole = tier.mask == full_mask(self.state.config)
        repaired = None if whole else repair(self.state, self.model, [[tier.mask]], pruned=pruned)[0][0]
        losses = behind.of_mask(tier.mask) if repaired is None else behind.of_tier(repaired, tier.mask)
        return self.entry(kind, tier.energy_j, losses)

    def chosen(self, tier: TierPlan) -> Entry:
        """A tier whose channels the prompt chooses."""
        assert tier.selector
        fitted = fit(self.state, self.model, tier.selector)
        found = selected_losses(self.model, tier.selector, fitted, self.text, self.prompt)
        return self.entry("chosen", tier.energy_j, domain_means(self.text, found))


def entries(judge: Judge, budget_j: float, plans: Mapping[str, tuple[TierPlan, ...]]) -> Iterator[Entry]:
    """What every kind makes of a budget."""
    static = _tier(plans["static"], budget_j)
    if static is None:
        return
    yield judge.throughout(static)
    yield judge.static("handed over", static)
    pruned = plans["pruned"]
    tier = _tier(pruned, budget_j)
    path = pruned[tier.prefill].prompt if tier else None
    if tier and path:
        share = f", {path.share:.0%}" if path.share else ""
        yield judge.static(f"pruned to {path.depth}{share}", tier, path)
    choosing = next((t for t in plans["chosen"] if t.budget_j == budget_j and t.selector), None)
    if choosing:
        yield judge.chosen(choosing)


def _tier(plan: tuple[TierPlan, ...], budget_j: float) -> TierPlan | None:
    """The static tier of a budget that the dense model exceeds."""
    return next((t for t in plan[1:] if t.budget_j == budget_j and t.selector is None), None)


def main() -> None:
    """A block of rows a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, budgets="16,14,12J", windows=12)
    parser.add_argument("--workload", default="128:256")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the answer that is scored [128]")
    parser.add_argument("--length", type=int, default=256, help="tokens of both [256]")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    workload = Workload(*map(int, options.workload.split(":")))
    args = replace(build_args(options), workload=workload, selectors="off")
    state = start(args, options)
    assert state.checkpoint and state.storage
    kinds = {"pruned": replace(args, prefill_depth="auto"), "chosen": replace(args, selectors="on")}
    plans = {"static": state.plan} | {k: plan_tiers(replace(state, args=a)).plan for k, a in kinds.items()}
    model = deployed_model(state, state.storage)
    windows = evaluation_windows(
        state.checkpoint.tokenizer(), options.corpora, DOMAINS, options.windows, options.length
    )
    text = tuple(windows.batches())
    dense = ContinuationLoss(model, text, options.prompt).of_mask(full_mask(state.config))
    judge = Judge(state, model, text, options.prompt, dense)
    click.echo(f"dense {state.plan[0].energy_j:.3f} J for {options.workload}")
    for budget_j in sorted(args.budgets_j, reverse=True):
        rows = list(entries(judge, budget_j, plans))
        click.echo(format_energy(budget_j) + ("" if rows else ": the dense model fits"))
        for row in rows:
            by_domain = "  ".join(f"{d} {v:+.3f}" for d, v in zip(DOMAINS, row.added, strict=True))
            best = "  <- lowest" if row is min(rows, key=lambda r: r.mean) else ""
            click.echo(f"  {row.kind:19}{row.energy_j:7.3f} J  {by_domain}  mean {row.mean:+.3f}{best}")


if __name__ == "__main__":
    main()
