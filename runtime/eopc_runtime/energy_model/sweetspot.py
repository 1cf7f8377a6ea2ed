"""Where a joule buys most tokens, and how many tokens a budget buys.

    J per token  e(m) = E(n, m) / m,   cheapest at   n_out* = sqrt((θ0 + θ1 n + θ2 n²) / θ5)

(SweetSpot, arXiv 2602.05695.) The fixed cost of a request is shared by more tokens as the answer grows, until the
growing KV cache costs more than that saves. A negative θ0 is a trait of the sensor and counts as 0: with it, J per
token would fall without bound as the answer gets shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eopc_runtime.energy_model.forms import Theta

NEARLY = 0.01  # answers within 1 % of the least J per token count as equally good; the fit errs by about as much


@dataclass(frozen=True, slots=True)
class SweetSpot:
    """The cheapest answer length for one prompt length.

    n_out_star is null, with the reason, where the curve has no lowest point within the lengths that were measured;
    best_n_out is the cheapest length among these all the same, and `clipped` says that it is their edge. Answers of
    low to high tokens cost at most 1 % more per token.
    """

    n_in: int
    n_out_star: int | None
    reason: str
    best_n_out: int
    clipped: bool
    j_per_token: float
    low: int
    high: int


def j_per_token(theta: Theta, n_in: int, n_out: int) -> float:
    """Joules per generated token."""
    return theta.charged().energy_j(float(n_in), float(n_out)) / n_out


def optimum(theta: Theta, n_in: int) -> tuple[float | None, str]:
    """Return the answer length of least energy per token, not rounded; or None and the reason."""
    charged = theta.charged()
    fixed_j = charged.energy_j(float(n_in), 0.0)
    if theta.theta5 <= 0:
        return None, "no interior optimum: a longer answer is always cheaper per token"
    if fixed_j <= 0:
        return None, "no interior optimum: there is no fixed cost to share, so a shorter answer is always cheaper"
    return math.sqrt(fixed_j / theta.theta5), ""


def sweet_spot(theta: Theta, n_in: int, n_out: tuple[int, int]) -> SweetSpot:
    """Return the sweet spot at n_in among answers of n_out[0] to n_out[1] tokens, those that were measured."""
    shortest, longest = n_out
    found, reason = optimum(theta, n_in)
    if found is None:
        best = longest if theta.theta5 <= 0 else shortest
        star = None
    else:
        inside = min(max(found, shortest), longest)
        best = min({math.floor(inside), math.ceil(inside)}, key=lambda m: j_per_token(theta, n_in, m))
        star = best if shortest <= found <= longest else None
        if star is None:
            reason = f"the optimum, {found:.0f} tokens, is outside the measured {shortest} to {longest}"
    least = j_per_token(theta, n_in, best)
    low, high = _nearly(theta, n_in, best, n_out)
    return SweetSpot(n_in, star, reason, best, star is None, least, low, high)


def token_cap(theta: Theta, n_in: int, budget_j: float, limit: int) -> int:
    """Return the most tokens, up to `limit`, whose charged energy is within the budget; 0 if not even one is.

    The root of θ5 m² + b m + c = budget is taken in the form that neither cancels nor divides by θ5 = 0.
    """
    charged, n = theta.charged(), float(n_in)

    def fits(m: int) -> bool:
        return charged.energy_j(n, float(m)) <= budget_j

    left_j = budget_j - charged.energy_j(n, 0.0)
    if left_j <= 0 or limit < 1:
        return 0
    if fits(limit):
        return limit
    b = charged.theta3 + charged.theta4 * n
    cap = min(int(2 * left_j / (b + math.sqrt(b * b + 4 * charged.theta5 * left_j))), limit)
    while cap < limit and fits(cap + 1):  # the last bit of rounding, either way
        cap += 1
    while cap > 0 and not fits(cap):
        cap -= 1
    return cap


def advice(spot: SweetSpot) -> str:
    """Say in words what to do."""
    if spot.low == spot.high:
        return f"at n_in {spot.n_in}, answers of {spot.best_n_out} tokens cost least per token"
    edge = ""
    if spot.clipped:
        edge = " (nothing longer was measured)" if spot.best_n_out == spot.high else " (nothing shorter was measured)"
    return f"at n_in {spot.n_in}, answers of {spot.low}-{spot.high} tokens cost least per token{edge}"


def round_lengths(low: int, high: int, most: int = 8) -> tuple[int, ...]:
    """Return both ends of a range and the powers of two between them, thinned to at most about `most`."""
    powers = [1 << k for k in range(high.bit_length()) if low < 1 << k < high]
    every = max(1, -(-len(powers) // max(most - 2, 1)))
    return tuple(sorted({low, *powers[::every], high}))


def grid(theta: Theta, n_ins: Sequence[int], n_outs: Sequence[int]) -> list[dict[str, float]]:
    """Return J per token over a grid of lengths, as {n_in, n_out, j_per_token} records."""
    return [{"n_in": n, "n_out": m, "j_per_token": j_per_token(theta, n, m)} for n in n_ins for m in n_outs]


def _nearly(theta: Theta, n_in: int, best: int, n_out: tuple[int, int]) -> tuple[int, int]:
    """Return the shortest and longest answers within 1 % of the least J per token; the curve has one valley."""
    limit = j_per_token(theta, n_in, best) * (1 + NEARLY)

    def edge(good: int, far: int) -> int:
        if j_per_token(theta, n_in, far) <= limit:
            return far
        while abs(far - good) > 1:
            middle = (good + far) // 2
            good, far = (middle, far) if j_per_token(theta, n_in, middle) <= limit else (good, middle)
        return good

    return edge(best, n_out[0]), edge(best, n_out[1])
