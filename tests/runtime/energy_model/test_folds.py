"""Splits by cell: complete, disjoint, and with the corners of the grid in the fit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.energy_model.folds import Samples, hold_out, make_folds

cell = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
cell_lists = st.lists(cell, min_size=1, max_size=60, unique=True)


@settings(deadline=None)  # a busy machine is no failure
@given(cell_lists, st.integers(2, 6), st.integers(0, 99))
def test_folds_hold_every_cell_once(cells: list[tuple[int, int]], count: int, seed: int) -> None:
    """No cell is in two folds or in none, sizes differ by one at most, and the seed repeats it."""
    folds = make_folds(cells, count, seed)
    assert sorted(c for fold in folds for c in fold) == sorted(cells)
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert folds == make_folds(cells, count, seed)


@settings(deadline=None)  # a busy machine is no failure
@given(cell_lists, st.integers(1, 4), st.integers(0, 99))
def test_repeats_of_a_cell_are_never_on_both_sides(cells: list[tuple[int, int]], repeats: int, seed: int) -> None:
    """Samples chosen by one fold and by the rest share no cell, however often a cell was measured."""
    samples = Samples.of((n, m, 1.0 + i) for n, m in cells for i in range(repeats))
    for fold in make_folds(samples.cells(), 5, seed):
        tested = samples.within(fold)
        fitted = samples.within(set(samples.cells()) - set(fold))
        assert not set(tested.cells()) & set(fitted.cells())
        assert len(tested) == repeats * len(fold)
        assert len(tested) + len(fitted) == len(samples)


@settings(deadline=None)  # a busy machine is no failure
@given(cell_lists, st.integers(0, 40), st.integers(0, 99))
def test_held_out_cells_are_never_corners(cells: list[tuple[int, int]], count: int, seed: int) -> None:
    """Fitted and kept cells are all cells; the corners that were measured are fitted."""
    fitted, kept = hold_out(cells, count, seed)
    assert sorted((*fitted, *kept)) == sorted(cells)
    low_n, high_n = min(c[0] for c in cells), max(c[0] for c in cells)
    low_m, high_m = min(c[1] for c in cells), max(c[1] for c in cells)
    assert not {(low_n, low_m), (low_n, high_m), (high_n, low_m), (high_n, high_m)} & set(kept)
    assert len(kept) <= count


def test_samples_know_their_cells_and_hull() -> None:
    """Cells are distinct and sorted, the hull is the smallest rectangle."""
    samples = Samples.of([(8, 64, 2.0), (32, 16, 1.0), (8, 64, 2.1)])
    assert samples.cells() == ((8, 64), (32, 16))
    assert (samples.hull().n_in, samples.hull().n_out) == ((8, 32), (16, 64))
    assert len(samples.where(np.array([True, False, True]))) == 2
