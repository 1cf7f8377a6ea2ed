"""Looks at an ONNX graph of a bundle before a runtime does: what it may do, and what it may read.

A graph comes with the bundle and may come from anywhere. It may use the operators eopc's exporter writes, of ONNX's own
domain; no functions, no graphs inside graphs (so no loops), no custom operators. Its tensors lie in the graph or in
files the manifest lists, within their bounds, with exactly the bytes their shape says, and together no more than
the files have. All this is read from the serialised bytes, before anything is allocated or opened.

Not covered: how large the results of operators become. An Expand, or an outer product of two small tensors, can ask
for more memory than there is; ONNX Runtime then raises, or the system ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from eopc_runtime.bundle_files import inside
from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import shown
from eopc_runtime.protobuf_wire import Message, WireError

MAX_GRAPH_BYTES = 64 << 20  # weights lie outside; 80 layers take some 3 MB
MAX_DIMENSIONS = 8
OWN_DOMAIN = ("", "ai.onnx")
# What eopc's dialects are written in.
OPERATORS = frozenset(
    {
        *("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"),  # native
        *(
            "Div",
            "Expand",
            "Range",
            "ReduceMean",
            "ScatterND",
            "Shape",
            "Softmax",
            "Sqrt",
            "Squeeze",
            "Sub",
        ),  # primitive
        *("Add", "Cast", "Concat", "Gather", "MatMul", "Mul", "Reshape", "Sigmoid", "Slice", "Split", "Transpose"),
        *(
            "Constant",
            "Greater",
            "Identity",
            "Neg",
            "OneHot",
            "Pow",
            "Reciprocal",
            "ScatterElements",
            "Unsqueeze",
        ),  # kin
        *("Abs", "DequantizeLinear", "QuantizeLinear", "ReduceMax"),
        *("Less", "Max", "Or", "ReduceSum", "TopK", "Where"),  # channels and tokens chosen by the prompt
    }
)
# onnx.proto: bits of one element, by TensorProto.DataType
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20), 8),  # uint8, int8, bool, float8
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13), 64),
    **dict.fromkeys((21, 22), 4),
}
# onnx.proto: field numbers
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_GRAPH_NODES, _GRAPH_TENSORS, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTES, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS, _ATTRIBUTE_FORBIDDEN = 5, 10, {6: "a graph", 11: "graphs", 22: "a sparse tensor"}
_ATTRIBUTE_FORBIDDEN |= {23: "sparse tensors"}
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_EXTERNAL_KEYS = ("location", "offset", "length")


def read_graph(root: Path, relative: str, sizes: Mapping[str, int]) -> bytes:
    """Return the bytes of a graph that may be handed to a runtime.

    Args:
        relative: the graph in the bundle.
        sizes: bytes of the files that the manifest lists, by path.

    Raises:
        BundleError: the graph cannot be read, or is not what a bundle's graph may be.
    """
    try:
        with inside(root, relative).open("rb") as file:
            content = file.read(MAX_GRAPH_BYTES + 1)
    except OSError as e:
        raise BundleError(f"{relative} cannot be read ({e.strerror}). Copy the bundle again.") from None
    check_graph(content, relative, sizes)
    return content


def check_graph(content: bytes, where: str, sizes: Mapping[str, int]) -> None:
    """Raise BundleError unless a serialised graph is what a bundle's graph may be; see the module."""
    if len(content) > MAX_GRAPH_BYTES:
        raise BundleError(f"{where} is larger than {MAX_GRAPH_BYTES >> 20} MiB. Copy the bundle again, or rebuild it.")
    try:
        reason = _refusal(content, sizes)
    except WireError as e:
        reason = f"it is no ONNX file ({e})"
    if reason:
        raise BundleError(f"{where} is refused: {reason}. Use only bundles from a source you trust; build it again.")


def _refusal(content: bytes, sizes: Mapping[str, int]) -> str | None:
    """Why a graph is refused; None when it is not."""
    model = Message(memoryview(content))
    graph_bytes = model.one(_MODEL_GRAPH)
    if graph_bytes is None:
        return "it holds no graph"
    if _MODEL_FUNCTIONS in model or _MODEL_TRAINING in model:
        return "it holds functions, which graphs of a bundle do not"
    domains = {Message(opset).text(1) for opset in model.many(_MODEL_OPSETS)}
    if foreign := sorted(domains - set(OWN_DOMAIN)):
        return f'it uses custom operators of the domain "{shown(foreign[0])}"'
    graph = Message(graph_bytes)
    if _GRAPH_SPARSE in graph:
        return "it holds sparse tensors"
    tensors = [Message(tensor) for tensor in graph.many(_GRAPH_TENSORS)]
    for node in map(Message, graph.many(_GRAPH_NODES)):
        if reason := _operator_refusal(node):
            return reason
        for attribute in map(Message, node.many(_NODE_ATTRIBUTES)):
            for number, what in _ATTRIBUTE_FORBIDDEN.items():
                if number in attribute:
                    return f"an attribute of {shown(node.text(_NODE_OPERATOR))} holds {what}"
            own = attribute.one(_ATTRIBUTE_TENSOR)
            tensors += map(Message, [*attribute.many(_ATTRIBUTE_TENSORS), *([] if own is None else [own])])
    return _tensors_refusal(tensors, len(content), sizes)


def _operator_refusal(node: Message) -> str | None:
    domain, operator = node.text(_NODE_DOMAIN), node.text(_NODE_OPERATOR)
    if domain not in OWN_DOMAIN:
        return f'it uses the custom operator {shown(operator)} of the domain "{shown(domain)}"'
    if operator not in OPERATORS:
        return f"it uses the operator {shown(operator)}, which eopc does not write"
    return None


def _tensors_refusal(tensors: list[Message], graph_bytes: int, sizes: Mapping[str, int]) -> str | None:
    outside, files = 0, set[str]()
    for tensor in tensors:
        name = f'the tensor "{shown(tensor.text(_TENSOR_NAME))}"'
        dims, bits = tensor.integers(_TENSOR_DIMS), _BITS.get(tensor.integer(_TENSOR_TYPE))
        if bits is None or len(dims) > MAX_DIMENSIONS or min(dims, default=0) < 0:
            return f"{name} has a type or shape that no tensor of a bundle has"
        elements = math.prod(dims)
        size = -(-elements * bits // 8)
        if _TENSOR_EXTERNAL not in tensor and tensor.integer(_TENSOR_LOCATION) == 0:
            raw = tensor.one(_TENSOR_RAW)
            if elements > graph_bytes or (raw is not None and len(raw) != size):
                return f"{name} claims {size} bytes that the graph does not hold"
            continue
        entries = [(entry.text(1), entry.text(2)) for entry in map(Message, tensor.many(_TENSOR_EXTERNAL))]
        where = dict(entries)
        if len(where) < len(entries) or set(where) - set(_EXTERNAL_KEYS) or _TENSOR_RAW in tensor:
            return f"{name} does not say plainly where its data is"
        path = where.get("location", "")
        if path not in sizes:
            return f'{name} reads the file "{shown(path)}", which the manifest does not list'
        offset, length = _number(where.get("offset", "0")), _number(where.get("length", str(size)))
        if offset is None or length != size or offset + length > sizes[path]:
            return f"{name} of {size} bytes does not lie within {shown(path)}, which has {sizes[path]}"
        outside += size
        files.add(path)
    if outside > sum(sizes[path] for path in files):
        return f"its tensors claim {outside} bytes, more than all files they lie in"
    return None


def _number(text: str) -> int | None:
    """A count in digits; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
