"""A tier's graph in the form TensorRT's parsers take, computing the same.

A bundle's graphs are written for one shared weights.bin and for caches that grow. TensorRT asks for three things that
ONNX Runtime does not:

* the sequence dimension of a cache is a number, because its KV cache update writes into a fixed buffer;
* an int8 or int4 constant stands directly before a DequantizeLinear, so the column pieces that a pruned tier joins are
  joined here;
* for the same reason a table is dequantised first and gathered from afterwards: the embedding's, and those that weights
  are gathered from after a prompt.

External data that is not touched stays in weights.bin. Joined constants go into the graph, or for models where they
exceed what one ONNX file holds into a file of their own in a workspace folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from eopc_runtime.errors import BundleError

CACHE_LEN = "cache_len"  # the symbolic dimension of caches and mask
MAX_INLINE_BYTES = 2_000_000_000  # a protobuf message ends at 2 GiB; the graph itself takes a little
JOINED_FILE = "joined.bin"
MOVED_BYTES = 1024  # smaller constants are shapes and axes, which parsers want to see
ALIGNMENT = 64
STORED: dict[
    int, np.dtype[Any]
] = {  # what weights.bin holds and a Concat may join; int4 pieces are joined after their MatMul instead
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.INT8: np.dtype(np.int8),
}

Join = Callable[[Sequence[Any], int, str], Any]  # constants, axis and name to one constant


def prepare_for_tensorrt(
    bundle_root: Path, graph: Path, cache_len: int | None, workspace: Path | None = None
) -> onnx.ModelProto:
    """A copy of a tier's graph that TensorRT accepts; external data names stay relative to the bundle's root.

    Args:
        bundle_root: the folder weights.bin lies in.
        graph: one of the tier's graphs, absolute or relative to the bundle's root.
        cache_len: cache slots the engine is built for; None for the graph that gathers weights, which has no cache.
        workspace: an empty folder for joined constants and links to the files they lie beside; loaders are then given
            this folder in place of the bundle's root. None puts joined constants into the graph, at most 2 GB.

    Raises:
        BundleError: the file is no graph of a tier, or its joined constants need a workspace.
    """
    path = bundle_root / graph
    model = _rewritten(path, cache_len, lambda parts, axis, name: _joined(parts, axis, name, bundle_root))
    if workspace is not None:
        _move_out(model.graph, bundle_root, workspace)
    _require_size(model, path)
    return model


def outline_for_tensorrt(path: Path, cache_len: int | None) -> onnx.ModelProto:
    """The graph that `prepare_for_tensorrt` would give, its weights left out: no weights.bin is read or needed.

    Joined constants have their type and shape, but name no place in a file. For checks of structure, not for loaders.

    Raises:
        BundleError: the file is no graph of a tier.
    """
    return _rewritten(path, cache_len, _outlined)


def _rewritten(path: Path, cache_len: int | None, join: Join) -> onnx.ModelProto:
    if cache_len is not None and cache_len < 2:
        raise ValueError(f"an engine needs at least two cache slots, not {cache_len}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf and onnx raise many types; none means anything to a user
        raise BundleError(f"{path} is not a readable ONNX file ({error}). Build the bundle again.") from error
    if cache_len is None:
        _require_fixed(model.graph, path)
    else:
        _fix_dimension(model.graph, cache_len, path)
    del model.graph.value_info[:]  # TensorRT infers its own shapes
    _join_constants(model.graph, join)
    _dequantize_before_gather(model.graph)
    _drop_unused_initializers(model.graph)
    return model


def _fix_dimension(graph: Any, cache_len: int, path: Path) -> None:
    """Put the number wherever the symbol stands."""
    found = False
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CACHE_LEN:
                dim.dim_value, found = cache_len, True
    if not found:
        raise BundleError(f"{path} has no dimension {CACHE_LEN!r}; expected the graph of a tier with KV caches.")


def _require_fixed(graph: Any, path: Path) -> None:
    """Weights are gathered in fixed shapes, for which an engine needs no profile."""
    for value in (*graph.input, *graph.output):
        if not all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise BundleError(f"{path} has {value.name} of an open shape; expected a graph that gathers weights.")


def _join_constants(graph: Any, join: Join) -> None:
    """Replace every Concat whose inputs are all constants by one constant that lies in the graph itself."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type != "Concat" or not all(name in constants for name in node.input):
            continue
        parts = [constants[name] for name in node.input]
        if any(part.data_type not in STORED and _is_external(part) for part in parts):
            continue
        axis = next(a.i for a in node.attribute if a.name == "axis")
        tensor = join(parts, axis, node.output[0])
        graph.initializer.append(tensor)
        constants[tensor.name] = tensor  # a Concat of Concats folds as well
        graph.node.remove(node)


