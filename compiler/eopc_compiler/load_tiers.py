"""Tiers read back in fp32 from the bytes that their graphs use: what parity is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.model import Llama, Projection
from eopc_compiler.prompt_pass import Pool, PromptPass
from eopc_compiler.selector import ChannelSelector, Selector
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.weight_table import WeightTable, row_count, unit_count
from eopc_compiler.weights import ColumnMatrix, Entry, Stored, WeightReader


def load_tier(config: LlamaConfig, table: WeightTable, reader: WeightReader, context: int) -> Llama:
    """The deployment-form fp32 model of a tier, from the bytes its graph uses: the reference for parity."""
    with torch.device("meta"):
        model = Llama(config, context=context).fuse()
    _load(model, config, table, reader)
    return model.eval()


def load_prompt_pass(
    config: LlamaConfig,
    path: PromptPath,
    table: WeightTable,
    reader: WeightReader,
    context: int,
    pools: Sequence[Pool | None] = (),
) -> PromptPass:
    """The same for the pass that fills the cache, and adds up energies of pools."""
    with torch.device("meta"):
        model = PromptPass(config, path, context=context, pools=pools)
    _load(model, config, table, reader)
    return model.eval()


def load_selector(config: LlamaConfig, selector: Selector, table: WeightTable, reader: WeightReader) -> ChannelSelector:
    """The same for what gathers chosen channels."""
    with torch.device("meta"):
        model = ChannelSelector(config, selector, torch.float32)
    _load(model, config, table, reader)
    return model.eval()


def _load(model: nn.Module, config: LlamaConfig, table: WeightTable, reader: WeightReader) -> None:
    for name, _ in list(model.named_parameters()):
        entry, dims = table.of_tier(name, config.layers)
        owner, _, leaf = name.rpartition(".")
        value = _read(reader, entry, dims, name)
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if leaf == "weight" and isinstance(module, Projection):
            module.inputs = None if isinstance(entry, Stored) else entry.inputs
    for buffer in ("cos", "sin"):
        entry = table.entries[buffer]
        assert isinstance(entry, Stored)
        setattr(model, buffer, reader.stored(entry).float())


def _read(reader: WeightReader, entry: Entry, dims: LayerDims | None, name: str) -> Tensor:
    if isinstance(entry, Stored):
        return reader.stored(entry).float()
    if isinstance(entry, ColumnMatrix):
        return reader.columns(entry, unit_count(name, dims))
    if name == "model.embed_tokens.weight":  # stored [vocab, hidden] with scales along hidden
        codes = reader.stored(entry.codes).float()
        if entry.scales is None:
            return codes
        scales = reader.stored(entry.scales).float()
        return codes * (scales[:, None] if entry.block is None else scales.repeat_interleave(entry.block, 1))
    assert dims is not None
    return reader.rows(entry, row_count(name, dims, entry))
