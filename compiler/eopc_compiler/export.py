"""From a tier's shape to model.onnx: trace the one model file, then point its initializers into weights.bin.

The trace never sees weights (parameters are uninitialised memory), so exporting costs no memory and every tier is
traced the same way. Afterwards each initializer is replaced by what the bundle stores:

* fp16 and fp32: an external tensor, or a Concat of the column pieces a tier keeps;
* int8 and int4: codes and scales, joined the same way, behind one DequantizeLinear, the form that ONNX Runtime
  fuses into MatMulNBits and TensorRT into a weight-only GEMM;
* int8 and 8-bit floats with an input scale: the inputs pass QuantizeLinear and DequantizeLinear as well, and runtimes
  multiply codes by codes;
* int8 with a token group: the same, behind a division by every token's largest input, which the product is multiplied
  by again; of the FFN's channels, behind a product with a Hadamard matrix;
* the embedding: its rows are gathered *before* they are dequantised, so a step never expands the table.

External data is named "weights.bin", relative to the bundle's root: loaders pass that folder (ONNX Runtime
`session.model_external_initializers_file_folder_path`, TensorRT's `parse(bytes, path)`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.hadamard import hadamard
from eopc_compiler.prompt_pass import Pool
from eopc_compiler.quantize import FP8, LEAST_PEAK, TOKEN_SCALE
from eopc_compiler.selector import Selector
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.tracing import Target, trace, trace_prompt_pass, trace_selector
from eopc_compiler.weights import ColumnMatrix, Entry, Piece, RowMatrix, Stored

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    FP8: ir.DataType.FLOAT8E4M3FN,
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
    config: LlamaConfig, target: Target, table: WeightTable, path: Path, chosen: Sequence[int] = ()
) -> None:
    """Write a tier's graph.

    Args:
        config: of the sliced model.
        path: the .onnx file to write; its weights stay in weights.bin.
        chosen: per layer, FFN channels whose weights are inputs; empty for none.
    """
    _write(trace(config, target, chosen), config, target, table, path)


def export_prompt_pass(
    config: LlamaConfig,
    prompt: PromptPath,
    target: Target,
    table: WeightTable,
    path: Path,
    pools: Sequence[Pool | None] = (),
) -> None:
    """Write the graph that fills a cache: the layers that the prompt runs through, of the others keys and values.

    Args:
        table: has what `TierExtras.write_prompt` wrote for that prompt.
        pools: per layer, FFN channels whose energies are added up; empty for none.
    """
    _write(trace_prompt_pass(config, prompt, target, pools), config, target, table, path)


def export_selector(config: LlamaConfig, selector: Selector, target: Target, table: WeightTable, path: Path) -> None:
    """Write the graph that gathers the chosen channels' weights; `table` has what `TierExtras.write_selector` wrote."""
    _write(trace_selector(config, selector, target), config, target, table, path)


def _write(model: ir.Model, config: LlamaConfig, target: Target, table: WeightTable, path: Path) -> None:
    attach_weights(model, config, target.dialect, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)


