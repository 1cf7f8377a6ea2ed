"""Whole sequences through eager blocks: losses and cosines over token windows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler import sequences
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import build_model
from eopc_compiler.sequences import cosine_sum, mean_loss

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@pytest.mark.parametrize("tokens", [1, 40, 1024], ids=["one window", "two windows", "all at once"])
def test_the_mean_loss_is_that_of_the_models_own_logits(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Over all predicted tokens, however many windows go through the model at a time; every window is counted."""
    model = build_model(*make_tiny(), 64)
    windows = torch.randint(0, 160, (5, 20), generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(model.score(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    monkeypatch.setattr(sequences, "LOSS_TOKENS", tokens)
    heard: list[tuple[int, int]] = []
    assert mean_loss(model, windows, lambda *at: heard.append(at)) == pytest.approx(float(want), abs=1e-5)
    assert heard == {1: [(i, 5) for i in range(1, 6)], 40: [(2, 5), (4, 5), (5, 5)], 1024: [(5, 5)]}[tokens]


def test_cosines_are_summed_over_tokens() -> None:
    """A state that keeps its direction counts 1, a turned one 0, a reversed one -1."""
    before = torch.tensor([[[3.0, 4.0], [3.0, 4.0]], [[3.0, 4.0], [1.0, 0.0]]])
    after = torch.tensor([[[6.0, 8.0], [-4.0, 3.0]], [[-3.0, -4.0], [1.0, 1.0]]])
    assert cosine_sum(before, after) == pytest.approx(0.5**0.5)
