"""From joule budgets to masks: ladder v1's choice of what each tier keeps.

For every budget, from the largest down, a few candidates that *just fit* are built inside the tier above and the one
with the smallest calibration loss is kept. A candidate drops a number of layers first (lowest block influence) and then
takes FFN channels, and where asked a KV group per layer, in the order of importance lost per joule saved, until the
price of the reference workload is within the budget. Prices come from one function; nothing here knows a device.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import LayerScores
from eopc_compiler.ladder import Mask
from eopc_runtime.errors import BudgetError
from eopc_runtime.units import format_energy

Price = Callable[[Mask], float]  # joules of the reference workload
Loss = Callable[[Mask], float]

LAYER_STEPS = 6  # candidates per tier differ by how many layers they drop


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier as decided: its mask, its price at the reference workload, its loss on the calibration text."""

    budget_j: float | None
    mask: Mask
    energy_j: float
    loss: float
    note: str
    considered: tuple[dict[str, float], ...] = ()  # the candidates: layers kept, joules, loss


def plan_ladder(
    full: Mask,
    budgets_j: Sequence[float],
    scores: Sequence[LayerScores],
    price: Price,
    loss: Loss,
    align: int,
    report: Callable[[str], None] | None = None,
) -> tuple[TierPlan, ...]:
    """Decide the ladder: t0 dense, then a tier for every budget that the dense model exceeds, each inside the last.

    Args:
        budgets_j: joules per sequence at the reference workload, any order.
        align: FFN widths are multiples of it.

    Raises:
        BudgetError: a budget is below what the smallest mask needs; the message names that.
    """
    dense_j, dense_loss = price(full), loss(full)
    fitting = [b for b in budgets_j if dense_j <= b]
    note = "dense: fits its budget unpruned" if fitting else "dense: above every budget, reference and prefill tier"
    tiers = [TierPlan(max(fitting, default=None), full, dense_j, dense_loss, note)]
    smallest = smallest_mask(full, scores, align)
    floor = price(smallest)
    for budget in sorted((b for b in budgets_j if dense_j > b), reverse=True):
        if floor > budget:
            raise BudgetError(
                f"no tier of this model fits {format_energy(budget)} at the reference workload: the smallest needs "
                f"{format_energy(floor, round_up=True)}. Raise that budget, or shorten --workload."
            )
        if report:
            report(f"fitting {format_energy(budget)}")
        tiers.append(_best_candidate(tiers[-1].mask, budget, scores, price, loss, align))
    return tuple(tiers)


def plan_masks(full: Mask, masks: Sequence[Mask], budgets_j: Sequence[float], price: Price) -> tuple[TierPlan, ...]:
    """The ladder of masks given by the user: t0 dense, then one tier per mask, each under the next smaller budget.

    Raises:
        BudgetError: a mask is priced above the budget it is meant for.
    """
    dense_j = price(full)
    fitting = [b for b in budgets_j if dense_j <= b]
    below = sorted((b for b in budgets_j if dense_j > b), reverse=True)
    tiers = [TierPlan(max(fitting, default=None), full, dense_j, 0.0, "dense")]
    for i, mask in enumerate(masks):
        budget, joules = below[i] if i < len(below) else None, price(mask)
        if budget is not None and joules > budget:
            raise BudgetError(
                f"mask {i + 1} needs {format_energy(joules, round_up=True)} at the reference workload, above its "
                f"budget of {format_energy(budget)}. Give a smaller mask, or raise --budgets."
            )
        tiers.append(TierPlan(budget, mask, joules, 0.0, "mask given"))
    return tuple(tiers)


def _best_candidate(
    above: Mask, budget_j: float, scores: Sequence[LayerScores], price: Price, loss: Loss, align: int
) -> TierPlan:
    tried: list[tuple[float, Mask, float]] = []
    for start in _layer_candidates(above, scores):
        mask = shrink_to_budget(start, budget_j, scores, price, align)
        if mask is not None and all(mask != m for _, m, _ in tried):
            tried.append((loss(mask), mask, price(mask)))
    best_loss, best, joules = min(tried, key=lambda t: t[0])
    rows = tuple({"layers": float(len(m.layers)), "energy_j": j, "loss": value} for value, m, j in tried)
    return TierPlan(budget_j, best, joules, best_loss, "pruned to its budget", rows)


