"""Layers rounded as they are stored, each on what the already rounded ones before it make of the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import EagerOps, rotary_tables
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.quantize import InputRounding, Quantized, gptq, round_to_nearest, static_scale
from eopc_compiler.sequences import attend
from eopc_compiler.storage import HEAD, Storage


def round_matrix(name: str, layer: int, matrix: Tensor, storage: Storage) -> Tensor | Quantized:
    """A matrix [in, out] of a source layer as it is stored, rounded to nearest; itself where nothing is rounded."""
    grid = storage.grid_of(name, layer)
    if grid is None:
        return matrix
    rounded = round_to_nearest(matrix, grid, storage.block_of(name, layer), getattr(torch, storage.dtype))
    return replace(rounded, inputs=storage.token_inputs(name, layer))


class LayerRounding:
    """GPTQ (arXiv 2210.17323) from the first layer up, "true sequential": every matrix on what it will really get.

    Its inputs come from all rounded matrices before it, those of its own layer too, so a layer runs once.
    """

    def __init__(self, config: LlamaConfig, embedding: Tensor, calibration: Sequence[Tensor]) -> None:
        """Begin with embeddings [vocab, hidden] of token batches [n, S], n and S differing between batches."""
        self._hidden = [embedding[tokens] for tokens in calibration]
        with torch.device("meta"):
            self._shell = Llama(replace(config, layers=()), context=1)
        length = max(x.shape[1] for x in self._hidden)
        self._shell.cos, self._shell.sin = rotary_tables(config, length)
        self._eps = config.rms_norm_eps

    @torch.no_grad()
    def layer(self, source: int, layer: Block, storage: Storage) -> dict[str, Quantized]:
        """Round the matrices of a layer in deployment form; it then computes with the rounded ones."""
        found = dict[str, Quantized]()

        def fit(inputs: Sequence[Tensor], *names: str) -> None:  # of one input: columns do not depend on each other
            modules = [cast(Projection, layer.get_submodule(name)) for name in names]
            weights = [module.weight.data for module in modules]
            joined = self._fit(names[0], source, torch.cat(weights, 1), inputs, storage)
            sizes = [w.shape[1] for w in weights]
            parts = zip(torch.split(joined.codes, sizes, 1), torch.split(joined.scales, sizes, -1), strict=True)
            for name, module, (codes, scales) in zip(names, modules, parts, strict=True):
                found[name] = replace(joined, codes=codes, scales=scales)
                module.weight.data = found[name].dequantize()
                module.inputs = joined.inputs

        normed = [layer.input_layernorm(x) for x in self._hidden]
        fit(normed, "self_attn.qkv_proj")
        attended = [attend(self._shell, layer, x) for x in normed]
        fit(attended, "self_attn.o_proj")
        middle = [x + layer.self_attn.o_proj(z) for x, z in zip(self._hidden, attended, strict=True)]
        normed = [layer.post_attention_layernorm(x) for x in middle]
        fit(normed, "mlp.gate_proj", "mlp.up_proj")
        inner = [layer.mlp.hidden(x) for x in normed]
        fit(inner, "mlp.down_proj")
        self._hidden = [x + layer.mlp.down_proj(h) for x, h in zip(middle, inner, strict=True)]
        return found

    def head(self, head: Tensor, norm: Tensor, storage: Storage) -> Quantized:
        """Round the LM head [hidden, vocab] on the final norm's outputs; call it after all layers."""
        normed = [EagerOps().rms_norm(x, norm, self._eps) for x in self._hidden]
        return self._fit("lm_head", HEAD, head, normed, storage)

    def _fit(self, name: str, layer: int, weight: Tensor, inputs: Sequence[Tensor], storage: Storage) -> Quantized:
        grid = storage.grid_of(name, layer)
        assert grid is not None
        dtype, rows = getattr(torch, storage.dtype), [x.flatten(0, 1) for x in inputs]
        rounded = gptq(weight, _gram(rows), grid, storage.block_of(name, layer), dtype)
        if storage.has_static_inputs(name, layer):
            return replace(rounded, inputs=InputRounding(rounded.stored, static_scale(rows, dtype, rounded.stored)))
        return replace(rounded, inputs=storage.token_inputs(name, layer))


def _gram(inputs: Sequence[Tensor]) -> Tensor:
    """Σ xᵀx over tokens, [width, width] fp64 accumulated from fp32 products."""
    width = inputs[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in inputs:
        total += (x.t() @ x).double()
    return total
