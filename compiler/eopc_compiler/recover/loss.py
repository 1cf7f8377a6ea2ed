"""What recovery minimises: KL(teacher || student) of the next token, and the distance of hidden states.

The states that are compared are normed: behind a block by their root mean square, before the head by the model's final
norm. A mean square of 1 makes the distance relative, and the few tokens with huge activations do not drown the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.model import Llama, build_model
from eopc_compiler.sequences import mean_loss, run_layer

Domains = Sequence[tuple[str, Tensor]]  # (name, int64 [n, S])


def autocast(bf16: bool) -> AbstractContextManager[object]:
    """Matrix products in bf16, everything between them in fp32; or all in fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


def normed_states(model: Llama, tokens: Tensor, behind: Sequence[int] = ()) -> list[Tensor]:
    """States [n, S, hidden] behind chosen blocks, over their root mean square, and last what the head reads."""
    states = []
    x: Tensor = model.model.embed_tokens(tokens)
    for i, layer in enumerate(model.blocks):
        x = run_layer(model, layer, x)
        if i in behind:
            states.append(x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps))
    return [*states, model.model.norm(x)]


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the compared places of ||s - t||² / ||t||²."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(s - t).pow(2).mean() / t.pow(2).mean() for s, t in pairs]).mean()


def kl_divergence(
    student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, rows: int, bf16: bool = False
) -> Tensor:
    """Mean KL(teacher || student) in nats over positions; differentiable in the student's states only.

    Args:
        student, teacher: what the heads read, [T, hidden].
        head, teacher_head: [vocab, hidden], frozen.
        rows: positions whose logits are held at a time; [T, vocab] never is, in backward neither.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    result: Tensor = _ChunkedKl.apply(student, teacher, head.to(dtype), teacher_head.to(dtype), rows)  # type: ignore[no-untyped-call]
    return result


class _ChunkedKl(torch.autograd.Function):
    """The gradient by logits is softmax(s) - softmax(t): it is taken in forward, while both are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: Tensor,
        teacher_head: Tensor,
        rows: int,
    ) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros(())
        with autocast(False):
            for i in range(0, len(student), rows):
                s = F.linear(student[i : i + rows].to(head.dtype), head)  # [rows, vocab]
                t = F.linear(teacher[i : i + rows].to(head.dtype), teacher_head)
                log_s = torch.log_softmax(s, -1, dtype=torch.float32)
                log_t = torch.log_softmax(t, -1, dtype=torch.float32)
                p_t = log_t.exp()
                total += torch.dot(p_t.flatten(), log_t.sub_(log_s).flatten())
                gradient[i : i + rows] = log_s.exp_().sub_(p_t).to(head.dtype) @ head
        ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


class Teacher:
    """The dense model's normed states of training windows, computed when first asked for and kept within a limit.

    They are kept in fp16: a normed state is at most sqrt(hidden) times the norm's weight, far inside its range.
    """

    def __init__(self, model: Llama, tokens: Tensor, behind: Sequence[int], bf16: bool, cache_bytes: int) -> None:
        self._model = _light(model) if bf16 else model
        self._tokens, self._behind, self._bf16 = tokens, tuple(behind), bf16
        self._limit, self._kept = cache_bytes, dict[int, Tensor]()

    def states(self, rows: Sequence[int]) -> list[Tensor]:
        """States [n, S, hidden] of these windows, fp32: behind the chosen blocks, and last what the head reads."""
        missing = [row for row in rows if row not in self._kept]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad(), autocast(self._bf16):
                states = torch.stack(normed_states(self._model, self._tokens[missing], self._behind), 1).half()
            fresh = dict(zip(missing, states.unbind(), strict=True))  # [places, S, hidden] each
        found = [self._kept[row] if row in self._kept else fresh[row] for row in rows]
        for row, value in fresh.items():
            if (len(self._kept) + 1) * value.nbytes <= self._limit:
                self._kept[row] = value.clone()  # a view would hold the whole batch
        return list(torch.stack(found, 1).float().unbind())


def _light(model: Llama) -> Llama:
    """The model with its blocks' matrices in bf16, so that a forward pass need not round them again."""
    tensors = {n: p.data.bfloat16() if "proj." in n else p.data for n, p in model.named_parameters()}
    return build_model(model.config, tensors, model.get_buffer("cos").shape[0])


def selection_losses(model: Llama, domains: Domains, bf16: bool) -> dict[str, float]:
    """Mean next-token loss of whole windows by domain, in nats."""
    with autocast(bf16):
        return {name: mean_loss(model, windows) for name, windows in domains}
