"""Tiny models of eight layers, tokens for them, and synthetic loss tables that behave like real ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.evop.pattern import Space
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


def synthetic_table(seed: int, layers: int = 30, most: int = 3) -> dict[str, float]:
    """Losses by bits of every pattern of 1..`most` whole layers, shaped as those of real models are.

    Single removals are log-normal, with dear first and last layers. Pairs add up to more than their parts, neighbours
    most, by amounts of their own; triples have a small part of their own. The sum saturates: a broken model cannot get
    much worse. Noise on pairs (0.15 nats) is as large as a cheap layer's own loss, so that single removals mislead.
    """
    rng = np.random.default_rng(seed)
    single = rng.lognormal(-1.6, 0.7, layers)
    single[[0, 1, -2, -1]] += (6.0, 1.0, 0.3, 2.0)
    distance = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    pair = (
        0.5 * np.sqrt(np.outer(single, single)) * np.exp((1 - distance) / 4) * rng.lognormal(0, 0.6, (layers, layers))
    )
    pair = np.triu(pair + 0.15 * rng.standard_normal((layers, layers)), 1)
    table = {}
    for count in range(1, most + 1):
        for pattern in Space(layers, count):
            removed = list(pattern.removed)
            own = 0.05 * rng.standard_normal() if count > 2 else 0.0
            added = single[removed].sum() + pair[np.ix_(removed, removed)].sum() + own
            table[pattern.bits] = 3.0 + 9.0 * (1 - math.exp(-float(added) / 9.0))
    return table


@pytest.fixture(scope="session")
def table() -> dict[str, float]:
    """A synthetic table of 30 + 435 + 4,060 losses."""
    return synthetic_table(0)


@pytest.fixture(scope="session")
def tables(table: dict[str, float]) -> tuple[dict[str, float], ...]:
    """Three such tables."""
    return table, synthetic_table(1), synthetic_table(2)
