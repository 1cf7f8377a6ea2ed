"""Meters that measure nothing, and say so."""

from __future__ import annotations

import itertools

import pytest

from eopc_runtime.errors import MeterLostError, UsageError
from eopc_runtime.power.base import measure_idle
from eopc_runtime.power.null import NullMeter
from eopc_runtime.power.proxy import ProxyMeter


def test_a_proxy_is_time_times_watts() -> None:
    """Five seconds at an assumed 30 W are 150 J, with the source `proxy`; half a second is as good."""
    now = [0.0]
    with ProxyMeter(30.0, clock=lambda: now[0]) as meter:
        meter.begin("all")
        now[0] = 4.5
        meter.begin("part")
        now[0] = 5.0
        assert meter.energy_so_far_j("all") == 150.0
        part, window = meter.end("part"), meter.end("all")
    assert (window.energy_j, window.source, window.meter, window.verified) == (150.0, "proxy", "proxy", True)
    assert part.energy_j == 15.0
    assert window.energy_idle_subtracted_j is None
    assert window.notes == ("time x 30 W, an assumed power: nothing was measured",)


def test_a_proxy_has_no_idle_power() -> None:
    """Its watts are assumed: subtracting them from themselves would leave nothing."""
    seconds = itertools.count()
    idle = measure_idle(ProxyMeter(30.0, clock=lambda: next(seconds)), 3.0, lambda s: None, lambda: next(seconds))
    assert idle.power_w is None
    assert "no idle power" in idle.notes[-1]


def test_a_proxy_survives_a_clock_that_steps_back() -> None:
    """No negative energy."""
    now = [10.0]
    meter = ProxyMeter(30.0, clock=lambda: now[0])
    meter.begin("w")
    now[0] = 4.0
    assert meter.energy_so_far_j("w") == 0.0
    window = meter.end("w")
    assert (window.energy_j, window.verified, window.faults) == (None, False, ("clock",))


@pytest.mark.parametrize("watts", [0.0, -5.0, float("nan"), float("inf")])
def test_a_proxy_needs_a_positive_power(watts: float) -> None:
    """Zero watts would make everything free."""
    with pytest.raises(UsageError, match="positive number of watts"):
        ProxyMeter(watts)


def test_the_null_meter_never_gives_a_number() -> None:
    """Unverified windows, and an error for who asks while they are open."""
    with NullMeter(clock=itertools.count(step=5).__next__) as meter:
        meter.begin("w")
        with pytest.raises(MeterLostError, match="no power meter"):
            meter.energy_so_far_j("w")
        window = meter.end("w")
    assert (window.energy_j, window.mean_w, window.verified, window.faults) == (None, None, False, ("none",))
    assert window.duration_s == 5.0
    assert measure_idle(meter, 1.0, lambda s: None, itertools.count().__next__).power_w is None


@pytest.mark.parametrize("meter", [ProxyMeter(30.0), NullMeter()])
def test_window_names_are_checked(meter: ProxyMeter | NullMeter) -> None:
    """As with every meter."""
    meter.begin("w")
    with pytest.raises(ValueError, match="open already"):
        meter.begin("w")
    meter.close()
    with pytest.raises(ValueError, match="no open window"):
        meter.end("w")
