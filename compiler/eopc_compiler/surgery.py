"""Removing inputs of a linear map so that its output changes least: pure functions on second moments.

A map y = W x + b loses the inputs U. With the mean of what is lost in the bias, the output changes by W_U (x_U - x̄_U);
with the kept columns re-fitted by least squares, only by what x_K cannot tell of it:

    WIFV  E = Σ_j in U  Var(x_j) ||W_j||²                        arXiv 2601.02674 (from FLAP, arXiv 2312.11983)
    OBS   E = tr(W_U (P_UU)⁻¹ W_Uᵀ),  P = (Σ + λI)⁻¹             optimal brain surgeon, Hassibi and Stork 1993

`metric` M measures the output change as E[Δyᵀ M Δy]; with the Fisher information of the loss there, half of it is the
loss added, in nats (second order), and errors of different layers can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.pruned import unit_columns

# The ridge counts as so many tokens in which inputs varied as they do, but independently, and the map was as it is.
# It is a share of every input's own variance, not of their mean: a few inputs vary thousands of times more than most.
RIDGE_TOKENS = 2400
VARIANCE_FLOOR = 1e-6  # of the mean variance, so that R has an inverse
METRIC_FLOOR = 1e-6  # of the mean diagonal, so that a metric of few samples has a square root


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of the inputs of a map, and of a target against them, fp64."""

    mean: Tensor  # [in]
    covariance: Tensor  # [in, in]
    target_mean: Tensor  # [out]
    cross: Tensor  # [out, in]: E[(t - t̄)(x - x̄)ᵀ]
    rows: int  # tokens they were taken from

    @property
    def damping(self) -> float:
        """The share of every input's variance that RIDGE_TOKENS add."""
        return RIDGE_TOKENS / self.rows

    def restricted(self, columns: Tensor) -> Moments:
        """The moments of some inputs only."""
        return Moments(
            self.mean[columns],
            self.covariance[columns][:, columns],
            self.target_mean,
            self.cross[:, columns],
            self.rows,
        )


class MomentSums:
    """Accumulates weighted moments of a mixture of domains over batches.

    Args:
        inputs, outputs: widths; 0 outputs where no target is wanted.
        domains: how many there are; their means are kept apart.
    """

    def __init__(self, inputs: int, outputs: int, domains: int) -> None:
        self._square = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(outputs, inputs, dtype=torch.float64)
        self._sum = torch.zeros(domains, inputs, dtype=torch.float64)
        self._target = torch.zeros(outputs, dtype=torch.float64)
        self._weight = torch.zeros(domains, dtype=torch.float64)
        self._rows = 0

    def add(self, x: Tensor, target: Tensor, domain: int, weight: float) -> None:
        """Add rows x [tokens, in] and target [tokens, out] of a domain, each row with `weight`."""
        x, target = x.float(), target.float()
        self._square += weight * (x.t() @ x).double()
        self._cross += weight * (target.t() @ x).double()
        self._sum[domain] += weight * x.sum(0, dtype=torch.float64)
        self._target += weight * target.sum(0, dtype=torch.float64)
        self._weight[domain] += weight * len(x)
        self._rows += len(x)

    @property
    def rows(self) -> int:
        """Tokens that were added."""
        return self._rows

    def merge(self, earlier: MomentSums) -> None:
        """Add the sums of earlier batches."""
        self._square += earlier._square
        self._sum += earlier._sum
        self._weight += earlier._weight
        self._cross += earlier._cross
        self._target += earlier._target
        self._rows += earlier._rows

    def moments(self, within: bool = False) -> Moments:
        """Moments of the mixture: its total variance, or with `within` only the mean variance inside the domains.

        V_total = Σ_k α_k V_k + Σ_k α_k (x̄_k - x̄)²; the second term is what the bias of a removed input cannot mend.
        """
        total = self._weight.sum()
        mean, target = self._sum.sum(0) / total, self._target / total
        covariance = self._square / total - torch.outer(mean, mean)
        if within:
            apart = self._sum / self._weight[:, None] - mean
            covariance = covariance - apart.t() @ (apart * (self._weight / total)[:, None])
        return Moments(mean, covariance, target, self._cross / total - torch.outer(target, mean), self._rows)


