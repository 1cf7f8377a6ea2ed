"""Fitted tiers to a bundle's energy table: pure, and strict about what may stand beside what.

Power modes stand side by side. Within one mode all tiers have one source, one meter and one range of lengths; a part
of the ladder may be calibrated anew only if the rest was calibrated under the same conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eopc_runtime.calibration.fitting import TierFit
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.provenance import Calibration, Conformal, Hull, Identity, MeterRecord


@dataclass(frozen=True, slots=True)
class Basis:
    """What all prices of one power mode share: their source, the lengths they hold for, the meter, the device."""

    source: str
    hull: Hull
    meter: MeterRecord
    identity: Identity


def calibrated_table(old: EnergyTable, fits: Sequence[TierFit], basis: Basis, cells: int) -> EnergyTable:
    """Return the table with the fitted tiers in place and the other power modes beside it; raises as `check_place`."""
    check_place(old, [item.tier for item in fits], basis)
    by_name = {item.tier: item for item in fits}
    rest = _same_mode(old, basis.identity)
    tiers: list[TierEnergy] = []
    mape_cv: dict[str, float] = {}
    bounds = [item.conformal for item in fits]
    for index, tier in enumerate(old.tiers):
        if fitted := by_name.get(tier.tier):
            tiers.append(fitted.theta.to_tier(tier.tier, basis.source))
            mape_cv[tier.tier] = fitted.mape_cv
        else:
            assert rest is not None and rest.calibration is not None  # check_place has seen to it
            tiers.append(rest.tiers[index])
            mape_cv[tier.tier] = rest.calibration.mape_cv[tier.tier]
            bounds += [rest.calibration.conformal] if rest.calibration.conformal else []
    conformal = weakest(bounds)
    return EnergyTable(
        device=old.device,
        source=basis.source,
        margin=max(conformal.q, 0.0),
        tiers=tuple(tiers),
        mode=basis.identity.power_mode,
        calibration=Calibration(basis.hull, conformal, cells, mape_cv, basis.meter, basis.identity),
        other_modes=kept_modes(old, basis.identity),
        own_prompts=old.own_prompts,
    )


def check_place(old: EnergyTable, tiers: Sequence[str], basis: Basis) -> None:
    """Raise, before anything is measured, if prices of these tiers would have no place in the table.

    DeviceError: the power mode cannot be read, and the bundle has prices for modes by name. UsageError: only a part
    of the ladder is calibrated, and the rest was not calibrated under the same conditions.
    """
    kept = kept_modes(old, basis.identity)
    if kept and basis.identity.power_mode is None:
        raise DeviceError(
            f"The bundle has prices for the power modes {', '.join(t.mode or '' for t in kept)}, but the mode that is "
            "active now cannot be read, so new prices have no place beside them. Check `nvpmodel -q`."
        )
    missing = [tier.tier for tier in old.tiers if tier.tier not in tiers]
    if missing and (reason := _differs(_same_mode(old, basis.identity), basis)):
        raise UsageError(
            f"--tier leaves out {', '.join(missing)}, and their prices {reason}. A ladder has prices of one kind: "
            "calibrate all tiers, without --tier."
        )


def kept_modes(old: EnergyTable, identity: Identity) -> tuple[EnergyTable, ...]:
    """Return the calibrated tables of the same module in power modes other than the present one."""
    return tuple(
        table
        for table in old.modes()
        if table.mode not in (None, identity.power_mode)
        and table.calibration is not None
        and _same_module(table.calibration.identity, identity)
    )


def weakest(bounds: Sequence[Conformal]) -> Conformal:
    """Return a record that holds for all: the largest q, at the lowest level among them."""
    widest = max(bounds, key=lambda c: c.q)
    lowest = min(bounds, key=lambda c: c.level)
    return Conformal(alpha=lowest.alpha, k=lowest.k, q=widest.q, level=lowest.level)


def _same_mode(old: EnergyTable, identity: Identity) -> EnergyTable | None:
    """The calibrated table of the present mode, if there is one."""
    for table in old.modes():
        if table.calibration is not None and table.mode == identity.power_mode:
            return table
    return None


def _same_module(one: Identity | None, other: Identity) -> bool:
    return one is None or None in (one.module, other.module) or one.module == other.module


def _differs(rest: EnergyTable | None, basis: Basis) -> str:
    """What keeps the other tiers of the present mode from standing beside new prices; empty if nothing does."""
    if rest is None or rest.calibration is None:
        return "have not been calibrated in this power mode"
    found, meter = rest.calibration, rest.calibration.meter
    if rest.source != basis.source:
        return f"are {rest.source}, not {basis.source}"
    if found.hull != basis.hull:
        return f"hold for {found.hull}, not for {basis.hull}"
    if meter is None or (meter.name, set(meter.rails)) != (basis.meter.name, set(basis.meter.rails)):
        return f"were read from {meter.name if meter else 'an unknown meter'}, or from other rails"
    differences = found.identity.differences(basis.identity) if found.identity else ()
    return f"were calibrated under other conditions ({'; '.join(differences)})" if differences else ""
