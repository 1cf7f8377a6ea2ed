"""Which lengths to measure, and in which order: pure, from a seed.

The four corners of the range are always fitted, the other cells are log-uniform at random. The cells for the margin
are drawn like the sequences it is promised for, and none of them is fitted. Every cell is visited in several rounds,
in an order that mixes cells and tiers, so that a drift of the machine does not look like a property of either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eopc_runtime.energy_model.conformal import needed_cells
from eopc_runtime.energy_model.fit import FEWEST_CELLS
from eopc_runtime.energy_model.folds import Cell
from eopc_runtime.errors import UsageError

Range = tuple[int, int]

FIT_CELLS = 14
CONFORMAL_CELLS = needed_cells(0.05)
ROUNDS = 3  # the fewest with a middle that one odd visit does not move
PROXY_ROUNDS = 5  # times scatter more than joules over a window of a meter
QUICK = (8, 9, 1)  # cells to fit, cells for a margin of 90 %, rounds

BLOCK = 4  # visits of one tier in a row: loading a tier takes as long as a short visit


@dataclass(frozen=True, slots=True)
class CellPlan:
    """The cells (prompt and generated tokens) to fit, and those kept out of the fit for the margin."""

    n_in: Range
    n_out: Range
    fit: tuple[Cell, ...]
    conformal: tuple[Cell, ...]
    rounds: int
    seed: int

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, those to fit first."""
        return self.fit + self.conformal


@dataclass(frozen=True, slots=True)
class Visit:
    """One measurement to make: a cell on a tier, for the `turn`-th time."""

    turn: int
    tier: str
    cell: Cell


def plan_cells(
    n_in: Range, n_out: Range, fit_cells: int, conformal_cells: int, rounds: int = ROUNDS, seed: int = 0
) -> CellPlan:
    """Return the cells to measure; UsageError when the range or the numbers cannot give a fit."""
    for name, (low, high) in (("--prompt-range", n_in), ("--new-range", n_out)):
        if not 1 <= low < high:
            raise UsageError(f"{name} {low}:{high} is no range; give two rising numbers of 1 or more, such as 32:512.")
    if fit_cells < FEWEST_CELLS:
        raise UsageError(f"--fit-cells is {fit_cells}, but a fit takes at least {FEWEST_CELLS} cells.")
    if conformal_cells < 1 or rounds < 1:
        raise UsageError("At least one cell for the margin and one round are needed.")
    wanted = fit_cells + conformal_cells
    if (there := (n_in[1] - n_in[0] + 1) * (n_out[1] - n_out[0] + 1)) < 2 * wanted:
        raise UsageError(
            f"The ranges hold {there} pairs of lengths, too few to draw {wanted} different ones at random. "
            "Widen --prompt-range or --new-range."
        )
    rng = np.random.default_rng(seed)
    cells = [(n, m) for n in n_in for m in n_out]
    while len(cells) < wanted:
        cell = (log_uniform(n_in, rng), log_uniform(n_out, rng))
        if cell not in cells:
            cells.append(cell)
    return CellPlan(n_in, n_out, tuple(cells[:fit_cells]), tuple(cells[fit_cells:]), rounds, seed)


def order_visits(plan: CellPlan, tiers: Sequence[str]) -> tuple[Visit, ...]:
    """Return every visit: round after round, each in a random order of blocks of one tier's cells."""
    rng = np.random.default_rng((plan.seed, 1))
    visits: list[Visit] = []
    for turn in range(plan.rounds):
        blocks = []
        for tier in tiers:
            cells = [plan.cells[i] for i in rng.permutation(len(plan.cells))]
            blocks += [[Visit(turn, tier, c) for c in cells[i : i + BLOCK]] for i in range(0, len(cells), BLOCK)]
        for i in rng.permutation(len(blocks)):
            visits += blocks[i]
    return tuple(visits)


def parse_range(text: str, option: str) -> Range:
    """Read `32:512`; UsageError on anything else."""
    low, colon, high = text.partition(":")
    if not (colon and low.strip().isdecimal() and high.strip().isdecimal()):
        raise UsageError(f'{option} "{text}" is no range of tokens. Write it as LOW:HIGH, for example 32:512.')
    return int(low), int(high)


def log_uniform(bounds: Range, rng: np.random.Generator) -> int:
    """A length, as likely between 32 and 64 as between 256 and 512; both bounds can come out."""
    low, high = math.log(bounds[0] - 0.5), math.log(bounds[1] + 0.5)
    return min(max(round(math.exp(rng.uniform(low, high))), bounds[0]), bounds[1])
