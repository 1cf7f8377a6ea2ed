"""Removals against explicit data: every error is the residual that torch.linalg.lstsq leaves on the same rows."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.surgery import (
    RIDGE_TOKENS,
    Moments,
    MomentSums,
    compensate,
    correction,
    damped,
    held_share,
    obs_removals,
    repair,
    sum_halves,
    sum_moments,
    wifv_removals,
)

ROWS, INPUTS, OUTPUTS = 400, 12, 5
NO_DAMPING = 1e-9


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs [rows, in] with a mean, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(ROWS, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    return mixed + torch.randn(INPUTS, generator=generator), torch.randn(OUTPUTS, INPUTS, generator=generator)


def moments_of(x: Tensor, target: Tensor) -> Moments:
    sums = MomentSums(x.shape[1], target.shape[1], 1)
    sums.add(x, target, 0, 1 / len(x))
    return sums.moments()


def metric_of(seed: int = 5) -> Tensor:
    """A positive definite metric [out, out]."""
    root = torch.randn(OUTPUTS, OUTPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.t() + 0.1 * torch.eye(OUTPUTS, dtype=torch.float64)


def residual(x: Tensor, weight: Tensor, gone: set[int], metric: Tensor | None = None) -> float:
    """Mean of Δyᵀ M Δy when the other inputs and a bias are fitted to x Wᵀ."""
    kept = [j for j in range(x.shape[1]) if j not in gone]
    a = torch.cat([x[:, kept], torch.ones(len(x), 1)], 1).double()
    y = x.double() @ weight.double().t()
    rest = y - a @ torch.linalg.lstsq(a, y).solution
    m = torch.eye(len(weight), dtype=torch.float64) if metric is None else metric
    return float(torch.einsum("no,op,np->n", rest, m, rest).mean())


def columns(units: tuple[int, ...], width: int) -> set[int]:
    return {u * width + i for u in units for i in range(width)}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
@pytest.mark.parametrize("width", [1, 3])
def test_errors_are_the_least_squares_residual_of_what_is_gone(width: int, weighted: bool) -> None:
    """After every removal the error is what lstsq cannot restore from the kept inputs and a bias."""
    x, weight = data()
    metric = metric_of() if weighted else None
    covariance = moments_of(x, x).covariance
    units = INPUTS // width
    removals = obs_removals(weight, covariance, metric, width, units - 1, damping=NO_DAMPING)
    assert len(set(removals.units)) == len(removals.units) == units - 1
    assert set(removals.units) < set(range(units))
    assert all(a <= b for a, b in pairwise(removals.errors))
    for count in range(1, units):
        want = residual(x, weight, columns(removals.units[:count], width), metric)
        assert removals.errors[count - 1] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("width", [1, 3])
def test_every_step_takes_the_unit_that_adds_least(width: int) -> None:
    """No other unit would have left a smaller residual, at any step."""
    x, weight = data(1)
    covariance, units = moments_of(x, x).covariance, INPUTS // width
    taken = obs_removals(weight, covariance, None, width, units - 1, damping=NO_DAMPING).units
    for count in range(units - 1):
        left = set(range(units)) - set(taken[:count])
        losses = {u: residual(x, weight, columns((*taken[:count], u), width)) for u in left}
        assert losses[taken[count]] == pytest.approx(min(losses.values()), rel=1e-3)


def test_several_at_once_cost_what_they_cost_together() -> None:
    """Between two updates the error grows in equal parts, and at the update it is the residual of the whole set."""
    x, weight = data(2)
    covariance = moments_of(x, x).covariance
    removals = obs_removals(weight, covariance, None, 1, 8, at_once=4, damping=NO_DAMPING)
    assert len(set(removals.units)) == 8
    for count in (4, 8):
        assert removals.errors[count - 1] == pytest.approx(residual(x, weight, set(removals.units[:count])), rel=1e-3)
    assert removals.errors[1] == pytest.approx(removals.errors[3] / 2)


def test_an_identity_metric_is_none() -> None:
    """Without a metric errors are plain squared errors; a scaled one scales them."""
    x, weight = data()
    covariance, eye = moments_of(x, x).covariance, torch.eye(OUTPUTS, dtype=torch.float64)
    for method in (partial(obs_removals, damping=0.01), wifv_removals):
        plain, same, triple = (method(weight, covariance, m, 2, 5) for m in (None, eye, 3 * eye))
        assert plain.units == same.units == triple.units
        assert same.errors == pytest.approx(plain.errors, rel=1e-4)
        assert triple.errors == pytest.approx([3 * e for e in plain.errors], rel=1e-4)


def test_wide_units_that_are_gone_do_not_stop_the_rest() -> None:
    """What rounding leaves of a removed group's block of the inverse is not solved for, whatever it is."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(600, 128, generator=generator), torch.randn(8, 128, generator=generator)
        removals = obs_removals(weight, moments_of(x, x).covariance, None, 32, 3, damping=0.01)
        assert len(set(removals.units)) == 3 and all(a < b for a, b in pairwise(removals.errors))


