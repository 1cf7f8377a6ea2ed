"""The promise on real energies: 10,000 sequences from cells that neither fit nor margin has seen.

Data: AGX Orin at batch 1, eight engine sets, 36 cells each (public, see the data's own notes). Of every set 12 cells
are fitted, 19 make the margin, and 5 are what sequences are drawn from; four such splits. A sequence's energy is that
of one measured run, spread over its tokens as the shorter measured answers to the same prompt say, x 1.5 % noise. Its
length is known to nobody in advance: 4096 tokens are asked for, and a stop token ends it at the cell's length.

Budgets span two decades from 100 J, which an Orin spends in two seconds; less is over before a reading can confirm it.
"""

from __future__ import annotations

import csv
import gzip
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eopc_runtime.controller import Controller, Seen, Start
from eopc_runtime.energy import EnergyTable
from eopc_runtime.energy_model.conformal import cell_scores, split_conformal
from eopc_runtime.energy_model.fit import fit
from eopc_runtime.energy_model.folds import Samples, hold_out
from eopc_runtime.energy_model.forms import FORMS
from eopc_runtime.policy import Request
from eopc_runtime.provenance import Calibration

ORIN = Path(__file__).parents[3] / "shared" / "energy" / "data" / "orin_public.csv.gz"  # optional, beside a checkout
pytestmark = pytest.mark.skipif(
    not ORIN.is_file(), reason="the public Orin measurements beside the checkout are absent"
)

SEQUENCES = 10_000
BUDGETS_J = (100.0, 10_000.0)
ALPHA = 0.05
NOISE = 0.015
SLOW = 1.3  # in an episode a step takes and costs this much more
LAG_S = 0.35


