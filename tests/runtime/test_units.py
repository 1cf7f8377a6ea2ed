"""Joules as text: what is read, what is refused, and that text and value agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.errors import BudgetError
from eopc_runtime.units import format_energy, parse_budgets, parse_energy


@pytest.mark.parametrize(
    ("text", "joules"),
    [
        ("5J", 5.0),
        ("500mJ", 0.5),
        ("1.5 kJ", 1500.0),
        ("0.2Wh", 720.0),
        ("20mWh", 72.0),
        ("7", 7.0),
        (" .5j ", 0.5),
        ("+2J", 2.0),
        ("5.", 5.0),
        ("1e-3J", 0.001),
        ("3KJ", 3000.0),
        ("1WH", 3600.0),
    ],
)
def test_a_quantity_is_read_in_joules(text, joules):
    """Units convert exactly; a plain number is joules; case and spaces do not matter."""
    assert parse_energy(text) == joules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0J", "no energy"),
        ("0", "no energy"),
        ("-1", "negative"),
        ("-5mJ", "negative"),
        ("5 parsecs", 'unknown unit "parsecs"'),
        ("5MJ", 'Did you mean "mJ"'),
        ("5 W", "unknown unit"),
        ("", "empty"),
        ("   ", "empty"),
        ("nan", "not an energy"),
        ("inf", "not an energy"),
        ("J", "not an energy"),
        ("1e999J", "too large"),
        ("1e-999J", "no energy"),
        ("1e999999999J", "unknown unit"),
        ("١٢J", "not an energy"),
        ("5J 6J", "unknown unit"),
        ("1_0J", "unknown unit"),
    ],
)
def test_what_is_no_positive_energy_is_refused_with_an_example(text, says):
    """One sentence says what is wrong and shows the right form."""
    with pytest.raises(BudgetError, match=r"5J, 500mJ or 0\.2Wh") as caught:
        parse_energy(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "joules"),
    [
        ("5,10,20J", (5.0, 10.0, 20.0)),
        ("5J,500mJ", (5.0, 0.5)),
        ("20, 10 ,5 J", (20.0, 10.0, 5.0)),
        ("5,10,20", (5.0, 10.0, 20.0)),
        ("500,900mJ", (0.5, 0.9)),
        ("5,10J,500mJ", (5.0, 10.0, 0.5)),
        ("2kJ,3", (2000.0, 3000.0)),
        ("1J", (1.0,)),
    ],
)
def test_a_list_shares_the_last_unit_and_keeps_its_order(text, joules):
    """An item without a unit takes the next unit to its right, else the last one written."""
    assert parse_budgets(text) == joules


@pytest.mark.parametrize("text", ["", ",", "5,,10J", "5J,", "5,0,10J", "5,-1J", "5,x,10J"])
def test_a_list_with_a_bad_item_is_refused(text):
    """Nothing is skipped silently."""
    with pytest.raises(BudgetError, match="for example"):
        parse_budgets(text)


@pytest.mark.parametrize("text", ["5,5J", "5J,5000mJ", "1Wh,3.6kJ"])
def test_a_budget_written_twice_is_refused_in_any_spelling(text):
    """Two equal budgets would give two equal tiers."""
    with pytest.raises(BudgetError, match="twice"):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("joules", "text"),
    [
        (5.0, "5 J"),
        (0.0734, "73.4 mJ"),
        (20.0, "20 J"),
        (12345.0, "12.3 kJ"),
        (0.9999, "1 J"),
        (0.0, "0 J"),
        (100.0, "100 J"),
        (1e-9, "1E-6 mJ"),
    ],
)
def test_joules_print_with_three_digits_and_a_unit(joules, text):
    """The unit follows the size of the value."""
    assert format_energy(joules) == text


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_a_rounded_up_energy_is_never_below_the_value_and_close_to_it(joules):
    """What an error message asks for suffices when typed back, and exceeds the value by less than 1.1 %."""
    named = parse_energy(format_energy(joules, round_up=True))
    assert joules <= named <= joules * 1.011  # three digits: one unit of the last is at most 1 %
