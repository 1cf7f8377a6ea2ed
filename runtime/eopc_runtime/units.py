"""Joules as people write them: `5J`, `500mJ`, `1.2kJ`, `0.2Wh`, `20mWh`; a plain number is joules.

Decimal arithmetic keeps text and value in step: `parse_energy(format_energy(x, round_up=True)) >= x` always
holds, so a budget named in an error message works when it is typed back.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal

from eopc_runtime.errors import BudgetError
from eopc_runtime.jsonfields import did_you_mean, shown

# 1 Wh = 3600 J
JOULES_PER_UNIT = {
    "mJ": Decimal("0.001"),
    "J": Decimal(1),
    "kJ": Decimal(1000),
    "mWh": Decimal("3.6"),
    "Wh": Decimal(3600),
}
_EXAMPLE = "Write a positive number with a unit, for example 5J, 500mJ or 0.2Wh"
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?)\s*([^\d\s.].*)?", re.ASCII)


def parse_energy(text: str) -> float:
    """Return joules for one quantity such as `500mJ`; BudgetError on what is no positive energy."""
    number, unit = _split(text)
    return _joules(text, number, unit or "J")


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return the joules of a comma list in the order written: `5,10,20J` shares the last unit.

    An item without a unit takes the next unit to its right, else the last unit written, else joules.
    Duplicates raise BudgetError, however they are spelled (`5J,5000mJ`).
    """
    if not text.strip():
        raise BudgetError("The list of budgets is empty. Write energies with units, for example 5,10,20J.")
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise BudgetError(f'"{shown(text)}" has an empty item. Write energies with units, for example 5,10,20J.')
    parts = [_split(item) for item in items]
    units = [unit for _, unit in parts if unit]
    shared = units[-1] if units else "J"
    budgets: list[float] = []
    for item, (number, unit) in reversed(list(zip(items, parts, strict=True))):
        shared = unit or shared
        budgets.insert(0, _joules(item, number, shared))
    for i, joules in enumerate(budgets):
        if joules in budgets[:i]:
            raise BudgetError(f'"{shown(text)}" names {format_energy(joules)} twice. Write every budget once.')
    return tuple(budgets)


def format_energy(joules: float, round_up: bool = False) -> str:
    """Return joules with three digits and a unit (`73.4 mJ`); `round_up` never names less than the value."""
    if not math.isfinite(joules):
        return f"{joules} J"
    if joules == 0:
        return "0 J"
    value = Decimal(joules)
    rounding = ROUND_CEILING if round_up else ROUND_HALF_EVEN
    rounded = value.quantize(Decimal(1).scaleb(value.adjusted() - 2), rounding=rounding)
    size = abs(rounded)
    unit = "mJ" if size < 1 else "J" if size < 1000 else "kJ"
    rounded = rounded / JOULES_PER_UNIT[unit]
    if Decimal("0.001") <= abs(rounded) < Decimal(1_000_000):
        digits = f"{rounded:f}"
        return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"
    return f"{rounded.normalize():E} {unit}"


def _split(text: str) -> tuple[Decimal, str]:
    """Return the number and the unit as written ('' when there is none)."""
    stripped = text.strip()
    if not stripped:
        raise BudgetError(f"The energy is empty. {_EXAMPLE}.")
    match = _QUANTITY.fullmatch(stripped)
    if match is None:
        raise BudgetError(f'"{shown(text)}" is not an energy. {_EXAMPLE}.')
    return Decimal(match[1]), (match[2] or "").strip()


def _joules(text: str, number: Decimal, unit: str) -> float:
    joules = float(number * _scale(text, unit))
    if number < 0:
        raise BudgetError(f'"{shown(text)}" is a negative energy. {_EXAMPLE}.')
    if joules == 0:
        raise BudgetError(f'"{shown(text)}" is no energy at all, and a sequence needs some. {_EXAMPLE}.')
    if not math.isfinite(joules):
        raise BudgetError(f'"{shown(text)}" is too large an energy. {_EXAMPLE}.')
    return joules


def _scale(text: str, unit: str) -> Decimal:
    """Joules per unit; case does not matter, except that M (mega) is not m (milli)."""
    for name, joules in JOULES_PER_UNIT.items():
        if unit.lower() == name.lower() and not (name[0] == "m" and unit[0] == "M"):
            return joules
    known = ", ".join(JOULES_PER_UNIT)
    milli = f"m{unit[1:]}"  # MJ reads as mega, which eopc leaves out lest it be meant as milli
    near = f' Did you mean "{milli}"?' if milli in JOULES_PER_UNIT else did_you_mean(unit, JOULES_PER_UNIT)
    raise BudgetError(f'"{shown(text)}" has the unknown unit "{shown(unit)}"; eopc knows {known}.{near} {_EXAMPLE}.')


def format_bytes(count: float) -> str:
    """Return a size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
