"""Which matrices of which builds read inputs that are rounded, and how those are turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eopc_compiler.cache import StageCache
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.ladder import full_mask
from eopc_compiler.model import Llama
from eopc_compiler.pricing import storage_for
from eopc_compiler.quantize import PAIRED, InputRounding
from eopc_compiler.state import BuildArgs, CompileState
from eopc_compiler.storage import Storage
from eopc_runtime.profiles import load_profile

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@pytest.mark.parametrize(
    ("device", "precision", "align", "selectors", "group"),
    [
        ("cpu", "int8", 64, "auto", 64),
        ("cpu", "int8", 96, "auto", 32),  # the largest power of two that no tier cuts
        ("cpu", "int8", 8, "auto", None),  # too few to even anything out
        ("cpu", "int8", 64, "on", None),  # prompts choose single channels: they cannot be mixed
        ("cpu", "int4", 64, "auto", None),
        ("orin", "int8", 64, "auto", None),  # its engines unpack weights
    ],
)
def test_inputs_get_a_scale_per_token_where_all_products_are_of_codes(
    tiny_checkpoint: Path, tmp_path: Path, device: str, precision: str, align: int, selectors: str, group: int | None
) -> None:
    """int8 of the cpu profile, unless single channels have to stay apart."""
    args = BuildArgs(str(tiny_checkpoint), device, (1.0,), tmp_path / "out.eopc", selectors=selectors)
    state = CompileState(args, StageCache(tmp_path / "work"), load_profile(device), print, print)
    state = replace(state, checkpoint=open_checkpoint(str(tiny_checkpoint)), dialect=DIALECTS["native"], align=align)
    assert storage_for(state, precision).token_group == group


def test_every_matrix_of_a_layer_reads_codes_and_the_head_does_not() -> None:
    """Those of codes have one scale per output and pairs that never overflow; the head has blocks."""
    storage = Storage("int8", "float32", 64, static_inputs=True, token_group=64)
    static = {n: storage.has_static_inputs(n, 3) for n in ("qkv_proj", "gate_proj", "up_proj", "o_proj", "down_proj")}
    assert [n for n, found in static.items() if found] == ["qkv_proj", "gate_proj", "up_proj"]
    assert [storage.token_inputs(f"mlp.{n}", 3) for n in list(static)[:3]] == [None, None, None]
    assert [storage.token_inputs(n, 3) for n in list(static)[3:]] == [InputRounding(), InputRounding(group=64)]
    assert {(storage.grid_of(n, 3), storage.block_of(n, 3)) for n in static} == {(PAIRED, None)}
    assert (storage.grid_of("lm_head", -1), storage.block_of("lm_head", -1)) == ("int8", 64)
    assert storage.exact_products


def test_turning_channels_is_priced_as_it_is_counted(make_tiny: MakeTiny) -> None:
    """Product by product in PyTorch, for a token: the matrices, and the channels of every layer by 32 x 32."""
    config, _ = make_tiny()
    storage = Storage("int8", "float32", 64, static_inputs=True, token_group=32)
    with torch.device("meta"):
        model = Llama(config).fuse()
        for block in model.blocks:
            block.mlp.down_proj.inputs = InputRounding(group=32)
        hidden = torch.zeros(1, 1, config.hidden_size)
        with FlopCounterMode(display=False) as counter:
            for block in model.blocks:
                block.mlp(hidden)
                assert block.self_attn.qkv_proj
                block.self_attn.qkv_proj(hidden)
                block.self_attn.o_proj(torch.zeros(1, 1, block.self_attn.o_proj.weight.shape[0]))
    assert storage.cost(config, full_mask(config)).flops_per_token == counter.get_total_flops()