def _joined(parts: Sequence[Any], axis: int, name: str, bundle_root: Path) -> Any:
    values = np.concatenate([_read(part, bundle_root) for part in parts], axis)
    return onnx.numpy_helper.from_array(values, name)


def _outlined(parts: Sequence[Any], axis: int, name: str) -> Any:
    if not any(_is_external(part) for part in parts):  # shapes, which type inference wants to see
        return _joined(parts, axis, name, Path())
    dims = list(parts[0].dims)
    dims[axis] = sum(part.dims[axis] for part in parts)
    return TensorProto(name=name, data_type=parts[0].data_type, dims=dims, data_location=TensorProto.EXTERNAL)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _read(tensor: Any, bundle_root: Path) -> npt.NDArray[Any]:
    if not _is_external(tensor):
        inline: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return inline
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = bundle_root / where["location"]
    dtype, shape, offset = STORED[tensor.data_type], tuple(tensor.dims), int(where.get("offset", 0))
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not hold {tensor.name} ({error}). Build the bundle again.") from error


def _dequantize_before_gather(graph: Any) -> None:
    """Turn Gather(codes), Gather(scales) -> DequantizeLinear into DequantizeLinear(codes, scales) -> Gather."""
    constants = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        codes = producers.get(node.input[0])
        scales = producers.get(node.input[1])
        chain = [node, codes, scales]
        if scales is not None and scales.op_type == "Squeeze":  # one scale per row, its batch axis squeezed away
            scales = producers.get(scales.input[0])
            chain.append(scales)
        if codes is None or scales is None or codes.op_type != "Gather" or scales.op_type != "Gather":
            continue
        if codes.input[0] not in constants or scales.input[0] not in constants or codes.input[1] != scales.input[1]:
            continue
        block = [a.i for a in node.attribute if a.name == "block_size"]
        layout = {"axis": 1, "block_size": block[0]} if block else {"axis": 0}  # of the table [vocab, hidden]
        table = f"{codes.input[0]}.DequantizeLinear"
        new = [
            helper.make_node("DequantizeLinear", [codes.input[0], scales.input[0]], [table], name=table, **layout),
            helper.make_node("Gather", [table, codes.input[1]], [node.output[0]], name=f"{table}.Gather", axis=0),
        ]
        _replace(graph, node, new)
        _remove_if_unused(graph, chain[1:])


def _replace(graph: Any, old: Any, new: Iterable[Any]) -> None:
    position = next(i for i, node in enumerate(graph.node) if node is old or node == old)
    graph.node.remove(old)
    for offset, node in enumerate(new):
        graph.node.insert(position + offset, node)


def _remove_if_unused(graph: Any, candidates: Iterable[Any]) -> None:
    """Remove nodes nobody reads any more; candidates come in the order from output to input."""
    for node in candidates:
        uses = Counter(name for other in graph.node for name in other.input)
        if not any(uses[name] for name in node.output):
            graph.node.remove(node)


def _drop_unused_initializers(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _move_out(graph: Any, bundle_root: Path, workspace: Path) -> None:
    """Write joined constants to one file, and link the bundle's weight files beside it."""
    with (workspace / JOINED_FILE).open("wb") as file:
        for tensor in graph.initializer:
            if _is_external(tensor):
                name = next(entry.value for entry in tensor.external_data if entry.key == "location")
                if not (workspace / name).exists():
                    (workspace / name).symlink_to((bundle_root / name).resolve())
            elif len(tensor.raw_data) >= MOVED_BYTES:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                data, offset = tensor.raw_data, file.tell()
                file.write(data)
                onnx.external_data_helper.set_external_data(tensor, JOINED_FILE, offset, len(data))
                tensor.ClearField("raw_data")


def _require_size(model: Any, path: Path) -> None:
    inline = sum(len(t.raw_data) for t in model.graph.initializer if not _is_external(t))
    if inline > MAX_INLINE_BYTES:
        raise BundleError(
            f"{path}: {inline / 1e9:.1f} GB of joined constants do not fit one ONNX file of 2 GB. "
            "Prepare this tier with a workspace folder."
        )
