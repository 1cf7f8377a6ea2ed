"""The calibration of a bundle on the device it runs on: measure, fit, publish.

Everything that touches the world comes in from outside (`Rig`): runners, meter, the device's state, clock, sleep. A
killed run is gone on with by calling again; visits that are in the journal are not measured a second time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.calibration.conditions import (
    Conditions,
    Place,
    check_same,
    read_conditions,
    wait_until_cool,
)
from eopc_runtime.calibration.contention import (
    PATIENCE_S,
    QUIET_SHARE,
    CpuTimes,
    others_share,
    read_cpu_times,
    wait_until_quiet,
)
from eopc_runtime.calibration.fitting import TierFit, fit_tier
from eopc_runtime.calibration.identity import find_identity, fingerprint
from eopc_runtime.calibration.journal import Journal, Measured, journal_folder
from eopc_runtime.calibration.measure import Windowing, measure_cell
from eopc_runtime.calibration.plan import CellPlan, Visit, order_visits
from eopc_runtime.calibration.publish import publish
from eopc_runtime.calibration.table import Basis, calibrated_table, check_place
from eopc_runtime.calibration.workload import Workload
from eopc_runtime.errors import BundleError, UsageError
from eopc_runtime.jsonfields import plain
from eopc_runtime.power.base import MEASURED, Meter, measure_idle
from eopc_runtime.provenance import Hull, Identity, MeterRecord
from eopc_runtime.runners.base import RunnerPool

IDLE_S = 10.0
PREFILL_SHARE = 1 / 12  # of a generated token's time, for the estimate of the time left


@dataclass(frozen=True, slots=True)
class Rig:
    """What a calibration works with. `show` writes a passing line, `tell` one that stays."""

    pool: RunnerPool
    runner: str  # its name, version and threads
    meter: Meter
    place: Place = field(default_factory=Place)
    module: str | None = None  # for machines without a device tree
    cpu: Callable[[], CpuTimes | None] = read_cpu_times
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    show: Callable[[str], None] = lambda text: None
    tell: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure: the plan, the tiers (None: all), and how."""

    plan: CellPlan
    tiers: tuple[str, ...] | None = None
    seconds: float | None = None
    limit_c: float | None = None
    idle_s: float = IDLE_S
    patience_s: float = PATIENCE_S
    resume: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished calibration; the bundle has its prices."""

    bundle: Bundle
    fits: tuple[TierFit, ...]
    plan: CellPlan
    basis: Basis
    journal: Path
    reused: int  # visits taken from an earlier run
    elapsed_s: float


def calibrate(bundle: Bundle, rig: Rig, settings: Settings) -> Outcome:
    """Measure the tiers, fit their prices, and write them into the bundle.

    Raises UsageError or DeviceError with what to do; whatever was measured before that is kept in the journal.
    """
    begun_s = rig.clock()
    plan, source = settings.plan, "calibrated" if rig.meter.sensor.source == MEASURED else rig.meter.sensor.source
    tiers = _tiers(bundle, settings)
    how = Windowing.of(rig.meter, settings.seconds)
    start = wait_until_cool(lambda: read_conditions(rig.place, settings.limit_c), rig.tell, rig.sleep)
    identity = find_identity(
        rig.place,
        start,
        runner=rig.runner,
        engine=fingerprint(bundle.manifest),
        rails=rig.meter.sensor.rails,
        module=rig.module,
    )
    basis = Basis(source, Hull(plan.n_in, plan.n_out), _record(rig.meter), identity)
    check_place(bundle.energy, tiers, basis)
    journal = Journal(journal_folder(bundle.root), _belongs_to(rig, plan, tiers, identity, how), settings.resume)
    try:
        visits = order_visits(plan, tiers)
        reused = sum(visit in journal.done for visit in visits)
        if reused:
            rig.tell(f"going on: {reused} of {len(visits)} visits are in {journal.path.name}")
        _idle(rig, journal, settings.idle_s)
        _measure(bundle, rig, settings, how, journal, visits, start)
        fits = tuple(
            fit_tier(tier, plan, [journal.done[visit] for visit in visits if visit.tier == tier]) for tier in tiers
        )
        basis = replace(basis, meter=_record(rig.meter))  # idle power is known now
        now = Bundle.open(bundle.root, verify=False)
        if fingerprint(now.manifest) != identity.engine:
            raise BundleError(f"{bundle.root} was built anew meanwhile; calibrate it again.")
        published = publish(now, calibrated_table(now.energy, fits, basis, len(plan.cells)))
        kept = journal.retire()
    finally:
        journal.close()
    return Outcome(published, fits, plan, basis, kept, reused, rig.clock() - begun_s)


def _tiers(bundle: Bundle, settings: Settings) -> tuple[str, ...]:
    """The tiers to measure, in the order of the ladder; the plan must fit the context."""
    longest = settings.plan.n_in[1] + settings.plan.n_out[1]
    if longest > bundle.manifest.context:
        raise UsageError(
            f"{settings.plan.n_in[1]} prompt and {settings.plan.n_out[1]} new tokens do not fit this bundle's context "
            f"of {bundle.manifest.context}; lower --prompt-range or --new-range."
        )
    names = [info.tier for info in bundle.manifest.tiers]
    if settings.tiers is None:
        return tuple(names)
    wanted = {bundle.tier(name).tier for name in settings.tiers}
    return tuple(name for name in names if name in wanted)


def _belongs_to(
    rig: Rig, plan: CellPlan, tiers: Sequence[str], identity: Identity, how: Windowing
) -> dict[str, object]:
    """All that a visit's figures depend on."""
    sensor = rig.meter.sensor
    return plain(
        {
            "identity": {name: getattr(identity, name) for name in Identity.__slots__},
            "meter": {"name": sensor.name, "rails": sensor.rails, "details": dict(sensor.details)},
            "plan": {name: getattr(plan, name) for name in CellPlan.__slots__},
            "tiers": tiers,
            "windows": {name: getattr(how, name) for name in Windowing.__slots__},
        }
    )


