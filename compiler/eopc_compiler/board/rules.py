"""What each TensorRT version takes, as data, and the check that a graph keeps to it.

A graph that TensorRT will refuse should be refused at export, where it can still be changed, not on a board hours
later. One allow-list per compiler lies in `allow_lists/`: operators with their types, and rules, each with its remedy,
its source and what TensorRT-RTX, the one compiler that builds without a GPU, does with a graph that breaks it. A list
based on another one adds to its operators, replaces rules of the same name and leaves some out.

Passing a list is no proof: a parse is not a build (see tensorrt_build). It finds known refusals, in
milliseconds.
"""

from __future__ import annotations

import fnmatch
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from eopc_compiler.board.rule_checks import OF_GRAPH, Check, Scope, read_check
from eopc_runtime.errors import EopcError
from eopc_runtime.jsonfields import Fields, did_you_mean, parse_json

RTX_MARKS = {
    "refuses": "TensorRT-RTX refuses a graph that breaks the rule",
    "accepts": "it builds such a graph; the rule is another compiler's, or about what the engine would compute",
    "varies": "it depends on the graph; the source says how",
}
SHOWN = 8  # violations in one message


class RefusedGraphError(EopcError):
    """A graph breaks rules of the TensorRT version it is meant for; the message lists node, rule and remedy."""

    def __init__(self, what: str, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        lines = [f"  {v}" for v in self.violations[:SHOWN]]
        if (rest := len(self.violations) - SHOWN) > 0:
            lines.append(f"  and {rest} more")
        super().__init__("\n".join([f"The graph of {what} breaks rules of the TensorRT it is for:", *lines]))


@dataclass(frozen=True, slots=True)
class Violation:
    """One operator that breaks one rule of one compiler."""

    node: str  # its name, or that of its first output; "graph" where the graph as a whole is meant
    op: str
    rule: str
    remedy: str
    found: str
    says: str
    compiler: str

    def __str__(self) -> str:
        return f"{self.node} ({self.op}): {self.found}; {self.compiler}, rule {self.rule}: {self.says}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a list: what it says, what to do about it, where it comes from, and what TensorRT-RTX does."""

    name: str
    kind: str
    check: Check
    says: str
    remedy: str
    source: str
    rtx: str  # one of RTX_MARKS


@dataclass(frozen=True, slots=True)
class AllowList:
    """What one compiler takes. `devices` are patterns of profile names, `dialects` those whose graphs it is given."""

    name: str
    compiler: str
    devices: tuple[str, ...]
    dialects: tuple[str, ...]
    operators: Mapping[str, frozenset[str]]  # types of its first operand, by operator
    rules: tuple[Rule, ...]


def lists_for(device: str, dialect: str) -> tuple[AllowList, ...]:
    """The lists that a device's graphs in a dialect must all pass; none for a device without TensorRT.

    The native dialect of a Jetson serves JetPack 7.2 (TensorRT 10.16) and 7.2.2 (11.4): both lists apply.
    """
    return tuple(
        entry
        for entry in all_lists()
        if dialect in entry.dialects and any(fnmatch.fnmatchcase(device, pattern) for pattern in entry.devices)
    )


def list_of(compiler: str, release: tuple[int, ...]) -> AllowList:
    """The list that graphs given to a compiler of this release are held to: the newest one that is not newer.

    Args:
        compiler: a key of `profiles.ENGINE_COMPILERS`.
        release: the first two numbers of its version; for one older than all lists the oldest list serves.
    """
    own: dict[tuple[int, ...], AllowList] = {}
    for entry in all_lists():
        name, _, version = entry.name.rpartition("-")
        if name == compiler.replace("_", "-"):
            own[tuple(map(int, version.split(".")))] = entry
    return own[max((known for known in own if known <= release), default=min(own))]


def check_graph(model: Any, rules: AllowList) -> tuple[Violation, ...]:
    """Judge a graph as TensorRT will get it; weights are not read and may be absent.

    Args:
        model: a ModelProto from `outline_for_tensorrt` or `prepare_for_tensorrt`.
        rules: of one compiler.

    Returns:
        Violations in the graph's order, branches after the operator they belong to; empty for a graph that passes.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    scope = _scope(inferred.graph, Scope(opset, {}, {}, {}, frozenset(), frozenset(), (), rules.operators))
    return tuple(
        Violation(*_names(node), rule.name, rule.remedy, words, rule.says, rules.compiler)
        for node, seen in ((None, scope), *_nodes(inferred.graph, scope))
        for rule in rules.rules
        if (rule.kind == OF_GRAPH) == (node is None) and (words := rule.check(node, seen))
    )


def require_allowed(model: Any, lists: Sequence[AllowList], what: str) -> None:
    """Refuse a graph that breaks a rule of any of the lists; `what` names it in the message.

    Raises:
        RefusedGraphError: lists every violation once, under the first compiler that has the rule.
    """
    found: dict[tuple[str, str, str], Violation] = {}
    for rules in lists:
        for violation in check_graph(model, rules):
            found.setdefault((violation.node, violation.rule, violation.found), violation)
    if found:
        raise RefusedGraphError(what, list(found.values()))


def _names(node: Any) -> tuple[str, str]:
    """What to call an operator, and its type."""
    if node is None:
        return "graph", "model"
    return node.name or f"the one that gives {next(iter(node.output), 'nothing')}", node.op_type


def _nodes(graph: Any, scope: Scope) -> Iterator[tuple[Any, Scope]]:
    """Every operator with what it can see, those of branches too."""
    for node in graph.node:
        yield node, scope
        for attribute in node.attribute:
            branches = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for branch in branches:
                yield from _nodes(branch, _scope(branch, scope, node.op_type))


def _scope(graph: Any, outer: Scope, op: str | None = None) -> Scope:
    """What operators of a graph can see: its own values before those of the graph around it."""
    types: dict[str, str] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types[value.name] = TensorProto.DataType.Name(tensor.elem_type)
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for name, tensor in constants.items():
        types[name], shapes[name] = TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims)
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return Scope(
        outer.opset,
        ChainMap(types, outer.types),  # type: ignore[arg-type]  # the outer one is only read
        ChainMap(shapes, outer.shapes),  # type: ignore[arg-type]
        ChainMap(constants, outer.constants),  # type: ignore[arg-type]
        frozenset(v.name for v in graph.input) - constants.keys(),
        frozenset(v.name for v in graph.output),
        outer.around if op is None else (*outer.around, op),
        outer.operand_types,
    )


@cache
def all_lists() -> tuple[AllowList, ...]:
    """Every list shipped with eopc, by name."""
    texts = {
        entry.name.removesuffix(".json"): entry.read_text(encoding="utf-8")
        for entry in files("eopc_compiler.board").joinpath("allow_lists").iterdir()
        if entry.name.endswith(".json")
    }
    return tuple(parse_list(name, texts) for name in sorted(texts))


def parse_list(name: str, texts: Mapping[str, str]) -> AllowList:
    """Read one list from JSON text; `based_on` refers to another of the texts. EopcError names what is malformed."""
    where = f"allow-list {name}.json"
    fields = Fields(parse_json(texts[name], where, EopcError), where, EopcError)
    if (schema := fields.integer("schema")) != 1 or fields.text("name") != name:
        fields.fail(f'schema must be 1, not {schema}, and "name" the name of the file.')
    parent = _parent(fields, name, texts)
    without = fields.texts("without")
    rules = {rule.name: rule for rule in (parent.rules if parent else ())}
    for key in without:
        if rules.pop(key, None) is None:
            fields.fail(
                f'"without" names "{key}", which {fields.raw("based_on")} does not have.{did_you_mean(key, rules)}'
            )
    rules |= {rule.name: rule for rule in map(_rule, fields.children("rules"))}
    fields.texts_by_name("sources")
    found = AllowList(
        name=name,
        compiler=fields.text("compiler"),
        devices=fields.texts("devices"),
        dialects=fields.texts("dialects"),
        operators=MappingProxyType({**(parent.operators if parent else {}), **_operators(fields)}),
        rules=tuple(rules.values()),
    )
    fields.done()
    return found


def _parent(fields: Fields, name: str, texts: Mapping[str, str]) -> AllowList | None:
    base = fields.text_or_none("based_on")
    others = {key: text for key, text in texts.items() if key != name}  # a circle runs out of lists
    if base is not None and base not in others:
        fields.fail(f'"based_on" names "{base}", which is not there.{did_you_mean(base, others)}')
    return parse_list(base, others) if base is not None else None


def _operators(fields: Fields) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for group in fields.children("operators"):
        types = group.texts("types")
        if unknown := sorted(set(types) - set(TensorProto.DataType.keys())):
            group.fail(f"{unknown[0]} is no type of ONNX.{did_you_mean(unknown[0], TensorProto.DataType.keys())}")
        found |= dict.fromkeys(group.texts("ops"), frozenset(types))
        group.done()
    return found


def _rule(fields: Fields) -> Rule:
    rule = Rule(
        name=fields.text("rule"),
        kind=fields.text("check"),
        check=read_check(fields),
        says=fields.text("says"),
        remedy=fields.text("remedy"),
        source=fields.text("source"),
        rtx=fields.text("rtx", choices=RTX_MARKS),
    )
    fields.done()
    return rule
