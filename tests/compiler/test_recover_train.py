"""The training loop alone, on a problem of one number: budget, checks, retreat, and what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eopc_compiler.recover.settings import RecoverSettings, choose_bf16, rate_shape
from eopc_compiler.recover.store import load_state, save_state
from eopc_compiler.recover.train import MAX_BACKOFFS, Trainer
from eopc_runtime.errors import UsageError


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Parabola:
    """(w - 3)² from w = 0; steps and checks take the seconds given, losses can be replaced."""

    final_checks = 0.0

    def __init__(self, clock: Clock, step_s: float = 1.0, check_s: float = 2.0) -> None:
        self.weight = nn.Parameter(torch.zeros(1))
        self.parameters = {"w": self.weight}
        self.clock, self.step_s, self.check_s = clock, step_s, check_s
        self.spoiled: dict[int, float] = {}  # step: loss
        self.losses: list[float] = []  # of the next checks, in place of the true ones
        self.seen: list[float] = []  # the weight before every step

    def backward(self, step: int) -> float:
        self.clock.now_s += self.step_s
        self.seen.append(float(self.weight.detach()))
        loss = (self.weight - 3).pow(2).sum() * self.spoiled.get(step, 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def selection(self) -> dict[str, float]:
        self.clock.now_s += self.check_s
        return {"x": self.losses.pop(0) if self.losses else float((self.weight.detach() - 3).pow(2))}


SETTINGS = RecoverSettings(steps=30, learning_rate=0.2, checks=3, precision="fp32")


def trainer(problem: Parabola, settings: RecoverSettings = SETTINGS, **more: Any) -> Trainer:
    """A trainer on the problem's clock that says nothing."""
    return Trainer(problem, settings, problem.clock, lambda _: None, **more)


def test_minutes_are_kept_and_the_step_size_follows_them() -> None:
    """Two minutes with 1 s steps and 2 s checks: all of it is used, none of it exceeded; small steps come last."""
    problem = Parabola(Clock())
    state = trainer(problem, replace(SETTINGS, steps=None, minutes=2.0)).run()
    assert 115 <= state.elapsed_s <= 120
    assert len(state.selection) == 4  # the start and three checks
    moves = [abs(b - a) for a, b in zip(problem.seen, problem.seen[1:], strict=False)]
    assert max(moves[-5:]) < 0.1 * max(moves)


def test_a_slower_machine_ends_with_small_steps_as_well() -> None:
    """With steps of 10 s a dozen fit, and the last is a small share of the largest."""
    problem = Parabola(Clock(), step_s=10.0)
    state = trainer(problem, replace(SETTINGS, steps=None, minutes=2.0, learning_rate=0.05)).run()
    assert 8 <= state.step <= 11
    assert state.elapsed_s <= 120


def test_a_budget_below_one_check_returns_the_start() -> None:
    """Nothing fits into 1 s: no step, no gain, no loss."""
    problem = Parabola(Clock())
    state = trainer(problem, replace(SETTINGS, steps=None, minutes=1 / 60)).run()
    assert (state.step, state.best_step, problem.weight.item()) == (0, 0, 0.0)


def test_the_best_weights_are_kept_not_the_last() -> None:
    """Selection losses 9, 4, 5, 6: those after the first check come back."""
    problem = Parabola(Clock())
    problem.losses = [9.0, 4.0, 5.0, 6.0]
    state = trainer(problem).run()
    assert (state.best_step, state.best_loss) == (10, 4.0)
    assert problem.weight.item() == pytest.approx(problem.seen[10])


def test_nothing_worse_than_the_start_comes_back() -> None:
    """Every check is worse than the start: the weights are the start's, bit for bit, and the step size was halved."""
    problem = Parabola(Clock())
    problem.losses = [1.0, 4.0, 5.0, math.nan]
    state = trainer(problem).run()
    assert (state.best_step, problem.weight.item()) == (0, 0.0)
    assert state.scale == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_costs_a_step_and_half_the_step_size(bad: float) -> None:
    """After a spoiled step 15 the run goes back to its best weights, and still ends better than they were."""
    problem = Parabola(Clock())
    problem.spoiled = {14: bad}
    state = trainer(problem).run()
    assert (state.backoffs, state.scale, state.step) == (1, 0.5, 30)
    assert problem.seen[15] == pytest.approx(problem.seen[10])
    assert state.best_loss < state.selection[1][2]["x"]
    assert math.isfinite(problem.weight.item())