def attach_weights(model: ir.Model, config: LlamaConfig, dialect: Dialect, table: WeightTable) -> None:
    """Replace every parameter of a traced graph by external data in weights.bin."""
    builder = _Builder(model.graph, dialect)
    for value in list(model.graph.initializers.values()):
        if value.name is None or not value.name.startswith(PREFIX):
            continue  # small constants of the graph itself
        name = value.name.removeprefix(PREFIX)
        entry, dims = table.of_tier(name, config.layers)
        if isinstance(entry, ColumnMatrix) and entry.input_scale is not None:
            builder.quantize_inputs(value, entry.input_scale, entry.pieces[0].codes.dtype, name)
        if isinstance(entry, RowMatrix) and entry.token_group is not None:
            assert dims is not None
            builder.divide_by_peaks(value, entry.token_group, row_count(name, dims, entry), name)
            builder.quantize_inputs(value, TOKEN_SCALE, "int8", name)
        if name == "model.embed_tokens.weight":
            assert isinstance(entry, RowMatrix)
            builder.embedding(value, entry, name)
        elif isinstance(entry, ColumnMatrix) and no_concat(entry) and len(entry.kept(unit_count(name, dims))) > 1:
            builder.split_matmul(value, entry, unit_count(name, dims), name)
        else:
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

    def quantize_inputs(self, weight: ir.Value, scale: float, grid: str, name: str) -> None:
        """Round what a matrix multiplies to codes of a grid: QuantizeLinear, DequantizeLinear.

        Every matrix has a pair of its own, also where two share an input: ONNX Runtime multiplies codes by codes only
        where each DequantizeLinear has one reader.
        """
        ((matmul, _),) = weight.uses()
        assert matmul.op_type == "MatMul"
        dtype = np.float16 if weight.dtype == ir.DataType.FLOAT16 else np.float32
        size = self.small(f"{name}.input_scale", np.array(scale, dtype=dtype))
        zero = self.small(f"{name}.input_zero", np.array(0, dtype=DTYPES[grid].numpy()))
        codes = ir.node("QuantizeLinear", [matmul.inputs[0], size, zero])
        values = ir.node("DequantizeLinear", [codes.outputs[0], size, zero])
        codes.outputs[0].name, values.outputs[0].name = f"{name}.input_codes", f"{name}.input_values"
        self.graph.insert_before(matmul, [codes, values])
        matmul.replace_input_with(0, values.outputs[0])

    def divide_by_peaks(self, weight: ir.Value, group: int, width: int, name: str) -> None:
        """Turn what a matrix multiplies in groups, and divide each token by its peak; the product makes up for that."""
        ((matmul, _),) = weight.uses()
        x, nodes = matmul.inputs[0], list[ir.Node]()

        def add(op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
            nodes.append(ir.node(op, inputs, attributes))
            nodes[-1].outputs[0].name = f"{name}.{op}.{len(nodes)}"
            return nodes[-1].outputs[0]

        if group > 1:
            grouped = self.shared(f"groups_of_{group}", np.array([0, 0, -1, group], dtype=np.int64))
            joined = self.shared(f"joined_to_{width}", np.array([0, 0, width], dtype=np.int64))
            turn = self.shared(f"hadamard_{group}", hadamard(group).numpy())
            x = add("Reshape", [add("MatMul", [add("Reshape", [x, grouped]), turn]), joined])
        axes = self.shared("last_axis", np.array([-1], dtype=np.int64))
        least = self.shared("least_peak", np.array(LEAST_PEAK, dtype=np.float32))
        peaks = add("Max", [add("ReduceMax", [add("Abs", [x]), axes], keepdims=1), least])
        scaled = add("Div", [x, peaks])
        self.graph.insert_before(matmul, nodes)
        matmul.replace_input_with(0, scaled)
        product = matmul.outputs[0]
        readers = list(product.uses())
        back = ir.node("Mul", [product, peaks])
        back.outputs[0].name, back.outputs[0].dtype, back.outputs[0].shape = f"{name}.Mul", product.dtype, product.shape
        for node, index in readers:
            node.replace_input_with(index, back.outputs[0])
        self.graph.insert_after(matmul, [back])

    def split_matmul(self, value: ir.Value, entry: ColumnMatrix, units: int, name: str) -> None:
        """One MatMul per column piece, outputs joined: ONNX has no Concat of int4 or 8-bit float constants."""
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

    def shared(self, name: str, array: Any) -> ir.Value:
        """A small constant that all layers read."""
        return self.graph.initializers.get(name) or self.small(name, array)

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


def no_concat(entry: ColumnMatrix) -> bool:
    """Whether the codes are of a type that Concat does not take."""
    return entry.pieces[0].codes.dtype in ("int4", FP8)


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
