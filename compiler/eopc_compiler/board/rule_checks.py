"""The kinds of checks that allow-lists are written with: each judges one operator of a graph, on structure alone.

A rule in an allow-list names its check and the check's parameters. A check gives words for what it found, or None where
the rule is kept or nothing can be known: a type that inference does not find, a K that is known only at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from eopc_runtime.jsonfields import Fields


@dataclass(frozen=True, slots=True)
class Scope:
    """What is known of the values that an operator can see: of its own graph and of those around it."""

    opset: int
    types: Mapping[str, str]  # by value name, as ONNX spells them: FLOAT16
    shapes: Mapping[str, tuple[int | None, ...]]  # None is a dimension without a number
    constants: Mapping[str, Any]  # TensorProto
    inputs: frozenset[str]
    outputs: frozenset[str]
    around: tuple[str, ...]  # operators whose branch this is, outermost first
    operand_types: Mapping[str, frozenset[str]]  # the allow-list's table


Check = Callable[[Any, Scope], "str | None"]


def read_check(fields: Fields) -> Check:
    """The check a rule names, with its parameters."""
    return CHECKS[fields.text("check", choices=CHECKS)](fields)


def _opset(fields: Fields) -> Check:
    """Of the whole graph: it is called once, with no operator."""
    low, high = fields.integer("min"), fields.integer("max")
    return lambda _, scope: None if low <= scope.opset <= high else f"it declares opset {scope.opset}"


def _domain(_: Fields) -> Check:
    return lambda node, _: None if standard(node) else f"it is of {node.domain}"


def _operator(_: Fields) -> Check:
    def check(node: Any, scope: Scope) -> str | None:
        is_listed = node.op_type in scope.operand_types
        return f"{node.op_type} is not listed" if standard(node) and not is_listed else None

    return check


def _refused_operator(fields: Fields) -> Check:
    refused = fields.texts("ops")
    return _of(refused, lambda node, _: f"{node.op_type} is in the graph")


def _tensor_type(fields: Fields) -> Check:
    allowed = set(fields.texts("allowed"))
    return lambda node, scope: _type_found(node, scope, lambda name: name not in allowed)


def _refused_type(fields: Fields) -> Check:
    refused = set(fields.texts("refused"))
    return lambda node, scope: _type_found(node, scope, lambda name: name in refused)


def _type_found(node: Any, scope: Scope, is_wrong: Callable[[str], bool]) -> str | None:
    for name in (*node.input, *node.output):
        kind = scope.types.get(name)
        if kind is not None and is_wrong(kind):
            return f"{name} is {kind}"
    return None


def _operand_type(_: Fields) -> Check:
    """Types of the first operand and of those that share its type; others (indices, scales) have rules of ONNX."""

    def check(node: Any, scope: Scope) -> str | None:
        allowed = scope.operand_types.get(node.op_type)
        if allowed is None or not standard(node) or not node.input:
            return None
        first = _alike(node, scope)[0]
        wrong = [(name, scope.types[name]) for name in first if scope.types.get(name) not in (None, *allowed)]
        return f"{wrong[0][0]} is {wrong[0][1]}" if wrong else None

    return check


def _mixed_types(_: Fields) -> Check:
    def check(node: Any, scope: Scope) -> str | None:
        for names in _alike(node, scope):
            kinds = {scope.types[name] for name in names if name in scope.types}
            if len(kinds) > 1:
                return f"{' and '.join(sorted(kinds))} meet in it"
        return None

    return check


def _alike(node: Any, scope: Scope) -> list[list[str]]:
    """Inputs grouped by the type variable ONNX gives them; the first input's group comes first."""
    if not standard(node) or not node.input:
        return [[]]
    try:
        formal = list(onnx.defs.get_schema(node.op_type, scope.opset).inputs)
    except onnx.defs.SchemaError:
        return [[]]
    groups: dict[str, list[str]] = {}
    for i, name in enumerate(node.input):
        groups.setdefault(formal[min(i, len(formal) - 1)].type_str, []).append(name)  # the last one may repeat
    return list(groups.values())


def _attribute(fields: Fields) -> Check:
    ops, name = fields.texts("ops"), fields.text("attribute")
    default, allowed = fields.raw("default"), fields.raw("allowed")
    if not isinstance(allowed, list):
        fields.fail('"allowed" must be a list.')

    def check(node: Any, _: Scope) -> str | None:
        value = attributes(node).get(name, default)
        return None if value in allowed else f"{name} is {value}"

    return _of(ops, check)


def _absent_inputs(fields: Fields) -> Check:
    ops, positions = fields.texts("ops"), fields.integers("positions")

    def check(node: Any, scope: Scope) -> str | None:
        given = [name for i in positions if (name := _input(node, i))]
        return f"it reads {', '.join(given)}" if given else None

    return _of(ops, check)


