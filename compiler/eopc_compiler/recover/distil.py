"""Recovery of one pruned model: its blocks learn to give the dense model's next-token distributions again.

Loss: KL(teacher || student) + hidden_weight x relative squared distance of normed hidden states, as in Minitron (arXiv
2407.14679), which found logits plus hidden states the best use of few tokens. Embedding, head and final norm stay as
they are, so the file of a ladder's tiers still shares them, and the head costs one product less per step.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eopc_compiler.model import Llama, build_model
from eopc_compiler.recover.loss import (
    Domains,
    Teacher,
    autocast,
    hidden_distance,
    kl_divergence,
    normed_states,
    selection_losses,
)
from eopc_compiler.recover.lowrank import add_low_rank, folded_weights
from eopc_compiler.recover.settings import RecoverSettings, choose_bf16
from eopc_compiler.recover.text import Draws, TrainingText
from eopc_compiler.recover.train import Clock, Say, Trainer, TrainState
from eopc_runtime.errors import UsageError


@dataclass(frozen=True)
class RecoverReport:
    """The recovered tensors and how they came about."""

    tensors: dict[str, Tensor]  # all of the student's, by Hugging Face name; a tied head is not listed
    before: dict[str, float]  # selection loss by domain, nats
    after: dict[str, float]
    bf16: bool
    tokens: int  # trained on, repeats counted
    state: TrainState

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of the whole run, checks included."""
        return self.tokens / max(self.state.elapsed_s, 1e-9)


def recover(
    student: Llama,
    teacher: Llama,
    text: TrainingText,
    selection: Domains,
    settings: RecoverSettings,
    *,
    sources: Sequence[int] | None = None,
    folder: Path | None = None,
    clock: Clock = time.monotonic,
    report: Say | None = None,
) -> RecoverReport:
    """Distil the dense teacher into a pruned student; the models given stay as they are.

    Args:
        student: checkpoint form, of the teacher's hidden size and vocabulary.
        text: windows to train on, from the calibration split.
        selection: (name, windows [n, S]) that decide which weights are kept, and whether any are.
        sources: of every student layer the teacher's layer it came from; the same numbers where left out.
        folder: for the state of a run that may be killed; emptied of it at the end.

    Raises:
        UsageError: the windows are longer than the context the teacher was built for.
    """
    say = report or (lambda _: None)
    bf16 = choose_bf16(settings.precision, teacher.config.hidden_size)
    problem = _Distillation(student, teacher, text, selection, settings, bf16, sources)
    identity = run_fingerprint(settings, bf16, text, selection, dict(student.named_parameters()))
    state = Trainer(problem, settings, clock, say, folder, identity).run()
    before, after = state.losses(0), state.losses(state.best_step)
    return RecoverReport(problem.tensors(), before, after, bf16, state.step * problem.tokens_per_step, state)


