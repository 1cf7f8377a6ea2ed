"""Tiny random models that every compiler test can build: a real config.json, real tensor names, seconds to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eopc_compiler.config import LlamaConfig, normalize_config, tensor_shapes

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics in fp32 on every processor, so that tests can be sharp; a test of bfloat16 switches it back on."""
    from eopc_compiler import sequences

    monkeypatch.setattr(sequences, "native_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def tiny_json() -> dict[str, Any]:
    """The config.json of the tiny model: 3 layers, 4 KV groups of 2 query heads x 16, explicit head_dim."""
    return dict(TINY)


@pytest.fixture(scope="session")
def make_tiny() -> MakeTiny:
    """Builds (config, random fp32 tensors by checkpoint name) from the tiny config.json with some keys changed."""

    def make(seed: int = 0, **changes: Any) -> tuple[LlamaConfig, dict[str, Tensor]]:
        config = normalize_config({**TINY, **changes})
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in tensor_shapes(config).items():
            noise = torch.randn(shape, generator=generator)
            if "norm" in name:
                tensors[name] = 1 + 0.2 * noise
            elif name.endswith(".bias"):
                tensors[name] = 0.3 * noise  # large enough to be missed if it were left out
            else:
                tensors[name] = noise / shape[-1] ** 0.5
        tensors["model.embed_tokens.weight"] *= config.hidden_size**0.5  # unit variance into the first layer
        return config, tensors

    return make