def sum_moments(
    batches: Sequence[Batch], inputs: Sequence[Tensor], targets: Sequence[Tensor] | None = None
) -> MomentSums:
    """The sums of a map's inputs [n, S, in] over the batches of a mixture, against targets [n, S, out] if given."""
    outputs = targets[0].shape[-1] if targets else 0
    sums = MomentSums(inputs[0].shape[-1], outputs, 1 + max(batch.domain for batch in batches))
    for i, (batch, x) in enumerate(zip(batches, inputs, strict=True)):
        rows = x.flatten(0, 1)
        target = targets[i].flatten(0, 1) if targets else rows[:, :0]
        sums.add(rows, target, batch.domain, batch.weight)
    return sums


def sum_halves(
    batches: Sequence[Batch], inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[MomentSums, MomentSums]:
    """`sum_moments` of every domain's windows in turn: of the first, third, ... and of the second, fourth, ..."""
    domains = 1 + max(batch.domain for batch in batches)
    halves = tuple(MomentSums(inputs[0].shape[-1], targets[0].shape[-1], domains) for _ in range(2))
    seen = [0] * domains
    for batch, x, target in zip(batches, inputs, targets, strict=True):
        for half, sums in enumerate(halves):
            mine = slice((half + seen[batch.domain]) % 2, None, 2)
            if len(x[mine]):
                sums.add(x[mine].flatten(0, 1), target[mine].flatten(0, 1), batch.domain, batch.weight)
        seen[batch.domain] += len(x)
    return halves[0], halves[1]


def weighted_mean(batches: Sequence[Batch], values: Sequence[Tensor]) -> Tensor:
    """The mean [width] of values [n, S, width] over the batches of a mixture, fp64."""
    rows = [x.flatten(0, 1) for x in values]
    total = sum(batch.weight * len(x) for batch, x in zip(batches, rows, strict=True))
    sums = [batch.weight * x.sum(0, dtype=torch.float64) for batch, x in zip(batches, rows, strict=True)]
    return torch.stack(sums).sum(0) / total


@dataclass(frozen=True, slots=True)
class Removals:
    """Units in the order they should go, and the summed error once each is gone."""

    units: tuple[int, ...]
    errors: tuple[float, ...]


def wifv_removals(weight: Tensor, covariance: Tensor, metric: Tensor | None, width: int, count: int) -> Removals:
    """The `count` units of `width` neighbouring inputs with the smallest fluctuation, kept columns left as they are."""
    scores = covariance.diagonal() * _scaled(weight, metric).pow(2).sum(0)
    per_unit = scores.view(-1, width).sum(1)
    order = torch.argsort(per_unit, stable=True)[:count]
    return Removals(tuple(order.tolist()), tuple(per_unit[order].cumsum(0).tolist()))


def obs_removals(
    weight: Tensor,
    covariance: Tensor,
    metric: Tensor | None,
    width: int,
    count: int,
    at_once: int = 1,
    *,
    damping: float,
) -> Removals:
    """The order in which units go when after each the kept columns are re-fitted.

    Args:
        weight: [out, in].
        covariance: [in, in] of the inputs.
        metric: [out, out], or None for the plain squared error.
        width: neighbouring inputs that make a unit.
        count: units to remove, at most all but one.
        at_once: units taken between two updates.
        damping: ridge, as a share of every input's variance (`Moments.damping`).
    """
    # the sweep is about ranks, so single precision does after the inverse
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(covariance, damping))).float()
    left = _scaled(weight, metric).float()
    units = weight.shape[1] // width
    alive = torch.ones(units, dtype=torch.bool)
    order, errors, total = list[int](), list[float](), 0.0
    while len(order) < count:
        scores = _unit_errors(left, inverse, width, alive).masked_fill(~alive, torch.inf)
        chosen = torch.topk(scores, min(at_once, count - len(order)), largest=False, sorted=True).indices
        columns = unit_columns(chosen.tolist(), width)
        rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (P_UU)⁻¹ P_U
        gone = left[:, columns]
        step = float(torch.einsum("oi,ij,oj->", gone, torch.linalg.inv(inverse[columns][:, columns]), gone))
        errors += [total + step * (i + 1) / len(chosen) for i in range(len(chosen))]
        total += step
        left.addmm_(gone, rows, alpha=-1)
        inverse.addmm_(inverse[:, columns], rows, alpha=-1)
        order += chosen.tolist()
        alive[chosen] = False
    return Removals(tuple(order), tuple(errors))


