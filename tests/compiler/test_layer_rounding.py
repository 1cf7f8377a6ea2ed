"""Layers rounded one behind the other: what every matrix is fitted to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import deployment_layer
from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import capture_inputs
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.layer_rounding import LayerRounding
from eopc_compiler.model import Block, build_model
from eopc_compiler.quantize import InputRounding, gptq
from eopc_compiler.rotate import rotate_channels
from eopc_compiler.sequences import run_layer
from eopc_compiler.storage import Storage

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("codes", ["weights", "normed inputs", "all inputs"])
def test_every_matrix_is_fitted_to_what_all_rounded_ones_before_it_produce(make_tiny: MakeTiny, codes: str) -> None:
    """Run the rounded layers on the same text: GPTQ of the original weights on the inputs met there gives their codes.

    Inputs that are rounded are fitted to as they were before.
    """
    config, tensors = make_tiny(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, config.vocab_size, shape, generator=generator) for shape in ((3, 24), (2, 9))]
    static, group = codes != "weights", 32 if codes == "all inputs" else None
    storage = Storage("int8", "float32", None if static else 16, static_inputs=static, token_group=group)

    def layers() -> list[Block]:
        orders = [
            UnitOrder(tuple(range(d.num_key_value_heads)), tuple(range(d.intermediate_size))) for d in config.layers
        ]
        found = [deployment_layer(config, i, tensors.__getitem__, order) for i, order in enumerate(orders)]
        for layer in found if group else ():
            rotate_channels(layer, InputRounding(group=group))
        return found

    embedding = tensors["model.embed_tokens.weight"]
    rounding, whole, rounded = LayerRounding(config, embedding, tokens), layers(), layers()
    found = [rounding.layer(i, layer, storage) for i, layer in enumerate(rounded)]

    shell, hidden = build_model(config, tensors), [embedding[t] for t in tokens]
    for index, layer in enumerate(rounded):
        with torch.no_grad(), capture_inputs({n: layer.get_submodule(n) for n in MATRICES}) as met:
            hidden = [run_layer(shell, layer, x) for x in hidden]
        for name in MATRICES:
            weight = whole[index].get_submodule(name).weight.data
            hessian = sum((x.double().t() @ x.double() for x in met[name]), torch.zeros(()))
            grid = storage.grid_of(name, index)
            assert grid is not None
            wanted = gptq(weight, hessian, grid, storage.block_of(name, index), torch.float32)
            differing = (wanted.codes != found[index][name].codes).float().mean()
            # Sums in another order put a value on the other side of a half, and GPTQ then carries it down its column:
            # seen 4e-3 in a down_proj, else none. Fitted to what the unrounded layers produce, 4e-3 of gate, up and
            # q/k/v would differ at least, and 2e-2 of the others.
            assert differing <= (1e-2 if name in ("self_attn.o_proj", MATRICES[-1]) else 2e-3)
            reads_codes = found[index][name].inputs is not None
            assert reads_codes == (static and (group is not None or name not in ("self_attn.o_proj", MATRICES[-1])))
