"""Pieces of an SVG picture written by hand: scales, ticks, text, marks.

Colours are roles. Every shape carries the colour of its role as an attribute, so that a picture stands alone, and a
class of that role (`f-ink` for its fill, `s-ink` for its stroke), so that a page can give it another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = {"ink": "#222", "muted": "#555", "grid": "#e3e3e3", "paper": "#fff", "alarm": "#c8553d"}
SERIES = ("#1b6ca8", "#2e7d4f", "#7a4ea3", "#a9812b", "#4f5b66", "#128a8a", "#b0357a")
COLORS |= {f"series{i}": color for i, color in enumerate(SERIES)}


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in user units."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    def across(self, low: float, high: float, log: bool = False) -> Scale:
        """A scale from its left to its right edge."""
        return Scale(low, high, self.x, self.width, log)

    def upwards(self, low: float, high: float, log: bool = False) -> Scale:
        """A scale from its lower to its upper edge."""
        return Scale(low, high, self.bottom, -self.height, log)


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from low to high on a line that begins at `start`; the middle of it where there is but one value."""

    low: float
    high: float
    start: float
    length: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        if self.high <= self.low:
            return self.start + self.length / 2
        if self.log:
            return self.start + self.length * math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + self.length * (value - self.low) / (self.high - self.low)


def picture(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """Return a picture for a page of HTML, which needs no namespace: it scales with its frame, and has a name."""
    return "\n".join(
        [
            f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
            'font-family="sans-serif" font-size="12">',
            *parts,
            "</svg>",
        ]
    )


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a picture as a file of its own, on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
            'font-size="12" fill="#222">',
            f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def paint(fill: str = "none", stroke: str | None = None) -> str:
    """Return the attributes that colour a shape: roles of COLORS, `none`, or a colour that is the same everywhere."""
    roles = [f"{kind}-{role}" for kind, role in (("f", fill), ("s", stroke)) if role in COLORS]
    names = f'class="{" ".join(roles)}" ' if roles else ""
    outline = f' stroke="{COLORS.get(stroke, stroke)}"' if stroke else ""
    return f'{names}fill="{COLORS.get(fill, fill)}"{outline}'


def series(index: int) -> str:
    """Return the role of the colour of a line or group."""
    return f"series{index % len(SERIES)}"


def text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    fill: str = "ink",
) -> str:
    """Return a line of text, escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f"{paint(fill)}>{escape(content, quote=False)}</text>"
    )


def circle(x: float, y: float, radius: float, fill: str, stroke: str, label: str = "") -> str:
    """Return a circle; the label shows where a pointer rests on it."""
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {paint(fill, stroke)} stroke-width="2"'
    return f"{shape}><title>{escape(label, quote=False)}</title></circle>" if label else f"{shape}/>"


def path(
    d: str, *, fill: str = "none", stroke: str | None = None, width: float = 1, dash: str = "", label: str = ""
) -> str:
    """Return a path; the label shows where a pointer rests on it."""
    more = f' stroke-width="{width:g}"' if width != 1 else ""
    more += f' stroke-dasharray="{dash}"' if dash else ""
    shape = f'<path d="{d}" {paint(fill, stroke)}{more}'
    return f"{shape}><title>{escape(label, quote=False)}</title></path>" if label else f"{shape}/>"


def x_labels(scale: Scale, values: Sequence[float], y: float, fill: str = "ink") -> list[str]:
    """Return numbers along an axis, from the right, each only where the one beside it leaves room."""
    parts, free = [], math.inf
    for value in sorted(values, reverse=True):
        half = 4.0 * len(number(value))
        if scale(value) + half < free:
            parts.append(text(scale(value), y, number(value), anchor="middle", fill=fill))
            free = scale(value) - half
    return parts


def y_grid(box: Box, scale: Scale, values: Sequence[float]) -> list[str]:
    """Return a line across the box and a number on its left for every value."""
    parts = []
    for value in values:
        parts.append(path(f"M{box.x:g} {scale(value):.1f}h{box.width:g}", stroke="grid"))
        parts.append(text(box.x - 8, scale(value) + 4, number(value), anchor="end"))
    return parts


def axes(box: Box) -> str:
    """Return the left and the lower edge of a box."""
    return path(f"M{box.x:g} {box.y:g}v{box.height:g}h{box.width:g}", stroke="ink")


def number(value: float) -> str:
    """Return a number as axes show it."""
    return f"{value:.4g}" if abs(value) < 1e6 and not float(value).is_integer() else f"{value:.0f}"


def linear_ticks(least: float, most: float) -> tuple[float, ...]:
    """Return 2 to 7 round numbers, evenly spread, of which the first and the last enclose the values."""
    span = (most - least) or most or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 5)
    low, high = math.floor(least / step + 1e-9) * step, math.ceil(most / step + 1e-9) * step
    return tuple(low + i * step for i in range(round((high - low) / step) + 1))


def log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2, 5 x 10^k between two bounds, powers of ten alone where these are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
