"""What admission and the ledger cost on the host, per sequence and per step.

    python benchmarks/ledger.py

A ladder of four calibrated tiers, 512 prompt tokens, 2000 new tokens wanted, three cases: a budget that covers the
request, one that ends it, and one that moves it down the ladder; each without a meter and with one that is read as the
controller asks. Printed: microseconds, the mean and the 99th percentile of the steps in the median round. Time spent
in a real meter's own reading is not part of it.
"""

from __future__ import annotations

import statistics
import sys
import time

from eopc_runtime.controller import Controller, Seen, Start
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.policy import Request
from eopc_runtime.provenance import Calibration, Conformal, Hull

PROMPT, WANTED, STEP_S = 512, 2000, 0.016
ROUNDS, ADMISSIONS = 15, 200
STEPS_J = (0.77, 0.51, 0.37, 0.2)


def table() -> EnergyTable:
    """Four tiers with all coefficients in use."""
    tiers = tuple(
        TierEnergy(f"t{i}", s, 0.004, 8e-7, s, 5.5e-6, 1.2e-5, "calibrated", -10.0) for i, s in enumerate(STEPS_J)
    )
    calibration = Calibration(Hull((32, 4096), (32, 4096)), Conformal(0.05, 19, 0.02, 0.95), 31, {}, None, None)
    return EnergyTable("agx-orin", "calibrated", 0.02, tiers, "MAXN", calibration)


def admit(prices: EnergyTable, start: Start) -> float:
    """Return the seconds of an admission and the booking of its prefill, the mean of many."""
    began = time.perf_counter()
    for _ in range(ADMISSIONS):
        Controller(prices, start).begin(Seen(0.0))
    return (time.perf_counter() - began) / ADMISSIONS


def play(prices: EnergyTable, start: Start) -> list[float]:
    """Decide one sequence; return the seconds of every step, wants_reading included."""
    controller = Controller(prices, start)
    controller.begin(Seen(0.0))
    now, spent_j, steps = 0.06, 2.0, []
    while True:
        began = time.perf_counter()
        reading = max(spent_j - 16.0, 0.0) if controller.wants_reading(now) else None
        decision = controller.next(Seen(now, reading))
        steps.append(time.perf_counter() - began)
        if decision.action == "stop":
            return steps
        now += STEP_S
        spent_j += decision.price_j / 1.02


def main() -> None:
    """Run all cases and print a table."""
    prices, request = table(), Request(PROMPT, WANTED)
    whole_j = prices.plan_price_j(0, 0, PROMPT, WANTED) * 1.1
    cases = {
        "covers the request": (whole_j, None),
        "ends the sequence": (100.0, None),
        "moves down the ladder": (prices.plan_price_j(0, 3, PROMPT, WANTED) * 1.5, 0),
    }
    sys.stdout.write(f"{'budget':24s}{'meter':>7s}{'admission us':>14s}{'us per step':>13s}{'p99':>9s}{'steps':>7s}\n")
    for name, (budget_j, tier) in cases.items():
        for metered in (False, True):
            start = Start(request, budget_j, tier=tier, metered=metered)
            steps = sorted((play(prices, start) for _ in range(ROUNDS)), key=statistics.mean)[ROUNDS // 2]
            admission = statistics.median(admit(prices, start) for _ in range(ROUNDS))
            p99 = sorted(steps)[int(0.99 * len(steps))]
            sys.stdout.write(
                f"{name:24s}{'yes' if metered else 'no':>7s}{admission * 1e6:14.1f}"
                f"{statistics.mean(steps) * 1e6:13.2f}{p99 * 1e6:9.1f}{len(steps):7d}\n"
            )


if __name__ == "__main__":
    main()
