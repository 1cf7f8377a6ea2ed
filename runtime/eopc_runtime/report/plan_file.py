"""What plan.json tells of the tiers: which plan each was priced for, the loss it adds, and what it removed.

Older builds wrote less, newer ones may write more, so only what the page shows is read; but that strictly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields, read_json

PLAN_NAME = "plan.json"
KINDS = ("layer", "kv_groups", "ffn")


@dataclass(frozen=True, slots=True)
class Removal:
    """Units of one kind that left a layer: joules saved by that alone, nats its curve predicts (null: not known)."""

    source_layer: int
    kind: str  # one of KINDS
    units: int
    energy_saved_j: float
    loss_added: float | None


@dataclass(frozen=True, slots=True)
class PlannedTier:
    """One tier as decided. loss_added is measured, in nats per token of an answer, above t0's; null: not measured.

    `plan` is the pair it was priced for, energies are at the reference workload, nats_per_joule is the tier's dual
    variable, and `removed` what it keeps less than the static tier above it, in the order it went.
    """

    tier: str
    plan: str
    energy_saved_j: float
    loss_added: float | None
    nats_per_joule: float | None
    removed: tuple[Removal, ...]


@dataclass(frozen=True, slots=True)
class PlanFile:
    """The tiers of plan.json; all its joules have one source."""

    energy_source: str
    tiers: tuple[PlannedTier, ...]

    def tier(self, name: str) -> PlannedTier | None:
        """Return a tier by name, None where the file has none."""
        return next((tier for tier in self.tiers if tier.tier == name), None)


def read_plan(root: Path) -> PlanFile:
    """Read the plan.json of a bundle; BundleError when it is missing or is not one."""
    fields = Fields(read_json(root / PLAN_NAME, PLAN_NAME, BundleError), PLAN_NAME, BundleError)
    tiers = tuple(_tier(child) for child in fields.children("tiers"))
    return PlanFile(fields.text("energy_source"), tiers)


def _tier(fields: Fields) -> PlannedTier:
    name = fields.text("tier")
    return PlannedTier(
        tier=name,
        plan=fields.text("plan", default=name),
        energy_saved_j=fields.number("energy_saved_j"),
        loss_added=fields.number_or_none("loss_added"),
        nats_per_joule=fields.number_or_none("nats_per_joule") if "nats_per_joule" in fields else None,
        removed=tuple(_removal(child) for child in fields.children("removed")) if "removed" in fields else (),
    )


def _removal(fields: Fields) -> Removal:
    return Removal(
        source_layer=fields.integer("source_layer", minimum=0),
        kind=fields.text("kind", choices=KINDS),
        units=fields.integer("units", minimum=1),
        energy_saved_j=fields.number("energy_saved_j"),
        loss_added=fields.number_or_none("loss_added"),
    )
