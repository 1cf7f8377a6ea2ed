"""The sections about the ladder: quality against joules, what each tier removed, the layer map."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.bundle import Workload
from eopc_runtime.report.content import Figure, Section, Table
from eopc_runtime.report.facts import Facts
from eopc_runtime.report.front import KINDS, Point, alone_points, best_first, plan_points, workloads
from eopc_runtime.report.layer_map import CHOSEN, FFN, KV, layer_map
from eopc_runtime.report.pictures import front_document, front_picture, legend_mark, swatch
from eopc_runtime.report.plan_file import PlannedTier
from eopc_runtime.tier_info import TierInfo
from eopc_runtime.units import format_energy

UNKNOWN = "not measured"
LOSS = "nats per token above t0"
_UNITS = {"layer": "whole layer", "kv_groups": "KV groups", "ffn": "FFN channels"}


def front_section(facts: Facts) -> Section:
    """Every plan by joules and loss, for the reference workload and two others, and every tier's perplexity."""
    manifest, table = facts.bundle.manifest, facts.bundle.energy
    reference, *others = workloads(manifest)
    points = plan_points(manifest, table, facts.plan, reference)
    words = (
        f"A sequence runs a plan: its prompt on one tier, its answer on the same or a lower one. Joules are "
        f"{table.source}, as charged, with a margin of {table.margin:.1%}.",
    )
    tables = (_plans(facts, points), _tiers(facts))
    if len(points) == 1:  # nothing to compare
        return Section("front", "Quality against joules", words, (), tables)
    budgets = _budgets(manifest.tiers)
    legend = tuple((legend_mark(kind), kind) for kind in KINDS if any(p.kind == kind for p in points))
    figures = [
        Figure(
            front_picture(f"loss against joules at {_work(reference)}", points, budgets, LOSS),
            f"Answers behind prompts, {_work(reference)}: the loss that each plan adds on the selection text, against "
            f"{table.source} joules. The line joins what no other plan beats; dashed lines are budgets in joules; "
            "ticks on the axis are pairs whose loss was not measured.",
            legend,
        )
    ]
    for work in others:
        title = f"loss against joules at {_work(work)}"
        figures.append(
            Figure(
                front_picture(title, plan_points(manifest, table, facts.plan, work), (), LOSS),
                f"The same losses at the joules of {_work(work)}.{_outside(facts, work)}",
            )
        )
    alone = alone_points(manifest, table, reference)
    if any(point.loss is not None for point in alone[1:]):
        figures.append(
            Figure(
                front_picture("perplexity against joules", alone, budgets, "ln perplexity above t0's"),
                "Plain held-out text, both phases on the tier: what perplexity says without a prompt. Tiers that treat "
                "their prompts in another way are not in it.",
            )
        )
    return Section("front", "Quality against joules", words, tuple(figures), tables)


def front_plot(facts: Facts) -> str:
    """The picture of the reference workload as an SVG file."""
    manifest, table = facts.bundle.manifest, facts.bundle.energy
    reference, *_ = workloads(manifest)
    points = plan_points(manifest, table, facts.plan, reference)
    notes = [
        f"{manifest.model.name}, {manifest.device}, {manifest.precision}",
        f"{_work(reference)}; joules: {table.source}",
        "dashed: budgets" + ("; ticks: loss not measured" if any(p.loss is None for p in points) else ""),
    ]
    return front_document(points, _budgets(manifest.tiers), LOSS, notes)


def _budgets(tiers: Sequence[TierInfo]) -> list[float]:
    return sorted({tier.budget_j for tier in tiers if tier.budget_j is not None})


def removed_section(facts: Facts) -> Section:
    """Per tier, what it keeps less than the one it is cut from, what that saves and adds; every removal in order."""
    tiers, plan = facts.bundle.manifest.tiers, facts.plan
    source = plan.energy_source if plan else facts.bundle.energy.source
    rows, lists = [], []
    for index, tier in enumerate(tiers):
        planned = plan.tier(tier.tier) if plan else None
        above = cut_from(tiers, index)
        rows.append((tier.tier, planned.plan if planned else "-", *_cut(tier, above), *_worth(planned), tier.note))
        if planned and planned.removed:
            lists.append(
                Table(
                    f"{tier.tier}: what it removed beyond {above.tier}, in the order it went",
                    ("#", "layer", "what", "units", f"saves ({source})", "adds, nats (predicted)"),
                    [
                        (
                            str(number),
                            str(cut.source_layer),
                            _UNITS[cut.kind],
                            str(cut.units),
                            format_energy(cut.energy_saved_j),
                            "-" if cut.loss_added is None else f"{cut.loss_added:.5f}",
                        )
                        for number, cut in enumerate(planned.removed, start=1)
                    ],
                    folded=True,
                )
            )
    headers = (
        "tier", "planned as", "layers out", "KV groups out", "FFN channels out", f"saves of t0 ({source})",
        "adds, nats (measured)", "λ, nats per J", "note",
    )  # fmt: skip
    words = (
        "What went is counted from the tier that hands down to this one; joules saved and nats added are counted from "
        "t0, at the reference workload and for the plan named. Whole layers were searched for together and went first; "
        "KV groups and FFN channels followed by loss added per joule saved, up to λ.",
    )
    summary = Table("What each tier removed", headers, rows)
    return Section("removed", "What each tier removed", words, (), (summary, *lists))


