"""What stands behind the parameters of a traced graph: external data in weights.bin, and what turns it into values.

* fp16 and fp32: an external tensor, or a Concat of the column pieces a tier keeps;
* int8 and int4: codes and scales, joined the same way, behind one DequantizeLinear, the form that ONNX Runtime
  fuses into MatMulNBits and TensorRT into a weight-only GEMM;
* int8 and 8-bit floats with an input scale: the inputs pass QuantizeLinear and DequantizeLinear as well, and runtimes
  multiply codes by codes;
* int8 with a token group: the same, behind a division by every token's largest input, which the product is multiplied
  by again; of the FFN's channels, behind a product with a Hadamard matrix;
* in a graph for single tokens, which are bound by the bytes they read, and not by products: the same codes, all of them
  behind a DequantizeLinear with scales in blocks, and inputs that are not rounded;
* the embedding: its rows are gathered *before* they are dequantised, so a step never expands the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.hadamard import hadamard
from eopc_compiler.quantize import FP8, LEAST_PEAK, TOKEN_SCALE, InputRounding, single_block
from eopc_compiler.weight_table import WeightTable, row_count, unit_count
from eopc_compiler.weights import ColumnMatrix, Entry, RowMatrix, Stored

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    FP8: ir.DataType.FLOAT8E4M3FN,
}
PREFIX = "llama."  # what the traced wrapper puts before every parameter name


def attach_weights(
    model: ir.Model, config: LlamaConfig, dialect: Dialect, table: WeightTable, single: bool = False
) -> None:
    """Replace every parameter of a traced graph by external data in weights.bin.

    Args:
        single: the graph is for single tokens.
    """
    builder = _Builder(model.graph, dialect, single)
    if single:
        builder.join_gates(config, table)
    for value in list(model.graph.initializers.values()):
        if value.name is None or not value.name.startswith(PREFIX):
            continue  # small constants of the graph itself
        name = value.name.removeprefix(PREFIX)
        entry, dims = table.of_tier(name, config.layers)
        if not isinstance(entry, Stored) and entry.inputs is not None:
            builder.turn(value, entry.inputs.group, name)
            if not single:
                builder.round_inputs(value, entry.inputs, name)
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

    def __init__(self, graph: ir.Graph, dialect: Dialect, single: bool) -> None:
        self.graph, self.dialect, self.single = graph, dialect, single

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
        sizes = self.concat(present, f"{name}.scales")
        if block is None and self.single:  # of a constant: loaders fold it
            rows, columns = codes[0].shape[0], sum(part.shape[1] for part in codes)
            block = single_block(rows)
            shape = self.shared(f"blocks_{rows}_{columns}", np.array([rows // block, columns], dtype=np.int64))
            sizes = self.node("Expand", [sizes, shape], f"{name}.scales", {})
        # one scale per column, or one per block of rows of a column
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        return self.node("DequantizeLinear", [joined, sizes], name, attributes)

    def concat(self, parts: Sequence[Stored], name: str) -> ir.Value:
        if len(parts) == 1:
            return self.constant(parts[0], f"{name}.data")
        values = [self.constant(part, f"{name}.{i}") for i, part in enumerate(parts)]
        return self.node("Concat", values, f"{name}.joined", {"axis": -1 if len(parts[0].shape) == 1 else 1})

    def round_inputs(self, weight: ir.Value, inputs: InputRounding, name: str) -> None:
        """Round what a matrix multiplies to codes: QuantizeLinear, DequantizeLinear.

        Every matrix has a pair of its own, also where two share an input: ONNX Runtime multiplies codes by codes only
        where each DequantizeLinear has one reader.
        """
        scale = inputs.scale
        if scale is None:
            self.divide_by_peaks(weight, name)
            scale = TOKEN_SCALE
        ((matmul, _),) = weight.uses()
        assert matmul.op_type == "MatMul"
        dtype = np.float16 if weight.dtype == ir.DataType.FLOAT16 else np.float32
        size = self.small(f"{name}.input_scale", np.array(scale, dtype=dtype))
        zero = self.small(f"{name}.input_zero", np.array(0, dtype=DTYPES[inputs.stored].numpy()))
        codes = ir.node("QuantizeLinear", [matmul.inputs[0], size, zero])
        values = ir.node("DequantizeLinear", [codes.outputs[0], size, zero])
        codes.outputs[0].name, values.outputs[0].name = f"{name}.input_codes", f"{name}.input_values"
        self.graph.insert_before(matmul, [codes, values])
        matmul.replace_input_with(0, values.outputs[0])

    def join_gates(self, config: LlamaConfig, table: WeightTable) -> None:
        """Multiply by gate_proj and up_proj at once and split the product.

        Splitting copies it, which for many tokens costs more than the second product's start, for one it does not.
        """
        for i, dims in enumerate(config.layers):
            gate, up = (f"model.layers.{i}.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
            values = [v for name in (gate, up) if (v := self.graph.initializers.get(PREFIX + name)) is not None]
            entries = [e for name in (gate, up) if isinstance(e := table.of_tier(name, config.layers)[0], ColumnMatrix)]
            if not values or any(map(no_concat, entries)):
                continue
            kept = [piece for entry in entries for piece in entry.kept(dims.intermediate_size)]
            name, block = gate.replace("gate", "gate_up"), entries[0].block
            weight = self.dequantize([p.codes for p in kept], [p.scales for p in kept], block, name)
            first, second = (node for value in values for node, _ in value.uses())
            both = self.before(first, "MatMul", [first.inputs[0], weight], f"{name}.product")
            split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
            self.graph.insert_before(first, [split])
            for matmul, half in zip((first, second), split.outputs, strict=True):
                product = matmul.outputs[0]
                half.name, half.dtype, half.shape = f"{product.name}.half", product.dtype, product.shape
                ir.convenience.replace_all_uses_with(product, half)
                self.graph.remove(matmul, safe=True)
            for value in values:
                del self.graph.initializers[value.name or ""]

    def turn(self, weight: ir.Value, group: int, name: str) -> None:
        """Turn what a matrix multiplies in groups (`hadamard.turned`); nothing for groups of one."""
        if group == 1:
            return
        ((matmul, _),) = weight.uses()
        assert weight.shape is not None
        width = weight.shape[0]
        grouped = self.shared(f"groups_of_{group}", np.array([0, 0, -1, group], dtype=np.int64))
        joined = self.shared(f"joined_to_{width}", np.array([0, 0, width], dtype=np.int64))
        matrix = self.shared(f"hadamard_{group}", hadamard(group).numpy())
        x = self.before(matmul, "Reshape", [matmul.inputs[0], grouped], f"{name}.grouped")
        x = self.before(matmul, "MatMul", [x, matrix], f"{name}.turned")
        matmul.replace_input_with(0, self.before(matmul, "Reshape", [x, joined], f"{name}.joined_again"))

    def divide_by_peaks(self, weight: ir.Value, name: str) -> None:
        """Divide each token that a matrix multiplies by its peak (`token_peaks`); the product makes up for that."""
        ((matmul, _),) = weight.uses()
        x = matmul.inputs[0]
        axes = self.shared("last_axis", np.array([-1], dtype=np.int64))
        least = self.shared("least_peak", np.array(LEAST_PEAK, dtype=np.float32))
        sizes = self.before(matmul, "Abs", [x], f"{name}.sizes")
        peaks = self.before(matmul, "ReduceMax", [sizes, axes], f"{name}.peaks", keepdims=1)
        peaks = self.before(matmul, "Max", [peaks, least], f"{name}.peaks_above_zero")
        matmul.replace_input_with(0, self.before(matmul, "Div", [x, peaks], f"{name}.divided"))
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

    def before(self, reader: ir.Node, op: str, inputs: list[ir.Value | None], name: str, **attributes: int) -> ir.Value:
        """A node right before another one."""
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = name
        self.graph.insert_before(reader, [node])
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(old, new)

    def _register(self, value: ir.Value) -> ir.Value:
        self.graph.initializers[value.name] = value
        return value


def no_concat(entry: ColumnMatrix) -> bool:
    """Whether the codes are of a type that Concat does not take."""
    return entry.pieces[0].codes.dtype in ("int4", FP8)
