"""Tiers of a tiny random model as a bundle holds them: weights.bin and tiers/tN/model.onnx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eopc_compiler.assemble import Storage, write_weights
from eopc_compiler.config import LayerDims
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.export import export_tier
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, tier_config

CONTEXT = 256
PRUNED = Mask((LayerDims(0, 1, 128), LayerDims(1, 2, 192)))  # both layers keep pieces, one of them a single KV group
MakeTier = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tier(cached_traces: None, make_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeTier:
    """Writes one tier and returns the folder its weights.bin lies in; the graph is tiers/<tier>/model.onnx."""
    done: dict[tuple[object, ...], tuple[Path, Any, Any]] = {}

    def make(precision: str, dialect: str, dtype: str, tier: str, bias: bool = False) -> Path:
        key = (precision, dialect, dtype, bias)
        changes = {"model_type": "qwen2"} if bias else {}
        config, tensors = make_tiny(
            hidden_size=128,
            head_dim=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            num_hidden_layers=2,
            max_position_embeddings=CONTEXT,
            **changes,
        )
        masks = [full_mask(config), PRUNED]
        storage = Storage.choose(precision, dtype, DIALECTS[dialect], {128, 192, 256}, layers=2)
        if key not in done:
            root = tmp_path_factory.mktemp("-".join(map(str, key)))
            orders = [UnitOrder(tuple(range(2)), tuple(range(256))) for _ in config.layers]
            tokens = torch.randint(0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
            weights = root / "weights.bin"
            table, _ = write_weights(
                weights, config, tensors.__getitem__, orders, masks, storage, CONTEXT, calibration=[tokens]
            )
            done[key] = root, table, storage
        root, table, storage = done[key]
        path = root / "tiers" / tier / "model.onnx"
        if not path.exists():
            sliced = tier_config(config, masks[int(tier[1:])])
            export_tier(sliced, DIALECTS[dialect], table, storage.dtype, CONTEXT, path)
        return root

    return make
