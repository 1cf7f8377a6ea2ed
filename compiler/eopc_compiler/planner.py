"""From joule budgets to masks: what every tier keeps, so that its plan fits and the continuation loses least.

For every budget, from the smallest up, a search runs over which layers stay; the KV groups and FFN channels that still
have to go follow from the curves of `importance.py` by loss added per joule saved, so every candidate *just fits*. A
candidate's objective is nats per token: the measured continuation loss with its layers left out, behind the cache that
the whole model has filled, plus what its curves say of the units cut. That ranks sets of layers, but misjudges depth
against width, as repair mends a missing layer better than a narrow one. So finalists of every depth, from width alone
to depth alone, are repaired and measured for real, and the best of them again on more text; the heuristic's own best is
always among them, so the result is never worse than the start.

Prices come from one function; nothing here knows a device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask
from eopc_compiler.selector import Selector
from eopc_compiler.shrink import EMPTY, Price, curves_added, depth_steps, shrink_to_budget, smallest_mask
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.errors import BudgetError
from eopc_runtime.units import format_energy

Loss = Callable[[Mask], float]  # nats per continuation token

RUN_OFF, CLOSE = 3, 0.1  # finalists at most that are judged on more text: within this share of what the best one adds


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier as decided: its mask, its price at the reference workload, its loss on the selection text."""

    budget_j: float | None
    mask: Mask
    energy_j: float
    loss: float
    note: str
    considered: tuple[dict[str, float], ...] = ()  # the finalists: layers kept, joules, predicted and measured loss
    evaluations: int = 0
    prefill: int = 0  # the tier that runs the prompts in the plan this one is priced and repaired for
    prompt: PromptPath | None = None  # how prompts run on this tier; None: through all layers
    selector: Selector | None = None  # channels beside those of the mask, chosen by the prompt

    @property
    def fills(self) -> bool:
        """Whether prompts run through a graph of their own."""
        return self.prompt is not None or self.selector is not None

    @property
    def run(self) -> Mask:
        """What an answer runs: the mask, and what the prompt has chosen."""
        return self.mask if self.selector is None else self.mask.widened(self.selector.chosen)

    @property
    def reach(self) -> Mask:
        """What it may run: the mask, and all that can be chosen."""
        return self.mask if self.selector is None else self.mask.widened(self.selector.pool)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TierPlan:
        """Read what `dataclasses.asdict` and JSON made of a plan."""
        mask = Mask(tuple(LayerDims(**d) for d in row["mask"]["layers"]))
        selector = row["selector"] and Selector(*(tuple(row["selector"][k]) for k in ("core", "pool", "chosen")))
        prompt = row["prompt"] and PromptPath(**row["prompt"])
        read = {"mask": mask, "considered": tuple(row["considered"]), "prompt": prompt, "selector": selector}
        return cls(**{**row, **read})


def up_to(plan: Sequence[TierPlan], index: int) -> list[Mask]:
    """A tier's mask, last, behind those of all smaller tiers that are repaired, from the smallest up."""
    return [*(t.mask for t in reversed(plan[index + 1 :]) if not t.fills), plan[index].mask]


@dataclass(frozen=True, slots=True)
class Objective:
    """How candidates are judged.

    Args:
        curves: of every source layer, on the whole model.
        price: joules of the reference workload under a mask.
        measured: continuation loss of a mask that only leaves layers out.
        repaired: continuation loss of the last of some tiers, smallest first, once repaired on part of the text; dear.
        align: FFN channels go this many at a time.
        shipped: the same of several such ladders' last tiers, on more text, nearer to how they ship; dearer.
    """

    curves: Sequence[LayerCurves]
    price: Price
    measured: Loss
    repaired: Callable[[Sequence[Mask]], float]
    align: int
    shipped: Callable[[Sequence[Sequence[Mask]]], Sequence[float]]

    def predicted(self, mask: Mask) -> float:
        """Nats per token: layers left out as measured, units cut as the curves say."""
        full = {i: c.dims for i, c in enumerate(self.curves)}
        whole = Mask(tuple(full[d.source_layer] for d in mask.layers))
        return self.measured(whole) + curves_added(self.curves, mask)


