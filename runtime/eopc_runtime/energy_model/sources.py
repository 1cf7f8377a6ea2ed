"""Anything whose energy is known, under one name: a tier of a bundle in a power mode, or the fit of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.groups import KIND, GroupFit, Refusal, fit_group, read_coefficients
from eopc_runtime.energy_model.rows import read_measurements
from eopc_runtime.errors import BudgetError, BundleError, UsageError
from eopc_runtime.jsonfields import did_you_mean, read_json
from eopc_runtime.provenance import Conformal, Hull

UNMEASURED = Hull((16, 2048), (16, 2048))  # the lengths to show where no range was calibrated


@dataclass(frozen=True, slots=True)
class Priced:
    """The energy of one tier or fit; margin is None where none is known."""

    name: str
    tier: TierEnergy
    margin: float | None
    conformal: Conformal | None
    hull: Hull | None
    mode: str | None
    warnings: tuple[str, ...]

    @property
    def theta(self) -> Theta:
        """The six coefficients."""
        return Theta.of_tier(self.tier)

    @property
    def lengths(self) -> Hull:
        """The lengths to look at: those that were measured, else a usual range."""
        return self.hull or UNMEASURED


@dataclass(frozen=True, slots=True)
class Prediction:
    """The energy of one sequence in joules.

    energy_j is what a meter is expected to show, bound_j what is charged: with the margin, without credit for a
    negative constant, and raised by `inflation` outside the measured lengths.
    """

    name: str
    mode: str | None
    energy_j: float
    bound_j: float | None
    margin: float | None
    level: float | None
    j_per_token: float
    extrapolated: bool
    inflation: float
    energy_source: str


def load_priced(path: Path, by: Sequence[str] = ()) -> tuple[Priced, ...]:
    """Read a bundle, an energy.json, a coefficients file or a CSV of measurements, which is fitted.

    Raises BundleError or UsageError when it is none of these; `by` groups the rows of a CSV.
    """
    if path.is_dir():
        from eopc_runtime.bundle import Bundle

        return _of_table(Bundle.open(path, verify=False).energy)
    if not path.is_file():
        raise UsageError(f"{path} does not exist. Give a bundle, a coefficients file or a CSV file.")
    if path.suffix == ".json":
        content = read_json(path, str(path), UsageError)
        if isinstance(content, dict) and content.get("kind") == KIND:
            return tuple(of_fit(item) for item in read_coefficients(path))
        return _of_table(EnergyTable.from_json(content, str(path)))
    fits = [fit_group(group) for group in read_measurements(path, by).groups]
    good = [of_fit(item) for item in fits if isinstance(item, GroupFit)]
    refused = tuple(f"not fitted: {item.key}: {item.reason}" for item in fits if isinstance(item, Refusal))
    if not good:
        raise UsageError(f"{path} has no group that can be fitted ({'; '.join(refused)}).")
    return tuple(replace(item, warnings=(*item.warnings, *refused)) for item in good)


def of_fit(fit: GroupFit) -> Priced:
    """Return a fitted group as a priced thing."""
    mode = fit.by.get("power_mode", fit.by.get("mode"))
    tier = fit.theta.to_tier("t0", "calibrated")
    return Priced(fit.key, tier, fit.margin, fit.conformal, fit.hull, mode, fit.warnings)


def choose(priced: Sequence[Priced], name: str | None) -> tuple[Priced, ...]:
    """Return those of this name (a tier in all its modes), all without one; BundleError names what there is."""
    if name is None:
        return tuple(priced)
    found = tuple(item for item in priced if name in (item.name, item.tier.tier if item.mode else item.name))
    if not found:
        known = list(dict.fromkeys(item.name for item in priced))
        raise BundleError(f'There is no "{name}".{did_you_mean(name, known)} There are: {", ".join(known)}.')
    return found


def predict(item: Priced, n_in: int, n_out: int, strict: bool = False) -> Prediction:
    """Return the energy of one sequence; BudgetError outside the measured lengths if `strict`."""
    inflation = item.hull.inflation(n_in, n_out) if item.hull else 1.0
    if strict and inflation > 1:
        raise BudgetError(
            f"{item.name} was measured for {item.hull}, not for {n_in} + {n_out}. Stay within these lengths, "
            "measure a wider range, or leave out --strict."
        )
    energy_j = item.tier.expected_j(n_in, n_out, measured=inflation == 1)
    bound_j = None
    if item.margin is not None:
        bound_j = item.tier.sequence_j(n_in, n_out) * (1 + item.margin) * inflation
    return Prediction(
        name=item.name,
        mode=item.mode,
        energy_j=energy_j,
        bound_j=bound_j,
        margin=item.margin,
        level=item.conformal.level if item.conformal else None,
        j_per_token=energy_j / n_out,
        extrapolated=inflation > 1,
        inflation=inflation,
        energy_source=item.tier.source,
    )


def _of_table(table: EnergyTable) -> tuple[Priced, ...]:
    return tuple(_of_tier(mode, tier) for mode in table.modes() for tier in mode.tiers)


def _of_tier(table: EnergyTable, tier: TierEnergy) -> Priced:
    calibration = table.calibration
    return Priced(
        name=f"{tier.tier} in {table.mode}" if table.mode else tier.tier,
        tier=tier,
        margin=table.margin,
        conformal=calibration.conformal if calibration else None,
        hull=calibration.hull if calibration else None,
        mode=table.mode,
        warnings=("computed from the device profile, not measured",) if table.nominal else (),
    )
