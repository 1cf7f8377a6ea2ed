"""Random sequences on a device of exact energies, against the prices of its calibration."""

from __future__ import annotations

from typing import Any

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.calibration.calibrate import Settings, calibrate
from eopc_runtime.calibration.contention import CpuTimes
from eopc_runtime.calibration.plan import plan_cells
from eopc_runtime.errors import UsageError
from eopc_runtime.power.base import PROXY, Meter
from eopc_runtime.provenance import Hull
from eopc_runtime.validation.compare import Checked, summarise
from eopc_runtime.validation.live import draw_sequences, lengths_of, run_sequences

HULL = Hull((32, 400), (32, 300))
PLAN = plan_cells(HULL.n_in, HULL.n_out, 12, 19, rounds=1)


@pytest.fixture
def calibrated(lab: Any) -> Any:
    """The lab after a calibration."""
    calibrate(lab.bundle, lab.rig(), Settings(PLAN))
    return lab


def run(lab: Any, count: int = 30, meter: Meter | None = None) -> list[Checked]:
    """Run random sequences on the lab's device."""
    bundle: Bundle = lab.bundle
    draws = draw_sequences(lengths_of(bundle.energy, 1024), 3, count)
    return run_sequences(
        bundle,
        bundle.energy,
        lab.rig().pool,
        meter or lab.meter(),
        draws,
        cpu=lambda: None,
        clock=lab.device.clock,
    )


def test_draws_lie_within_the_hull_and_never_climb_the_ladder() -> None:
    """A decode tier is the prefill tier or one below it, every pair comes up, and a seed fixes them."""
    draws = draw_sequences(HULL, 3, 400)
    assert all(HULL.holds(draw.n_in, draw.n_out) for draw in draws)
    assert {(draw.prefill, draw.decode) for draw in draws} == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)}
    assert draws == draw_sequences(HULL, 3, 400)
    assert draws != draw_sequences(HULL, 3, 400, seed=1)


def test_a_device_that_is_as_it_was_calibrated_agrees_with_its_prices(calibrated: Any) -> None:
    """Single tiers and pairs, which were never measured as such."""
    checked = run(calibrated)
    assert any(">" in item.plan for item in checked)
    found = summarise(checked)
    assert (found.verified, found.over_budget) == (30, 0)
    assert found.mape == pytest.approx(0.0, abs=1e-5)  # what is left are the roundings of the fit


def test_a_device_that_draws_more_is_found_out(calibrated: Any) -> None:
    """A fifth more power: every sequence is a violation, and the bias says by how much."""
    calibrated.device.factor = 1.2
    found = summarise(run(calibrated))
    assert (found.violations, found.coverage) == (30, 0.0)
    assert found.bias == pytest.approx(0.2, rel=1e-3)


def test_a_window_the_meter_cannot_vouch_for_is_unverified(calibrated: Any) -> None:
    """Every third window is stuck: no joules, the reason beside it, and no part in the error."""
    meter = calibrated.meter(faults=lambda i: {} if i % 3 else {"stuck": "no reading changed for 9 s"})
    checked = run(calibrated, 9, meter)
    lost = [item for item in checked if not item.verified]
    assert len(lost) == 3
    assert {(item.measured_j, item.notes) for item in lost} == {(None, ("no reading changed for 9 s",))}
    assert summarise(checked).verified == 6


def test_time_x_watts_does_not_validate_measured_prices(calibrated: Any) -> None:
    """Proxy joules and measured ones are different things."""
    with pytest.raises(UsageError, match="calibrated joules, and the fake meter measures none"):
        run(calibrated, meter=calibrated.meter(source=PROXY))


def test_proxy_prices_can_be_checked_with_the_proxy(lab: Any) -> None:
    """Then it is the times that are compared, one sequence per window."""
    calibrate(lab.bundle, lab.rig(meter=lab.meter(source=PROXY)), Settings(PLAN))
    meter = lab.meter(source=PROXY)
    assert summarise(run(lab, 5, meter)).mape == pytest.approx(0.0, abs=1e-5)
    assert meter.windows == 5


def test_sequences_say_what_others_used_meanwhile(calibrated: Any) -> None:
    """Half of one of two cores is a quarter."""
    seconds = iter(range(100))

    def cpu() -> CpuTimes:
        i = next(seconds)
        return CpuTimes(float(i), 0.5 * i, 0.0, 2)

    bundle = calibrated.bundle
    pool, meter = calibrated.rig().pool, calibrated.meter()
    draws = draw_sequences(HULL, 3, 2)
    checked = run_sequences(bundle, bundle.energy, pool, meter, draws, cpu=cpu, clock=calibrated.device.clock)
    assert [item.others_share for item in checked] == [0.25, 0.25]


def test_without_a_calibrated_range_lengths_fit_the_context(lab: Any) -> None:
    """A prior has no range: 32 to 512, or half the context."""
    assert lengths_of(lab.bundle.energy, 4096) == Hull((32, 512), (32, 512))
    assert lengths_of(lab.bundle.energy, 64) == Hull((32, 32), (32, 32))