def map_section(facts: Facts) -> Section:
    """The layer map."""
    tiers = facts.bundle.manifest.tiers
    legend = [(swatch(KV), "KV groups kept"), (swatch(FFN), "FFN channels kept")]
    if any(tier.selector for tier in tiers):
        legend.append((swatch(CHOSEN), "FFN channels the prompt chooses"))
    prompts = [t.prefill for t in tiers if t.prefill and t.prefill.depth < len(t.layers)]
    some = next((p.share for p in prompts if p.share), None)
    caption = "A row per layer, the first on top; a grey cell without bars is a layer that is left out."
    caption += " Faded layers run in the answer only: prompts skip them." if prompts else ""
    caption += f" Half faded ones run for {some:.0%} of a prompt's tokens." if some else ""
    return Section("map", "Layer map", (), (Figure(layer_map(tiers), caption, tuple(legend)),))


def cut_from(tiers: Sequence[TierInfo], index: int) -> TierInfo:
    """The tier that a tier is a part of: the static one above it; t0 for tiers that depend on the prompt."""
    if tiers[index].selector or tiers[index].prefill:
        return tiers[0]
    return next((t for t in reversed(tiers[:index]) if not t.selector and not t.prefill), tiers[0])


def _plans(facts: Facts, points: Sequence[Point]) -> Table:
    source, best = facts.bundle.energy.source, best_first(points)
    rows = [
        (
            point.plan,
            point.kind,
            format_energy(point.energy_j),
            format_energy(point.prefill_j),
            format_energy(point.decode_j),
            UNKNOWN if point.loss is None else f"{point.loss:+.4f}",
            "unbeaten" if point in best else "",
        )
        for point in points
    ]
    headers = ("plan", "kind", f"sequence ({source})", "prompt", "answer", "nats added", "front")
    return Table(f"Every plan at {_work(facts.bundle.manifest.workload)}", headers, rows)


def _tiers(facts: Facts) -> Table:
    tiers = facts.bundle.manifest.tiers
    domains = list(dict.fromkeys(name for tier in tiers for name in tier.perplexity_by_domain))
    rows = [
        (
            tier.tier,
            "-" if tier.budget_j is None else format_energy(tier.budget_j),
            f"{tier.params / 1e6:.1f} M",
            *(f"{tier.keep[part]:.0%}" for part in ("layers", "kv_groups", "ffn")),
            "-" if tier.perplexity is None else f"{tier.perplexity:.2f}",
            *(f"{tier.perplexity_by_domain[d]:.2f}" if d in tier.perplexity_by_domain else "-" for d in domains),
        )
        for tier in tiers
    ]
    dense = next((t.perplexity_dense for t in tiers if t.perplexity_dense is not None), None)
    caption = "Every tier: its budget, what it keeps, its perplexity on held-out text, in all and by domain"
    caption += "." if dense is None else f". The model in PyTorch fp32 has {dense:.2f}."
    return Table(caption, ("tier", "budget", "parameters", "layers", "KV", "FFN", "perplexity", *domains), rows)


def _cut(tier: TierInfo, above: TierInfo) -> tuple[str, str, str]:
    kept = {layer.source_layer: layer for layer in tier.layers}
    out = [layer.source_layer for layer in above.layers if layer.source_layer not in kept]
    pairs = [(layer, kept[layer.source_layer]) for layer in above.layers if layer.source_layer in kept]
    groups = sum(old.kv_heads - new.kv_heads for old, new in pairs)
    channels = sum(old.ffn - new.ffn for old, new in pairs)
    if tier.selector:
        idle = sum(pool - n for pool, n in zip(tier.selector.pool, tier.selector.chosen, strict=True))
        return "-", str(groups or "-"), f"{channels + idle}, chosen by the prompt"
    layers = f"{len(out)}: {', '.join(map(str, out))}" if out else "-"
    return layers, str(groups or "-"), str(channels or "-")


def _worth(planned: PlannedTier | None) -> tuple[str, str, str]:
    if planned is None:
        return "-", "-", "-"
    loss = UNKNOWN if planned.loss_added is None else f"{planned.loss_added:+.4f}"
    dual = "-" if planned.nats_per_joule is None else f"{planned.nats_per_joule:.3g}"
    return format_energy(planned.energy_saved_j), loss, dual


def _work(work: Workload) -> str:
    return f"{work.prompt_tokens} prompt and {work.new_tokens} new tokens"


def _outside(facts: Facts, work: Workload) -> str:
    calibration = facts.bundle.energy.calibration
    hull = calibration.hull if calibration else None
    if hull is None or hull.holds(work.prompt_tokens, work.new_tokens):
        return ""
    return f" Extrapolated: calibrated for {hull}."
