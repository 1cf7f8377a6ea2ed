"""Write weights.bin: every tensor of the ladder once, in deployment form, units sorted, quantised as asked.

Layers are taken one at a time from the checkpoint, so this holds one layer beside whatever the checkpoint itself
holds. A quantised layer is rotated and equalised, then rounded with GPTQ against the activations that the *already
quantised* layers below it produce on the calibration text, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import Dialect, EagerOps, rotary_tables
from eopc_compiler.equalize import equalize_layer
from eopc_compiler.export import WeightTable, row_count, unit_count
from eopc_compiler.importance import Observations, Report, capture_inputs
from eopc_compiler.ladder import Mask, UnitOrder, column_cuts, full_mask, prompt_cost, tier_cost
from eopc_compiler.model import Block, Llama, Projection
from eopc_compiler.prompt_pass import Pool, PromptPass
from eopc_compiler.quantize import FP8, GRIDS, Quantized, choose_block, gptq, round_to_nearest, static_scale
from eopc_compiler.rotate import Rotation, rotate_head, rotate_layer
from eopc_compiler.selector import ChannelSelector, Selector
from eopc_compiler.sequences import run_layer
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.weights import ColumnMatrix, Entry, RowMatrix, Stored, WeightReader, WeightWriter
from eopc_runtime.energy import TierCost

GetTensor = Callable[[str], Tensor]
GRID_OF = {"int8": "int8", "int4": "int4", "fp8": FP8}  # what the matrices of a precision are rounded to
HEAD = -1  # stands for the LM head where a source layer is asked for
# Seen on SmolLM2-135M (blocks of 32, nearest rounding, perplexity added on wiki / code / maths): LM head +9.7 / 3.1 /
# 4.7 %, q/k/v +4.7 / 3.8 / 3.4 % for 13 % of the layer weights; the first three layers +7.0 / 1.3 / 0.9 %, the last
# three +2.2 / 4.4 / 5.3 %, against +7.7 / 10 / 6 % for the 24 between them.
SENSITIVE_TO_INT4 = ("lm_head", "qkv_proj")
EDGE_SHARE = 0.15  # of the layers at either end
# Their inputs come from a norm and are Gaussian after rotation. Seen on SmolLM2-135M, divergence from fp32 in 1e-2 nats
# when only these inputs are rounded to one static scale: q/k/v 0.11, gate and up 0.13; o_proj would add 0.08 and
# down_proj, whose inputs differ from token to token by orders of magnitude, 0.37 even with a scale per token.
NORMED = ("qkv_proj", "gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Storage:
    """How values are stored: precision of the matrices, compute type of the rest, scale layout of the dialect."""

    precision: str  # fp32, fp16, int8, int4, fp8
    dtype: str  # compute type: float32 or float16
    block: int | None  # inputs per scale; None is one scale per output
    edge_layers: frozenset[int] = frozenset()  # source layers that int4 leaves in int8
    static_inputs: bool = False  # normed inputs are rounded too, so that the device multiplies codes by codes

    @classmethod
    def choose(
        cls,
        precision: str,
        compute_dtype: str,
        dialect: Dialect,
        widths: set[int],
        layers: int,
        static_inputs: bool = False,
    ) -> Storage:
        """Storage for a precision; fp32 and fp16 fix the compute type, quantised tiers follow the device."""
        dtype = {"fp32": "float32", "fp16": "float16"}.get(precision, compute_dtype)
        edge = round(EDGE_SHARE * layers)
        edges = frozenset(i for i in range(layers) if i < edge or i >= layers - edge)
        block = choose_block(widths, GRID_OF.get(precision)) if dialect.block_quantization else None
        return cls(precision, dtype, block, edges, static_inputs and precision in GRID_OF)

    @property
    def grid(self) -> str | None:
        """What the matrices are rounded to, a key of `quantize.GRIDS`; None where none is."""
        return GRID_OF.get(self.precision)

    def grid_of(self, name: str, layer: int) -> str | None:
        """The same of a matrix of a source layer: under int4 the matrices that lose most by it stay int8."""
        sensitive = layer in self.edge_layers or any(kind in name for kind in SENSITIVE_TO_INT4)
        return "int8" if self.grid == "int4" and sensitive else self.grid

    def has_static_inputs(self, name: str, layer: int) -> bool:
        """Whether a matrix of a source layer multiplies rounded inputs."""
        return self.static_inputs and self.grid_of(name, layer) != "int4" and any(kind in name for kind in NORMED)

    def block_of(self, name: str, layer: int) -> int | None:
        """Inputs per scale of a matrix: products of codes are summed over a whole column before they are scaled."""
        return None if self.has_static_inputs(name, layer) else self.block

    def bytes_per_weight(self, name: str, layer: int) -> float:
        """Stored bytes per element of a matrix, scales included."""
        grid, block = self.grid_of(name, layer), self.block_of(name, layer)
        if grid is None:
            return self.value_bytes
        return GRIDS[grid].bits / 8 + (self.value_bytes / block if block else 0.0)

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of the compute type: scales, caches, unquantised weights."""
        return {"float32": 4, "float16": 2}[self.dtype]

    def cost(
        self, config: LlamaConfig, mask: Mask, path: PromptPath | None = None, selector: Selector | None = None
    ) -> TierCost:
        """What a tier stored this way costs to run, counted.

        Args:
            path: how its prompts run; None for through all layers.
            selector: of channels beside those of the mask, whose weights are gathered in the compute type.
        """
        cost = tier_cost(config, mask, self.bytes_per_weight, self.value_bytes)
        if path is not None:
            return replace(cost, prefill=prompt_cost(config, mask, path, self.bytes_per_weight, self.value_bytes))
        if selector is None:
            return cost
        chosen = 3 * config.hidden_size * sum(selector.chosen)
        whole, every = full_mask(config), PromptPath(len(config.layers))
        return replace(
            cost,
            weight_bytes=cost.weight_bytes + chosen * self.value_bytes,
            flops_per_token=cost.flops_per_token + 2.0 * chosen,
            prefill=prompt_cost(config, whole, every, self.bytes_per_weight, self.value_bytes),
            gather_bytes=2 * chosen * self.value_bytes,  # read, and written
        )


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
    gptq_run = _GptqRun(config, embedding, calibration) if storage.grid and calibration else None
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
            quantized = gptq_run.quantize_layer(source, layer, storage) if gptq_run else {}
            _write_layer(writer, entries, f"model.layers.{source}.", layer, quantized, dims, masks, config, storage)
            if report:
                report(source + 1, len(config.layers) + 1)
        norm, head = get("model.norm.weight").clone(), get(head_name).t().contiguous()
        if rotation:
            norm, head = rotate_head(norm, head, rotation)
        entries["model.norm.weight"] = writer.tensor(norm, storage.dtype)
        quantized_head = gptq_run.quantize_head(head, norm, storage) if gptq_run else None
        stored_head = quantized_head or _round("lm_head", HEAD, head, storage)
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
        if leaf == "weight" and isinstance(module, Projection) and isinstance(entry, ColumnMatrix):
            module.input_scale, module.input_grid = entry.input_scale, entry.pieces[0].codes.dtype
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
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        value = parameter.data
        if owner in cuts:
            matrix = (
                value if leaf == "bias" else quantized.get(owner) or _round(owner, dims.source_layer, value, storage)
            )
            entries[prefix + name] = writer.columns(matrix, cuts[owner].parts, cuts[owner].bounds, storage.dtype)
        elif owner in rows_per_unit and leaf == "weight":
            matrix = quantized.get(owner) or _round(owner, dims.source_layer, value, storage)
            entries[prefix + name] = writer.rows(matrix, storage.dtype, rows_per_unit[owner])
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


