"""Fitted tiers in a bundle's table: modes side by side, and what may not be mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eopc_runtime.calibration.fitting import TierFit
from eopc_runtime.calibration.table import Basis, calibrated_table, check_place
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.provenance import Conformal, Hull, Identity, MeterRecord

PRIOR = EnergyTable("orin", "prior", 0.1, tuple(TierEnergy(f"t{i}", 0.1, 0.1, 0, 0.5, 0, 0, "prior") for i in range(2)))
MAXN = Basis(
    "calibrated",
    Hull((32, 512), (32, 512)),
    MeterRecord("ina3221", ("VDD_IN",), 5.0, 0.02),
    Identity(module="p3767-0003", power_mode="MAXN", rails=("VDD_IN",), engine="e", runner="r"),
)


def in_mode(name: str | None) -> Basis:
    """The basis of another power mode."""
    return replace(MAXN, identity=replace(MAXN.identity, power_mode=name))


def fitted(tier: str, q: float = 0.02, theta3: float = 0.3) -> TierFit:
    """A fitted tier."""
    theta = Theta(-1.0, 0.001, 0.0, theta3, 0.0, 0.0)
    conformal = Conformal(0.05, 19, q, 0.95)
    return TierFit(tier, "quadratic", theta, 0.01, 0.03, conformal, 0.0, 0.0, None, 99, 0, 0, ())


def both(q: float = 0.02, theta3: float = 0.3) -> list[TierFit]:
    """Both tiers."""
    return [fitted("t0", q, theta3), fitted("t1", q / 2, theta3 / 2)]


def test_a_prior_is_replaced_whole() -> None:
    """Source, margin, mode and provenance are those of the measurement; the negative constant is kept apart."""
    table = calibrated_table(PRIOR, both(), MAXN, 33)
    assert (table.source, table.margin, table.mode, table.device) == ("calibrated", 0.02, "MAXN", "orin")
    assert table.other_modes == ()
    assert table.tiers[0].uncredited_j == -1.0
    assert table.calibration is not None
    assert table.calibration.mape_cv == {"t0": 0.01, "t1": 0.01}
    assert table.calibration.identity == MAXN.identity
    assert table.calibration.conformal == Conformal(0.05, 19, 0.02, 0.95)
    assert EnergyTable.from_json(table.to_json()) == table


def test_the_margin_of_the_table_is_that_of_the_tier_that_needs_most_and_never_negative() -> None:
    """One table has one margin; prices below the prediction are no reason for a discount."""
    assert calibrated_table(PRIOR, [fitted("t0", 0.01), fitted("t1", 0.06)], MAXN, 33).margin == 0.06
    assert calibrated_table(PRIOR, both(-0.03), MAXN, 33).margin == 0.0


def test_power_modes_stand_side_by_side() -> None:
    """A second mode keeps the first; calibrating the first again replaces it alone."""
    first = calibrated_table(PRIOR, both(theta3=0.3), MAXN, 33)
    second = calibrated_table(first, both(theta3=0.2), in_mode("15W"), 33)
    assert [table.mode for table in second.modes()] == ["15W", "MAXN"]
    assert second.in_mode("MAXN").tiers == first.tiers
    third = calibrated_table(second, both(theta3=0.25), MAXN, 33)
    assert [table.mode for table in third.modes()] == ["MAXN", "15W"]
    assert third.tiers[0].step_j0 == pytest.approx(0.25)
    assert third.in_mode("15W").tiers == second.tiers


def test_modes_of_another_module_are_not_kept() -> None:
    """A bundle that was copied to another board has no prices there."""
    first = calibrated_table(PRIOR, both(), MAXN, 33)
    here = replace(in_mode("15W"), identity=replace(in_mode("15W").identity, module="p3767-0005"))
    assert calibrated_table(first, both(), here, 33).other_modes == ()


def test_an_unreadable_mode_has_no_place_beside_named_ones() -> None:
    """The refusal comes from the check that runs before anything is measured."""
    first = calibrated_table(PRIOR, both(), MAXN, 33)
    with pytest.raises(DeviceError, match=r"power modes MAXN.*cannot be read.*nvpmodel -q"):
        check_place(first, ["t0", "t1"], in_mode(None))
    check_place(PRIOR, ["t0", "t1"], in_mode(None))


def test_a_part_of_the_ladder_may_be_calibrated_again_under_the_same_conditions() -> None:
    """t1 anew: t0 keeps its prices, and the margin still covers both."""
    first = calibrated_table(PRIOR, both(q=0.05), MAXN, 33)
    again = calibrated_table(first, [fitted("t1", q=0.01, theta3=0.11)], MAXN, 33)
    assert again.tiers[0] == first.tiers[0]
    assert again.tiers[1].step_j0 == pytest.approx(0.11)
    assert again.margin == 0.05


@pytest.mark.parametrize(
    ("basis", "reason"),
    [
        (in_mode("15W"), "have not been calibrated in this power mode"),
        (replace(MAXN, source="proxy"), "are calibrated, not proxy"),
        (replace(MAXN, hull=Hull((16, 512), (32, 512))), "hold for 32 to 512 prompt"),
        (replace(MAXN, meter=MeterRecord("tegrastats", ("VDD_IN",), None, None)), "were read from ina3221"),
        (
            replace(MAXN, identity=replace(MAXN.identity, runner="s")),
            r"were calibrated under other conditions \(runner: r, not s\)",
        ),
    ],
)
def test_otherwise_a_part_of_the_ladder_is_refused(basis: Basis, reason: str) -> None:
    """The message names the tiers left out and why their prices cannot stay."""
    first = calibrated_table(PRIOR, both(), MAXN, 33)
    with pytest.raises(UsageError, match=f"--tier leaves out t0, and their prices {reason}"):
        check_place(first, ["t1"], basis)
    with pytest.raises(UsageError, match="have not been calibrated"):
        check_place(PRIOR, ["t1"], MAXN)
