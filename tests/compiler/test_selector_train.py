"""Training of what ranks channels: the dual variable, static counts, and scorers that learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama, build_model
from eopc_compiler.recover import TrainingText
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import FittedChannels, fit_selector, selected_losses, unfitted, with_scorers
from eopc_compiler.selector_train import (
    ScorerText,
    TrainedScorers,
    dual_variable,
    scorer_settings,
    static_counts,
    train_scorers,
)

LENGTH, PROMPT, WINDOWS = 48, 24, 12


@pytest.fixture
def model(make_tiny: Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]) -> Llama:
    config, tensors = make_tiny()
    return build_model(config, tensors, LENGTH).fuse()


def selector_of(model: Llama) -> Selector:
    """Half of every layer fixed, half of the rest chosen."""
    widths = [d.intermediate_size for d in model.config.layers]
    return Selector(tuple(w // 2 for w in widths), tuple(w - w // 2 for w in widths), tuple(w // 4 for w in widths))


def windows(model: Llama, seed: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def priced(model: Llama) -> list[Batch]:
    tokens = windows(model, 0)
    return [Batch(0, 1 / tokens.numel(), tokens)]


def scrambled(fitted: tuple[FittedChannels, ...]) -> tuple[FittedChannels, ...]:
    """Scorers that rank upside down."""
    return tuple(replace(f, weight=1 / f.weight) for f in fitted)


def train(
    model: Llama, fitted: tuple[FittedChannels, ...], steps: int, folder: Path | None = None, rate: float = 0.3
) -> TrainedScorers:
    training = TrainingText((("random", windows(model, 0)),), (1.0,))
    text = ScorerText(training, priced(model), (("random", windows(model, 1)),), PROMPT)
    settings = replace(scorer_settings(steps=steps), learning_rate=rate, batch_tokens=6 * LENGTH)
    return train_scorers(model, selector_of(model), fitted, text, settings, folder=folder)


def test_the_dual_variable_spends_what_there_is() -> None:
    """In the mean over prompts, as many channels as asked for score above λ, however layers differ."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(5, 40, generator=generator) * spread for spread in (1.0, 3.0)]
    for total in (1, 30, 79):
        log_dual = dual_variable(scores, total)
        assert sum(int((s > log_dual).sum()) for s in scores) == 5 * total
    assert dual_variable(scores, 80) == min(float(s.min()) for s in scores)


def test_a_higher_price_never_buys_more() -> None:
    """λ falls as more channels may run: joules are monotone in it."""
    scores = [torch.randn(7, 30, generator=torch.Generator().manual_seed(1))]
    found = [dual_variable(scores, total) for total in range(1, 31)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("means", "total", "most", "expected"),
    [
        ([2.6, 3.4], 6, [9, 9], (3, 3)),
        ([0.0, 6.0], 6, [9, 9], (1, 5)),  # a pool that is never chosen from keeps one
        ([9.5, 1.5], 11, [8, 9], (8, 3)),  # no more than there are
        ([2.0, 2.0], 4, [2, 2], (2, 2)),
    ],
)
def test_static_counts_cost_what_the_budget_buys(
    means: list[float], total: int, most: list[int], expected: tuple[int, ...]
) -> None:
    """Whole counts near the means, within their bounds, of exactly the total."""
    assert static_counts(means, total, most) == expected
    assert sum(expected) == total


def test_before_training_counts_are_those_of_the_plan(model: Llama) -> None:
    """At λ = 1 every layer runs, in the mean, what the planner gave it."""
    fitted = fit_selector(model, selector_of(model), priced(model), PROMPT)
    nothing = train(model, fitted, 1, rate=1e-12)
    assert nothing.selector == selector_of(model)
    assert sum(nothing.selector.chosen) == sum(selector_of(model).chosen)


def test_scorers_that_rank_upside_down_learn_better(model: Llama) -> None:
    """The loss of unseen answers falls, most of the way to that of the utilities; joules stay the same."""
    fitted = unfitted(model, selector_of(model), priced(model), PROMPT)
    unseen = [Batch(0, 1.0, windows(model, 1))]

    def loss(selector: Selector, channels: tuple[FittedChannels, ...]) -> float:
        return float(selected_losses(model, selector, channels, unseen, PROMPT)[0].double().mean())

    right, wrong = loss(selector_of(model), fitted), loss(selector_of(model), scrambled(fitted))
    trained = train(model, scrambled(fitted), 60)
    assert sum(trained.selector.chosen) == sum(selector_of(model).chosen)
    after = loss(trained.selector, with_scorers(fitted, trained.scorers))
    assert trained.before["random"] == pytest.approx(wrong, abs=1e-4)
    assert trained.after["random"] == pytest.approx(after, abs=1e-4)
    assert after - right < 0.5 * (wrong - right)


def test_training_never_ends_worse_and_repeats_itself(model: Llama, tmp_path: Path) -> None:
    """From fitted utilities the selection loss cannot rise; the same seed gives the same scorers and counts."""
    fitted = fit_selector(model, selector_of(model), priced(model), PROMPT)
    first, again = train(model, fitted, 4, tmp_path), train(model, fitted, 4)
    assert first.after["random"] <= first.before["random"]
    assert first.selector == again.selector
    assert first.after == again.after
    assert not list(tmp_path.iterdir())  # the state of a run that ended is gone


def test_a_killed_run_goes_on(model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a step whose state was saved, it ends with what an unbroken run ends with."""
    from eopc_compiler.recover.train import Trainer

    fitted = scrambled(unfitted(model, selector_of(model), priced(model), PROMPT))
    whole, step = train(model, fitted, 6), Trainer._step

    def killed(trainer: Trainer, progress: float) -> None:
        if trainer.state.step == 3:
            trainer._save(tmp_path)
            raise KeyboardInterrupt
        step(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, fitted, 6, tmp_path)
    resumed = train(model, fitted, 6, tmp_path)
    assert resumed.state.resumed
    assert resumed.selector == whole.selector
    for ours, theirs in zip(resumed.scorers, whole.scorers, strict=True):
        assert ours and theirs
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=0)
