"""Tiers that choose FFN channels by the prompt, as a coordinate of the ladder: priced, and only where they win.

Beside a static tier, a candidate of the same joules keeps every layer and KV group. One λ for the whole model, in nats
per joule, decides how many channels every layer runs: all whose loss added per joule saved, by the curves, is above it
(`planner.shrink_to_budget`). The last CHOSEN_SHARE of them are not fixed, but chosen from the rest by the prompt. What
gathering costs is part of the price, so a candidate runs a little less than the static tier it competes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from eopc_compiler.board.tensorrt_build import MOST_CHOSEN
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.planner import TierPlan, up_to
from eopc_compiler.selector import Selector
from eopc_compiler.shrink import Price, shrink_to_budget
from eopc_compiler.token_selector import PromptPath

CHOSEN_SHARE = 0.2  # of the channels that run; a larger share costs more to gather, and was not better
WORTH_HAVING = 0.005  # nats per token that a choosing tier must win by


@dataclass(frozen=True, slots=True)
class Choosing:
    """How candidates are judged.

    Args:
        fixed: joules of a mask, nothing chosen.
        price: joules of a core and a selector.
        fitted: continuation loss of a selector once fitted, behind prompts long enough to choose by; dear.
        repaired: the same, behind the same prompts, of the last of some tiers, smallest first, behind prompts on this
            path (None: all layers).
    """

    fixed: Price
    price: Callable[[Mask, Selector], float]
    fitted: Callable[[Selector], float]
    repaired: Callable[[Sequence[Mask], PromptPath | None], float]


def plan_selectors(
    plan: Sequence[TierPlan],
    choosing: Choosing,
    curves: Sequence[LayerCurves],
    align: int,
    report: Callable[[str], None] | None = None,
    always: bool = False,
) -> tuple[TierPlan, ...]:
    """The ladder, with a choosing tier in front of every static one that loses more at the same joules.

    Args:
        plan: t0 and tiers below it.
        align: channels of the core are a multiple of this.
        always: keep a choosing tier whether or not it wins.
    """
    full, ladder = plan[0].mask, list[TierPlan]()
    for index, tier in enumerate(plan):
        if tier.budget_j is not None and tier.prompt is None and tier.mask != full:
            candidate = _candidate(full, tier, choosing, curves, align)
            if candidate is not None:
                won = choosing.repaired(up_to(plan, index), plan[tier.prefill].prompt) - candidate.loss
                if report:
                    report(
                        f"channels chosen by the prompt, {tier.budget_j:.3g} J: {won:+.3f} nats less than fixed ones"
                    )
                if always or won > WORTH_HAVING:
                    ladder.append(replace(candidate, loss=tier.loss - won))  # as if behind the others' prompts
        ladder.append(tier)
    return _renumbered(plan, ladder)


def split(mask: Mask, full: Mask, align: int) -> Selector:
    """A mask's channels with the last CHOSEN_SHARE of every layer's to be chosen from all that are not fixed."""
    cores, pools, chosen = list[int](), list[int](), list[int]()
    for d, whole in zip(mask.layers, full.layers, strict=True):
        core = max(int(d.intermediate_size * (1 - CHOSEN_SHARE)) // align, 1) * align
        n = d.intermediate_size - core
        pool = whole.intermediate_size - core if n else 0
        if d == whole:
            core, pool, n = d.intermediate_size, 0, 0
        cores.append(core)
        pools.append(pool)
        chosen.append(min(n, MOST_CHOSEN))
    return Selector(tuple(cores), tuple(pools), tuple(chosen))


def core_of(selector: Selector, full: Mask) -> Mask:
    """The mask of what a choosing tier always runs."""
    pairs = zip(full.layers, selector.core, strict=True)
    return Mask(tuple(replace(d, intermediate_size=core) for d, core in pairs))


def _candidate(
    full: Mask, tier: TierPlan, choosing: Choosing, curves: Sequence[LayerCurves], align: int
) -> TierPlan | None:
    """A choosing tier within a static tier's budget; None where channels cannot save so much or leave no choice."""
    assert tier.budget_j is not None
    found = _within(full, tier.budget_j, choosing, curves, align)
    if found is None:
        return None
    core, selector = found
    share = sum(selector.chosen) / sum(d.intermediate_size for d in full.layers)
    return TierPlan(
        tier.budget_j,
        core,
        choosing.price(core, selector),
        choosing.fitted(selector),
        f"{share:.0%} of the FFN channels chosen by the prompt",
        selector=selector,
    )


def _within(
    full: Mask, budget_j: float, choosing: Choosing, curves: Sequence[LayerCurves], align: int
) -> tuple[Mask, Selector] | None:
    """Core and selector that fit a budget, KV groups left alone; None where there are none.

    Prices of a choice are those of fixed channels and of gathering, which changes little with the widths.
    """
    channels_only, gathering_j = [replace(c, kv_errors=()) for c in curves], 0.0
    for _ in range(4):
        mask = shrink_to_budget(full, budget_j - gathering_j, channels_only, choosing.fixed, align)
        if mask is None:
            return None
        selector = split(mask, full, align)
        core = core_of(selector, full)
        if choosing.price(core, selector) <= budget_j:
            return (core, selector) if any(selector.chosen) else None
        gathering_j = choosing.price(core, selector) - choosing.fixed(mask) + 1e-9
    return None


def _renumbered(plan: Sequence[TierPlan], ladder: Sequence[TierPlan]) -> tuple[TierPlan, ...]:
    """The ladder with the indexes of prefill tiers as they are now; a choosing tier reads its own prompts."""
    where = {id(tier): i for i, tier in enumerate(ladder)}
    return tuple(
        replace(tier, prefill=i if tier.selector else where[id(plan[tier.prefill])]) for i, tier in enumerate(ladder)
    )
