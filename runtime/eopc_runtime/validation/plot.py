"""Predicted against measured joules as one SVG file by hand: on the line the prediction was right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from eopc_runtime.validation.compare import Checked, Summary

SIZE, LEFT, TOP = 420, 80, 60  # of the plot, and its place
WIDTH, HEIGHT = LEFT + SIZE + 220, TOP + SIZE + 70
_COLORS = ("#1b6ca8", "#2e7d4f", "#7a4ea3", "#a9812b", "#4f5b66", "#128a8a")
_OVER = "#c8553d"


def validation_svg(title: str, note: str, checked: Sequence[Checked], summary: Summary) -> str:
    """Return the picture as SVG text; both axes are logarithmic, and sequences above their price are red.

    Unverified sequences have no point; the note below says how many there are.
    """
    points = [(item, item.measured_j) for item in checked if item.measured_j is not None]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 28, title, size=16, weight="bold"),
        _text(LEFT, 48, _figures(summary), fill="#555"),
        _text(LEFT, HEIGHT - 12, note, fill="#555"),
    ]
    if points:
        values = [v for item, measured in points for v in (item.predicted_j, measured)]
        parts += _axes(min(values) / 1.1, max(values) * 1.1)
        parts += _points(points, min(values) / 1.1, max(values) * 1.1)
    else:
        parts.append(_text(LEFT, TOP + SIZE / 2, "no sequence could be verified"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(points: Sequence[tuple[Checked, float]], low: float, high: float) -> list[str]:
    plans = sorted({item.plan for item, _ in points})
    parts = []
    for item, measured in points:
        color = _COLORS[plans.index(item.plan) % len(_COLORS)]
        over = item.over_price or item.over_budget
        x, y = LEFT + SIZE * _share(item.predicted_j, low, high), TOP + SIZE * (1 - _share(measured, low, high))
        label = f"{item.name}: {item.plan}, {item.prompt_tokens} + {item.new_tokens} tokens, {measured:.4g} J"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{_OVER if over else color}" fill-opacity="0.75" '
            f'stroke="{color}"><title>{escape(label)}</title></circle>'
        )
    for i, plan in enumerate(plans):
        y = TOP + 14 + 20 * i
        parts.append(f'<circle cx="{LEFT + SIZE + 24}" cy="{y - 4}" r="4.5" fill="{_COLORS[i % len(_COLORS)]}"/>')
        parts.append(_text(LEFT + SIZE + 36, y, plan))
    y = TOP + 14 + 20 * len(plans)
    parts.append(f'<circle cx="{LEFT + SIZE + 24}" cy="{y - 4}" r="4.5" fill="{_OVER}"/>')
    parts.append(_text(LEFT + SIZE + 36, y, "above price or budget"))
    return parts


def _axes(low: float, high: float) -> list[str]:
    """Frame, the line of equal joules, and ticks at 1, 2 and 5 times powers of ten."""
    parts = [
        f'<path d="M{LEFT} {TOP}h{SIZE}v{SIZE}h-{SIZE}z" fill="none" stroke="#222"/>',
        f'<path d="M{LEFT} {TOP + SIZE}L{LEFT + SIZE} {TOP}" stroke="#888" stroke-dasharray="5 4"/>',
        _text(LEFT + SIZE / 2, TOP + SIZE + 38, "predicted J", anchor="middle"),
        _text(LEFT, TOP - 6, "measured J", anchor="end"),
    ]
    for value in ticks(low, high):
        x, y = LEFT + SIZE * _share(value, low, high), TOP + SIZE * (1 - _share(value, low, high))
        parts.append(f'<path d="M{x:.1f} {TOP}v{SIZE}M{LEFT} {y:.1f}h{SIZE}" stroke="#eee"/>')
        parts.append(_text(x, TOP + SIZE + 18, f"{value:g}", anchor="middle"))
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2, 5 x 10^k between two bounds, powers of ten alone where these are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]


def _figures(summary: Summary) -> str:
    if summary.mape is None or summary.coverage is None:
        return f"{summary.sequences} sequences, none verified"
    return (
        f"{summary.verified} of {summary.sequences} sequences verified; mean error {summary.mape:.1%}, "
        f"{summary.violations} above price or budget"
    )


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal", fill: str = "#222"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
