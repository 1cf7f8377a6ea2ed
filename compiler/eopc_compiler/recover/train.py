"""The training loop: AdamW under a budget of minutes or steps, the best weights kept, killed runs continued.

It knows nothing of language models: a `Problem` has parameters, leaves gradients, and tells its selection loss. The
step size falls with the *share of the budget spent*, so that a slow machine ends with small steps as a fast one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from eopc_compiler.recover.settings import RecoverSettings, rate_shape
from eopc_compiler.recover.store import load_state, remove_state, save_state

Clock = Callable[[], float]  # seconds, monotonic
Say = Callable[[str], None]

MAX_BACKOFFS = 4  # each halves the step size; then the run ends with the best it had
_BETAS = (0.9, 0.95)  # a few hundred steps: the usual 0.999 would still be warming up


class Problem(Protocol):
    """What is trained: parameters by name, all fp32 leaves."""

    parameters: dict[str, nn.Parameter]
    final_checks: float  # selection losses that the caller takes after training, in units of one

    def backward(self, step: int) -> float:
        """Add this step's gradients to the parameters; return its loss."""

    def selection(self) -> dict[str, float]:
        """Losses by name; their mean decides which weights are kept."""


@dataclass(slots=True)
class TrainState:
    """How far a run is; everything in it is JSON."""

    step: int = 0
    elapsed_s: float = 0.0
    check_s: float = 0.0  # of one selection loss
    step_s: float = 0.0  # of the slowest step
    checks_done: int = 0
    scale: float = 1.0  # of the step size
    backoffs: int = 0
    start_loss: float = math.nan
    best_loss: float = math.nan
    best_step: int = 0
    resumed: bool = False
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # (elapsed_s, step, training loss)
    selection: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)  # (elapsed_s, step, by name)

    def losses(self, step: int) -> dict[str, float]:
        """Selection losses by name, as measured after this step."""
        return next(by_name for _, at, by_name in self.selection if at == step)


class Trainer:
    """One run of a problem; `run` leaves the best parameters in place."""

    def __init__(
        self,
        problem: Problem,
        settings: RecoverSettings,
        clock: Clock,
        say: Say,
        folder: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        """With a folder, the state is saved there and a run with the same fingerprint goes on."""
        self.problem, self.settings, self.state = problem, settings, TrainState()
        self._clock, self._say, self._folder, self._fingerprint = clock, say, folder, fingerprint
        self._began_s = self._saved_s = clock()
        self._best = self._copy()
        self._optimizer = self._new_optimizer()

    def run(self) -> TrainState:
        """Train until the budget is spent; never ends with a selection loss above that of the start."""
        if not self._resume():
            self._measure_start()
        while (progress := self.progress()) < 1 and self.state.backoffs <= MAX_BACKOFFS:
            self._step(progress)
            if self.progress() * self.settings.checks >= self.state.checks_done + 1 and self.progress() < 1:
                self._check()
            if self._folder and self._clock() - self._saved_s >= self.settings.save_every_s:
                self._save(self._folder)
        if self.state.selection[-1][1] != self.state.step and self.state.backoffs <= MAX_BACKOFFS:
            self._check()
        self._restore_best()
        self.state.elapsed_s = self._elapsed()
        if self._folder:
            remove_state(self._folder)
        return self.state

    def progress(self) -> float:
        """The share of the budget spent, 0..1 and beyond; what must still fit in at the end counts as spent."""
        if self.settings.steps is not None:
            return self.state.step / self.settings.steps
        assert self.settings.minutes is not None
        reserved_s = (1 + self.problem.final_checks) * self.state.check_s + self.state.step_s
        return (self._elapsed() + reserved_s) / (60 * self.settings.minutes)

    def _elapsed(self) -> float:
        return self._clock() - self._began_s

    def _step(self, progress: float) -> None:
        state, settings, began = self.state, self.settings, self._clock()
        middle = progress + 0.5 / settings.steps if settings.steps else progress
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * state.scale * rate_shape(middle, settings.warmup)
        loss = self.problem.backward(state.step)
        norm = nn.utils.clip_grad_norm_(self.problem.parameters.values(), settings.clip)
        state.step += 1
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            self._back_off(f"the loss or its gradient is not finite in step {state.step}")
            return
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step_s = max(state.step_s, self._clock() - began)
        state.curve.append((self._elapsed(), state.step, loss))

    def _measure_start(self) -> None:
        began = self._clock()
        losses = self.problem.selection()
        self.state.start_loss = self.state.best_loss = _mean(losses)
        self.state.check_s = self._clock() - began
        self.state.selection.append((self._elapsed(), 0, losses))
        self._say(f"before training: selection loss {self.state.start_loss:.4f}")

    def _check(self) -> None:
        state = self.state
        losses = self.problem.selection()
        loss = _mean(losses)
        state.checks_done = max(state.checks_done + 1, math.floor(self.progress() * self.settings.checks))
        state.selection.append((self._elapsed(), state.step, losses))
        recent = [value for _, _, value in state.curve[-20:]]
        training = sum(recent) / len(recent) if recent else math.nan
        self._say(
            f"{self._elapsed():.0f} s, step {state.step}: training loss {training:.4f}, selection loss {loss:.4f}"
        )
        if loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            self._best = self._copy()
        elif not loss <= state.start_loss and self.progress() < 1:
            self._back_off(f"the selection loss {loss:.4f} is above the start's {state.start_loss:.4f}")

    def _back_off(self, why: str) -> None:
        """Return to the best weights with half the step size and no memory of past gradients."""
        self.state.backoffs += 1
        self.state.scale /= 2
        self._restore_best()
        self._optimizer = self._new_optimizer()
        self._say(f"{why}: back to step {self.state.best_step}, with half the step size")

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.problem.parameters.values())
        for parameter in parameters:
            parameter.grad = None
        return torch.optim.AdamW(parameters, lr=0.0, betas=_BETAS, weight_decay=0.0, fused=True)

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.problem.parameters.items()}

    def _restore_best(self) -> None:
        _assign(self.problem.parameters, self._best)

    def _save(self, folder: Path) -> None:
        self.state.elapsed_s = self._elapsed()
        tensors = {f"best.{n}": t for n, t in self._best.items()}
        tensors |= {f"now.{n}": p.detach() for n, p in self.problem.parameters.items()}
        for name, parameter in self.problem.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self._optimizer.state[parameter].items()}
        save_state(folder, tensors, {"fingerprint": self._fingerprint, "state": asdict(self.state)})
        self._saved_s = self._clock()

    def _resume(self) -> bool:
        """Take over the saved state of the same run, if there is one."""
        found = load_state(self._folder, self._fingerprint) if self._folder else None
        if found is None:
            return False
        tensors, record = found
        self.state = TrainState(**{**record["state"], "resumed": True})
        self._best = {name: tensors[f"best.{name}"] for name in self.problem.parameters}
        _assign(self.problem.parameters, {name: tensors[f"now.{name}"] for name in self.problem.parameters})
        for name, parameter in self.problem.parameters.items():
            moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                self._optimizer.state[parameter] = moments
        self._began_s = self._clock() - self.state.elapsed_s
        self._say(f"goes on at step {self.state.step}, after {self.state.elapsed_s:.0f} s")
        return True


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _mean(losses: dict[str, float]) -> float:
    """The mean over names, which counts every domain alike whatever its length."""
    return sum(losses.values()) / len(losses)
