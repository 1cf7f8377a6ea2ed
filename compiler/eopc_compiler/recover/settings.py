"""What a recovery is told, and the two decisions that follow from it alone: step size and number format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from eopc_runtime.errors import UsageError

Precision = Literal["auto", "bf16", "fp32"]

_BF16_WORTH = 1.3  # times faster, below which rounding to 8 bits buys too little


@dataclass(frozen=True, slots=True)
class RecoverSettings:
    """How to recover; give `minutes` or `steps`, not both.

    Minutes include everything: teacher, checks, state files. With steps, one machine and one precision give the same
    result on every run.
    """

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float = 3e-4  # AdamW's, at its peak
    warmup: float = 0.05  # share of the budget in which the step size grows
    batch_tokens: int = 768  # per step: few, because within minutes the number of steps is what is short
    micro_tokens: int = 768  # per forward and backward: what activations are held of
    logit_rows: int = 128  # positions whose logits are held at a time: rows x vocabulary stay near the caches
    kl_share: float = 1.0  # of the positions, drawn anew every step, that pay for the head
    hidden_weight: float = 1.0  # of the hidden-state term, beside a KL divergence of weight 1
    hidden_every: int = 0  # compare also behind every that many kept layers; 0: only what the head reads
    rank: int = 0  # of low-rank updates; 0 trains the whole matrices
    clip: float = 1.0  # largest norm of the gradient
    checks: int = 5  # times the selection loss is measured
    precision: Precision = "auto"
    cache_bytes: int = 512 << 20  # of the teacher's states, kept for when a window comes again
    save_every_s: float = 120.0
    seed: int = 0
    t0_weight: float = 1.0  # ladder: weight of the whole model's own loss, beside 1 for each other tier
    t0_bound: float = 0.005  # ladder: nats that the whole model may lose on selection text

    def __post_init__(self) -> None:
        """UsageError for a budget that is not one, or a value out of range."""
        if (self.minutes is None) == (self.steps is None):
            raise UsageError("recovery needs minutes or steps, one of them. Give --recover MINUTES.")
        budget = self.minutes if self.minutes is not None else self.steps
        if budget is not None and not 0 < budget < float("inf"):
            raise UsageError(f"recovery for {budget} minutes is not possible; give a number above 0.")
        if not 0 < self.kl_share <= 1 or not 0 <= self.warmup < 1:
            raise UsageError(f"kl_share {self.kl_share} must be in 0..1, and warmup {self.warmup} below 1.")
        positive = ("learning_rate", "batch_tokens", "micro_tokens", "logit_rows", "clip", "checks")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UsageError(f"recovery: {name} is {getattr(self, name)}; it must be above 0.")
        if self.rank < 0 or self.hidden_every < 0:
            raise UsageError(f"recovery: rank {self.rank} and hidden_every {self.hidden_every} must be 0 or more.")


def rate_shape(progress: float, warmup: float) -> float:
    """The share of the peak step size at a progress in 0..1: up over the warm-up, then down to 0, both linear."""
    rising = progress / warmup if warmup else 1.0
    return max(0.0, min(rising, (1 - progress) / (1 - warmup), 1.0))


def choose_bf16(precision: Precision, width: int, clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether to multiply matrices in bf16: as told, or where a matrix product of this width is measurably faster."""
    if precision != "auto":
        return precision == "bf16"
    return _BF16_WORTH * _product_s(torch.bfloat16, width, clock) < _product_s(torch.float32, width, clock)


def _product_s(dtype: torch.dtype, width: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of five products [512, width] x [width, 2 width]."""
    a, b = torch.ones(512, width, dtype=dtype), torch.ones(2 * width, width, dtype=dtype)
    times = []
    for _ in range(5):
        began = clock()
        torch.nn.functional.linear(a, b)
        times.append(clock() - began)
    return min(times)
