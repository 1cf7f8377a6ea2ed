"""Prefill-only pruning (POP, arXiv 2602.03295) as a coordinate of the ladder: how prompts run, priced in joules.

A ladder gets at most one tier whose prompts skip the deepest layers, or run only a share of their tokens through them.
It keeps all weights, so it stands right below t0, fills the caches of every tier below it, and costs a budget's joules
only in prefill. What it saves there is spent on a wider decode tier, and it enters the ladder only if that loses less
on the continuation of the selection text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.planner import TierPlan, up_to
from eopc_compiler.shrink import Price, shrink_to_budget
from eopc_compiler.token_selector import PromptPath

# Of the layers, that prompts still run; beyond 40 % skipped the paper's knee begins, and retrieval breaks first.
DEPTH_SHARES = (0.8, 11 / 15, 2 / 3, 0.6)
WORTH_TRYING = 0.02  # share of a budget that skipping must free before it is measured
WORTH_HAVING = 0.005  # nats per token that a pair must win by


@dataclass(frozen=True, slots=True)
class Behind:
    """Prompts that run through part of the model only.

    Args:
        price: joules of a mask in the plan behind them.
        whole: continuation loss of the whole model behind them, nats per token; takes seconds.
        repaired: the same of the last of some tiers, smallest first, repaired on the cache they leave; dear.
    """

    price: Price
    whole: Callable[[], float]
    repaired: Callable[[Sequence[Mask]], float]


def paths_to_try(layers: int, shares: Sequence[float]) -> tuple[PromptPath, ...]:
    """Paths that spare a prompt what skipping DEPTH_SHARES' layers does, by layers or by tokens, dearest first.

    The last layer never runs, so to spare n layers by tokens takes 1 + (n - 1) / (1 - c), where a share c runs.
    """
    skipped = sorted({layers - round(share * layers) for share in DEPTH_SHARES})
    wanted = [(layers - 1 - round((count - 1) / (1 - c)), c) for count in skipped for c in shares]
    return tuple(PromptPath(depth, c) for depth, c in wanted if 1 <= depth < layers)


def plan_prefill(
    plan: Sequence[TierPlan],
    paths: Mapping[PromptPath, Behind],
    curves: Sequence[LayerCurves],
    align: int,
    report: Callable[[str], None] | None = None,
    always: bool = False,
) -> tuple[TierPlan, ...]:
    """The ladder, with a tier that prunes its prefill where that loses less at the same joules.

    Every path that frees enough is judged by what it does to the whole model and by the curves of what tiers win back;
    the most promising one is then measured, its tiers repaired.

    Args:
        plan: t0 and the static tiers, from `planner.plan_ladder`.
        paths: to try.
        align: FFN channels go this many at a time.
        always: keep the tier whether or not it wins; for a path that was asked for.
    """
    promising = []
    for path, behind in paths.items():
        if always or _frees_enough(plan, behind.price):
            _, won = _with_path(plan, path, behind, _estimate(plan, behind, curves), curves, align)
            promising.append((won, path))
    if not promising:
        return tuple(plan)
    expected, path = max(promising, key=lambda found: found[0])
    if expected <= 0 and not always:
        return tuple(plan)
    behind = paths[path]
    ladder, won = _with_path(plan, path, behind, lambda _tier, ladder: behind.repaired(ladder), curves, align)
    if report:
        way = describe(path, len(plan[0].mask.layers))
        report(f"{way}: {won:.3f} nats less over the tiers, {expected:.3f} expected")
    return ladder if always or won > 0 else tuple(plan)


# Nats per token of a mask, the last of a ladder whose smaller tiers come first, in place of a static tier's.
Judge = Callable[[TierPlan, Sequence[Mask]], float]


def _frees_enough(plan: Sequence[TierPlan], price: Price) -> bool:
    freed = plan[0].energy_j - price(plan[0].mask)
    return any(t.budget_j is not None and freed >= WORTH_TRYING * t.budget_j for t in plan[1:])


def _estimate(plan: Sequence[TierPlan], behind: Behind, curves: Sequence[LayerCurves]) -> Judge:
    """A static tier's loss, more by the harm that skipping does to the whole model, less by what a wider mask wins."""
    harm = behind.whole() - plan[0].loss

    def cut(mask: Mask) -> float:
        return sum(curves[d.source_layer].added(d) for d in mask.layers)

    return lambda tier, ladder: tier.loss + harm + cut(ladder[-1]) - cut(tier.mask)


def describe(path: PromptPath, layers: int) -> str:
    """What prompts on a path do with the last of so many layers."""
    last = f"the last {layers - path.depth} of {layers} layers"
    return f"{path.share:.0%} of a prompt's tokens run through {last}" if path.share else f"prompts skip {last}"


def _with_path(
    plan: Sequence[TierPlan], path: PromptPath, behind: Behind, judge: Judge, curves: Sequence[LayerCurves], align: int
) -> tuple[tuple[TierPlan, ...], float]:
    """The ladder with a tier of this path, and the nats per token it wins over all tiers below."""
    full, won = plan[0].mask, 0.0
    note = describe(path, len(full.layers))
    first = TierPlan(None, full, behind.price(full), behind.whole(), note, prompt=path, prefill=1)
    below = list[TierPlan]()
    for index, tier in enumerate(plan[1:], start=1):
        assert tier.budget_j is not None
        if first.energy_j <= tier.budget_j:  # then the whole model answers, within the budget
            won += tier.loss - first.loss
            first = replace(first, budget_j=max(tier.budget_j, first.budget_j or 0.0))
            continue
        above = below[-1].mask if below else full
        kept = {d.source_layer for d in tier.mask.layers}
        start = Mask(tuple(d for d in above.layers if d.source_layer in kept))
        mask = shrink_to_budget(start, tier.budget_j, curves, behind.price, align, below=tier.mask)
        found = judge(tier, [*up_to(plan, index)[:-1], mask]) if mask is not None else float("inf")
        if mask is not None and found < tier.loss - WORTH_HAVING:
            won += tier.loss - found
            below.append(replace(tier, mask=mask, energy_j=behind.price(mask), loss=found, prefill=1))
        else:
            below.append(tier)
    return (plan[0], first, *below), won