class Distiller:
    """What recovering one model and a ladder share: the text's order, the teacher, the loss of one forward pass."""

    def __init__(
        self, teacher: Llama, text: TrainingText, settings: RecoverSettings, bf16: bool, behind: Sequence[int]
    ) -> None:
        """`behind`: blocks of the teacher behind which its states are compared."""
        self.settings, self.bf16, self.tokens = settings, bf16, text.tokens
        self._head = teacher.lm_head.weight.detach()
        self._cast_head = self._head.bfloat16() if bf16 else self._head
        self._teacher = Teacher(teacher, self.tokens, behind, bf16, settings.cache_bytes)
        self._draws = Draws(text, settings.seed)
        length, context = self.tokens.shape[1], teacher.get_buffer("cos").shape[0]
        if length > context:
            raise UsageError(f"training windows of {length} tokens do not fit the model's {context} positions.")
        self._windows, self._part = (max(1, n // length) for n in (settings.batch_tokens, settings.micro_tokens))
        self.tokens_per_step = self._windows * length

    def parts(self, step: int) -> list[tuple[Tensor, list[Tensor], float]]:
        """The step's windows in parts: token ids [n, S], the teacher's states, and the part's share of the step."""
        rows = self._draws.rows(step, self._windows)
        cut = [rows[i : i + self._part] for i in range(0, len(rows), self._part)]
        return [(self.tokens[part], self._teacher.states(part), len(part) / len(rows)) for part in cut]

    def loss(self, model: Llama, tokens: Tensor, target: Sequence[Tensor], step: int, behind: Sequence[int]) -> Tensor:
        """The loss of one part, with a graph behind it."""
        with autocast(self.bf16):
            states = normed_states(model, tokens, behind)
        student, teacher = states[-1].flatten(0, 1), target[-1].flatten(0, 1)
        picked = self._positions(len(student), step)
        head = model.lm_head.weight
        own = self._cast_head if head.data_ptr() == self._head.data_ptr() else head.detach()
        rows, bf16 = self.settings.logit_rows, self.bf16
        loss = kl_divergence(student[picked], teacher[picked], own, self._cast_head, rows, bf16)
        return loss + self.settings.hidden_weight * hidden_distance(states, target)

    def _positions(self, count: int, step: int) -> Tensor | slice:
        """The positions that pay for the head: a mean over a random share has the same expectation."""
        share = self.settings.kl_share
        if share == 1:
            return slice(None)
        generator = torch.Generator().manual_seed(random.Random(f"{self.settings.seed}:{step}").getrandbits(62))
        return torch.randperm(count, generator=generator)[: max(1, round(share * count))]


class _Distillation:
    """The problem of recovering one model."""

    final_checks = 0.0

    def __init__(
        self,
        student: Llama,
        teacher: Llama,
        text: TrainingText,
        selection: Domains,
        settings: RecoverSettings,
        bf16: bool,
        sources: Sequence[int] | None,
    ) -> None:
        depth = len(student.blocks)
        sources = list(range(depth)) if sources is None else sources
        every = settings.hidden_every
        self._behind = [i - 1 for i in range(every, depth, every)] if every else []
        # behind a kept layer the state should be what the next kept layer read in the teacher
        targets = [sources[i + 1] - 1 for i in self._behind]
        self._distiller = Distiller(teacher, text, settings, bf16, targets)
        self.tokens_per_step = self._distiller.tokens_per_step
        self._selection, self._bf16, self._low_rank = selection, bf16, settings.rank > 0
        self.model, self.parameters = _trainable(student, settings)

    def backward(self, step: int) -> float:
        total = 0.0
        for tokens, target, share in self._distiller.parts(step):
            loss = share * self._distiller.loss(self.model, tokens, target, step, self._behind)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def selection(self) -> dict[str, float]:
        return selection_losses(self.model, self._selection, self._bf16)

    def tensors(self) -> dict[str, Tensor]:
        """The student's tensors as trained, low-rank updates folded."""
        found = plain_tensors(self.model)
        return found | folded_weights(self.model) if self._low_rank else found


def _trainable(student: Llama, settings: RecoverSettings) -> tuple[Llama, dict[str, nn.Parameter]]:
    """A copy of the student's blocks (all else shared), and those of its parameters that are trained."""
    in_blocks = [n for n, _ in student.named_parameters() if n.startswith("model.layers.")]
    matrices = {n for n in in_blocks if n.endswith("proj.weight")} if settings.rank else set()
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in student.named_parameters()}
    tensors |= {n: tensors[n].clone() for n in in_blocks if n not in matrices}
    model = build_model(student.config, tensors, student.get_buffer("cos").shape[0])
    named = dict(model.named_parameters())
    trained = {n: named[n] for n in in_blocks if n not in matrices}
    if settings.rank:
        trained |= add_low_rank(model, settings.rank, settings.seed)
    trained = {n: p for n, p in trained.items() if p.numel()}
    for parameter in trained.values():
        parameter.requires_grad_()
    return model, trained


def plain_tensors(model: Llama) -> dict[str, Tensor]:
    """A model's tensors by Hugging Face name, without a tied head and without low-rank updates."""
    left_out = (".lower", ".upper", "lm_head.weight" if model.config.tie_word_embeddings else " ")
    return {n: p.detach() for n, p in model.named_parameters() if not n.endswith(left_out)}


def run_fingerprint(
    settings: RecoverSettings, bf16: bool, text: TrainingText, selection: Domains, start: dict[str, nn.Parameter]
) -> str:
    """What must be the same for a killed run to go on: settings, texts, and the weights it began with."""
    digest = hashlib.sha256(f"{asdict(settings)}{bf16}{text.fingerprint}".encode())
    for name, tensor in (*selection, *start.items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
