"""The polynomial behind every price, the published forms beside it, and the paper's numbering of coefficients.

With n prompt tokens and m generated tokens a sequence costs, in joules,

    E(n, m) = θ0 + θ1 n + θ2 n² + θ3 m + θ4 n m + θ5 m²

θ0 fixed cost, θ1 prompt token, θ2 attention within the prompt, θ3 generated token (reading the weights), θ4 the
prompt's KV cache per step, θ5 the answer's. SweetSpot (arXiv 2602.05695) writes the same six per output token,
with its coefficients t0..t5 in another order; `Theta.from_paper` and `to_paper` convert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from eopc_runtime.energy import TierEnergy

Array = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Array)

# position in θ of the paper's t0..t5
_PAPER_ORDER = (3, 2, 4, 1, 5, 0)


@dataclass(frozen=True, slots=True)
class Theta:
    """The six coefficients in joules; θ1..θ5 are not negative, θ0 may be."""

    theta0: float
    theta1: float
    theta2: float
    theta3: float
    theta4: float
    theta5: float

    def energy_j(self, n: Number, m: Number) -> Number:
        """Joules of a sequence, numbers or arrays of them."""
        prompt = self.theta0 + n * (self.theta1 + n * self.theta2)
        return prompt + m * (self.theta3 + n * self.theta4 + m * self.theta5)

    def charged(self) -> Theta:
        """Return the coefficients a budget is charged by: a negative constant is not credited."""
        return replace(self, theta0=max(self.theta0, 0.0))

    def to_tier(self, tier: str, source: str) -> TierEnergy:
        """Return the same energy by phase; prefill and steps add up to the charged E(n, m) for every m >= 1."""
        step_j0 = self.theta3 + self.theta5
        return TierEnergy(
            tier=tier,
            prefill_j0=max(self.theta0, 0.0) + step_j0,
            prefill_j1=self.theta1 + self.theta4,
            prefill_j2=self.theta2,
            step_j0=step_j0,
            step_jn=self.theta4,
            step_ji=2 * self.theta5,
            source=source,
            uncredited_j=min(self.theta0, 0.0),
        )

    @classmethod
    def of_tier(cls, tier: TierEnergy) -> Theta:
        """Return the coefficients of a tier's prices, the uncredited constant included."""
        theta5 = tier.step_ji / 2
        return cls(
            theta0=tier.prefill_j0 - tier.step_j0 + tier.uncredited_j,
            theta1=tier.prefill_j1 - tier.step_jn,
            theta2=tier.prefill_j2,
            theta3=tier.step_j0 - theta5,
            theta4=tier.step_jn,
            theta5=theta5,
        )

    @classmethod
    def from_paper(cls, t: Sequence[float]) -> Theta:
        """Return θ for the paper's t0..t5 (joules per output token)."""
        if len(t) != len(_PAPER_ORDER):
            raise ValueError(f"the paper's form has six coefficients, not {len(t)}")
        by_position = dict(zip(_PAPER_ORDER, t, strict=True))
        return cls(*(by_position[i] for i in range(6)))

    def to_paper(self) -> tuple[float, ...]:
        """Return the paper's t0..t5."""
        theta = astuple(self)
        return tuple(theta[i] for i in _PAPER_ORDER)


@dataclass(frozen=True, slots=True)
class Form:
    """A form to fit: its columns for E (not E / m), which coefficients may be negative, and how they make a θ.

    `mix` is [6, columns] with θ = mix @ coefficients; None where the form is no polynomial in n and m.
    """

    name: str
    formula: str  # J per output token, as published
    columns: Callable[[Array, Array], Array]
    free: tuple[bool, ...]
    mix: Array | None


def _polynomial(name: str, formula: str, *columns: tuple[int, ...] | dict[int, float]) -> Form:
    """A form whose columns are sums of monomials of θ; one that is the constant alone may be negative."""
    weights = [c if isinstance(c, dict) else dict.fromkeys(c, 1.0) for c in columns]
    mix = np.zeros((6, len(weights)))
    for j, column in enumerate(weights):
        for i, weight in column.items():
            mix[i, j] = weight
    free = tuple(set(column) == {0} for column in weights)
    return Form(name, formula, lambda n, m: monomials(n, m) @ mix, free, mix)


def monomials(n: Array, m: Array) -> Array:
    """Return the columns 1, n, n², m, n m, m² [rows, 6]."""
    return np.stack([np.ones_like(n), n, n * n, m, n * m, m * m], axis=1)


QUADRATIC = "quadratic"
PHYS5 = "phys5"
FORMS = {
    form.name: form
    for form in (
        _polynomial("b1", "t0", (3,)),
        _polynomial("b2", "t0 + t1/m", (3,), (0,)),
        Form("b3", "t0 + t1/(n+m)", lambda n, m: np.stack([m, m / (n + m)], axis=1), (False, True), None),
        _polynomial("b4", "t0 + t1 n/m + t2 n", (3,), (1,), (4,)),
        _polynomial("flops", "t0 + t1 n²/m + t2 n + t3 n/m + t4 m", (3,), (2,), (4,), (1,), (5,)),
        # SweetSpot's Mem+FLOPs; the order is that in which columns are given up when cells cannot tell them apart
        _polynomial(QUADRATIC, "flops + t5/m", (0,), (3,), (1,), (4,), (5,), (2,)),
        # for few cells: a step's price depends on its context n + i alone, so θ4 = 2 θ5
        _polynomial(PHYS5, "quadratic with θ4 = 2 θ5", (0,), (3,), (1,), {4: 1.0, 5: 0.5}, (2,)),
        _polynomial("linear", "t0 + t1 n/m + t2/m", (0,), (3,), (1,)),
    )
}
PUBLISHED = {"b1": "B1", "b2": "B2", "b3": "B3", "b4": "B4", "flops": "FLOPs", QUADRATIC: "Mem+FLOPs"}