def test_damping_makes_removals_dearer_than_they_are() -> None:
    """The ridge stands for inputs that cannot be told from the others: no error gets smaller."""
    x, weight = data()
    covariance = moments_of(x, x).covariance
    bare, ridged = (obs_removals(weight, covariance, None, 1, 6, damping=d) for d in (NO_DAMPING, 0.1))
    assert all(a < b for a, b in zip(bare.errors, ridged.errors, strict=True))


@pytest.mark.parametrize("width", [1, 4])
def test_wifv_is_variance_times_squared_weight_norm(width: int) -> None:
    """E = sum of Var(x_j) ||W_j||^2 over what is gone, smallest units first."""
    x, weight = data(3)
    scores = x.double().var(0, correction=0) * weight.double().pow(2).sum(0)
    per_unit = [float(scores[u * width : (u + 1) * width].sum()) for u in range(INPUTS // width)]
    removals = wifv_removals(weight, moments_of(x, x).covariance, None, width, len(per_unit) - 1)
    want = sorted(range(len(per_unit)), key=per_unit.__getitem__)[:-1]
    assert removals.units == tuple(want)
    for count in range(1, len(want) + 1):
        assert removals.errors[count - 1] == pytest.approx(sum(per_unit[u] for u in want[:count]), rel=1e-4)


def test_wifv_under_a_metric_weighs_the_outputs() -> None:
    """The metric's norm of a column takes the place of the plain one: E = Var(x_j) W_jᵀ M W_j."""
    x, weight = data(3)
    metric, w = metric_of(), weight.double()
    scores = x.double().var(0, correction=0) * torch.einsum("oj,op,pj->j", w, metric, w)
    removals = wifv_removals(weight, moments_of(x, x).covariance, metric, 1, 1)
    assert removals.units == (int(scores.argmin()),)
    assert removals.errors[0] == pytest.approx(float(scores.min()), rel=1e-4)


@pytest.mark.parametrize("damping", [NO_DAMPING, 0.05, 10.0])
def test_repair_is_ridge_regression_towards_the_weights(damping: float) -> None:
    """W' minimises the squared error plus λ Σ_j Var(x_j) ||w'_j - w_j||²: one lstsq with rows added for the ridge."""
    x, weight = data(4)
    generator = torch.Generator().manual_seed(9)
    target = x @ weight.t() + torch.randn(ROWS, OUTPUTS, generator=generator)
    kept = torch.tensor([0, 2, 3, 7, 11])
    fitted, bias = repair(moments_of(x, target), weight, kept, damping)
    xk, y = x[:, kept].double(), target.double()
    apart = xk - xk.mean(0)
    ridge = damping * apart.pow(2).sum(0)
    a = torch.cat([apart, ridge.sqrt().diag()])
    b = torch.cat([y - y.mean(0), ridge.sqrt()[:, None] * weight.double()[:, kept].t()])
    torch.testing.assert_close(fitted, torch.linalg.lstsq(a, b).solution.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((xk @ fitted.t() + bias).mean(0), y.mean(0), rtol=1e-5, atol=1e-5)


def test_without_a_damping_the_ridge_counts_as_a_fixed_number_of_tokens() -> None:
    """RIDGE_TOKENS against the rows that were seen, however they were dealt out and merged."""
    x, weight = data(4)
    target = x @ weight.t() + torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(9))
    first, second = (MomentSums(INPUTS, OUTPUTS, 1) for _ in range(2))
    first.add(x[:100], target[:100], 0, 1 / ROWS)
    second.add(x[100:], target[100:], 0, 1 / ROWS)
    second.merge(first)
    kept = torch.tensor([0, 2, 3, 7, 11])
    found, _ = repair(second.moments(), weight, kept)
    want, _ = repair(moments_of(x, target), weight, kept, damping=RIDGE_TOKENS / ROWS)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_large_elsewhere_keep_their_weights() -> None:
    """Left-out inputs are made up for by the others, but not through one that other tokens fire a thousand times."""
    x, weight = data()
    kept = torch.arange(INPUTS - 3)
    moments = moments_of(x, x @ weight.t())
    squares = torch.zeros(len(kept))
    squares[2] = 1e6 * float(moments.covariance[2, 2])
    free, bound = (repair(moments, weight, kept, 0.01, e)[0].float() for e in (None, squares))
    assert float((free - weight[:, kept])[:, 2].abs().max()) > 0.05
    assert float((bound - weight[:, kept])[:, 2].abs().max()) < 1e-3
    others = [0, 1, *range(3, len(kept))]
    assert float((bound - weight[:, kept])[:, others].abs().max()) > 0.05


def test_repair_with_everything_kept_changes_nothing() -> None:
    """Where the target is the map's own output, ridge and data agree on the weights."""
    x, weight = data()
    moments = moments_of(x, x @ weight.t() + 3.0)
    fitted, bias = repair(moments, weight, torch.arange(INPUTS))
    torch.testing.assert_close(fitted, weight.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, torch.full((OUTPUTS,), 3.0, dtype=torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_correction_is_a_share_of_what_the_kept_inputs_tell(share: float) -> None:
    """Of a target that the kept inputs determine, a correction with next to no ridge gives the asked share."""
    x, weight = data()
    kept = torch.arange(4, INPUTS)
    target = x[:, kept] @ weight[:, kept].t() + 3.0
    added, bias = correction(moments_of(x, target), kept, share, damping=1e-9)
    assert torch.allclose(
        x[:, kept].double() @ added.t() + bias, share * target.double(), atol=1e-4
    )  # fp32 sums of terms near 20


def test_compensation_keeps_columns_and_the_mean() -> None:
    """Only the bias moves, and the mean of the output stays."""
    x, weight = data()
    target, kept = x @ weight.t(), torch.tensor([1, 4, 9])
    part, bias = compensate(moments_of(x, target), weight, kept)
    assert torch.equal(part, weight.double()[:, kept])
    after = x[:, kept].double() @ part.t() + bias
    torch.testing.assert_close(after.mean(0), target.double().mean(0), rtol=1e-5, atol=1e-5)


def test_total_variance_is_within_plus_between() -> None:
    """V_total = Σ α_k V_k + Σ α_k (x̄_k - x̄)², means weighted by α, on domains of other sizes and batches."""
    generator = torch.Generator().manual_seed(7)
    shares, sizes = (0.5, 0.2, 0.3), (90, 200, 40)
    domains = [torch.randn(n, INPUTS, generator=generator) + 2 * k for k, n in enumerate(sizes)]
    weight = data()[1]
    sums = MomentSums(INPUTS, OUTPUTS, 3)
    for k, (x, share) in enumerate(zip(domains, shares, strict=True)):
        for part in torch.split(x, 33):
            sums.add(part, part @ weight.t(), k, share / len(x))
    total, within = sums.moments(), sums.moments(within=True)
    exact = [x.double() for x in domains]
    mean = sum(a * x.mean(0) for a, x in zip(shares, exact, strict=True))
    inside = sum(a * torch.cov(x.t(), correction=0) for a, x in zip(shares, exact, strict=True))
    apart = [x.mean(0) - mean for x in exact]
    between = sum(a * torch.outer(d, d) for a, d in zip(shares, apart, strict=True))
    assert isinstance(mean, Tensor) and isinstance(inside, Tensor) and isinstance(between, Tensor)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(total.mean, mean, **close)
    torch.testing.assert_close(within.covariance, inside, **close)
    torch.testing.assert_close(total.covariance, inside + between, **close)
    torch.testing.assert_close(total.cross, weight.double() @ total.covariance, **close)
    torch.testing.assert_close(total.target_mean, weight.double() @ mean, **close)
    assert float(between.diagonal().min()) > 1  # far more than the tolerance


def test_restricted_moments_are_those_of_fewer_inputs() -> None:
    """Taking columns of the moments is taking moments of the columns."""
    x, weight = data()
    kept = torch.tensor([5, 1])
    part, direct = moments_of(x, x @ weight.t()).restricted(kept), moments_of(x[:, kept], x @ weight.t())
    for a, b in ((part.mean, direct.mean), (part.covariance, direct.covariance), (part.cross, direct.cross)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_covariance_of_zeros_can_be_inverted() -> None:
    """Inputs that never fire become an identity; otherwise the ridge is a share of every input's own variance."""
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(damped(0 * eye, 0.1), eye)
    ridged = damped(torch.tensor([1.0, 2.0, 3.0]).double().diag(), 0.5).diagonal()
    torch.testing.assert_close(ridged, torch.tensor([1.5, 3.0, 4.5]).double(), rtol=1e-5, atol=0)
    removals = obs_removals(torch.ones(2, 3), 0 * eye, None, 1, 2, damping=0.1)
    assert len(set(removals.units)) == 2


def test_a_change_is_held_to_what_other_text_confirms() -> None:
    """The share is where the error on the other text is least; a change of nothing is whole, a wrong one is none."""
    x, weight = data(3)
    wanted = data(4)[1]
    unseen = moments_of(x, x @ wanted.t())
    change = 3 * (wanted - weight) + 0.5 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))

    def error(share: float) -> float:
        left = (x - x.mean(0)) @ (wanted - weight - share * change).t()
        return float(left.double().pow(2).mean())

    share = held_share((weight + change).double(), weight, unseen)
    assert 0.2 < share < 0.5
    assert error(share) < min(error(share - 0.01), error(share + 0.01))
    assert held_share(wanted.double(), weight, unseen) == pytest.approx(1.0, abs=1e-4)
    assert held_share((2 * weight - wanted).double(), weight, unseen) == 0.0
    assert held_share(weight.double(), weight, unseen) == 1.0


def test_halves_take_the_windows_of_every_domain_in_turn() -> None:
    """Also where batches hold an odd number of windows or one; together they are the sums of all."""
    generator = torch.Generator().manual_seed(6)
    sizes = ((0, 3), (0, 1), (1, 1), (0, 2), (1, 2))
    batches = [Batch(domain, 1.0, torch.zeros(n, 4, dtype=torch.long)) for domain, n in sizes]
    inputs = [torch.randn(n, 4, 5, generator=generator) for _, n in sizes]
    targets = [2 * x[..., :2] for x in inputs]
    first, second = sum_halves(batches, inputs, targets)
    assert (first.rows, second.rows) == ((3 + 2) * 4, (3 + 1) * 4)
    assert not torch.allclose(first.moments().mean, second.moments().mean, atol=1e-3)
    first.merge(second)
    got, want = first.moments(), sum_moments(batches, inputs, targets).moments()
    for name in ("mean", "covariance", "target_mean", "cross"):
        assert torch.allclose(getattr(got, name), getattr(want, name), atol=1e-6)
    assert got.rows == want.rows