def test_a_run_that_never_gets_finite_losses_stops_with_the_start() -> None:
    """Five retreats are enough."""
    problem = Parabola(Clock())
    problem.spoiled = dict.fromkeys(range(30), math.nan)
    state = trainer(problem).run()
    assert (state.step, state.backoffs, problem.weight.item()) == (MAX_BACKOFFS + 1, MAX_BACKOFFS + 1, 0.0)


def test_a_killed_run_spends_only_the_minutes_that_remain(tmp_path: Path) -> None:
    """Killed after about 60 of 120 s, it takes no more than the other 60 and is as good as one that was not killed."""
    settings = replace(SETTINGS, steps=None, minutes=2.0, save_every_s=10.0)

    class Dying(Parabola):
        """Ends in step 50."""

        def backward(self, step: int) -> float:
            if step == 50:
                raise KeyboardInterrupt
            return super().backward(step)

    with pytest.raises(KeyboardInterrupt):
        trainer(Dying(Clock()), settings, folder=tmp_path, fingerprint="same").run()
    problem = Parabola(Clock())
    state = trainer(problem, settings, folder=tmp_path, fingerprint="same").run()
    assert state.resumed
    assert 115 <= state.elapsed_s <= 120
    assert problem.clock.now_s - 1000 < 75
    assert state.best_loss < 1e-3
    assert not list(tmp_path.iterdir())


def test_a_state_of_another_run_or_a_damaged_one_is_not_loaded(tmp_path: Path) -> None:
    """Only the same fingerprint, and only a whole file."""
    save_state(tmp_path, {"a": torch.arange(3.0)}, {"fingerprint": "one", "x": 1})
    found = load_state(tmp_path, "one")
    assert found is not None
    assert torch.equal(found[0]["a"], torch.arange(3.0))
    assert found[1]["x"] == 1
    assert load_state(tmp_path, "two") is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert load_state(tmp_path, "one") is None


def test_the_step_size_rises_over_the_warm_up_and_falls_to_nothing() -> None:
    """Half of the peak in the middle of the warm-up and halfway down; never below 0."""
    assert [rate_shape(p, 0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0, 1.1)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert rate_shape(0.0, 0.0) == 1.0


def test_bf16_is_chosen_where_it_is_measured_to_be_faster() -> None:
    """A clock by which products take 1 s in bf16 and 2 s (then 1 s) in fp32; and what was asked for is not measured."""

    def clock(bf16_s: float, fp32_s: float) -> Any:
        times = iter([t for s in (bf16_s, fp32_s) for i in range(5) for t in (10 * i, 10 * i + s)])
        return lambda: next(times)

    assert choose_bf16("auto", 8, clock(1.0, 2.0))
    assert not choose_bf16("auto", 8, clock(1.0, 1.0))
    assert choose_bf16("bf16", 8, clock(9.0, 1.0))


WRONG: list[dict[str, Any]] = [
    {},
    {"minutes": 1.0, "steps": 1},
    {"minutes": -1.0},
    {"minutes": math.nan},
    {"steps": 1, "kl_share": 0.0},
    {"steps": 1, "rank": -1},
    {"steps": 1, "checks": 0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    """No budget or two, and values out of range."""
    with pytest.raises(UsageError):
        RecoverSettings(**wrong)


def test_a_parameter_that_gets_no_gradient_stays_as_it_is(tmp_path: Path) -> None:
    """As the norm before a sub-block that was left out; states can be saved nevertheless."""
    problem = Parabola(Clock())
    unused = nn.Parameter(torch.ones(2))
    problem.parameters = {"w": problem.weight, "unused": unused}
    assert trainer(problem, replace(SETTINGS, save_every_s=0.0), folder=tmp_path).run().best_loss < 0.1
    assert torch.equal(unused.detach(), torch.ones(2))
