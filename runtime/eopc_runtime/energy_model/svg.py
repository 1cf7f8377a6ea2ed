"""The sweet spot as a picture: J per token against the answer's length, and a heat map, as one SVG file by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.sweetspot import SweetSpot, j_per_token

WIDTH, HEIGHT = 1120, 470
_LEFT = (70, 70, 430, 320)  # x, y, width, height of the curves
_RIGHT = (640, 70, 400, 320)  # and of the heat map
_LINES = ("#1b6ca8", "#c8553d", "#2e7d4f", "#7a4ea3", "#a9812b", "#4f5b66", "#b0357a", "#128a8a")
_COOL, _WARM = (232, 244, 241), (176, 66, 54)  # cheap, dear


def sweetspot_svg(title: str, note: str, theta: Theta, spots: Sequence[SweetSpot], n_outs: Sequence[int]) -> str:
    """Return the picture as SVG text.

    Args:
        title: one line above, for example the model and the power mode.
        note: one line below: where the joules come from.
        spots: the sweet spot of every prompt length to show.
        n_outs: answer lengths of the heat map, rising; the curves span them.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(70, 30, title, size=16, weight="bold"),
        _text(70, HEIGHT - 14, note, fill="#555"),
        *_curves(theta, spots, n_outs),
        *_heat_map(theta, spots, n_outs),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curves(theta: Theta, spots: Sequence[SweetSpot], n_outs: Sequence[int]) -> list[str]:
    """Lines of J per token over the answer's length, one per prompt length, the sweet spots as rings."""
    x0, y0, width, height = _LEFT
    low, high = n_outs[0], n_outs[-1]
    lengths = [low * (high / low) ** (i / 120) for i in range(121)] if high > low else [float(low)]
    curves = [[theta.charged().energy_j(float(s.n_in), m) / m for m in lengths] for s in spots]
    bottom, top, step = _ticks(min(map(min, curves)), max(map(max, curves)))

    def x(m: float) -> float:
        return x0 + width * (math.log(m / low) / math.log(high / low) if high > low else 0.5)

    def y(j: float) -> float:
        return y0 + height * (top - j) / (top - bottom)

    parts = [_text(x0, y0 - 14, "J per generated token", weight="bold")]
    for i in range(round((top - bottom) / step) + 1):
        j = bottom + i * step
        parts.append(f'<path d="M{x0} {y(j):.1f}h{width}" stroke="#e3e3e3"/>')
        parts.append(_text(x0 - 8, y(j) + 4, f"{j:.4g}", anchor="end"))
    free = math.inf  # labels from the right, each only where the one beside it leaves room
    for m in reversed(n_outs):
        half = 4.0 * len(str(m))
        if x(m) + half < free:
            parts.append(_text(x(m), y0 + height + 18, str(m), anchor="middle"))
            free = x(m) - half
    parts.append(_text(x0 + width / 2, y0 + height + 38, "generated tokens (n_out)", anchor="middle"))
    for i, (spot, curve) in enumerate(zip(spots, curves, strict=True)):
        color = _LINES[i % len(_LINES)]
        path = " ".join(f"{x(m):.1f},{y(j):.1f}" for m, j in zip(lengths, curve, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_mark(x(spot.best_n_out), y(spot.j_per_token), color, filled=spot.n_out_star is not None))
        parts.append(_text(x0 + width + 10, y0 + 12 + 18 * i, f"n_in {spot.n_in}", fill=color))
    parts.append(f'<path d="M{x0} {y0}v{height}h{width}" fill="none" stroke="#222"/>')
    return parts


def _heat_map(theta: Theta, spots: Sequence[SweetSpot], n_outs: Sequence[int]) -> list[str]:
    """Cells of J per token, prompt length upwards, the cheapest answer of every prompt marked."""
    x0, y0, width, height = _RIGHT
    values = [[j_per_token(theta, s.n_in, m) for m in n_outs] for s in spots]
    least, most = min(map(min, values)), max(map(max, values))
    cell_w, cell_h = width / len(n_outs), height / len(spots)
    parts = [_text(x0, y0 - 14, "J per generated token; ring = cheapest answer for the prompt", weight="bold")]
    for row, (spot, line) in enumerate(zip(spots, values, strict=True)):
        y = y0 + height - (row + 1) * cell_h
        for column, value in enumerate(line):
            share = math.log(value / least) / math.log(most / least) if most > least else 0.0
            fill = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_COOL, _WARM, strict=True))
            x = x0 + column * cell_w
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w:.1f}" height="{cell_h:.1f}" fill="{fill}"/>')
            ink = "#fff" if share > 0.6 else "#222"
            middle = (x + cell_w / 2, y + cell_h / 2 + 4)
            parts.append(_text(*middle, f"{value:.3g}", anchor="middle", size=10, fill=ink))
        nearest = min(range(len(n_outs)), key=lambda i: abs(math.log(n_outs[i] / spot.best_n_out)))
        parts.append(
            f'<rect x="{x0 + nearest * cell_w + 2:.1f}" y="{y + 2:.1f}" width="{cell_w - 4:.1f}" '
            f'height="{cell_h - 4:.1f}" fill="none" stroke="#222" stroke-width="2" rx="6"/>'
        )
        parts.append(_text(x0 - 8, y + cell_h / 2 + 4, str(spot.n_in), anchor="end"))
    for column, m in enumerate(n_outs):
        parts.append(_text(x0 + (column + 0.5) * cell_w, y0 + height + 18, str(m), anchor="middle"))
    parts.append(_text(x0 + width / 2, y0 + height + 38, "generated tokens (n_out)", anchor="middle"))
    parts.append(_text(x0 - 8, y0 - 14, "n_in", anchor="end"))
    return parts


def _ticks(least: float, most: float) -> tuple[float, float, float]:
    """Return the lowest and highest tick and the step: round numbers around the values."""
    span = (most - least) or most or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 5)
    return math.floor(least / step) * step, math.ceil(most / step + 1e-9) * step, step


def _mark(x: float, y: float, color: str, filled: bool) -> str:
    """A ring at a sweet spot; hollow where it is only the edge of what was measured."""
    fill = color if filled else "#fff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal", fill: str = "#222"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
