"""A short run of every fuzz target; fuzz.py runs them for longer, guided by coverage."""

from __future__ import annotations

import random
import time

import pytest

from .mutate import mutate
from .targets import TARGETS, Target

SECONDS = 2.0


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_eopc_errors_for_two_seconds(name: str) -> None:
    """Mutated inputs are accepted or refused with one line; the seeds of the run are the same every time."""
    target, rng = TARGETS[name], random.Random(name)
    pool, ended_s, runs = list(target.seeds), time.monotonic() + SECONDS, 0
    while time.monotonic() < ended_s or runs < 20:
        data = mutate(rng.choice(pool), rng, target.is_json)
        if target.run(data) and len(pool) < 200:
            pool.append(data)  # what is still accepted is changed further
        runs += 1


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "sequences"])
def test_seeds_are_accepted(name: str) -> None:
    """Fuzzing starts from inputs that are read to their end."""
    assert all(TARGETS[name].run(seed) for seed in TARGETS[name].seeds if seed)


def test_a_target_that_breaks_is_seen() -> None:
    """The negative twin: an error that is none of ours is raised."""
    with pytest.raises(ZeroDivisionError):
        Target(lambda data: 1 // len(data), ()).run(b"")
