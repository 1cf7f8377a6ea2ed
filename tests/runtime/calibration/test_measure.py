"""One visit: windows long enough, joules per sequence, and what a meter that cannot tell leads to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eopc_runtime.calibration.measure import Windowing, measure_cell
from eopc_runtime.calibration.workload import Workload
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.power.base import PROXY

SHORT, LONG = (32, 8), (200, 300)


def work_on(lab: Any, prefill: str = "t0", decode: str = "t0") -> Workload:
    """A workload on the lab's runners."""
    pool = lab.rig().pool
    return Workload(pool.get(prefill), pool.get(decode), 258, np.random.default_rng(0))


def theta_of(lab: Any, tier: str) -> Theta:
    """The energy of a tier."""
    thetas: tuple[Theta, ...] = lab.rig().pool.thetas
    return thetas[int(tier[1:])]


@pytest.mark.parametrize("cell", [SHORT, LONG])
def test_a_meter_gets_one_window_of_enough_sequences(lab: Any, cell: tuple[int, int]) -> None:
    """Short sequences are repeated until 3 s have passed; the joules are those of one, to the last bit of rounding."""
    meter = lab.meter()
    reading = measure_cell(meter, work_on(lab), cell, Windowing.of(meter), lab.device.clock)
    want_j = theta_of(lab, "t0").energy_j(float(cell[0]), float(cell[1]))
    assert reading.energy_j == pytest.approx((want_j,), rel=1e-12)
    assert reading.seconds >= 3.0
    assert reading.seconds == pytest.approx(reading.repeats * want_j / 20.0)
    assert reading.repeats == (1 if cell == LONG else int(np.ceil(3.0 / (want_j / 20.0))))
    assert meter.windows == 1


def test_a_proxy_gets_a_window_per_sequence(lab: Any) -> None:
    """So that the median can leave a disturbed one out."""
    meter = lab.meter(source=PROXY)
    reading = measure_cell(meter, work_on(lab), SHORT, Windowing.of(meter), lab.device.clock)
    assert len(reading.energy_j) == meter.windows > 3
    assert reading.repeats == 1
    assert reading.seconds >= 1.0


def test_the_lead_in_is_not_measured(lab: Any) -> None:
    """For a second before the window opens the same work runs: what a lagging sensor shows first is this cell."""
    meter = lab.meter()
    began: list[float] = []
    real = meter.begin
    meter.begin = lambda name: (began.append(lab.device.clock()), real(name))
    measure_cell(meter, work_on(lab), LONG, Windowing.of(meter), lab.device.clock)
    assert 1.0 <= began[0] < 1.1
    assert lab.device.forwards > 300  # one whole sequence, and a part before it


def test_idle_power_is_subtracted_where_it_is_known(lab: Any) -> None:
    """5 W of 20 W are idle, so three quarters remain."""
    meter = lab.meter()
    how = Windowing.of(meter)
    assert measure_cell(meter, work_on(lab), SHORT, how, lab.device.clock).idle_subtracted_j is None
    meter.idle_w = 5.0
    reading = measure_cell(meter, work_on(lab), SHORT, how, lab.device.clock)
    assert reading.idle_subtracted_j is not None
    assert reading.idle_subtracted_j[0] == pytest.approx(0.75 * reading.energy_j[0])


def test_a_plan_of_two_tiers_is_the_sum_of_its_phases(lab: Any) -> None:
    """Prefill on t0, handed down, decode on t2."""
    meter = lab.meter()
    reading = measure_cell(meter, work_on(lab, "t0", "t2"), LONG, Windowing.of(meter), lab.device.clock)
    upper, lower = theta_of(lab, "t0").to_tier("t0", "prior"), theta_of(lab, "t2").to_tier("t2", "prior")
    assert reading.energy_j[0] == pytest.approx(upper.prefill_j(200) + lower.decode_j(200, 300))


def test_a_window_found_too_short_is_repeated_longer(lab: Any) -> None:
    """The second attempt takes half as long again, and counts."""
    meter = lab.meter(faults=lambda i: {"short": "12 samples"} if i == 1 else {})
    reading = measure_cell(meter, work_on(lab), SHORT, Windowing.of(meter), lab.device.clock)
    assert meter.windows == 2
    assert reading.seconds >= 4.5


def test_a_meter_that_never_gives_a_window_stops_with_its_reasons(lab: Any) -> None:
    """Three attempts, then the fault in words: never 0 J."""
    meter = lab.meter(faults=lambda i: {"stuck": "no reading changed for 9.0 s"})
    with pytest.raises(
        DeviceError, match=r"no usable window for 32 \+ 8 tokens: no reading changed for 9.0 s.*--meter"
    ):
        measure_cell(meter, work_on(lab), SHORT, Windowing.of(meter), lab.device.clock)
    assert meter.windows == 3


def test_a_lost_meter_is_not_asked_again(lab: Any) -> None:
    """The first window without a source ends it."""
    meter = lab.meter(faults=lambda i: {"lost": "tegrastats ended"})
    with pytest.raises(DeviceError, match="tegrastats ended"):
        measure_cell(meter, work_on(lab), SHORT, Windowing.of(meter), lab.device.clock)
    assert meter.windows == 1


def test_windows_below_what_a_meter_resolves_are_refused(lab: Any) -> None:
    """2 s are the least for a meter; a proxy may have less."""
    with pytest.raises(UsageError, match=r"resolves no window below 2 s"):
        Windowing.of(lab.meter(), 1.0)
    assert Windowing.of(lab.meter(source=PROXY), 0.1).seconds == 0.1
