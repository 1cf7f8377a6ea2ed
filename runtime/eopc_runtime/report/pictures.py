"""The pictures of the report, each as one SVG of at most 400 units across, so that a phone shows its text in full."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.energy import EnergyTable
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.sources import UNMEASURED
from eopc_runtime.energy_model.svg import Curve, curves, heat_map
from eopc_runtime.energy_model.sweetspot import SweetSpot, round_lengths, sweet_spot
from eopc_runtime.provenance import Hull
from eopc_runtime.report.front import KINDS, Point, best_first, plan_energy
from eopc_runtime.report.labels import place_labels
from eopc_runtime.report.residuals import Residual
from eopc_runtime.svg import (
    Box,
    axes,
    circle,
    document,
    linear_ticks,
    log_ticks,
    paint,
    path,
    picture,
    series,
    text,
    x_labels,
    y_grid,
)
from eopc_runtime.units import format_energy
from eopc_runtime.validation.compare import Checked
from eopc_runtime.validation.plot import scatter

WIDTH = 400
_MARKS = dict(zip(KINDS, ("circle", "square", "diamond", "triangle", "cross"), strict=True))


_FRONT = Box(52, 34, WIDTH - 72, 220)


def front_picture(title: str, points: Sequence[Point], budgets_j: Sequence[float], y_name: str) -> str:
    """Quality against joules: a mark per plan, the best of all kinds joined, budgets as lines.

    Plans whose loss was not measured have a tick on the axis and no height.
    """
    return picture(WIDTH, _FRONT.bottom + 46, _front(points, budgets_j, y_name), title)


def front_document(points: Sequence[Point], budgets_j: Sequence[float], y_name: str, notes: Sequence[str]) -> str:
    """The same as a file of its own, with a legend and lines that say of what."""
    parts, y = _front(points, budgets_j, y_name), _FRONT.bottom + 62
    for kind in (kind for kind in KINDS if any(p.kind == kind and p.loss is not None for p in points)):
        parts += [mark(_FRONT.x + 8, y, kind), text(_FRONT.x + 24, y + 4, kind)]
        y += 20
    for note in notes:
        parts.append(text(_FRONT.x, y + 6, note, fill="muted", size=11))
        y += 16
    return document(WIDTH, y + 4, parts)


def _front(points: Sequence[Point], budgets_j: Sequence[float], y_name: str) -> list[str]:
    box = _FRONT
    known = [(p, p.loss) for p in points if p.loss is not None]
    energies = [p.energy_j for p in points]
    ticks_x = linear_ticks(min(energies), max(energies))
    ticks_y = linear_ticks(min((v for _, v in known), default=0.0), max((v for _, v in known), default=1.0))
    inner = Box(box.x + 10, box.y + 10, box.width - 20, box.height - 20)  # marks stay clear of the axes
    x, y = inner.across(ticks_x[0], ticks_x[-1]), inner.upwards(ticks_y[0], ticks_y[-1])
    parts = [text(box.x - 44, 14, y_name, weight="bold"), *y_grid(box, y, ticks_y)]
    parts += x_labels(x, ticks_x, box.bottom + 18)
    parts.append(text(box.x + box.width / 2, box.bottom + 36, "joules per sequence", anchor="middle"))
    inside = [budget for budget in budgets_j if ticks_x[0] <= budget <= ticks_x[-1]]
    for budget in inside:
        label = f"budget of {format_energy(budget)}"
        parts.append(path(f"M{x(budget):.1f} {box.y:g}v{box.height:g}", stroke="alarm", dash="3 4", label=label))
    parts += x_labels(x, inside, box.y - 4, fill="alarm")
    for point in (p for p in points if p.loss is None):
        label = f"{point.plan}: {point.energy_j:.4g} J, quality not measured"
        parts.append(path(f"M{x(point.energy_j):.1f} {box.bottom:g}v-9", stroke="muted", width=2, label=label))
    best = " ".join(f"{x(p.energy_j):.1f},{y(p.loss or 0.0):.1f}" for p in best_first(points))
    parts.append(f'<polyline points="{best}" {paint(stroke="muted")} stroke-width="1.5"/>')
    placed = [(x(p.energy_j), y(loss), p) for p, loss in known]
    for px, py, point in placed:
        label = f"{point.plan} ({point.kind}): {point.energy_j:.4g} J, {point.loss:+.4f} nats"
        parts.append(mark(px, py, point.kind, label))
    for item in place_labels([(px, py, p.plan) for px, py, p in placed], box.x + 2, WIDTH):
        parts.append(text(item.x, item.y, item.text, anchor=item.anchor))
    return [*parts, axes(box)]


def mark(x: float, y: float, kind: str, label: str = "") -> str:
    """The mark of a kind of plan."""
    shape, color = _MARKS[kind], series(KINDS.index(kind))
    outline = {
        "square": f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z",
        "diamond": f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z",
        "triangle": f"M{x:.1f} {y - 6:.1f}l6.5 11h-13z",
        "cross": f"M{x - 2:.1f} {y - 6:.1f}h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    }.get(shape)
    if outline is None:
        return circle(x, y, 5, color, color, label)
    return path(outline, fill=color, stroke=color, label=label)


def legend_mark(kind: str) -> str:
    """The same as a picture of its own, for a line of a legend."""
    return f'<svg viewBox="0 0 16 16" class="mark" aria-hidden="true">{mark(8, 8, kind)}</svg>'


def curve_picture(table: EnergyTable, plans: Sequence[str], n_in: int) -> str:
    """J per generated token over the answer's length, a line per plan, for one prompt length."""
    lengths = lengths_of(table)
    lines = [Curve(plan, theta_of(table, plan), spot_of(table, plan, n_in)) for plan in plans]
    parts = curves(Box(52, 34, WIDTH - 122, 220), lines, round_lengths(*lengths.n_out))
    return picture(WIDTH, 300, parts, f"joules per generated token behind prompts of {n_in} tokens")


