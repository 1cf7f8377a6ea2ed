"""Write weights.bin: every tensor of the ladder once, in deployment form, units sorted, quantised as asked.

Layers are taken one at a time from the checkpoint, so this holds one layer beside whatever the checkpoint itself
holds. A quantised layer is rotated and equalised, then rounded on the calibration text (`layer_rounding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import EagerOps, rotary_tables
from eopc_compiler.equalize import equalize_layer
from eopc_compiler.importance import Observations, Report
from eopc_compiler.ladder import Mask, UnitOrder, column_cuts
from eopc_compiler.layer_rounding import LayerRounding, round_matrix
from eopc_compiler.model import Block
from eopc_compiler.quantize import Quantized, round_to_nearest
from eopc_compiler.rotate import Rotation, rotate_channels, rotate_head, rotate_layer, rotate_values
from eopc_compiler.storage import HEAD, Storage
from eopc_compiler.weight_table import WeightTable
from eopc_compiler.weights import Entry, RowMatrix, WeightWriter

GetTensor = Callable[[str], Tensor]


def write_weights(
    path: Path,
    config: LlamaConfig,
    get: GetTensor,
    orders: Sequence[UnitOrder],
    masks: Sequence[Mask],
    storage: Storage,
    context: int,
    observed: Observations | None = None,
    calibration: Sequence[Tensor] = (),
    report: Report | None = None,
) -> tuple[WeightTable, dict[str, int]]:
    """Write weights.bin and return where everything lies, and how many bytes each stored type takes.

    Args:
        get: tensors by Hugging Face name, fp32.
        masks: of all tiers; they fix where column matrices are cut.
        observed: input peaks; with them, quantised layers are equalised too.
        calibration: token batches [n, S] for GPTQ and static input scales; without them codes are rounded to nearest,
            and inputs are not rounded.
    """
    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    entries: dict[str, Entry] = {}
    rotation = Rotation(config.hidden_size) if storage.grid else None
    embedding = get("model.embed_tokens.weight")
    if rotation:
        embedding = rotation.columns(embedding)
    rounding = LayerRounding(config, embedding, calibration) if storage.grid and calibration else None
    with WeightWriter(path) as writer:
        for name, table in zip(("cos", "sin"), rotary_tables(config, context), strict=True):
            entries[name] = writer.tensor(table, storage.dtype)
        entries["model.embed_tokens.weight"] = _write_embedding(writer, embedding, storage)
        del embedding
        for source, dims in enumerate(config.layers):
            layer = deployment_layer(config, source, get, orders[source])
            if rotation:
                rotate_layer(layer, rotation)
            if observed and storage.grid:
                equalize_layer(layer, observed.peaks[source], orders[source], config)
            if inputs := storage.token_inputs("mlp.down_proj", source):
                rotate_values(layer, config.head_dim)
                rotate_channels(layer, inputs)
            quantized = rounding.layer(source, layer, storage) if rounding else {}
            _write_layer(writer, entries, f"model.layers.{source}.", layer, quantized, dims, masks, config, storage)
            if report:
                report(source + 1, len(config.layers) + 1)
        norm, head = get("model.norm.weight").clone(), get(head_name).t().contiguous()
        if rotation:
            norm, head = rotate_head(norm, head, rotation)
        entries["model.norm.weight"] = writer.tensor(norm, storage.dtype)
        quantized_head = rounding.head(head, norm, storage) if rounding else None
        stored_head = quantized_head or round_matrix("lm_head", HEAD, head, storage)
        entries["lm_head.weight"] = writer.columns(stored_head, [(1, config.vocab_size)], [1], storage.dtype)
        if report:
            report(len(config.layers) + 1, len(config.layers) + 1)
        return WeightTable(entries), dict(writer.histogram)


def deployment_layer(config: LlamaConfig, source: int, get: GetTensor, order: UnitOrder) -> Block:
    """One whole layer, units sorted, in deployment form."""
    dims = config.layers[source]
    with torch.device("meta"):
        block = Block(config, dims, EagerOps())
    groups, channels = torch.tensor(order.kv_groups), torch.tensor(order.ffn_channels)
    width = config.query_group_size * config.head_dim

    def by_group(tensor: Tensor, rows: int) -> Tensor:
        return tensor.view(len(groups), rows, *tensor.shape[1:])[groups].flatten(0, 1)

    def sort(name: str, tensor: Tensor) -> Tensor:
        if "q_proj" in name:
            return by_group(tensor, width)
        if "k_proj" in name or "v_proj" in name:
            return by_group(tensor, config.head_dim)
        if "o_proj.weight" in name:
            return by_group(tensor.t(), width).t()
        if "gate_proj" in name or "up_proj" in name:
            return tensor[channels]
        if "down_proj.weight" in name:
            return tensor[:, channels]
        return tensor.clone()

    for name, _ in list(block.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = sort(name, get(f"model.layers.{source}.{name}")).contiguous()
        setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    block.self_attn.fuse()
    block.mlp.fuse()
    return block


def _write_layer(
    writer: WeightWriter,
    entries: dict[str, Entry],
    prefix: str,
    layer: Block,
    quantized: dict[str, Quantized],
    dims: LayerDims,
    masks: Sequence[Mask],
    config: LlamaConfig,
    storage: Storage,
) -> None:
    cuts, head = column_cuts(config, dims, masks), config.head_dim
    rows_per_unit = {"self_attn.o_proj": config.query_group_size * head, "mlp.down_proj": 1}

    def stored(owner: str, value: Tensor) -> Tensor | Quantized:
        return quantized.get(owner) or round_matrix(owner, dims.source_layer, value, storage)

    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        value = parameter.data
        if owner in cuts:
            matrix = value if leaf == "bias" else stored(owner, value)
            entries[prefix + name] = writer.columns(matrix, cuts[owner].parts, cuts[owner].bounds, storage.dtype)
        elif owner in rows_per_unit and leaf == "weight":
            entries[prefix + name] = writer.rows(stored(owner, value), storage.dtype, rows_per_unit[owner])
        else:
            entries[prefix + name] = writer.tensor(value, storage.dtype)


def _write_embedding(writer: WeightWriter, table: Tensor, storage: Storage) -> RowMatrix:
    """The lookup table [vocab, hidden], rows contiguous; int8 also under int4 and fp8: a step reads one row of it."""
    if storage.grid is None:
        return writer.rows(table, storage.dtype)
    columns = round_to_nearest(table.t(), "int8", storage.block, getattr(torch, storage.dtype))
    codes = writer.tensor(columns.codes.t().contiguous(), "int8")
    scales = columns.scales.t().contiguous()  # [vocab, hidden / block], or [vocab]
    return RowMatrix(codes, writer.tensor(scales, storage.dtype), storage.block)