@dataclass(frozen=True)
class Cell:
    """A held-out cell: the table that has not seen it, the runs measured, and the share of energy by token."""

    table: EnergyTable
    n_in: int
    shares: list[float]  # shares[k] of a run's energy is spent when k tokens are out
    runs: list[tuple[float, float, float]]  # energy_j, seconds to the first token, seconds per token


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """Held-out cells of every engine set and split, each with its table."""
    sets: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with gzip.open(ORIN, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["source"] == "iiswc2026":
                sets[row["engine"], row["quant"]].append(row)
    return [cell for rows in sets.values() for seed in range(4) for cell in held_out_cells(rows, seed)]


def held_out_cells(rows: list[dict[str, str]], seed: int) -> list[Cell]:
    """Fit 12 cells, take 19 for the margin, and return the other 5."""
    samples = Samples.of((int(r["n_in"]), int(r["n_out"]), float(r["energy_j"])) for r in rows)
    runs = defaultdict(list)
    for r in rows:
        runs[int(r["n_in"]), int(r["n_out"])].append(r)
    mean = {cell: statistics.mean(float(r["energy_j"]) for r in found) for cell, found in runs.items()}
    fitted, kept = hold_out(samples.cells(), 24, seed)
    order = np.random.default_rng(seed).permutation(len(kept))
    theta = fit(samples.within(fitted), FORMS["quadratic"]).theta
    scores = cell_scores(theta, samples.within(kept[i] for i in order[:19]))
    margin = split_conformal(scores, ALPHA)
    calibration = Calibration(samples.hull(), margin, 31, {}, None, None)
    tier = theta.to_tier("t0", "calibrated")
    table = EnergyTable("agx-orin", "calibrated", max(margin.q, 0.0), (tier,), "MAXN", calibration)
    assert margin.level == pytest.approx(1 - ALPHA)
    found = []
    for n, m in (kept[i] for i in order[19:]):
        lengths = [1, *sorted(b for a, b in mean if a == n and b <= m)]
        first_j = statistics.mean(float(r["prefill_j"]) for r in runs[n, m])
        spent = np.interp(np.arange(m + 1), lengths, [first_j, *(mean[n, b] for b in lengths[1:])])
        spent[0] = 0.0
        measured = [(float(r["energy_j"]), float(r["ttft_s"]), float(r["tpot_s"])) for r in runs[n, m]]
        found.append(Cell(table, n, (spent / spent[-1]).tolist(), measured))
    return found


class Sequence:
    """The truth of one sequence: joules and seconds until k tokens are out, k fractional in mid-step."""

    def __init__(self, cell: Cell, rng: random.Random, slow: tuple[int, int] | None) -> None:
        energy_j, self.first_s, self.step_s = rng.choice(cell.runs)
        self.energy_j = energy_j * (1 + NOISE * rng.gauss(0, 1))
        self.shares, self.length = cell.shares, len(cell.shares) - 1
        self.a, self.b = slow or (self.length, self.length)

    def spent_j(self, k: float) -> float:
        """Joules; tokens a to b cost 1.3 times as much."""
        episode = self._plain(min(max(k, self.a), self.b)) - self._plain(self.a)
        return self._plain(k) + (SLOW - 1) * episode

    def time_s(self, k: float) -> float:
        """Seconds; tokens a to b take 1.3 times as long."""
        slow = min(max(k, self.a), self.b) - self.a
        return self.first_s + self.step_s * (k - 1 + (SLOW - 1) * slow)

    def tokens_at(self, time_s: float) -> float:
        """How far the sequence is at a time: the inverse of `time_s`."""
        if time_s <= self.first_s:
            return max(time_s, 0.0) / self.first_s
        k = (time_s - self.first_s) / self.step_s + 1
        if k > self.a:
            late = (SLOW - 1) * (self.b - self.a)
            k = self.a + (k - self.a) / SLOW if k < self.b + late else k - late
        return min(k, self.length)

    def _plain(self, k: float) -> float:
        i = min(int(k), self.length - 1)
        low, high = self.shares[i], self.shares[i + 1]
        return self.energy_j * (low + (high - low) * (k - i))


@dataclass(frozen=True)
class Outcome:
    """How one sequence ended."""

    budget_j: float
    spent_j: float
    last_step_j: float
    by_budget: bool
    enforced_by: str | None


def play(cell: Cell, budget_j: float, sequence: Sequence, metered: bool) -> Outcome:
    """Run one sequence; far from the end a quarter of a second of steps is asked for at once."""
    controller = Controller(cell.table, Start(Request(cell.n_in, 4096), budget_j, metered=metered))
    controller.begin(Seen(0.0))
    k, many = 1, max(1, int(0.25 / sequence.step_s))
    while k < sequence.length:
        now, reading = sequence.time_s(k), None
        if controller.wants_reading(now):
            reading = sequence.spent_j(sequence.tokens_at(now - LAG_S))
        decision = controller.next(Seen(now, reading, None, min(many, sequence.length - k)))
        if decision.action == "stop":
            break
        k += decision.steps
    spent_j = sequence.spent_j(k)
    last_j = spent_j - sequence.spent_j(k - 1)
    return Outcome(budget_j, spent_j, last_j, k < sequence.length, controller.enforced_by)


def draw_budget(rng: random.Random) -> float:
    """A budget, uniform in its logarithm."""
    low, high = BUDGETS_J
    return float(low * (high / low) ** rng.random())


def episode(rng: random.Random, length: int) -> tuple[int, int]:
    """A slow stretch of 10 to 50 % of a sequence."""
    start = rng.randrange(1, length)
    return start, min(length, start + max(1, int(length * rng.uniform(0.1, 0.5))))


def unused(outcomes: list[Outcome]) -> float:
    """Median share of the budget that is left where the budget ended the sequence."""
    return statistics.median(1 - o.spent_j / o.budget_j for o in outcomes if o.by_budget)


def test_with_a_meter_no_sequence_overspends_by_more_than_a_step(cells: list[Cell]) -> None:
    """10,000 sequences, each slowed 1.3 times over 10 to 50 % of its length: 0 overspends beyond one step's energy.

    All are enforced by the meter, which lags 0.35 s, and the median share of the budget left unused is <= 6 %
    (4.4 % was measured).
    """
    rng = random.Random(1)
    outcomes = []
    for _ in range(SEQUENCES):
        cell = rng.choice(cells)
        sequence = Sequence(cell, rng, episode(rng, len(cell.shares) - 1))
        outcomes.append(play(cell, draw_budget(rng), sequence, metered=True))
    assert [o for o in outcomes if o.spent_j > o.budget_j + o.last_step_j] == []
    assert sum(o.by_budget for o in outcomes) > SEQUENCES / 4
    assert {o.enforced_by for o in outcomes if o.by_budget} == {"meter"}
    assert unused(outcomes) <= 0.06


def test_without_a_meter_the_violation_rate_is_within_the_stated_level(cells: list[Cell]) -> None:
    """10,000 sequences on a board that another process slows 1.3 times during 400 of them: at most 5 % overspend.

    What the model cannot see, it cannot keep: within the episode most budgets that bind are overspent, outside it few
    (measured: 2.3 % of all sequences, 37 % within the episode, 2.8 % of those that the budget ended outside it).
    """
    rng = random.Random(2)
    outcomes, inside = [], []
    for i in range(SEQUENCES):
        cell = rng.choice(cells)
        slow = (1, len(cell.shares) - 1) if 4000 <= i < 4400 else None
        outcome = play(cell, draw_budget(rng), Sequence(cell, rng, slow), metered=False)
        (inside if slow else outcomes).append(outcome)
    violations = sum(o.spent_j > o.budget_j for o in (*outcomes, *inside))
    assert violations / SEQUENCES <= ALPHA
    bound = [o for o in outcomes if o.by_budget]
    assert sum(o.spent_j > o.budget_j for o in bound) / len(bound) <= ALPHA
    assert {o.enforced_by for o in outcomes} == {"model"}
    assert unused(outcomes) <= 0.06
    assert sum(o.spent_j > o.budget_j for o in inside) > 0.05 * len(inside)  # the twin: an episode does matter


def test_the_simulated_clock_runs_both_ways(cells: list[Cell]) -> None:
    """Time of a token and token at a time invert each other, also across an episode."""
    rng = random.Random(3)
    for _ in range(50):
        cell = rng.choice(cells)
        sequence = Sequence(cell, rng, episode(rng, len(cell.shares) - 1))
        for k in (1.0, 1.5, sequence.a + 0.25, (sequence.a + sequence.b) / 2, sequence.b + 0.5):
            if k <= sequence.length:
                assert sequence.tokens_at(sequence.time_s(k)) == pytest.approx(k)
