"""How far the prior of a device is from measurements there: a record of its profile, read strictly.

The constants of a prior are fitted to public measurements of a few engines. What it is worth for anything else is
told by sets left out of the fit: their mean error, and the largest factor by which a measured energy exceeded the
price. The same figures for engines the prior was not made for say how much the choice of engine matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eopc_runtime.jsonfields import Fields


@dataclass(frozen=True, slots=True)
class Deviation:
    """Prices against measurements of `n_sets` engine sets.

    mape is the mean over the sets of their mean absolute error, as a share (0.02 = 2 %); worst_under the largest
    measured / price ratio of any cell (1.1: prices were up to 1.1 times too low).
    """

    mape: float
    worst_under: float
    n_sets: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Deviation:
        """Read the record strictly."""
        found = _read(fields)
        fields.done()
        return found


@dataclass(frozen=True, slots=True)
class PriorError:
    """The held-out error of a prior for `engine`, the engine its constants belong to, and how it was found.

    `as_metered` is the same without putting back what a lagging sensor misses; `other_engines` are errors of these
    prices for engines that had no part in the fit.
    """

    engine: str
    held_out: Deviation
    as_metered: Deviation
    other_engines: Mapping[str, Deviation]
    method: str

    @classmethod
    def from_fields(cls, fields: Fields) -> PriorError:
        """Read the record strictly; an empty method is refused."""
        found = cls(
            engine=fields.text("engine"),
            held_out=_read(fields),
            as_metered=Deviation.from_fields(fields.child("as_metered")),
            other_engines=MappingProxyType(
                {name: Deviation.from_fields(child) for name, child in fields.children_by_name("other_engines").items()}
            ),
            method=fields.text("method"),
        )
        if not found.method.strip():
            fields.fail('"method" is empty; say how the error was found.')
        fields.done()
        return found

    def to_json(self) -> dict[str, object]:
        """Return the record as it stands in a profile."""
        return {
            "engine": self.engine,
            **_plain(self.held_out),
            "as_metered": _plain(self.as_metered),
            "other_engines": {name: _plain(error) for name, error in self.other_engines.items()},
            "method": self.method,
        }

    def __str__(self) -> str:
        """One line for people: what the prices are worth, and for which engine."""
        text = (
            f"{self.engine}: {self.held_out.mape:.1%} off in the mean, at most {self.held_out.worst_under:.2f} times "
            f"too low, on {self.held_out.n_sets} public engine sets left out of the fit"
        )
        if self.other_engines:
            worst = max(self.other_engines.values(), key=lambda error: error.worst_under)
            text += f"; other engines: up to {worst.worst_under:.1f} times too low"
        return text


def _read(fields: Fields) -> Deviation:
    found = Deviation(
        mape=fields.number("mape", minimum=0),
        worst_under=fields.number("worst_under", minimum=0),
        n_sets=fields.integer("n_sets", minimum=1),
    )
    if found.worst_under == 0:
        fields.fail('"worst_under" is 0, but a measured energy is never 0 times its price.')
    return found


def _plain(error: Deviation) -> dict[str, object]:
    return {"mape": error.mape, "worst_under": error.worst_under, "n_sets": error.n_sets}