def repair(
    moments: Moments,
    weight: Tensor,
    kept: Tensor,
    damping: float | None = None,
    elsewhere: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Least squares for the kept inputs: weight [out, kept] and bias [out], fp64, ridge towards `weight`.

    W' = (C_K + W_K R)(Σ_KK + R)⁻¹ and b = t̄ - W' x̄_K, with C the cross moments of the target, Σ the covariance and
    R = λ diag(Σ), λ being `damping`, by default that of the moments.

    Args:
        elsewhere: mean squares [kept] of inputs that the map must serve as well, though it is not fitted to them; R
            counts them where they are above the variance.
    """
    part = moments.restricted(kept)
    ridge = ridge_of(part.covariance, moments.damping if damping is None else damping, elsewhere)
    prior = weight.double()[:, kept]
    fitted = torch.linalg.solve(part.covariance + ridge.diag(), (part.cross + prior * ridge).t()).t()
    return fitted, moments.target_mean - fitted @ part.mean


def held_share(fitted: Tensor, weight: Tensor, unseen: Moments) -> float:
    """The share of a change D = fitted - weight, both [out, in], that serves text best which it was not fitted to.

    E||t - (W + s D) x||², centred, is least at s = tr(D C_rᵀ) / tr(D Σ Dᵀ), with C_r = C - W Σ; within 0..1, and 1 for
    no change. What a small sample taught of its own accord is shrunk away, and only that.
    """
    change, weight = fitted - weight, weight.double()
    moved = change @ unseen.covariance
    power = float((moved * change).sum())
    wanted = float((change * (unseen.cross - weight @ unseen.covariance)).sum())
    return min(1.0, max(0.0, wanted / power)) if power > 0 else 1.0


def correction(moments: Moments, kept: Tensor, share: float, damping: float) -> tuple[Tensor, Tensor]:
    """What to add to a map so that it makes up for a `share` of a target it was not fitted to: weight and bias, fp64.

    The target is an error that others have left, of which a map's own inputs tell little: it takes a stronger ridge,
    here towards zero, than fitting the map itself.
    """
    part = moments.restricted(kept)
    weight = share * torch.linalg.solve(damped(part.covariance, damping), part.cross.t()).t()
    return weight, share * moments.target_mean - weight @ part.mean


def compensate(moments: Moments, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept columns as they are, and the bias that keeps the output's mean: b = t̄ - W_K x̄_K."""
    part = weight.double()[:, kept]
    return part, moments.target_mean - part @ moments.mean[kept]


def damped(covariance: Tensor, damping: float) -> Tensor:
    """Σ + R, with R as `ridge_of`."""
    return covariance + ridge_of(covariance, damping).diag()


def ridge_of(covariance: Tensor, damping: float, elsewhere: Tensor | None = None) -> Tensor:
    """The diagonal of R = λ diag(Σ), with a floor for inputs that do not vary; ones where none does.

    Args:
        elsewhere: as of `repair`.
    """
    variance = covariance.diagonal()
    if elsewhere is not None:
        variance = torch.maximum(variance, elsewhere.double())
    floor = VARIANCE_FLOOR * variance.mean()
    return damping * variance + (floor if floor > 0 else 1.0)


def _scaled(weight: Tensor, metric: Tensor | None) -> Tensor:
    """Lᵀ W with M = L Lᵀ, so that plain squared norms are norms under the metric."""
    if metric is None:
        return weight.double()
    floor = METRIC_FLOOR * metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
    scaled: Tensor = (
        torch.linalg.cholesky(metric + floor * torch.eye(len(metric), dtype=metric.dtype)).t() @ weight.double()
    )
    return scaled


def _unit_errors(left: Tensor, inverse: Tensor, width: int, alive: Tensor) -> Tensor:
    """What removing each unit alone would add, [units]; of no meaning for units that are gone."""
    if width == 1:
        return left.pow(2).sum(0) / inverse.diagonal().clamp_min(torch.finfo(inverse.dtype).tiny)
    units = left.shape[1] // width
    index = torch.arange(units)
    blocks = inverse.view(units, width, units, width)[index, :, index]  # [units, width, width]
    # a removed unit's block is zero but for rounding, and could not be solved
    blocks = torch.where(alive[:, None, None], blocks, torch.eye(width, dtype=blocks.dtype))
    parts = left.view(-1, units, width).permute(1, 2, 0)  # [units, width, out]
    errors: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return errors
