"""Quality against joules: every plan of a ladder, what kind it is, what it costs, and what it loses where known. Pure.

Losses were measured for one plan per tier, the one it was planned for. Another pair has joules and no loss, and none
is made up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eopc_runtime.bundle import Manifest, Workload
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.policy import plan_label
from eopc_runtime.report.plan_file import PlanFile
from eopc_runtime.tier_info import TierInfo

WHOLE, STATIC, HANDED, PRUNED, CHOOSING = (
    "whole model",
    "static tier",
    "handed-over pair",
    "prompt through fewer layers",
    "channels chosen by the prompt",
)
KINDS = (WHOLE, STATIC, HANDED, PRUNED, CHOOSING)
EDGE, PROMPT_HEAVY = Workload(128, 256), Workload(2048, 64)


@dataclass(frozen=True, slots=True)
class Point:
    """A plan at a workload: joules charged, and nats per token above t0's (null: not measured)."""

    plan: str
    kind: str
    prefill_j: float
    decode_j: float
    loss: float | None

    @property
    def energy_j(self) -> float:
        """Joules of both phases."""
        return self.prefill_j + self.decode_j


def plan_points(manifest: Manifest, table: EnergyTable, plan: PlanFile | None, work: Workload) -> tuple[Point, ...]:
    """Return every plan that a sequence may run, at a workload, best decode tier first."""
    losses = {tier.plan: tier.loss_added for tier in plan.tiers} if plan else {}
    found = []
    for prefill, decode in table.plans():
        name = plan_label(prefill, decode)
        found.append(
            Point(
                plan=name,
                kind=kind_of(manifest.tiers, prefill, decode),
                prefill_j=table.prefill_price_j(prefill, work.prompt_tokens),
                decode_j=table.steps_price_j(decode, work.prompt_tokens, 0, work.new_tokens - 1),
                loss=losses.get(name),
            )
        )
    return tuple(found)


def alone_points(manifest: Manifest, table: EnergyTable, work: Workload) -> tuple[Point, ...]:
    """Return t0 and the static tiers, each alone, with the nats that its perplexity on held-out text is above t0's.

    Plain text has no prompt, so it says nothing about a tier that treats its prompt in another way.
    """
    points = plan_points(manifest, table, None, work)
    alone = {p.plan: p for p in points if p.kind in (WHOLE, STATIC)}
    whole = manifest.tiers[0].perplexity
    return tuple(
        replace(alone[t.tier], loss=math.log(t.perplexity / whole) if t.perplexity and whole else None)
        for t in manifest.tiers
        if t.tier in alone
    )


def best_first(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that nothing beats: cheaper ones lose more. From the cheapest on."""
    known = [(p.energy_j, p.loss, p) for p in points if p.loss is not None]
    found: list[Point] = []
    least = math.inf
    for _, loss, point in sorted(known, key=lambda row: row[:2]):
        if loss < least:
            found.append(point)
            least = loss
    return tuple(found)


def kind_of(tiers: Sequence[TierInfo], prefill: int, decode: int) -> str:
    """Return what kind of plan a pair of tier indexes is."""
    if tiers[decode].selector:
        return CHOOSING
    if tiers[prefill].prefill and not tiers[prefill].selector:
        return PRUNED
    if prefill != decode:
        return HANDED
    return STATIC if decode else WHOLE


def plan_energy(table: EnergyTable, plan: str) -> TierEnergy:
    """Return the coefficients of a plan by name, without margin: the prompt of one tier, the steps of another."""
    prefill, _, decode = plan.partition(">")
    by_name = {tier.tier: tier for tier in table.tiers}
    first = by_name[prefill]
    last = by_name[decode or prefill]
    return replace(first, tier=plan, step_j0=last.step_j0, step_jn=last.step_jn, step_ji=last.step_ji)


def planned_names(manifest: Manifest, table: EnergyTable, plan: PlanFile | None) -> tuple[str, ...]:
    """Return the plan of every tier: the one it was planned for, where that is known and may run, else it alone."""
    allowed = {plan_label(*pair) for pair in table.plans()}
    found = []
    for tier in manifest.tiers:
        planned = plan.tier(tier.tier) if plan else None
        found.append(planned.plan if planned and planned.plan in allowed else tier.tier)
    return tuple(found)


def workloads(manifest: Manifest) -> tuple[Workload, ...]:
    """Return the reference workload, one with long answers and one with long prompts, cut to the context."""
    room = manifest.context
    edge = Workload(min(EDGE.prompt_tokens, room // 3), min(EDGE.new_tokens, room - room // 3))
    answer = min(PROMPT_HEAVY.new_tokens, room // 4)
    heavy = Workload(min(PROMPT_HEAVY.prompt_tokens, room - answer), answer)
    return tuple(dict.fromkeys((manifest.workload, edge, heavy)))