def _round(name: str, layer: int, matrix: Tensor, storage: Storage) -> Tensor | Quantized:
    grid = storage.grid_of(name, layer)
    if grid is None:
        return matrix
    return round_to_nearest(matrix, grid, storage.block_of(name, layer), getattr(torch, storage.dtype))


class _GptqRun:
    """Carries the calibration activations upwards through quantised layers."""

    def __init__(self, config: LlamaConfig, embedding: Tensor, calibration: Sequence[Tensor]) -> None:
        self._hidden = [embedding[tokens] for tokens in calibration]
        with torch.device("meta"):
            self._shell = Llama(replace(config, layers=()), context=1)
        length = max(x.shape[1] for x in self._hidden)
        self._shell.cos, self._shell.sin = rotary_tables(config, length)
        self._eps = config.rms_norm_eps

    def quantize_layer(self, source: int, layer: Block, storage: Storage) -> dict[str, Quantized]:
        """Quantise the matrices of a layer on its inputs; the layer then computes with the rounded ones."""
        sharing = (  # matrices of one input are quantised side by side: columns do not depend on each other
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
        modules = {name: cast(Projection, layer.get_submodule(name)) for names in sharing for name in names}
        with capture_inputs({names[0]: modules[names[0]] for names in sharing}) as captured:
            for x in self._hidden:
                run_layer(self._shell, layer, x)
        result = {}
        for names in sharing:
            weights = [modules[name].weight.data for name in names]
            joined = self._quantize(names[0], source, torch.cat(weights, 1), captured.pop(names[0]), storage)
            sizes = [w.shape[1] for w in weights]
            parts = zip(names, torch.split(joined.codes, sizes, 1), torch.split(joined.scales, sizes, -1), strict=True)
            for name, codes, scales in parts:
                result[name] = replace(joined, codes=codes, scales=scales)
                modules[name].weight.data = result[name].dequantize()
                modules[name].input_scale, modules[name].input_grid = joined.input_scale, joined.grid
        self._hidden = [run_layer(self._shell, layer, x) for x in self._hidden]
        return result

    def quantize_head(self, head: Tensor, norm: Tensor, storage: Storage) -> Quantized:
        """Quantise the LM head [hidden, vocab] against the final norm's outputs."""
        normed = [EagerOps().rms_norm(x, norm, self._eps).flatten(0, 1) for x in self._hidden]
        return self._quantize("lm_head", HEAD, head, normed, storage)

    def _quantize(self, name: str, layer: int, weight: Tensor, inputs: Sequence[Tensor], storage: Storage) -> Quantized:
        grid = storage.grid_of(name, layer)
        assert grid is not None
        dtype = getattr(torch, storage.dtype)
        scale = static_scale(inputs, dtype, grid) if storage.has_static_inputs(name, layer) else None
        return replace(gptq(weight, _gram(inputs), grid, storage.block_of(name, layer), dtype), input_scale=scale)


def _gram(inputs: Sequence[Tensor]) -> Tensor:
    """Σ xᵀx over tokens, [width, width] fp64 accumulated from fp32 products."""
    width = inputs[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in inputs:
        total += (x.t() @ x).double()
    return total
