"""The sections about joules: where they come from, energy curves, calibration, sequences that ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from eopc_runtime.energy import EnergyTable
from eopc_runtime.energy_model.sweetspot import advice, round_lengths
from eopc_runtime.provenance import Identity
from eopc_runtime.report.content import Figure, Section, Table
from eopc_runtime.report.facts import Facts
from eopc_runtime.report.front import planned_names
from eopc_runtime.report.pictures import curve_picture, heat_picture, lengths_of, residual_picture, spot_of
from eopc_runtime.report.pictures import validation_picture as validated
from eopc_runtime.sequence_record import SequenceRecord
from eopc_runtime.units import format_energy
from eopc_runtime.validation.compare import summarise
from eopc_runtime.validation.plot import figures

MEANINGS = {
    "measured": "a power meter on that device",
    "calibrated": "a model fitted to measurements of this model and engine on that device",
    "prior": "computed from the device profile's public data; ranks tiers, wrong by up to 3.6x",
    "proxy": "time x an assumed power, no meter",
}


def sources_section(facts: Facts) -> Section:
    """Which joules of this page come from where."""
    table = facts.bundle.energy
    rows = [("prices, curves, plans", table.source, MEANINGS[table.source])]
    rows += [(f"power mode {t.mode}", t.source, MEANINGS[t.source]) for t in table.other_modes]
    if facts.plan:
        source = facts.plan.energy_source
        rows.append(("joules saved by what was removed", source, MEANINGS.get(source, "not known")))
    for source in dict.fromkeys(record.energy_source for record in facts.sequences):
        rows.append(("sequences of the log", source, MEANINGS.get(source, "not known")))
    if facts.validation:
        rows.append(("measured joules of the validation", f"meter: {facts.validation.meter}", "as the meter read them"))
    words = [f"Every joule on this page names its source. Prices are for {table.device}{_mode(table)}."]
    if table.nominal and facts.prior_error:
        words.append(f"What such prices are worth: {facts.prior_error}.")
    return Section(
        "sources", "Where the joules come from", tuple(words), (), (Table("", ("joules", "source", "means"), rows),)
    )


def curves_section(facts: Facts) -> Section:
    """J per generated token by answer length, the sweet spots of every plan, in every power mode."""
    manifest, table = facts.bundle.manifest, facts.bundle.energy
    plans = planned_names(manifest, table, facts.plan)
    n_in, shown = manifest.workload.prompt_tokens, lengths_of(table)
    cheapest = min(plans, key=lambda plan: spot_of(table, plan, n_in).j_per_token)
    pictures = (
        Figure(
            curve_picture(table, plans, n_in),
            f"Prompts of {n_in} tokens, {table.source} joules without margin. A filled ring is a plan's cheapest "
            "answer length, a hollow one the edge of the lengths shown.",
        ),
        Figure(
            heat_picture(table, cheapest),
            f"{cheapest}, the cheapest plan, by prompt length (n_in) and answer length; frames mark the cheapest "
            "answer of each row.",
        ),
    )
    rows = [
        (
            plan,
            mode.mode or "-",
            str(n),
            _star(spot.n_out_star),
            f"{spot.j_per_token:.4g} J ({mode.source})",
            advice(spot),
            spot.reason,
        )
        for mode in table.modes()
        for plan in plans
        for n in sorted({*round_lengths(*lengths_of(mode).n_in, 4), n_in})
        for spot in (spot_of(mode, plan, n),)
    ]
    headers = ("plan", "power mode", "n_in", "n_out*", "least per token", "advice", "why no optimum")
    lengths = (
        f"Lengths are the calibrated ones, {shown}"
        if table.calibration
        else f"No lengths were measured; shown are {shown}"
    )
    words = (
        "The fixed cost of a request is shared by more tokens as its answer grows, until the growing cache costs more. "
        f"{lengths}.",
    )
    spots = Table("Sweet spots", headers, rows, folded=True)
    return Section("curves", "Energy curves and sweet spots", words, pictures, (spots,))


def calibration_section(facts: Facts) -> Section:
    """What was calibrated where, its error, and the residuals where the visits are there."""
    table = facts.bundle.energy
    found = table.calibration
    if found is None:
        why = f"Not calibrated: the prices are {table.source}. On the device, eopc calibrate measures them."
        return Section("calibration", "Calibration", (why,))
    words = [f"{found.cells} pairs of lengths, {found.hull}{_mode(table)}." if found.hull else f"{found.cells} cells."]
    if found.conformal:
        words.append(
            f"Prices include {table.margin:.2%}, which holds for {found.conformal.level:.0%} of sequences "
            f"(k = {found.conformal.k} cells kept out of the fit)."
        )
    if found.meter:
        idle = "not known" if found.meter.idle_w is None else f"{found.meter.idle_w:.2f} W"
        words.append(f"Meter: {found.meter.name} ({' + '.join(found.meter.rails) or 'no rails'}); idle power {idle}.")
    errors = Table(
        "Mean error per tier on cells the fit has not seen",
        ("tier", "error"),
        [(tier, f"{error:.2%}") for tier, error in found.mape_cv.items()],
    )
    tables = [errors, *([_identity(found.identity)] if found.identity else [])]
    pictures = []
    if facts.residuals:
        caption = (
            "Every pair of lengths, by its visits: filled where the prices were fitted to it, hollow where it was kept "
            f"out. The dashed lines are the price without and with its margin; joules are {table.source}."
        )
        pictures.append(Figure(residual_picture(facts.residuals, table.margin), caption))
    else:
        words.append("Residuals are not shown: the visits lie beside the bundle on the device that was calibrated.")
    return Section("calibration", "Calibration", tuple(words), tuple(pictures), tuple(tables))


def sequences_section(facts: Facts) -> Section | None:
    """Sequences that ran, from the log, and the validation; None without either."""
    if not facts.sequences and facts.validation is None:
        return None
    words, pictures, tables, notes = [], [], [], []
    if facts.sequences:
        tables.append(_log(facts.sequences))
    if facts.validation is not None:
        checked = facts.validation.checked
        words.append(f"Validated against {facts.validation.meter}: {figures(summarise(checked))}.")
        caption = f"On the line the prediction was right. Predicted joules are {facts.validation.energy_source}."
        pictures.append(Figure(validated(checked), caption))
        notes += [f"Sequence {c.name} is unverified: {'; '.join(c.notes)}" for c in checked if not c.verified]
        notes += facts.validation.notes
    return Section("sequences", "Sequences that ran", tuple(words), tuple(pictures), tuple(tables), tuple(notes))


def _log(records: Sequence[SequenceRecord]) -> Table:
    rows = []
    for plan in sorted({record.plan for record in records}):
        ran = [record for record in records if record.plan == plan]
        budgeted = [record for record in ran if record.budget_j is not None]
        over = sum(record.energy_j > (record.budget_j or 0.0) * (1 + 1e-9) for record in budgeted)
        tokens = sum(record.completion_tokens for record in ran)
        ends = Counter(record.finish_reason for record in ran)
        rows.append(
            (
                plan,
                str(len(ran)),
                str(tokens),
                format_energy(sum(record.energy_j for record in ran)),
                f"{sum(record.energy_j for record in ran) / tokens:.4g} J",
                f"{over} of {len(budgeted)}",
                ", ".join(f"{count} {reason}" for reason, count in sorted(ends.items())),
            )
        )
    sources = "; ".join(sorted({record.energy_source for record in records}))
    headers = ("plan", "sequences", "new tokens", f"ledger ({sources})", "per token", "over budget", "ended by")
    return Table("The sequences of the log, by plan", headers, rows)


def _identity(identity: Identity) -> Table:
    known = [(item.name, getattr(identity, item.name)) for item in fields(identity)]
    rows = [(name, " + ".join(v) if isinstance(v, tuple) else str(v)) for name, v in known if v is not None]
    return Table("What the prices belong to", ("", "calibrated on"), rows)


def _mode(table: EnergyTable) -> str:
    return f" in power mode {table.mode}" if table.mode else ""


def _star(n_out: int | None) -> str:
    return "-" if n_out is None else str(n_out)
