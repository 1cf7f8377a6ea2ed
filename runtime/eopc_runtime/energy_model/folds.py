"""Samples, and how they are split: always by cell, so that repeats of one cell never stand on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eopc_runtime.energy_model.forms import Array
from eopc_runtime.provenance import Hull

Cell = tuple[int, int]  # prompt and generated tokens
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured sequences: prompt tokens, generated tokens and gross joules, one entry per run."""

    n_in: Array
    n_out: Array
    energy_j: Array

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, float]]) -> Samples:
        """Return samples from (n_in, n_out, energy_j) rows."""
        table = np.array(list(rows), dtype=np.float64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2])

    def __len__(self) -> int:
        return len(self.energy_j)

    def cells(self) -> tuple[Cell, ...]:
        """The distinct (n_in, n_out) pairs, sorted."""
        return tuple(sorted({(int(n), int(m)) for n, m in zip(self.n_in, self.n_out, strict=True)}))

    def hull(self) -> Hull:
        """The smallest rectangle around the samples."""
        n, m = self.n_in.astype(int), self.n_out.astype(int)
        return Hull((int(n.min()), int(n.max())), (int(m.min()), int(m.max())))

    def within(self, cells: Iterable[Cell]) -> Samples:
        """The samples of some cells."""
        wanted = set(cells)
        return self.where(
            np.array([(int(n), int(m)) in wanted for n, m in zip(self.n_in, self.n_out, strict=True)], dtype=bool)
        )

    def where(self, chosen: npt.NDArray[np.bool_]) -> Samples:
        """The samples a mask chooses."""
        return Samples(self.n_in[chosen], self.n_out[chosen], self.energy_j[chosen])


def make_folds(cells: Sequence[Cell], count: int = FOLDS, seed: int = 0) -> tuple[tuple[Cell, ...], ...]:
    """Deal the cells into `count` folds of nearly equal size, in a random order that the seed fixes."""
    count = min(count, len(cells))
    order = np.random.default_rng(seed).permutation(len(cells))
    return tuple(tuple(cells[i] for i in order[fold::count]) for fold in range(count))


def hold_out(cells: Sequence[Cell], count: int, seed: int = 0) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
    """Split cells into those to fit and `count` random ones to keep out; the corners of the grid are fitted."""
    n, m = {c[0] for c in cells}, {c[1] for c in cells}
    corners = {(a, b) for a in (min(n), max(n)) for b in (min(m), max(m))}
    inner = [cell for cell in cells if cell not in corners]
    order = np.random.default_rng(seed).permutation(len(inner))
    kept = {inner[i] for i in order[:count]}
    return tuple(c for c in cells if c not in kept), tuple(c for c in cells if c in kept)
