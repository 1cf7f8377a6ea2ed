"""Weights that were rounded once and cut for a ladder are those that writing the ladder directly gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import write_weights
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.cut import cut_weights
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.importance import observe
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.model import build_model
from eopc_compiler.storage import Storage
from eopc_compiler.weights import WeightReader

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
CONTEXT = 48
LADDER = [Mask((LayerDims(0, 2, 96), LayerDims(2, 3, 96))), Mask((LayerDims(0, 1, 64),))]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize(
    ("precision", "dialect", "dtype", "static"),
    [
        ("int8", "native", "float32", True),
        ("int8", "native", "float16", False),
        ("int8", "primitive", "float16", False),
        ("int4", "native", "float32", True),
    ],
)
def test_a_cut_file_is_the_file_written_for_the_ladder(
    make_tiny: MakeTiny, tmp_path: Path, precision: str, dialect: str, dtype: str, static: bool, bias: bool
) -> None:
    """The same bytes at the same places, whatever the precision, the layout of scales, and with biases."""
    config, tensors = make_tiny(attention_bias=bias, mlp_bias=bias)
    tokens = [torch.randint(0, config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(3))]
    observed = observe(build_model(config, tensors, CONTEXT), [Batch(0, 1.0, t) for t in tokens], 32)
    orders = [s.order() for s in observed.curves]
    storage = Storage.choose(precision, dtype, DIALECTS[dialect], {config.hidden_size, 32}, 3, static)
    full = full_mask(config)

    def write(name: str, masks: list[Mask]) -> tuple[Path, object, object]:
        path = tmp_path / name
        return path, *write_weights(
            path, config, tensors.__getitem__, orders, masks, storage, CONTEXT, observed, tokens
        )

    whole, table, _ = write("whole.bin", [full])
    direct, direct_table, direct_bytes = write("direct.bin", [full, *LADDER])
    cut = tmp_path / "cut.bin"
    cut_table, cut_bytes = cut_weights(cut, table, WeightReader(whole), config, [full, *LADDER])
    assert cut.read_bytes() == direct.read_bytes() != whole.read_bytes()
    assert cut_table == direct_table
    assert cut_bytes == direct_bytes
