"""The picture: well-formed, inside its frame, no label over another, and everything it should show."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest

from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.svg import HEIGHT, WIDTH, sweetspot_svg
from eopc_runtime.energy_model.sweetspot import round_lengths, sweet_spot

NS = "{http://www.w3.org/2000/svg}"
ORIN = Theta(-10.5, 0.00257, 8.9e-7, 0.3683, 5.56e-6, 5.96e-6)
FLAT = Theta(0.0, 0.0, 0.0, 0.5, 0.0, 0.0)


def draw(theta: Theta, n_in: tuple[int, int], n_out: tuple[int, int], title: str = "a <model> & mode") -> ET.Element:
    """The picture as a tree."""
    spots = [sweet_spot(theta, n, n_out) for n in round_lengths(*n_in)]
    return ET.fromstring(sweetspot_svg(title, "joules are calibrated", theta, spots, round_lengths(*n_out)))


def boxes(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """Text, left, top, right and bottom of every label, at 0.6 of the font size per character."""
    found = []
    for text in root.iter(f"{NS}text"):
        size = float(text.attrib["font-size"])
        width = 0.6 * size * len(text.text or "")
        shift = {"start": 0.0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
        x, y = float(text.attrib["x"]) - shift, float(text.attrib["y"])
        found.append((text.text or "", x, y - 0.8 * size, x + width, y + 0.2 * size))
    return found


@pytest.mark.parametrize(
    ("theta", "n_in", "n_out"),
    [
        (ORIN, (128, 4096), (128, 4096)),
        (ORIN, (16, 2048), (16, 2048)),
        (ORIN, (1, 131072), (1, 131072)),
        (ORIN, (512, 512), (64, 64)),
        (FLAT, (32, 512), (32, 512)),
    ],
)
def test_labels_stay_inside_and_apart(theta: Theta, n_in: tuple[int, int], n_out: tuple[int, int]) -> None:
    """Usual and extreme ranges, one single cell, and a curve without any slope."""
    labels = boxes(draw(theta, n_in, n_out))
    for text, left, top, right, bottom in labels:
        assert left >= 0, text
        assert top >= 0, text
        assert right <= WIDTH, text
        assert bottom <= HEIGHT, text
    for (a, l1, t1, r1, b1), (b, l2, t2, r2, b2) in itertools.combinations(labels, 2):
        assert min(r1, r2) <= max(l1, l2) or min(b1, b2) <= max(t1, t2), f"{a} covers {b}"


def test_every_prompt_has_a_curve_a_row_and_a_mark() -> None:
    """Six prompt lengths: six lines, six rings on them, six frames in the heat map, 36 cells; the title is escaped."""
    root = draw(ORIN, (128, 4096), (128, 4096))
    lines = list(root.iter(f"{NS}polyline"))
    rings = list(root.iter(f"{NS}circle"))
    rects = list(root.iter(f"{NS}rect"))
    assert (len(lines), len(rings)) == (6, 6)
    assert sum(r.attrib["fill"] == "none" for r in rects) == 6
    assert len(rects) == 1 + 36 + 6
    assert any(text == "a <model> & mode" for text, *_ in boxes(root))


def test_a_ring_is_filled_only_at_a_true_optimum() -> None:
    """Where the curve just ends at the range's edge, the ring is hollow."""
    falling = Theta(5.0, 0.01, 0.0, 0.5, 1e-5, 0.0)
    assert {c.attrib["fill"] for c in draw(falling, (128, 512), (32, 512)).iter(f"{NS}circle")} == {"#fff"}
    assert "#fff" not in {c.attrib["fill"] for c in draw(ORIN, (128, 512), (128, 4096)).iter(f"{NS}circle")}


def test_curves_and_points_lie_within_the_axes() -> None:
    """No point of a line leaves the frame of its panel."""
    for line in draw(ORIN, (16, 2048), (16, 2048)).iter(f"{NS}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 70 <= x <= 500.05
            assert 69.9 <= y <= 390.1
