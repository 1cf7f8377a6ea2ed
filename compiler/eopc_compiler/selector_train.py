"""Training of what ranks a tier's channels (`eopc build --train-selectors`): all weights frozen, one dual variable.

Of pool l, channel j is scored by what selector.py calls its utility, in logarithms, and prior and weight are trained:

    s_lj = log(Σ_t z_tj² + prior_lj) + log weight_lj

A channel costs the same joules in every layer, so one dual variable λ prices all of them: in training, channel j of
layer l runs for a sequence iff s_lj > log λ. Joules Ê(λ) fall as λ rises, so λ need not be ascended: before every step
it is solved for over the prompts of the calibration text, where on average Ê(λ) is exactly what the tier may spend.
The loss is KL(dense || tier) over answers, behind the whole model's cache of their prompts; its gradient passes a
choice as if it were sigmoid((s - log λ) / TEMPERATURE) (straight through).

What ships is static in cost: layer l runs k_l channels of its pool, the mean count at the last λ, rounded so that their
sum, and with it the joules, stay what they were; for each prompt the k_l of them with the largest s. The maps stay
those that scorers were trained on: fitted again to the new choices, they lost more on text that neither had seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eopc_compiler.board.tensorrt_build import MOST_CHOSEN
from eopc_compiler.calibration import Batch, domain_means
from eopc_compiler.model import Llama
from eopc_compiler.recover.distil import run_fingerprint
from eopc_compiler.recover.loss import Domains, kl_divergence
from eopc_compiler.recover.settings import RecoverSettings
from eopc_compiler.recover.text import Draws, TrainingText
from eopc_compiler.recover.train import Say, Trainer, TrainState
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import (
    FittedChannels,
    Scorer,
    Scorers,
    prompt_energies,
    selected_losses,
    with_scorers,
)
from eopc_compiler.sequences import keys_and_values, run_attention

TEMPERATURE = 0.5  # in nats of utility: channels within about so much of log λ are moved
LEARNING_RATE = 0.03  # of logarithms: a hundred steps can change a utility by a factor e^3
STEP_TOKENS, PART_TOKENS = 2048, 1024  # per step, and per forward and backward


@dataclass(frozen=True)
class TrainedScorers:
    """Scorers by layer (None: nothing to choose), the counts that go with them, and how they came about."""

    selector: Selector
    scorers: Scorers
    before: dict[str, float]  # selection loss of answers by domain, nats
    after: dict[str, float]
    state: TrainState


@dataclass(frozen=True)
class ScorerText:
    """What scorers are trained and judged on.

    Args:
        training: windows to train on.
        priced: windows whose prompts λ is solved over.
        selection: (name, windows [n, S]) that decide which scorers are kept, and whether any are.
        prompt: tokens of every window that the choice is made by.
    """

    training: TrainingText
    priced: Sequence[Batch]
    selection: Domains
    prompt: int


def scorer_settings(minutes: float | None = None, steps: int | None = None, seed: int = 0) -> RecoverSettings:
    """How to train scorers, for so many minutes or steps."""
    return RecoverSettings(
        minutes, steps, LEARNING_RATE, batch_tokens=STEP_TOKENS, micro_tokens=PART_TOKENS, save_every_s=60.0, seed=seed
    )


def train_scorers(
    model: Llama,
    selector: Selector,
    fitted: Sequence[FittedChannels],
    text: ScorerText,
    settings: RecoverSettings,
    *,
    folder: Path | None = None,
    report: Say | None = None,
) -> TrainedScorers:
    """Train the scorers of a choosing tier; never ends with a selection loss above that of the start.

    Args:
        model: the whole model in deployment form; it is left as it is, runs the prompts, and is the teacher.
        selector, fitted: the tier to start from (selector_fit.fit_selector); its maps stay as they are.
        folder: for the state of a run that may be killed; emptied of it at the end.
    """
    problem = _Scoring(model, selector, fitted, text, settings)
    fingerprint = run_fingerprint(settings, False, text.training, text.selection, problem.parameters)
    trainer = Trainer(problem, settings, time.monotonic, report or (lambda _: None), folder, fingerprint)
    state = trainer.run()
    before, after = state.losses(0), state.losses(state.best_step)
    return TrainedScorers(*problem.static(), before=before, after=after, state=state)


def dual_variable(scores: Sequence[Tensor], total: int) -> float:
    """log λ at which, in the mean over n prompts, `total` channels of all pools score above it.

    Args:
        scores: [n, pool] of every layer.
    """
    joined = torch.cat([s.flatten() for s in scores])
    above = total * len(scores[0])
    largest = torch.topk(joined, min(above + 1, len(joined))).values
    return float(largest[-1]) if len(largest) <= above else float(largest[-2:].mean())


def static_counts(means: Sequence[float], total: int, most: Sequence[int]) -> tuple[int, ...]:
    """Whole counts from 1 to `most` that sum to `total`, near these means: the largest remainders are rounded up."""
    counts = [min(max(math.floor(mean), 1), top) for mean, top in zip(means, most, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i, n in enumerate(counts) if 1 <= n + step <= most[i]]
        counts[max(free, key=lambda i: step * (means[i] - counts[i]))] += step
    return tuple(counts)


class _Scoring:
    """Scorers of all pools as a problem for the training loop."""

    final_checks = 0.0

    def __init__(
        self,
        model: Llama,
        selector: Selector,
        fitted: Sequence[FittedChannels],
        text: ScorerText,
        settings: RecoverSettings,
    ) -> None:
        self._model, self._selector, self._fitted, self._prompt = model, selector, fitted, text.prompt
        self._draws, self._tokens = Draws(text.training, settings.seed), text.training.tokens
        length = self._tokens.shape[1]
        self._windows, self._part = (max(1, n // length) for n in (settings.batch_tokens, settings.micro_tokens))
        self._rows = settings.logit_rows
        self._names = [name for name, _ in text.selection]
        self._selection = [
            Batch(i, 1.0, t) for i, (_, w) in enumerate(text.selection) for t in torch.split(w, self._windows)
        ]
        self._pools = selector.pools
        energies = prompt_energies(model, text.priced, text.prompt)
        self._energies = {i: self._of_pool(i, energies[i]) for i in self._pools}
        self._down = [channels.down() for channels in fitted]
        self.parameters: dict[str, nn.Parameter] = {}
        for i in self._pools:
            for name, value in (("prior", fitted[i].prior), ("weight", fitted[i].weight)):
                self.parameters[f"{i}.log_{name}"] = nn.Parameter(torch.log(value + 1e-30))
            with torch.no_grad():  # λ = 1 gives the counts there are
                scores = self._score(i, self._energies[i])
                self.parameters[f"{i}.log_weight"].sub_(dual_variable([scores], selector.chosen[i]))

    def backward(self, step: int) -> float:
        log_dual, total = self._log_dual(), 0.0
        tokens = self._tokens[self._draws.rows(step, self._windows)]
        for part in torch.split(tokens, self._part):
            with torch.enable_grad():
                loss = self._divergence(part, log_dual) * (len(part) / len(tokens))
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def selection(self) -> dict[str, float]:
        selector, scorers = self.static()
        fitted = with_scorers(self._fitted, scorers)
        losses = selected_losses(self._model, selector, fitted, self._selection, self._prompt)
        return {self._names[d]: loss for d, loss in domain_means(self._selection, losses).items()}

    @torch.no_grad()
    def static(self) -> tuple[Selector, Scorers]:
        """The counts and scorers that would ship now."""
        log_dual, scores = self._log_dual(), self._scores()
        means = [float((s > log_dual).sum(1).double().mean()) for s in scores.values()]
        most = [min(p.size, MOST_CHOSEN) for p in self._pools.values()]
        counts = dict(zip(scores, static_counts(means, sum(self._selector.chosen), most), strict=True))
        selector = replace(self._selector, chosen=tuple(counts.get(i, 0) for i in range(len(self._selector.chosen))))
        return selector, tuple(self._scorer(i) if i in self._pools else None for i in range(len(self._fitted)))

    def _scorer(self, index: int) -> Scorer:
        prior, weight = (self.parameters[f"{index}.log_{name}"].detach().exp() for name in ("prior", "weight"))
        return Scorer(prior, weight)

    @torch.no_grad()
    def _log_dual(self) -> float:
        return dual_variable(list(self._scores().values()), sum(self._selector.chosen))

    def _scores(self) -> dict[int, Tensor]:
        return {i: self._score(i, energy) for i, energy in self._energies.items()}

    def _score(self, index: int, energy: Tensor) -> Tensor:
        """s [n, pool] of the energies [n, pool] of prompts."""
        prior, weight = (self.parameters[f"{index}.log_{name}"] for name in ("prior", "weight"))
        return torch.logaddexp(torch.log(energy + 1e-30), prior) + weight

    def _of_pool(self, index: int, energy: Tensor) -> Tensor:
        core = self._selector.core[index]
        return energy[:, core : core + self._pools[index].size]

    def _gates(self, index: int, energy: Tensor, log_dual: float) -> Tensor:
        """1 for what runs and 0 for the rest [n, core + pool], from energies of prompts [n, ffn]."""
        fixed = energy.new_ones(len(energy), self._selector.core[index])
        if index not in self._pools:
            return fixed
        distance = self._score(index, self._of_pool(index, energy)) - log_dual
        soft = torch.sigmoid(distance / TEMPERATURE)
        return torch.cat([fixed, (distance > 0).float() + soft - soft.detach()], 1)

    def _divergence(self, tokens: Tensor, log_dual: float) -> Tensor:
        """Mean KL(dense || tier) in nats over the answers of windows [n, S]."""
        model, prompt = self._model, self._prompt
        dense = model.model.embed_tokens(tokens)
        ours: Tensor = dense[:, prompt:]
        for index, layer in enumerate(model.blocks):
            with torch.no_grad():
                past = keys_and_values(model, layer, dense[:, :prompt])
                middle = run_attention(model, layer, dense)
                hidden = layer.mlp.hidden(layer.post_attention_layernorm(middle))
                energy = hidden[:, : prompt - 1].pow(2).sum(1)
                dense = middle + layer.mlp.down_proj(hidden)
            gates, down = self._gates(index, energy, log_dual), self._down[index]
            middle = run_attention(model, layer, ours, past)
            hidden = layer.mlp.hidden(layer.post_attention_layernorm(middle))
            ours = middle + (hidden[..., : len(down)] * gates[:, None]) @ down + self._fitted[index].bias
        student, teacher = (model.model.norm(x).flatten(0, 1) for x in (ours, dense[:, prompt:]))
        head = model.lm_head.weight.t() if model.lm_head.transposed else model.lm_head.weight
        return kl_divergence(student, teacher, head, head, self._rows)
