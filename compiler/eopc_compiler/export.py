"""From a tier's shape to model.onnx: trace the one model file, then point its initializers into weights.bin.

The trace never sees weights (parameters are uninitialised memory), so exporting costs no memory and every tier is
traced the same way. Afterwards each initializer is replaced by what the bundle stores:

* fp16 and fp32: an external tensor, or a Concat of the column pieces a tier keeps;
* int8 and int4: codes and scales, joined the same way, behind one DequantizeLinear, the form that ONNX Runtime
  fuses into MatMulNBits and TensorRT into a weight-only GEMM;
* int8 with an input scale: the inputs pass QuantizeLinear and DequantizeLinear as well, and both runtimes multiply
  codes by codes;
* the embedding: its rows are gathered *before* they are dequantised, so a step never expands the table.

External data is named "weights.bin", relative to the bundle's root: loaders pass that folder (ONNX Runtime
`session.model_external_initializers_file_folder_path`, TensorRT's `parse(bytes, path)`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.model import Llama, PromptPass
from eopc_compiler.weights import ColumnMatrix, Entry, Piece, RowMatrix, Stored

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}
PREFIX = "llama."  # what the traced wrapper puts before every parameter name


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Where every tensor of the ladder lies: by deployment-form name, layers counted in the *source* model."""

    entries: Mapping[str, Entry]

    def of_tier(self, name: str, layers: Sequence[LayerDims]) -> tuple[Entry, LayerDims | None]:
        """The entry behind a tier's initializer, and the dimensions of its layer if it belongs to one."""
        if not name.startswith("model.layers."):
            return self.entries[name], None
        _, _, index, rest = name.split(".", 3)
        dims = layers[int(index)]
        return self.entries[f"model.layers.{dims.source_layer}.{rest}"], dims

    def with_extras(self, extras: WeightTable) -> WeightTable:
        """The table of one tier: its own entries in place of the shared ones."""
        return WeightTable({**self.entries, **extras.entries})

    def to_json(self) -> dict[str, Any]:
        """Entries by name, each with its kind."""
        return {name: {"kind": type(e).__name__, **asdict(e)} for name, e in self.entries.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WeightTable:
        """Read what `to_json` wrote."""
        return cls({name: _entry(dict(fields)) for name, fields in content.items()})


def _entry(fields: dict[str, Any]) -> Entry:
    kind = fields.pop("kind")
    if kind == "Stored":
        return _stored(fields)
    if kind == "RowMatrix":
        return RowMatrix(**{**fields, "codes": _stored(fields["codes"]), "scales": _stored_or_none(fields["scales"])})
    pieces = [Piece(p["units"], _stored(p["codes"]), _stored_or_none(p["scales"])) for p in fields["pieces"]]
    return ColumnMatrix(tuple(pieces), fields["block"], fields["input_scale"])


def _stored(fields: dict[str, Any]) -> Stored:
    return Stored(**{**fields, "shape": tuple(fields["shape"])})


def _stored_or_none(fields: dict[str, Any] | None) -> Stored | None:
    return None if fields is None else _stored(fields)


def export_tier(
    config: LlamaConfig, dialect: Dialect, table: WeightTable, dtype: str, context: int, path: Path
) -> None:
    """Write a tier's graph.

    Args:
        config: of the sliced model.
        dtype: compute type of activations and caches, float32 or float16.
        context: positions the rotary tables hold.
        path: the .onnx file to write; its weights stay in weights.bin.
    """
    _write(trace(config, dialect, getattr(torch, dtype), context), config, dialect, table, path)


def export_prompt_pass(
    config: LlamaConfig, depth: int, dialect: Dialect, table: WeightTable, dtype: str, context: int, path: Path
) -> None:
    """Write the prefill graph of prefill-only pruning: the first `depth` layers, then only keys and values.

    Args:
        table: has `self_attn.kv_proj` of the skipped layers (`extras.key_value_entries`).
    """
    model = trace_prompt_pass(config, depth, dialect, getattr(torch, dtype), context)
    _write(model, config, dialect, table, path)


def _write(model: ir.Model, config: LlamaConfig, dialect: Dialect, table: WeightTable, path: Path) -> None:
    attach_weights(model, config, dialect, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)


def trace(config: LlamaConfig, dialect: Dialect, dtype: torch.dtype, context: int) -> ir.Model:
    """The graph of one tier, opset and operators as the dialect says, initializers without meaningful values."""
    with torch.device("meta"):
        llama = Llama(config, dialect.ops, context).to(dtype).fuse()
    return _trace(_Traced(llama), config, dialect, dtype, logits=True)


def trace_prompt_pass(config: LlamaConfig, depth: int, dialect: Dialect, dtype: torch.dtype, context: int) -> ir.Model:
    """The graph that fills a cache and runs only `depth` layers, initializers without meaningful values."""
    with torch.device("meta"):
        prompt = PromptPass(config, depth, dialect.ops, context).to(dtype)
    return _trace(_TracedPrompt(prompt), config, dialect, dtype, logits=False)


def _trace(module: nn.Module, config: LlamaConfig, dialect: Dialect, dtype: torch.dtype, logits: bool) -> ir.Model:
    """Trace a module on the meta device; its inputs are those of every graph of a bundle."""
    module = module.to_empty(device="cpu")  # address space, not memory: its pages stay untouched
    for i, tensor in enumerate((*module.parameters(), *module.buffers())):
        # the optimizer merges small initializers of equal bytes, and fresh memory is often zero throughout
        tensor.data.view(-1)[0] = i
    count, length, capacity = len(config.layers), 7, 32  # any sizes but 0 and 1, which tracing would specialise
    caches = [  # one tensor each: torch.export merges inputs that are the same object
        torch.zeros(1, d.num_key_value_heads, capacity, config.head_dim, dtype=dtype)
        for d in (*config.layers, *config.layers)
    ]
    s, t, n = (torch.export.Dim(name, min=low) for name, low in (("seq", 1), ("cache_len", 2), ("n_logits", 1)))
    inputs = {
        "input_ids": (torch.zeros(1, length, dtype=torch.long), {1: s}),
        "position_ids": (torch.arange(length)[None], {1: s}),
        "write_index": (torch.zeros(1, dtype=torch.long), {}),
        "attn_mask": (torch.zeros(1, 1, length, capacity, dtype=dtype), {2: s, 3: t}),
        **({"logits_index": (torch.zeros(3, dtype=torch.long), {0: n})} if logits else {}),
        "caches": (caches, [{2: t}] * len(caches)),
    }
    cache_names = [f"{kind}_cache_{i}" for kind in "kv" for i in range(count)]
    with warnings.catch_warnings(), torch.no_grad(), _quiet_logger():
        warnings.simplefilter("ignore")  # the exporter's notes on axis names and missing torchvision
        program = torch.onnx.export(
            module,
            tuple(value for value, _ in inputs.values()),
            dynamo=True,
            dynamic_shapes=tuple(shape for _, shape in inputs.values()),
            opset_version=dialect.opset,
            input_names=[*list(inputs)[:-1], *cache_names],
            output_names=[*(["logits"] if logits else []), *(f"{name}_out" for name in cache_names)],
            optimize=False,
            verbose=False,
        )
        assert program is not None
        program.optimize()
    model: ir.Model = program.model
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # stack traces: machine paths do not belong in a bundle
    return model


class _Traced(nn.Module):
    """The model with its caches as one flat list: keys of all layers, then values."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        attn_mask: Tensor,
        logits_index: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        half = len(caches) // 2
        logits, keys, values = self.llama(
            input_ids, position_ids, write_index, attn_mask, logits_index, caches[:half], caches[half:]
        )
        return (logits, *keys, *values)


class _TracedPrompt(nn.Module):
    """The same for the pass that only fills the cache."""

    def __init__(self, prompt: PromptPass) -> None:
        super().__init__()
        self.llama = prompt

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, write_index: Tensor, attn_mask: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, ...]:
        half = len(caches) // 2
        keys, values = self.llama(input_ids, position_ids, write_index, attn_mask, caches[:half], caches[half:])
        return (*keys, *values)


def attach_weights(model: ir.Model, config: LlamaConfig, dialect: Dialect, table: WeightTable) -> None:
    """Replace every parameter of a traced graph by external data in weights.bin."""
    builder = _Builder(model.graph, dialect)
    for value in list(model.graph.initializers.values()):
        if value.name is None or not value.name.startswith(PREFIX):
            continue  # small constants of the graph itself
        name = value.name.removeprefix(PREFIX)
        entry, dims = table.of_tier(name, config.layers)
        if name == "model.embed_tokens.weight":
            assert isinstance(entry, RowMatrix)
            builder.embedding(value, entry, name)
        elif isinstance(entry, ColumnMatrix) and is_packed(entry) and len(entry.kept(unit_count(name, dims))) > 1:
            builder.split_matmul(value, entry, unit_count(name, dims), name)
        else:
            if isinstance(entry, ColumnMatrix) and entry.input_scale is not None:
                builder.quantize_inputs(value, entry.input_scale, name)
            builder.replace(value, builder.load(entry, dims, name))
        del model.graph.initializers[value.name]
    model.graph.sort()  # ONNX wants producers before consumers


class _Builder:
    """Adds initializers and constant-only nodes at the head of a graph."""

    def __init__(self, graph: ir.Graph, dialect: Dialect) -> None:
        self.graph, self.dialect = graph, dialect

    def load(self, entry: Entry, dims: LayerDims | None, name: str) -> ir.Value:
        """A value that holds the tier's share of an entry, in the compute type."""
        if isinstance(entry, Stored):
            return self.constant(entry, name)
        if isinstance(entry, RowMatrix):
            rows = entry.codes.shape[0] if dims is None else row_count(name, dims, entry)
            codes, scales = entry.kept(rows)
            return self.dequantize([codes], [scales], entry.block, name)
        units = unit_count(name, dims)
        kept = entry.kept(units)
        return self.dequantize([p.codes for p in kept], [p.scales for p in kept], entry.block, name)

    def dequantize(
        self, codes: Sequence[Stored], scales: Sequence[Stored | None], block: int | None, name: str
    ) -> ir.Value:
        joined = self.concat(codes, name)
        present = [s for s in scales if s is not None]
        if not present:
            return joined
        # one scale per column, or one per block of rows of a column
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        return self.node("DequantizeLinear", [joined, self.concat(present, f"{name}.scales")], name, attributes)

    def concat(self, parts: Sequence[Stored], name: str) -> ir.Value:
        if len(parts) == 1:
            return self.constant(parts[0], f"{name}.data")
        values = [self.constant(part, f"{name}.{i}") for i, part in enumerate(parts)]
        return self.node("Concat", values, f"{name}.joined", {"axis": -1 if len(parts[0].shape) == 1 else 1})

    def quantize_inputs(self, weight: ir.Value, scale: float, name: str) -> None:
        """Round what a matrix multiplies to int8 codes: QuantizeLinear, DequantizeLinear.

        Every matrix has a pair of its own, also where two share an input: ONNX Runtime multiplies codes by codes only
        where each DequantizeLinear has one reader.
        """
        ((matmul, _),) = weight.uses()
        assert matmul.op_type == "MatMul"
        dtype = np.float16 if weight.dtype == ir.DataType.FLOAT16 else np.float32
        size = self.small(f"{name}.input_scale", np.array(scale, dtype=dtype))
        zero = self.small(f"{name}.input_zero", np.array(0, dtype=np.int8))
        codes = ir.node("QuantizeLinear", [matmul.inputs[0], size, zero])
        values = ir.node("DequantizeLinear", [codes.outputs[0], size, zero])
        codes.outputs[0].name, values.outputs[0].name = f"{name}.input_codes", f"{name}.input_values"
        self.graph.insert_before(matmul, [codes, values])
        matmul.replace_input_with(0, values.outputs[0])

    def split_matmul(self, value: ir.Value, entry: ColumnMatrix, units: int, name: str) -> None:
        """One MatMul per column piece, outputs joined: ONNX has no Concat of int4 constants."""
        for use in list(value.uses()):
            matmul, x = use.node, use.node.inputs[0]
            assert matmul.op_type == "MatMul"
            outputs = []
            for i, piece in enumerate(entry.kept(units)):
                weight = self.dequantize([piece.codes], [piece.scales], entry.block, f"{name}.{i}")
                part = ir.node("MatMul", [x, weight])
                part.outputs[0].name = f"{matmul.outputs[0].name}.{i}"
                self.graph.insert_before(matmul, part)
                outputs.append(part.outputs[0])
            joined = ir.node("Concat", outputs, {"axis": -1})
            result = matmul.outputs[0]
            joined.outputs[0].name, joined.outputs[0].dtype = result.name, result.dtype
            joined.outputs[0].shape = result.shape
            ir.convenience.replace_nodes_and_values(
                self.graph, matmul, [matmul], [joined], [result], [joined.outputs[0]]
            )

    def embedding(self, value: ir.Value, entry: RowMatrix, name: str) -> None:
        """Gather rows of codes and scales, then dequantise what was gathered."""
        codes = self.constant(entry.codes, f"{name}.data")
        if entry.scales is None:
            self.replace(value, codes)
            return
        ((gather, _),) = value.uses()
        ids, result = gather.inputs[1], gather.outputs[0]
        scales = self.constant(entry.scales, f"{name}.scales")
        new = [ir.node("Gather", [codes, ids]), ir.node("Gather", [scales, ids])]
        row_scales = new[1].outputs[0]
        if entry.block is None:  # one scale per token: along the sequence axis, batch squeezed away
            axes = self.small(f"{name}.axes", np.array([0], dtype=np.int64))
            new.append(ir.node("Squeeze", [row_scales, axes]))
            attributes = {"axis": 1}
        else:
            attributes = {"axis": 2, "block_size": entry.block}
        new.append(ir.node("DequantizeLinear", [new[0].outputs[0], new[-1].outputs[0]], attributes))
        new[-1].outputs[0].name, new[-1].outputs[0].dtype = result.name, result.dtype
        new[-1].outputs[0].shape = result.shape
        ir.convenience.replace_nodes_and_values(self.graph, gather, [gather], new, [result], [new[-1].outputs[0]])

    def constant(self, stored: Stored, name: str) -> ir.Value:
        dtype, shape = DTYPES[stored.dtype], ir.Shape(stored.shape)
        tensor = ir.ExternalTensor(stored.file, stored.offset, stored.nbytes, dtype, shape=shape, name=name)
        return self._register(ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor))

    def small(self, name: str, array: Any) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return self._register(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )

    def node(self, op: str, inputs: list[ir.Value], name: str, attributes: dict[str, int]) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"{name}.{op}"
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(old, new)

    def _register(self, value: ir.Value) -> ir.Value:
        self.graph.initializers[value.name] = value
        return value


def is_packed(entry: ColumnMatrix) -> bool:
    """Whether the codes are int4, two to a byte."""
    return entry.pieces[0].codes.dtype == "int4"


def unit_count(name: str, dims: LayerDims | None) -> int:
    """Units of a column matrix a layer keeps: KV groups for attention, channels for the FFN; 1 outside layers."""
    if dims is None:
        return 1
    return dims.num_key_value_heads if "self_attn" in name else dims.intermediate_size


def row_count(name: str, dims: LayerDims, entry: RowMatrix) -> int:
    """Rows of o_proj or down_proj a layer keeps."""
    if "down_proj" in name:
        return dims.intermediate_size
    return dims.num_key_value_heads * entry.rows_per_unit


class _quiet_logger:  # noqa: N801  # reads as a statement
    """Silences the exporter's registration warnings for its duration."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