def plan_ladder(
    full: Mask,
    budgets_j: Sequence[float],
    objective: Objective,
    search_seconds: float,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[TierPlan, ...]:
    """Decide the ladder: t0 dense, then a tier for every budget that the dense model exceeds, each inside the last.

    From the smallest budget up: a small tier loses most, so it chooses first, and what it keeps the larger ones keep.

    Args:
        budgets_j: joules per sequence at the reference workload, any order.
        search_seconds: of evolution over the heuristic, for all tiers together; finalists are measured after it.

    Raises:
        BudgetError: a budget is below what the smallest mask needs; the message names that.
    """
    price = objective.price
    dense_j = price(full)
    below = sorted(b for b in budgets_j if dense_j > b)
    floor = price(smallest_mask(full, objective.curves, objective.align))
    if below:
        require_reachable(below[0], floor)
    tiers, dense = list[TierPlan](), objective.measured(full)
    for position, budget in enumerate(below):
        rng = random.Random(f"{seed}:{position}")
        search = _Search(full, [t.mask for t in tiers], budget, objective, dense, rng, report)
        tiers.append(search.run(search_seconds / len(below), clock))
    return _dense(full, budgets_j, dense_j, dense), *reversed(tiers)


def require_reachable(budget_j: float, floor_j: float) -> None:
    """Refuse a budget that is below what the smallest tier needs.

    Raises:
        BudgetError: it is; the message names the smallest budget that can be met.
    """
    if floor_j > budget_j:
        raise BudgetError(
            f"no tier of this model fits {format_energy(budget_j)} at the reference workload: the smallest needs "
            f"{format_energy(floor_j, round_up=True)}. Raise that budget, or shorten --workload."
        )


def plan_masks(full: Mask, masks: Sequence[Mask], budgets_j: Sequence[float], price: Price) -> tuple[TierPlan, ...]:
    """The ladder of masks given by the user: t0 dense, then one tier per mask, each under the next smaller budget.

    Losses are not measured: without masks, it is the ladder of the dense model alone.

    Raises:
        BudgetError: a mask is priced above the budget it is meant for.
    """
    dense_j = price(full)
    below = sorted((b for b in budgets_j if dense_j > b), reverse=True)
    tiers = [_dense(full, budgets_j, dense_j, 0.0)]
    for i, mask in enumerate(masks):
        budget, joules = below[i] if i < len(below) else None, price(mask)
        if budget is not None and joules > budget:
            raise BudgetError(
                f"mask {i + 1} needs {format_energy(joules, round_up=True)} at the reference workload, above its "
                f"budget of {format_energy(budget)}. Give a smaller mask, or raise --budgets."
            )
        tiers.append(TierPlan(budget, mask, joules, 0.0, "mask given"))
    return tuple(tiers)


def _dense(full: Mask, budgets_j: Sequence[float], dense_j: float, loss: float) -> TierPlan:
    fitting = [b for b in budgets_j if dense_j <= b]
    note = "dense: fits its budget unpruned" if fitting else "dense: above every budget, reference and prefill tier"
    return TierPlan(max(fitting, default=None), full, dense_j, loss, note)


class _Search:
    """One tier's search over the set of layers kept: a ladder of depths, and (mu + lambda) evolution seeded by it."""

    PARENTS, CHILDREN = 4, 8

    def __init__(
        self,
        full: Mask,
        smaller: Sequence[Mask],
        budget_j: float,
        objective: Objective,
        dense: float,
        rng: random.Random,
        report: Callable[[str], None] | None,
    ) -> None:
        self.full, self.smaller, self.budget_j, self.objective = full, smaller, budget_j, objective
        self.dense, self.rng, self.report = dense, rng, report
        self.below = smaller[-1] if smaller else EMPTY
        self.needed = frozenset(d.source_layer for d in self.below.layers)
        self.seen: dict[frozenset[int], tuple[float, Mask] | None] = {}
        self.losses: dict[Mask, float] = {}  # of what was repaired and measured

    def run(self, seconds: float, clock: Callable[[], float]) -> TierPlan:
        end, objective = clock() + seconds, self.objective
        curves, price = objective.curves, objective.price
        starts = depth_steps(self.full, self.below, lambda m: price(m) <= self.budget_j, curves)
        steps = [self._judge(frozenset(d.source_layer for d in m.layers)) for m in starts]
        while clock() < end:
            children = {self._mutate(kept) for kept in self._parents() for _ in range(self.CHILDREN // self.PARENTS)}
            fresh = [kept for kept in children if kept not in self.seen]
            if not fresh and len(self.seen) >= 2 ** min(20, len(self.full.layers) - len(self.needed)) // 2:
                break  # a tiny model: everything has been tried
            for kept in fresh:
                self._judge(kept)
                if clock() >= end:
                    break
            self._say(f"{len(self.seen)} candidates, best {self._ranked()[0][0]:.3f} nats")
        best = self._measure(steps)
        judged = {m: v for v, m in filter(None, self.seen.values())}
        rows = tuple(
            {"layers": float(len(m.layers)), "energy_j": price(m), "predicted_loss": judged[m], "loss": value}
            for m, value in self.losses.items()
        )
        note = "pruned to its budget"
        return TierPlan(self.budget_j, best, price(best), self.losses[best], note, rows, len(self.seen))

    def _measure(self, steps: Sequence[tuple[float, Mask] | None]) -> Mask:
        """The best of the finalists, repaired and measured: predictions rank sets of layers, but not depths.

        Every second step of depth and the last, which is depth alone, those beside the best of them, the steps' best
        prediction, and the best prediction of all with no more layers than what was best so far.
        """
        depths = list(dict.fromkeys(m for _, m in filter(None, steps)))
        self._repair([*depths[::2], depths[-1]])  # depth alone, whichever first steps cannot fit
        middle = depths.index(self._best())
        self._repair(depths[max(0, middle - 1) : middle + 2])
        self._repair([min(filter(None, steps), key=lambda row: row[0])[1]])
        most = len(self._best().layers)
        self._repair([next(m for _, m in self._ranked() if len(m.layers) <= most)])
        return self._run_off()

    def _run_off(self) -> Mask:
        """Of the finalists that lose about the same, the one that loses least when repaired and measured on more text.

        More text mends missing layers better than narrow ones, so the order of neighbours in depth changes with it.
        """
        best, *others = sorted(self.losses, key=lambda mask: self.losses[mask])
        most = self.losses[best] + CLOSE * (self.losses[best] - self.dense)
        close = [best, *(m for m in others[: RUN_OFF - 1] if self.losses[m] < most)]
        if len(close) == 1:
            return best
        losses = dict(zip(close, self.objective.shipped([(*self.smaller, m) for m in close]), strict=True))
        for mask, loss in losses.items():
            self._say(f"{len(mask.layers)} layers measured on more text, {loss:.3f} nats")
        return min(close, key=losses.__getitem__)

    def _repair(self, masks: Sequence[Mask]) -> None:
        for mask in masks:
            if mask not in self.losses:
                self.losses[mask] = self.objective.repaired((*self.smaller, mask))
                self._say(f"{len(mask.layers)} layers measured, {self.losses[mask]:.3f} nats")

    def _best(self) -> Mask:
        return min(self.losses, key=lambda mask: self.losses[mask])

    def _say(self, text: str) -> None:
        if self.report:
            self.report(f"{format_energy(self.budget_j)}: {text}")

    def _judge(self, kept: frozenset[int]) -> tuple[float, Mask] | None:
        """The predicted loss and the mask of a set of layers, shrunk to the budget; None if it cannot fit."""
        if kept not in self.seen:
            start = Mask(tuple(d for d in self.full.layers if d.source_layer in kept))
            objective, below = self.objective, self.below
            mask = shrink_to_budget(start, self.budget_j, objective.curves, objective.price, objective.align, below)
            self.seen[kept] = None if mask is None else (objective.predicted(mask), mask)
        return self.seen[kept]

    def _ranked(self) -> list[tuple[float, Mask]]:
        return sorted((r for r in self.seen.values() if r is not None), key=lambda row: row[0])

    def _parents(self) -> list[frozenset[int]]:
        return [frozenset(d.source_layer for d in m.layers) for _, m in self._ranked()[: self.PARENTS]]

    def _mutate(self, kept: frozenset[int]) -> frozenset[int]:
        """Swap, take back or drop one layer or two, but none that the tier below keeps."""
        inside, outside = sorted(kept - self.needed), sorted({d.source_layer for d in self.full.layers} - kept)
        for _ in range(self.rng.choice((1, 1, 2))):
            kind = self.rng.choice(("swap", "swap", "drop", "add"))
            if kind in ("swap", "drop") and len(inside) + len(self.needed) > 1 and inside:
                outside.append(inside.pop(self.rng.randrange(len(inside))))
            if kind in ("swap", "add") and outside:
                inside.append(outside.pop(self.rng.randrange(len(outside) - (kind == "swap" and len(outside) > 1))))
        return self.needed | frozenset(inside)
