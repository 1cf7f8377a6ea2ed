"""What is measured: a sequence of exact lengths on any runner, greedy, with random prompt tokens.

An end-of-sequence token does not end it, since a cell is a number of tokens. Prompts differ from run to run, and no
runner keeps a cache from one sequence to the next, so nothing is ever read from a prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eopc_runtime.energy_model.folds import Cell
from eopc_runtime.runners.base import TierRunner


@dataclass(frozen=True, slots=True)
class Workload:
    """Runs cells on a plan: the prompt on `prefill`, the answer on `decode`, the same runner or one below it."""

    prefill: TierRunner
    decode: TierRunner
    vocab: int
    rng: np.random.Generator

    def sequence(self, cell: Cell, until: Callable[[], bool] | None = None) -> None:
        """Run a cell once; with `until`, end after the step at which it becomes true."""
        n_in, n_out = cell
        prompt = self.rng.integers(0, self.vocab, size=n_in).tolist()
        cache = self.prefill.new_cache()
        token = int(self.prefill.prefill(cache, prompt)[-1].argmax())
        if n_out > 1 and self.decode.tier != self.prefill.tier:
            cache = self.decode.adopt(cache)
        for _ in range(n_out - 1):
            token = int(self.decode.forward(cache, [token])[-1].argmax())
            if until is not None and until():
                return

    def lead_in(self, cell: Cell, seconds: float, clock: Callable[[], float]) -> None:
        """Run a cell unmeasured, at least its prompt and one step, until so many seconds have passed.

        It allocates what the cell needs, and a sensor that lags shows the cell's own power when the window opens.
        """
        end_s = clock() + seconds
        while True:
            self.sequence((cell[0], max(cell[1], 2)), until=lambda: clock() >= end_s)
            if clock() >= end_s:
                return
