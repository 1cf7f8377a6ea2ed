"""Random sequences on the device, measured as they run, against what the bundle's prices say.

Lengths are log-uniform within the calibrated range, plans are random pairs of tiers: a prefill tier and a decode tier
at or below it. The calibration has measured single tiers only, so a pair tests that the phases may be added up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.calibration.contention import CpuTimes, others_share, read_cpu_times
from eopc_runtime.calibration.measure import Windowing, attempt_cell
from eopc_runtime.calibration.plan import log_uniform
from eopc_runtime.calibration.workload import Workload
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import UsageError
from eopc_runtime.power.base import MEASURED, Meter
from eopc_runtime.provenance import Hull
from eopc_runtime.runners.base import RunnerPool
from eopc_runtime.validation.compare import Checked

UNCALIBRATED = (32, 512)  # prompt and new tokens, where the prices have no range


@dataclass(frozen=True, slots=True)
class Draw:
    """One sequence to run: tier indexes of prefill and decode, prompt and new tokens."""

    prefill: int
    decode: int
    n_in: int
    n_out: int


def draw_sequences(hull: Hull, tiers: int, count: int, seed: int = 0) -> tuple[Draw, ...]:
    """Return random plans and lengths within the hull."""
    rng = np.random.default_rng((seed, 3))
    draws = []
    for _ in range(count):
        decode = int(rng.integers(tiers))
        draws.append(
            Draw(int(rng.integers(decode + 1)), decode, log_uniform(hull.n_in, rng), log_uniform(hull.n_out, rng))
        )
    return tuple(draws)


def lengths_of(table: EnergyTable, context: int) -> Hull:
    """Return the lengths to validate: those that were calibrated, else a usual range that fits the context."""
    if table.calibration is not None and table.calibration.hull is not None:
        return table.calibration.hull
    low, high = (min(bound, context // 2) for bound in UNCALIBRATED)
    return Hull((low, high), (low, high))


def expected_j(table: EnergyTable, draw: Draw) -> float:
    """Return what a meter should show for a plan within the hull: both phases, and the constant of the decode tier."""
    prefill, decode = table.tiers[draw.prefill], table.tiers[draw.decode]
    if draw.n_out == 1:
        decode = prefill
    charged_j = prefill.prefill_j(draw.n_in) + decode.decode_j(draw.n_in, draw.n_out)
    return max(charged_j + decode.uncredited_j, 0.0)


def run_sequences(
    bundle: Bundle,
    table: EnergyTable,
    pool: RunnerPool,
    meter: Meter,
    draws: tuple[Draw, ...],
    *,
    show: Callable[[str], None] = lambda text: None,
    cpu: Callable[[], CpuTimes | None] = read_cpu_times,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> list[Checked]:
    """Run and measure the sequences; UsageError when the meter and the prices are not of one kind."""
    if meter.sensor.source != MEASURED and table.source != meter.sensor.source:
        raise UsageError(
            f"The prices are {table.source} joules, and the {meter.sensor.name} meter measures none: it multiplies "
            "time by an assumed power. Validate with a power meter (`eopc doctor` says what there is)."
        )
    how = Windowing.of(meter)
    if how.each:
        how = Windowing(0.0, 0.0, True)  # one sequence each: nothing is gained by repeating
    checked = []
    for i, draw in enumerate(draws, start=1):
        names = (table.tiers[draw.prefill].tier, table.tiers[draw.decode].tier)
        plan = names[0] if draw.prefill == draw.decode else ">".join(names)
        show(f"sequence {i} of {len(draws)}: {plan}, {draw.n_in} + {draw.n_out} tokens")
        rng = np.random.default_rng((seed, 4, i))
        runners = [pool.get(name) for name in names]
        work = Workload(runners[0], runners[1], bundle.manifest.model.vocab_size, rng)
        before = cpu()
        reading, window = attempt_cell(meter, work, (draw.n_in, draw.n_out), how, clock)
        checked.append(
            Checked(
                name=str(i),
                plan=plan,
                prompt_tokens=draw.n_in,
                new_tokens=draw.n_out,
                predicted_j=expected_j(table, draw),
                price_j=table.plan_price_j(draw.prefill, draw.decode, draw.n_in, draw.n_out),
                budget_j=None,
                measured_j=None if reading is None else statistics.fmean(reading.energy_j),
                seconds=window.duration_s,
                samples=window.samples,
                verified=reading is not None,
                others_share=others_share(before, cpu()),
                notes=window.notes if reading is None else (),
            )
        )
    return checked