def _layer_candidates(above: Mask, scores: Sequence[LayerScores]) -> Iterator[Mask]:
    """`above` with 0, then more and more of its least influential layers dropped, up to two thirds of them."""
    weakest = sorted(above.layers, key=lambda d: scores[d.source_layer].influence)
    most = 2 * len(above.layers) // 3
    for step in range(LAYER_STEPS + 1):
        drop = {d.source_layer for d in weakest[: round(most * step / LAYER_STEPS)]}
        yield Mask(tuple(d for d in above.layers if d.source_layer not in drop))


def shrink_to_budget(
    mask: Mask, budget_j: float, scores: Sequence[LayerScores], price: Price, align: int
) -> Mask | None:
    """Take units of `align` FFN channels, least important per joule first, until the price fits; None if it cannot.

    Every such unit of a layer has the same price, so importance alone orders them; KV groups are taken only once no
    FFN unit is left to take, because on small models a whole group is a third of a layer's attention.
    """
    if price(mask) <= budget_j:
        return mask
    removals = list(_ffn_removals(mask, scores, align)) + list(_kv_removals(mask, scores))
    low, high = 0, len(removals)
    if price(_apply(mask, removals[:high], align)) > budget_j:
        return None
    while high - low > 1:  # prices fall with every removal, so the fewest that fit can be bisected
        middle = (low + high) // 2
        if price(_apply(mask, removals[:middle], align)) <= budget_j:
            high = middle
        else:
            low = middle
    return _apply(mask, removals[:high], align)


def smallest_mask(mask: Mask, scores: Sequence[LayerScores], align: int) -> Mask:
    """The least a tier may be: a third of the layers, one unit of FFN channels and one KV group in each."""
    *_, fewest = _layer_candidates(mask, scores)
    return Mask(
        tuple(
            replace(d, num_key_value_heads=1, intermediate_size=min(align, d.intermediate_size)) for d in fewest.layers
        )
    )


def _ffn_removals(mask: Mask, scores: Sequence[LayerScores], align: int) -> Iterator[tuple[str, int]]:
    """(kind, source layer) of FFN units in the order they are taken: smallest share of its layer's output first."""
    queue = []
    for dims in mask.layers:
        tail = sorted(scores[dims.source_layer].ffn_channels, reverse=True)[: dims.intermediate_size]
        weight = scores[dims.source_layer].influence  # a unit of a layer that changes little matters little
        units = [weight * sum(tail[i : i + align]) for i in range(0, len(tail), align)]
        queue.append((units.pop(), dims.source_layer, units))  # from the least important end
    heapq.heapify(queue)
    while queue:
        _, source, units = heapq.heappop(queue)
        if units:  # the last unit of a layer stays
            yield "ffn", source
            heapq.heappush(queue, (units.pop(), source, units))


def _kv_removals(mask: Mask, scores: Sequence[LayerScores]) -> Iterator[tuple[str, int]]:
    entries = []
    for dims in mask.layers:
        shares = sorted(scores[dims.source_layer].kv_groups, reverse=True)[: dims.num_key_value_heads]
        entries += [(share * scores[dims.source_layer].influence, dims.source_layer) for share in shares[1:]]
    for _, source in sorted(entries):
        yield "kv", source


def _apply(mask: Mask, removals: Sequence[tuple[str, int]], align: int) -> Mask:
    taken: dict[tuple[str, int], int] = {}
    for removal in removals:
        taken[removal] = taken.get(removal, 0) + 1

    def cut(dims: LayerDims) -> LayerDims:
        return replace(
            dims,
            num_key_value_heads=dims.num_key_value_heads - taken.get(("kv", dims.source_layer), 0),
            intermediate_size=dims.intermediate_size - align * taken.get(("ffn", dims.source_layer), 0),
        )

    return Mask(tuple(cut(d) for d in mask.layers))