def heat_picture(table: EnergyTable, plan: str) -> str:
    """J per generated token of one plan over prompt and answer lengths."""
    lengths, theta = lengths_of(table), theta_of(table, plan)
    spots = [sweet_spot(theta, n, lengths.n_out) for n in round_lengths(*lengths.n_in)]
    parts = heat_map(Box(44, 34, WIDTH - 54, 220), theta, spots, round_lengths(*lengths.n_out), "J per generated token")
    return picture(WIDTH, 300, parts, f"joules per generated token of {plan} over prompt and answer lengths")


def residual_picture(residuals: Sequence[Residual], margin: float) -> str:
    """Measured over predicted of every cell; filled where the prices were fitted to it, hollow where not."""
    box = Box(52, 34, WIDTH - 102, 220)
    energies = [r.predicted_j for r in residuals]
    errors = [100 * r.error for r in residuals]
    ticks = linear_ticks(min(*errors, 0.0), max(*errors, 100 * margin))
    low, high = min(energies) / 1.1, max(energies) * 1.1
    x, y = box.across(low, high, log=True), box.upwards(ticks[0], ticks[-1])
    parts = [text(box.x - 44, 16, "measured above predicted, %", weight="bold"), *y_grid(box, y, ticks)]
    parts += x_labels(x, log_ticks(low, high), box.bottom + 18)
    parts.append(text(box.x + box.width / 2, box.bottom + 36, "predicted J per sequence", anchor="middle"))
    for value, stroke in ((0.0, "ink"), (100 * margin, "alarm")):
        parts.append(path(f"M{box.x:g} {y(value):.1f}h{box.width:g}", stroke=stroke, dash="5 4"))
    tiers = list(dict.fromkeys(r.tier for r in residuals))
    for r in residuals:
        color = series(tiers.index(r.tier))
        label = f"{r.tier}, {r.n_in} + {r.n_out} tokens: {r.measured_j:.4g} J, {r.error:+.2%}"
        parts.append(circle(x(r.predicted_j), y(100 * r.error), 3.5, color if r.fitted else "paper", color, label))
    for i, tier in enumerate(tiers):
        parts.append(text(box.right + 10, box.y + 12 + 18 * i, tier, fill=series(i)))
    return picture(WIDTH, box.bottom + 46, [*parts, axes(box)], "calibration residuals by cell")


def validation_picture(checked: Sequence[Checked]) -> str:
    """Predicted against measured joules per sequence."""
    box = Box(52, 34, WIDTH - 72, WIDTH - 72)
    parts = scatter(box, checked, legend=(box.x + 14, box.y + 20))
    return picture(WIDTH, WIDTH + 10, parts, "predicted against measured joules per sequence")


def lengths_of(table: EnergyTable) -> Hull:
    """The lengths to show: those that were calibrated, else a usual range."""
    hull = table.calibration.hull if table.calibration else None
    return hull or UNMEASURED


def theta_of(table: EnergyTable, plan: str) -> Theta:
    """The six coefficients of a plan, without margin."""
    return Theta.of_tier(plan_energy(table, plan))


def spot_of(table: EnergyTable, plan: str, n_in: int) -> SweetSpot:
    """The cheapest answer length of a plan behind prompts of n_in tokens."""
    return sweet_spot(theta_of(table, plan), n_in, lengths_of(table).n_out)


def swatch(role: str) -> str:
    """A square of a colour, for a line of a legend."""
    return f'<svg viewBox="0 0 16 16" class="mark" aria-hidden="true">{path("M2 2h12v12h-12z", fill=role)}</svg>'
