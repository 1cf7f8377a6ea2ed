"""A tier seen through the whole model is the tier that is written and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import write_weights
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, tier_config
from eopc_compiler.load_tiers import load_tier
from eopc_compiler.model import build_model
from eopc_compiler.storage import Storage
from eopc_compiler.tier_model import tier_view
from eopc_compiler.weights import WeightReader

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
CONTEXT = 32
MASKS = [
    Mask((LayerDims(0, 4, 128), LayerDims(1, 4, 128), LayerDims(2, 4, 128))),
    Mask((LayerDims(0, 1, 32), LayerDims(1, 4, 96), LayerDims(2, 3, 128))),
    Mask((LayerDims(0, 3, 64), LayerDims(2, 1, 32))),
    Mask((LayerDims(2, 2, 96),)),
]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_view_is_the_tier_written_and_read_back(
    make_tiny: MakeTiny, tmp_path: Path, precision: str, biased: bool
) -> None:
    """For masks that cut groups, channels and layers, logits equal those of load_tier from the same bytes."""
    config, tensors = make_tiny(attention_bias=biased, mlp_bias=biased)
    generator = torch.Generator().manual_seed(0)
    orders = [UnitOrder(*(tuple(torch.randperm(n, generator=generator).tolist()) for n in (4, 128))) for _ in range(3)]
    storage = Storage.choose(precision, "float32", DIALECTS["native"], {32, 64, 128}, 3)
    path = tmp_path / "weights.bin"
    table, _ = write_weights(path, config, tensors.__getitem__, orders, MASKS, storage, CONTEXT)
    reader = WeightReader(path)
    whole = load_tier(config, table, reader, CONTEXT)
    tokens = torch.randint(0, 160, (2, 20), generator=generator)
    for mask in MASKS:
        want = load_tier(tier_config(config, mask), table, reader, CONTEXT).score(tokens)
        torch.testing.assert_close(tier_view(whole, mask).score(tokens), want, rtol=1e-5, atol=1e-5)
    different = [tier_view(whole, mask).score(tokens) for mask in MASKS[:2]]
    assert float((different[0] - different[1]).abs().max()) > 0.1


def test_a_view_shares_tensors_and_has_modules_of_its_own(make_tiny: MakeTiny) -> None:
    """down_proj is a view of the whole one; a matrix put into a tier leaves the whole model alone."""
    config, tensors = make_tiny()
    whole = build_model(config, tensors, CONTEXT).fuse()
    tier = tier_view(whole, MASKS[1])
    mine, theirs = tier.blocks[0].mlp.down_proj, whole.blocks[0].mlp.down_proj
    assert mine is not theirs and mine.weight.data_ptr() == theirs.weight.data_ptr()
    assert mine.weight.shape == (32, 64) and tier.config == tier_config(config, MASKS[1])
    tokens = torch.arange(12)[None]
    want = whole.score(tokens)
    mine.weight = torch.nn.Parameter(torch.zeros(32, 64), requires_grad=False)
    assert torch.equal(whole.score(tokens), want)
    assert torch.equal(tier_view(whole, full_mask(config)).score(tokens), want)
