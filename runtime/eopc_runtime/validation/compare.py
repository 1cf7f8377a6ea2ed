"""Predicted against measured joules, sequence by sequence, and what they say together: pure.

A sequence whose power could not be measured is unverified: it has no error and counts for nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields
from eopc_runtime.ledger import ROUNDING


@dataclass(frozen=True, slots=True)
class Checked:
    """One sequence. measured_j and error (measured / predicted - 1) are null where it is unverified; notes say why.

    predicted_j is what a meter should show, price_j what was charged or would be (with margin).
    """

    name: str
    plan: str
    prompt_tokens: int
    new_tokens: int
    predicted_j: float
    price_j: float
    budget_j: float | None
    measured_j: float | None
    seconds: float
    samples: int
    verified: bool
    others_share: float | None  # of the CPU, used by other processes meanwhile
    notes: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """Measured over predicted, minus 1."""
        return None if self.measured_j is None else self.measured_j / self.predicted_j - 1

    @property
    def over_price(self) -> bool:
        """True if more was measured than charged."""
        return self.measured_j is not None and not fits(self.measured_j, self.price_j)

    @property
    def over_budget(self) -> bool:
        """True if more was measured than the budget."""
        return self.measured_j is not None and self.budget_j is not None and not fits(self.measured_j, self.budget_j)

    @classmethod
    def from_fields(cls, fields: Fields) -> Checked:
        """Read a sequence of `eopc validate --json`; what follows from the others is computed anew."""
        checked = cls(
            name=fields.text("name"),
            plan=fields.text("plan"),
            prompt_tokens=fields.integer("prompt_tokens", minimum=1),
            new_tokens=fields.integer("new_tokens", minimum=1),
            predicted_j=fields.number("predicted_j", minimum=0),
            price_j=fields.number("price_j", minimum=0),
            budget_j=fields.number_or_none("budget_j", minimum=0),
            measured_j=fields.number_or_none("measured_j", minimum=0),
            seconds=fields.number("seconds", minimum=0),
            samples=fields.integer("samples", minimum=0),
            verified=fields.boolean("verified", default=False),
            others_share=fields.number_or_none("others_share", minimum=0),
            notes=fields.texts("notes"),
        )
        if 0 in (checked.predicted_j, checked.price_j, checked.measured_j):
            fields.fail("a sequence costs something: predicted_j, price_j and measured_j are above 0.")
        return checked


@dataclass(frozen=True, slots=True)
class Validation:
    """A validation as `eopc validate --json` prints it: of which bundle (`engine`), with which meter, what it found."""

    engine: str
    meter: str
    energy_source: str
    checked: tuple[Checked, ...]
    notes: tuple[str, ...]

    @classmethod
    def from_json(cls, obj: object, where: str) -> Validation:
        """Read the object strictly as far as it is used; UsageError says what is wrong with it."""
        fields = Fields(obj, where, UsageError)
        return cls(
            engine=fields.text("engine"),
            meter=fields.text("meter"),
            energy_source=fields.text("energy_source"),
            checked=tuple(Checked.from_fields(child) for child in fields.children("sequences")),
            notes=fields.texts("notes"),
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """All sequences together; shares, and null where nothing was verified.

    mape: mean |measured - predicted| / measured. bias: mean of the errors. violations: sequences that cost more than
    their price or their budget. coverage: the share of verified sequences within their price, to hold against the
    margin's level. worst_over: the largest measured / price - 1.
    """

    sequences: int
    verified: int
    mape: float | None
    bias: float | None
    violations: int
    over_price: int
    over_budget: int
    coverage: float | None
    worst_over: float | None


def summarise(checked: Sequence[Checked]) -> Summary:
    """Return the figures over the verified ones among these sequences."""
    known = [(item, item.measured_j) for item in checked if item.measured_j is not None]
    errors = [abs(item.predicted_j - measured) / measured for item, measured in known]
    signed = [measured / item.predicted_j - 1 for item, measured in known]
    over_price = sum(item.over_price for item, _ in known)
    return Summary(
        sequences=len(checked),
        verified=len(known),
        mape=_mean(errors),
        bias=_mean(signed),
        violations=sum(item.over_price or item.over_budget for item, _ in known),
        over_price=over_price,
        over_budget=sum(item.over_budget for item, _ in known),
        coverage=1 - over_price / len(known) if known else None,
        worst_over=max((measured / item.price_j - 1 for item, measured in known), default=None),
    )


def fits(measured_j: float, limit_j: float) -> bool:
    """True if what was measured is within a limit, but for the rounding of sums."""
    return measured_j <= limit_j * (1 + ROUNDING)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