def _idle(rig: Rig, journal: Journal, seconds: float) -> None:
    """Measure idle power, once per journal, before any tier is loaded."""
    if not journal.has_idle:
        idle_w = None
        if rig.meter.sensor.source == MEASURED:
            rig.show(f"measuring idle power for {seconds:.0f} s")
            idle = measure_idle(rig.meter, seconds, rig.sleep, rig.clock)
            idle_w = idle.power_w
            shown = f"{idle_w:.2f} W" if idle_w is not None else f"not known ({'; '.join(idle.notes)})"
            rig.tell(f"idle power: {shown}")
        journal.set_idle(idle_w)
    rig.meter.idle_w = journal.idle_w


def _measure(
    bundle: Bundle,
    rig: Rig,
    settings: Settings,
    how: Windowing,
    journal: Journal,
    visits: Sequence[Visit],
    start: Conditions,
) -> None:
    """Make the visits that the journal does not hold.

    One that other processes disturbed is made again at the end, as long as the patience lasts; then its least
    disturbed attempt counts.
    """
    left = deque(visit for visit in visits if visit not in journal.done)
    clockwork = _TimeLeft(how.seconds + how.lead_in_s)
    attempts: dict[Visit, list[Measured]] = {}
    next_tenth = 1 + 10 * len(journal.done) // len(visits)
    patience_s = settings.patience_s
    while left:
        visit = left.popleft()
        done = len(visits) - len(left) - 1
        rig.show(
            f"{visit.tier}, {visit.cell[0]} + {visit.cell[1]} tokens: "
            f"{done} of {len(visits)} visits done{clockwork.shown((visit, *left))}"
        )
        tried = attempts.setdefault(visit, [])
        if not tried or patience_s > 0:
            begun_s = rig.clock()
            tried.append(_visit(bundle, rig, settings, how, visit, start))
            spent_s = rig.clock() - begun_s
            clockwork.add(visit, spent_s)
            patience_s -= spent_s if len(tried) > 1 else 0.0
        share = tried[-1].others_share or 0.0
        if share > QUIET_SHARE and patience_s > 0:
            if patience_s == settings.patience_s:
                rig.tell(f"other processes use {share:.0%} of the CPU: visits that they disturb are made again later")
            left.append(visit)
            begun_s = rig.clock()
            wait_until_quiet(rig.cpu, rig.sleep)
            patience_s -= rig.clock() - begun_s
            continue
        journal.add(min(attempts.pop(visit), key=lambda item: item.others_share or 0.0))
        if 10 * (done + 1) >= next_tenth * len(visits):
            rig.tell(f"{done + 1} of {len(visits)} visits{clockwork.shown(left)}")
            next_tenth = 1 + 10 * (done + 1) // len(visits)


def _visit(bundle: Bundle, rig: Rig, settings: Settings, how: Windowing, visit: Visit, start: Conditions) -> Measured:
    """Make one visit; DeviceError if the power mode or the clocks are not those of the start."""
    check_same(start, wait_until_cool(lambda: read_conditions(rig.place, settings.limit_c), rig.tell, rig.sleep))
    runner = rig.pool.get(visit.tier)
    seed = (settings.plan.seed, 2, visit.turn, *visit.cell)
    work = Workload(runner, runner, bundle.manifest.model.vocab_size, np.random.default_rng(seed))
    before = rig.cpu()
    reading = measure_cell(rig.meter, work, visit.cell, how, rig.clock)
    share = others_share(before, rig.cpu())
    after = read_conditions(rig.place, settings.limit_c)
    check_same(start, after)  # before the visit counts: it may have been measured in the other mode
    return Measured(
        turn=visit.turn,
        tier=visit.tier,
        n_in=visit.cell[0],
        n_out=visit.cell[1],
        energy_j=reading.energy_j,
        idle_subtracted_j=reading.idle_subtracted_j,
        repeats=reading.repeats,
        seconds=reading.seconds,
        samples=reading.samples,
        temperature_c=after.temperature_c,
        others_share=share,
    )


class _TimeLeft:
    """Estimates the time left from the visits so far; a visit takes as long as its tokens, or its window."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._spent_s = self._units = 0.0

    def add(self, visit: Visit, seconds: float) -> None:
        """Count a visit."""
        self._spent_s += seconds
        self._units += self._size(visit)

    def shown(self, left: Iterable[Visit]) -> str:
        """The time left in words, empty before the first visit and after the last."""
        if not self._units:
            return ""
        rate = self._spent_s / self._units
        seconds = sum(max(self._size(visit) * rate, self._least_s) for visit in left)
        if not seconds:
            return ""
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    @staticmethod
    def _size(visit: Visit) -> float:
        return visit.cell[0] * PREFILL_SHARE + visit.cell[1]


def _record(meter: Meter) -> MeterRecord:
    """The meter's record; its quantum is one step of every rail for one sampling period, where both are known."""
    steps_w, period_s = meter.sensor.steps_w, getattr(meter, "period_s", None)
    known = period_s is not None and meter.sensor.rails and all(rail in steps_w for rail in meter.sensor.rails)
    quantum_j = sum(steps_w[rail] for rail in meter.sensor.rails) * period_s if known and period_s else None
    return MeterRecord(meter.sensor.name, meter.sensor.rails, meter.idle_w, quantum_j)
