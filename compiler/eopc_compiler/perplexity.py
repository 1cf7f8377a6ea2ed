"""Perplexity of an eager model on a text: fixed windows that do not overlap, no tokens added, fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eopc_compiler.model import Llama
from eopc_compiler.sequences import mean_loss

WINDOW = 512  # tokens
WINDOWS = 24


def cut_text(tokens: Sequence[int], length: int = WINDOW, count: int = WINDOWS) -> Tensor:
    """The first `count` windows [n, length] of a text that was tokenised once; a shorter tail is dropped."""
    n = min(count, len(tokens) // length)
    return torch.tensor(tokens[: n * length], dtype=torch.int64).view(n, length)


def perplexity(model: Llama, windows: Tensor, report: Callable[[int, int], None] | None = None) -> float | None:
    """exp(summed next-token loss / predicted tokens) over windows [n, length], n >= 1; None if it overflows."""
    mean = mean_loss(model, windows, report)
    return math.exp(mean) if mean < 700 else None  # exp overflows at 709; not a number is not below 700 either
