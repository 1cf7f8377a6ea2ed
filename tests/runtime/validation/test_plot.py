"""The picture: well-formed, a point per verified sequence, and marks where they belong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from eopc_runtime.svg import log_ticks
from eopc_runtime.validation.compare import Checked, summarise
from eopc_runtime.validation.plot import SIZE, TOP, validation_svg

SVG = "{http://www.w3.org/2000/svg}"


def checked(predicted: float, measured: float | None, plan: str = "t0") -> Checked:
    """A sequence charged 10 % more than predicted."""
    verified = measured is not None
    return Checked("1", plan, 64, 64, predicted, 1.1 * predicted, None, measured, 3.0, 60, verified, None, ())


def points(svg: str) -> list[ElementTree.Element]:
    """The circles that carry a title: the points."""
    return [
        circle for circle in ElementTree.fromstring(svg).iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None
    ]


def test_every_verified_sequence_has_a_point_and_no_other() -> None:
    """Two of three; one above its price is red."""
    items = [checked(10.0, 10.0), checked(20.0, 30.0, "t0>t2"), checked(15.0, None)]
    svg = validation_svg("a < b & c", "note", items, summarise(items))
    found = points(svg)
    assert len(found) == 2
    assert [point.get("fill") == "#c8553d" for point in found] == [False, True]
    title = found[1].find(f"{SVG}title")
    assert title is not None
    assert title.text == "1: t0>t2, 64 + 64 tokens, 30 J"
    assert "2 of 3 sequences verified" in svg
    assert "a &lt; b &amp; c" in svg


def test_an_exact_prediction_lies_on_the_diagonal() -> None:
    """As far from the left edge as from the bottom."""
    items = [checked(1.0, 1.0), checked(5.0, 5.0), checked(80.0, 80.0)]
    for point in points(validation_svg("t", "n", items, summarise(items))):
        x, y = float(point.get("cx", "nan")) - 80, TOP + SIZE - float(point.get("cy", "nan"))
        assert x == pytest.approx(y, abs=0.2)  # coordinates have one decimal


def test_without_a_verified_sequence_the_picture_says_so() -> None:
    """An empty plot is no success."""
    items = [checked(1.0, None)]
    assert "no sequence could be verified" in validation_svg("t", "n", items, summarise(items))


def test_one_point_alone_has_axes() -> None:
    """No division by a range of zero."""
    items = [checked(7.0, 7.0)]
    assert len(points(validation_svg("t", "n", items, summarise(items)))) == 1


def test_ticks_are_round_numbers_within_the_bounds() -> None:
    """1, 2, 5 times powers of ten; powers alone over many decades."""
    assert log_ticks(3.0, 60.0) == [5.0, 10.0, 20.0, 50.0]
    assert log_ticks(0.0015, 900.0) == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
