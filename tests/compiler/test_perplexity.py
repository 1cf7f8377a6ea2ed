"""Perplexity on fixed windows equals a plain computation from all logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import build_model
from eopc_compiler.perplexity import cut_text, perplexity

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    """At most `count` windows; a text shorter than one gives none."""
    assert cut_text(range(23), 5, 3).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert cut_text(range(9), 5).shape == (1, 5)
    assert cut_text([1, 2], 5).shape == (0, 5)


def test_perplexity_is_the_exponential_of_the_mean_loss_over_predicted_tokens(make_tiny: MakeTiny) -> None:
    """Against logits of the cached model; length - 1 predictions per window."""
    model = build_model(*make_tiny(), 64)
    windows = torch.randint(0, 160, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = model.score(windows)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_loss_beyond_numbers_is_not_measured(make_tiny: MakeTiny) -> None:
    """exp would overflow, or the loss is not a number: None."""
    config, tensors = make_tiny()
    for factor in (1e6, math.nan):
        broken = {**tensors, "lm_head.weight": tensors["lm_head.weight"] * factor}
        assert perplexity(build_model(config, broken, 64), torch.arange(20)[None]) is None
