"""Tiny models of eight layers, tokens for them, and synthetic loss tables that behave like real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama, build_model

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@pytest.fixture(scope="session")
def eight_layers(make_tiny: MakeTiny) -> Llama:
    """A tiny random model of eight layers."""
    return build_model(*make_tiny(num_hidden_layers=8), context=64)


@pytest.fixture(scope="session")
def stages() -> tuple[Tensor, ...]:
    """Two stages of random tokens of different shapes."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(0, 160, shape, generator=generator) for shape in ((1, 20), (2, 28)))