def _output_count(fields: Fields) -> Check:
    ops, most = fields.texts("ops"), fields.integer("max")

    def check(node: Any, _: Scope) -> str | None:
        count = sum(bool(name) for name in node.output)
        return f"it has {count} outputs" if count > most else None

    return _of(ops, check)


def _rank(fields: Fields) -> Check:
    ops, positions, rank = fields.texts("ops"), fields.integers("inputs"), fields.integer("rank")

    def check(node: Any, scope: Scope) -> str | None:
        for name in (_input(node, i) for i in positions):
            shape = scope.shapes.get(name)
            if shape is not None and len(shape) != rank:
                return f"{name} has {len(shape)} dimensions"
        return None

    return _of(ops, check)


def _not_inside(fields: Fields) -> Check:
    ops, inside = fields.texts("ops"), fields.texts("inside")
    return _of(ops, lambda _, scope: next((f"it is inside {a}" for a in scope.around if a in inside), None))


def _graph_input(fields: Fields) -> Check:
    ops, position = fields.texts("ops"), fields.integer("input")

    def check(node: Any, scope: Scope) -> str | None:
        name = _input(node, position)
        return None if name in scope.inputs else f"{name} is computed in the graph"

    return _of(ops, check)


def _graph_output(fields: Fields) -> Check:
    def check(node: Any, scope: Scope) -> str | None:
        return None if node.output[0] in scope.outputs else f"{node.output[0]} is read inside the graph only"

    return _of(fields.texts("ops"), check)


def _static_dimension(fields: Fields) -> Check:
    ops, position, axis = fields.texts("ops"), fields.integer("input"), fields.integer("axis")

    def check(node: Any, scope: Scope) -> str | None:
        shape = scope.shapes.get(_input(node, position), ())
        open_there = len(shape) >= abs(axis) and shape[axis] is None
        return f"dimension {axis} of {_input(node, position)} is open" if open_there else None

    return _of(ops, check)


def _constant(fields: Fields) -> Check:
    return _at(fields, lambda name, scope: None if name in scope.constants else f"{name} is no constant")


def _zero_constant(fields: Fields) -> Check:
    def check(name: str, scope: Scope) -> str | None:
        values = value_of(name, scope)
        if values is None:
            return f"{name} is no constant that lies in the graph"
        return f"{name} is {values.ravel()[values.ravel() != 0][0]}" if values.any() else None

    return _at(fields, check)


def _constant_range(fields: Fields) -> Check:
    most = fields.integer("max")

    def check(name: str, scope: Scope) -> str | None:
        values = value_of(name, scope)
        return f"{name} is {values.max()}" if values is not None and values.size and values.max() > most else None

    return _at(fields, check)


def _of(ops: tuple[str, ...], check: Check) -> Check:
    return lambda node, scope: check(node, scope) if standard(node) and node.op_type in ops else None


def _at(fields: Fields, check: Callable[[str, Scope], str | None]) -> Check:
    """A check of one input, whose position depends on the operator; an input left out is fine."""
    record = fields.child("inputs")
    positions = {op: record.integer(op, minimum=0) for op in fields.mapping("inputs")}

    def at(node: Any, scope: Scope) -> str | None:
        if not standard(node) or node.op_type not in positions:
            return None
        name = _input(node, positions[node.op_type])
        return check(name, scope) if name else None

    return at


def standard(node: Any) -> bool:
    """Whether an operator is ONNX's own."""
    return node.domain in ("", "ai.onnx")


def attributes(node: Any) -> dict[str, Any]:
    """Values of an operator's numbers and strings."""
    kinds = (AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type in kinds}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def value_of(name: str, scope: Scope) -> np.ndarray[Any, Any] | None:
    """A constant that lies in the graph itself; None for weights and for what is computed."""
    tensor = scope.constants.get(name)
    if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
        return None
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _input(node: Any, position: int) -> str:
    return str(node.input[position]) if position < len(node.input) else ""


OF_GRAPH = "opset"  # the one check that judges a graph as a whole
CHECKS: dict[str, Callable[[Fields], Check]] = {
    OF_GRAPH: _opset,
    "domain": _domain,
    "operator": _operator,
    "refused-operator": _refused_operator,
    "tensor-type": _tensor_type,
    "refused-type": _refused_type,
    "operand-type": _operand_type,
    "mixed-types": _mixed_types,
    "attribute": _attribute,
    "absent-inputs": _absent_inputs,
    "output-count": _output_count,
    "rank": _rank,
    "not-inside": _not_inside,
    "graph-input": _graph_input,
    "graph-output": _graph_output,
    "static-dimension": _static_dimension,
    "constant": _constant,
    "zero-constant": _zero_constant,
    "constant-range": _constant_range,
}
