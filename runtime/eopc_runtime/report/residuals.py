"""Calibration residuals: what every cell of lengths really cost, against the prices that were fitted to it.

The table keeps only the error per tier. The visits are in the journal that `eopc calibrate` leaves beside the bundle;
a bundle that was copied elsewhere has none, and then the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.bundle import Manifest
from eopc_runtime.calibration.fitting import middle, visit_energies
from eopc_runtime.calibration.identity import fingerprint
from eopc_runtime.calibration.journal import Measured, journal_folder
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields


@dataclass(frozen=True, slots=True)
class Residual:
    """One cell of a tier: joules predicted and measured per sequence, and whether the prices were fitted to it."""

    tier: str
    n_in: int
    n_out: int
    predicted_j: float
    measured_j: float
    fitted: bool

    @property
    def error(self) -> float:
        """Measured over predicted, minus 1."""
        return self.measured_j / self.predicted_j - 1


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished calibration: its power mode and meter, the cells its prices were fitted to, its visits."""

    power_mode: str | None
    meter: str
    fit: frozenset[tuple[int, int]]
    visits: tuple[Measured, ...]


def read_residuals(root: Path, manifest: Manifest, table: EnergyTable) -> tuple[Residual, ...]:
    """Return the residuals of a table's power mode, from the journals beside its bundle; empty without one.

    A later calibration of the same tier stands for an earlier one. A journal that is damaged or of another bundle is
    left out.
    """
    if table.calibration is None or table.calibration.meter is None:
        return ()
    belongs_to = (table.mode, table.calibration.meter.name)
    found: dict[str, tuple[Residual, ...]] = {}
    for path in sorted(journal_folder(root).glob("*.done.jsonl"), key=lambda p: p.stat().st_mtime):
        finished = _read(path, fingerprint(manifest))
        if finished is not None and (finished.power_mode, finished.meter) == belongs_to:
            for tier in dict.fromkeys(visit.tier for visit in finished.visits):
                found[tier] = _residuals(table, tier, finished)
    return tuple(item for tier in table.tiers for item in found.get(tier.tier, ()))


def _residuals(table: EnergyTable, tier: str, finished: _Finished) -> tuple[Residual, ...]:
    prices = next((t for t in table.tiers if t.tier == tier), None)
    if prices is None:
        return ()
    energies, _ = visit_energies([visit for visit in finished.visits if visit.tier == tier])
    return tuple(
        Residual(tier, n, m, prices.expected_j(n, m), middle(joules), (n, m) in finished.fit)
        for (n, m), joules in sorted(energies.items())
    )


def _read(path: Path, engine: str) -> _Finished | None:
    """Read the journal of a finished calibration of this engine; None for any other, and for a damaged one."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        belongs_to = Fields(json.loads(head), path.name, UsageError).child("belongs_to")
        identity, plan = belongs_to.child("identity"), belongs_to.child("plan")
        if identity.text_or_none("engine") != engine:
            return None
        records = [json.loads(line) for line in lines]
        visits = [Measured.from_fields(Fields(r, path.name, UsageError)) for r in records if "idle_w" not in r]
        meter = belongs_to.child("meter").text("name")
        return _Finished(identity.text_or_none("power_mode"), meter, _cells(plan.raw("fit")), tuple(visits))
    except (OSError, ValueError, TypeError, UsageError):
        return None


def _cells(rows: object) -> frozenset[tuple[int, int]]:
    if not isinstance(rows, Sequence):
        raise TypeError("cells are a list")
    return frozenset((int(n), int(m)) for n, m in rows)
