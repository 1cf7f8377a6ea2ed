"""Predicted against measured joules as a picture: on the line the prediction was right."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.svg import Box, circle, document, log_ticks, path, series, text, x_labels, y_grid
from eopc_runtime.validation.compare import Checked, Summary

SIZE, LEFT, TOP = 420, 80, 80  # of the plot, and its place
WIDTH, HEIGHT = LEFT + SIZE + 220, TOP + SIZE + 70


def validation_svg(title: str, note: str, checked: Sequence[Checked], summary: Summary) -> str:
    """Return the picture as the text of an SVG file; both axes are logarithmic, sequences above their price are red.

    Unverified sequences have no point; the note below says how many there are.
    """
    parts = [
        text(LEFT, 28, title, size=16, weight="bold"),
        text(LEFT, 48, figures(summary), fill="muted"),
        text(LEFT, HEIGHT - 12, note, fill="muted"),
        *scatter(Box(LEFT, TOP, SIZE, SIZE), checked),
    ]
    return document(WIDTH, HEIGHT, parts)


def scatter(box: Box, checked: Sequence[Checked], legend: tuple[float, float] | None = None) -> list[str]:
    """A point per verified sequence over the line of equal joules; a legend from a point on, else right of the box."""
    points = [(item, item.measured_j) for item in checked if item.measured_j is not None]
    if not points:
        return [text(box.x, box.y + box.height / 2, "no sequence could be verified")]
    values = [v for item, measured in points for v in (item.predicted_j, measured)]
    low, high = min(values) / 1.1, max(values) * 1.1
    x, y, marks = box.across(low, high, log=True), box.upwards(low, high, log=True), log_ticks(low, high)
    parts = [
        *(path(f"M{x(value):.1f} {box.y:g}v{box.height:g}", stroke="grid") for value in marks),
        *y_grid(box, y, marks),
        *x_labels(x, marks, box.bottom + 18),
        path(f"M{box.x:g} {box.y:g}h{box.width:g}v{box.height:g}h-{box.width:g}z", stroke="ink"),
        path(f"M{box.x:g} {box.bottom:g}L{box.right:g} {box.y:g}", stroke="muted", dash="5 4"),
        text(box.x + box.width / 2, box.bottom + 38, "predicted J", anchor="middle"),
        text(box.x - 44, box.y - 12, "measured J"),
    ]
    plans = sorted({item.plan for item, _ in points})
    for item, measured in points:
        color = series(plans.index(item.plan))
        label = f"{item.name}: {item.plan}, {item.prompt_tokens} + {item.new_tokens} tokens, {measured:.4g} J"
        fill = "alarm" if item.over_price or item.over_budget else color
        parts.append(circle(x(item.predicted_j), y(measured), 4.5, fill, color, label))
    left, top = legend or (box.right + 24, box.y + 14)
    for i, plan in enumerate([*plans, "above price or budget"]):
        color, line = series(i) if i < len(plans) else "alarm", top + 20 * i
        parts.append(circle(left, line - 4, 4.5, color, color))
        parts.append(text(left + 12, line, plan))
    return parts


def figures(summary: Summary) -> str:
    """Say in one line what the sequences show together."""
    if summary.mape is None or summary.coverage is None:
        return f"{summary.sequences} sequences, none verified"
    return (
        f"{summary.verified} of {summary.sequences} sequences verified; mean error {summary.mape:.1%}, "
        f"{summary.violations} above price or budget"
    )
