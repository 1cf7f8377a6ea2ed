"""The sweet spot as a picture: J per token against the answer's length, and a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.sweetspot import SweetSpot, j_per_token
from eopc_runtime.svg import Box, axes, circle, document, linear_ticks, paint, series, text, x_labels, y_grid

WIDTH, HEIGHT = 1120, 470
_LEFT, _RIGHT = Box(70, 70, 430, 320), Box(640, 70, 400, 320)
HEAT_TITLE = "J per generated token; ring = cheapest answer for the prompt"
_COOL, _WARM = (232, 244, 241), (176, 66, 54)  # cheap, dear
_LIGHT, _DARK = "#ffffff", "#222222"  # on these cells, whatever the page's colours


@dataclass(frozen=True, slots=True)
class Curve:
    """J per token of one tier or prompt length, with its cheapest answer."""

    label: str
    theta: Theta
    spot: SweetSpot


def sweetspot_svg(title: str, note: str, theta: Theta, spots: Sequence[SweetSpot], n_outs: Sequence[int]) -> str:
    """Return the picture as the text of an SVG file.

    Args:
        title: one line above, for example the model and the power mode.
        note: one line below: where the joules come from.
        spots: the sweet spot of every prompt length to show.
        n_outs: answer lengths of the heat map, rising; the curves span them.
    """
    parts = [
        text(70, 30, title, size=16, weight="bold"),
        text(70, HEIGHT - 14, note, fill="muted"),
        *curves(_LEFT, [Curve(f"n_in {s.n_in}", theta, s) for s in spots], n_outs),
        *heat_map(_RIGHT, theta, spots, n_outs),
    ]
    return document(WIDTH, HEIGHT, parts)


def curves(box: Box, lines: Sequence[Curve], n_outs: Sequence[int]) -> list[str]:
    """Lines of J per token over the answer's length, the sweet spots as rings; names stand right of the box."""
    low, high = n_outs[0], n_outs[-1]
    lengths = [low * (high / low) ** (i / 120) for i in range(121)] if high > low else [float(low)]
    values = [[line.theta.charged().energy_j(float(line.spot.n_in), m) / m for m in lengths] for line in lines]
    ticks = linear_ticks(min(map(min, values)), max(map(max, values)))
    x, y = box.across(low, high, log=True), box.upwards(ticks[0], ticks[-1])
    parts = [text(box.x, box.y - 14, "J per generated token", weight="bold"), *y_grid(box, y, ticks)]
    parts += x_labels(x, n_outs, box.bottom + 18)
    parts.append(text(box.x + box.width / 2, box.bottom + 38, "generated tokens (n_out)", anchor="middle"))
    for i, (line, value) in enumerate(zip(lines, values, strict=True)):
        color, spot = series(i), line.spot
        path = " ".join(f"{x(m):.1f},{y(j):.1f}" for m, j in zip(lengths, value, strict=True))
        parts.append(f'<polyline points="{path}" {paint(stroke=color)} stroke-width="2"/>')
        ring = color if spot.n_out_star is not None else "paper"  # hollow where it is only the edge of the range
        parts.append(circle(x(spot.best_n_out), y(spot.j_per_token), 5, ring, color))
        parts.append(text(box.right + 10, box.y + 12 + 18 * i, line.label, fill=color))
    return [*parts, axes(box)]


def heat_map(
    box: Box, theta: Theta, spots: Sequence[SweetSpot], n_outs: Sequence[int], title: str = HEAT_TITLE
) -> list[str]:
    """Cells of J per token, prompt length upwards, the cheapest answer of every prompt marked."""
    values = [[j_per_token(theta, s.n_in, m) for m in n_outs] for s in spots]
    least, most = min(map(min, values)), max(map(max, values))
    cell_w, cell_h = box.width / len(n_outs), box.height / len(spots)
    parts = [text(box.x, box.y - 14, title, weight="bold")]
    for row, (spot, line) in enumerate(zip(spots, values, strict=True)):
        y = box.bottom - (row + 1) * cell_h
        for column, value in enumerate(line):
            share = math.log(value / least) / math.log(most / least) if most > least else 0.0
            fill = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_COOL, _WARM, strict=True))
            x = box.x + column * cell_w
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w:.1f}" height="{cell_h:.1f}" {paint(fill)}/>')
            ink, middle = _LIGHT if share > 0.6 else _DARK, (x + cell_w / 2, y + cell_h / 2 + 4)
            parts.append(text(*middle, f"{value:.3g}", anchor="middle", size=10, fill=ink))
        nearest = min(range(len(n_outs)), key=lambda i: abs(math.log(n_outs[i] / spot.best_n_out)))
        parts.append(
            f'<rect x="{box.x + nearest * cell_w + 2:.1f}" y="{y + 2:.1f}" width="{cell_w - 4:.1f}" '
            f'height="{cell_h - 4:.1f}" {paint(stroke=_DARK)} stroke-width="2" rx="6"/>'
        )
        parts.append(text(box.x - 8, y + cell_h / 2 + 4, str(spot.n_in), anchor="end"))
    for column, m in enumerate(n_outs):
        parts.append(text(box.x + (column + 0.5) * cell_w, box.bottom + 18, str(m), anchor="middle"))
    parts.append(text(box.x + box.width / 2, box.bottom + 38, "generated tokens (n_out)", anchor="middle"))
    parts.append(text(box.x - 8, box.y - 14, "n_in", anchor="end"))
    return parts
