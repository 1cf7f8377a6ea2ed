"""Every rule of every allow-list refuses a graph that breaks it, and TensorRT-RTX's builder does what the list says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from eopc_compiler.board.compilers import open_compiler
from eopc_compiler.board.rules import AllowList, RefusedGraphError, all_lists, check_graph, require_allowed
from eopc_compiler.board.tensorrt_build import BuildSettings, EngineBuildError, build_plan

LISTS = {rules.name: rules for rules in all_lists()}
RTX = "tensorrt-rtx-1.7"
F16, INT64 = TensorProto.FLOAT16, TensorProto.INT64
CACHE = [1, 4, 32, 64]
node, value = helper.make_node, helper.make_tensor_value_info


def graph(nodes: Sequence[Any], *constants: Any, opset: int = 20, inputs: Sequence[Any] = (), **changes: Any) -> Any:
    """A model that reads k_cache_0 and gives y, with some of its parts changed."""
    cache = value("k_cache_0", changes.get("dtype", F16), changes.get("cache", CACHE))
    outputs = [value(n, changes.get("gives", F16), changes.get("shape")) for n in changes.get("outputs", ["y"])]
    body = helper.make_graph(list(nodes), "g", [cache, *inputs], outputs, list(constants))
    domains = [helper.make_opsetid(n.domain, 1) for n in nodes if n.domain]
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset), *domains], ir_version=10)


def constant(name: str, content: Any, dtype: Any = None) -> Any:
    return numpy_helper.from_array(np.asarray(content, dtype), name)


def half(name: str, *shape: int) -> Any:
    return constant(name, np.full(shape, 0.5, np.float16))


def top_k(k: int, **attributes: Any) -> Any:
    return graph(
        [node("TopK", ["k_cache_0", "k"], ["y", "i"], "n", **attributes)], constant("k", [k]), cache=[1, 1, 8, 8192]
    )


def scatter(op: str, index: Any, update: Any, **attributes: Any) -> Any:
    nodes = [node(op, ["k_cache_0", "i", "u"], ["y"], "n", reduction="add", **attributes)]
    return graph(nodes, constant("i", index, np.int64), update)


def add(dtype: Any) -> Any:
    return graph([node("Add", ["k_cache_0", "u"], ["y"], "n")], constant("u", np.ones(64, dtype)))


def attention(more: Sequence[str] = (), *constants: Any, outputs: Sequence[str] = ("y",), **attributes: Any) -> Any:
    """Attention of queries q over k_cache_0, which stands for keys and values alike."""
    inputs = [value("q", F16, CACHE), *(value(n, F16, [1, 4, 8, 64]) for n in more if n.startswith("past"))]
    nodes = [node("Attention", ["q", "k_cache_0", "k_cache_0", *more], list(outputs), "n", **attributes)]
    return graph(nodes, *constants, opset=24, inputs=inputs, outputs=outputs)


def attention_in_branch() -> Any:
    then = [node("Attention", ["q", "k_cache_0", "k_cache_0"], ["t"], "n")]
    otherwise = [node("Identity", ["k_cache_0"], ["e"])]
    branches = {
        "then_branch": helper.make_graph(then, "then", [], [value("t", F16, None)]),
        "else_branch": helper.make_graph(otherwise, "else", [], [value("e", F16, None)]),
    }
    inputs = [value("q", F16, CACHE), value("c", TensorProto.BOOL, [])]
    return graph([node("If", ["c"], ["y"], **branches)], opset=24, inputs=inputs)


def rounded(zero: int) -> Any:
    nodes = [
        node("QuantizeLinear", ["k_cache_0", "s", "z"], ["c"], "n"),
        node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    return graph(nodes, constant("s", 0.1, np.float16), constant("z", zero, np.int8))


def weights(codes: Any, scales: Any, opset: int = 20, **attributes: Any) -> Any:
    nodes = [node("DequantizeLinear", ["a", "s"], ["w"], "n", **attributes), node("MatMul", ["k_cache_0", "w"], ["y"])]
    return graph(nodes, codes, scales, opset=opset)


def int4() -> Any:
    return helper.make_tensor("a", TensorProto.INT4, [64, 64], bytes(64 * 32), raw=True)


def cache_update(
    cache: Sequence[Any] = CACHE, update: Sequence[int] = (1, 4, 2, 64), axis: int = -2, **via: str
) -> Any:
    """Write an input into k_cache_0: `before` stands between cache and update, `after` between update and output."""
    source, result = ("m" if "before" in via else "k_cache_0"), ("t" if "after" in via else "k_cache_0_out")
    nodes = [node("TensorScatter", [source, "u", "w"], [result], "n", axis=axis)]
    if "before" in via:
        nodes.insert(0, node(via["before"], ["k_cache_0"], [source]))
    if "after" in via:
        nodes.append(node(via["after"], [result], ["k_cache_0_out"]))
    inputs = [value("u", F16, list(update)), value("w", INT64, [1])]
    return graph(nodes, opset=24, inputs=inputs, cache=list(cache), outputs=["k_cache_0_out"], shape=list(cache))


@dataclass(frozen=True)
class Broken:
    """A graph that breaks a rule: what is found, at node "n" unless said otherwise; whether TensorRT-RTX builds it."""

    rule: str
    found: str
    model: Any
    builds: bool = False
    where: str = "n"


ONE_NODE = graph([node("Sigmoid", ["k_cache_0"], ["y"], "n")])
FLOAT8 = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
BROKEN = {
    "opset": Broken("opset", "opset 25", graph([node("Sigmoid", ["k_cache_0"], ["y"])], opset=25), True, "graph"),
    "contrib": Broken(
        "domain", "com.microsoft", graph([node("QuickGelu", ["k_cache_0"], ["y"], "n", domain="com.microsoft")])
    ),
    "bernoulli": Broken("operator", "Bernoulli", graph([node("Bernoulli", ["k_cache_0"], ["y"], "n")])),
    "double": Broken(
        "tensor-type",
        "d is DOUBLE",
        graph([node("Cast", ["k_cache_0"], ["d"], "n", to=TensorProto.DOUBLE), node("Cast", ["d"], ["y"], to=F16)]),
        builds=True,
    ),
    "fp8": Broken(
        "fp8",
        "FLOAT8E4M3FN",
        graph(
            [node("QuantizeLinear", ["k_cache_0", "s", "z"], ["c"], "n"), node("DequantizeLinear", ["c", "s"], ["y"])],
            constant("s", 0.1, np.float16),
            FLOAT8,
        ),
    ),
    "uint8": Broken(
        "tensor-type", "a is UINT8", weights(constant("a", np.ones((64, 64), np.uint8)), half("s", 64), axis=1)
    ),
    "int4": Broken("int4", "a is INT4", weights(int4(), half("s", 64), axis=1), builds=True),
    "blocks": Broken(
        "block-scales",
        "block_size is 32",
        weights(constant("a", np.ones((64, 64), np.int8)), half("s", 2, 64), 20, axis=0, block_size=32),
        builds=True,
    ),
    "joined-codes": Broken(
        "operand-type",
        "b is INT8",
        graph(
            [
                node("Concat", ["b", "b"], ["c"], "n", axis=1),
                node("DequantizeLinear", ["c", "s"], ["w"], axis=1),
                node("MatMul", ["k_cache_0", "w"], ["y"]),
            ],
            constant("b", np.ones((64, 32), np.int8)),
            half("s", 64),
        ),
    ),
    "integer-matmul": Broken(
        "operand-type",
        "INT32",
        graph([node("MatMul", ["k_cache_0", "k_cache_0"], ["y"], "n")], cache=[1, 4, 8, 8], dtype=6, gives=6),
    ),
    "mixed-add": Broken("mixed-types", "FLOAT and FLOAT16", add(np.float32)),
    "asymmetric": Broken("zero-point", "z is 3", rounded(3)),
    "topk-4096": Broken("topk-size", "k is 4096", top_k(4096)),
    "topk-unsorted": Broken("topk-sorted", "sorted is 0", top_k(8, sorted=0), builds=True),
    "scatter-add": Broken("scatter-reduction", "add", scatter("ScatterND", [[[0, 0, 1]]], half("u", 1, 1, 64))),
    "scatter-add-elements": Broken(
        "scatter-reduction", "add", scatter("ScatterElements", np.zeros((1, 4, 1, 64)), half("u", 1, 4, 1, 64), axis=2)
    ),
    "nonzero": Broken(
        "data-dependent-shape", "NonZero", graph([node("NonZero", ["k_cache_0"], ["y"], "n")], gives=INT64)
    ),
    "open-axes": Broken(
        "constant-axes",
        "a is no constant",
        graph([node("Unsqueeze", ["k_cache_0", "a"], ["y"], "n")], inputs=[value("a", INT64, [1])]),
    ),
    "three-outputs": Broken(
        "attention-outputs",
        "3 outputs",
        attention(["", "past_k", "past_v"], outputs=["y", "present_k", "present_v"]),
    ),
    "past-inputs": Broken("attention-past", "past_k, past_v", attention(["", "past_k", "past_v"])),
    "lengths": Broken("attention-lengths", "l", attention(["", "", "", "l"], constant("l", [5])), builds=True),
    "softcap": Broken("attention-softcap", "softcap is 30", attention(softcap=30.0)),
    "causal": Broken("attention-causal", "is_causal is 1", attention(["m"], half("m", 1, 1, 32, 32), is_causal=1)),
    "flat-mask": Broken("attention-rank", "m has 2", attention(["m"], half("m", 32, 32)), builds=True),
    "attention-in-if": Broken("attention-in-if", "inside If", attention_in_branch()),
    "flat-cache": Broken("cache-rank", "3 dimensions", cache_update([4, 32, 64], (4, 2, 64))),
    "cache-axis": Broken("cache-axis", "axis is -3", cache_update(update=(1, 2, 32, 64), axis=-3)),
    "computed-cache": Broken("cache-input", "m is computed", cache_update(before="Neg")),
    "result-through-identity": Broken("cache-output", "t is read", cache_update(after="Identity")),
    "open-cache": Broken("cache-static", "is open", cache_update([1, 4, "cache_len", 64])),
}
SOUND = {
    "sigmoid": ONE_NODE,
    "symmetric": rounded(0),
    "add": add(np.float16),
    "topk": top_k(3839),
    "attention": attention(["m"], half("m", 1, 1, 32, 32)),
    "cache": cache_update(),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_rule_of_a_list_has_a_graph_that_breaks_it(name: str) -> None:
    """No rule goes untested, and rules say what to do and where they come from."""
    rules = LISTS[name].rules
    assert {rule.name for rule in rules} <= {broken.rule for broken in BROKEN.values()}
    assert all(rule.remedy.endswith(".") and len(rule.source) > 3 for rule in rules)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_refused_with_node_rule_and_remedy(name: str) -> None:
    """By every list that has the rule; the error names all three."""
    broken = BROKEN[name]
    holders = [rules for rules in LISTS.values() if broken.rule in {rule.name for rule in rules.rules}]
    assert holders
    for rules in holders:
        found = check_graph(broken.model, rules)
        assert broken.rule in {v.rule for v in found}, f"{rules.name} found {found}"
        violation = next(v for v in found if v.rule == broken.rule)
        assert violation.node == broken.where
        assert broken.found in violation.found
        with pytest.raises(RefusedGraphError) as refusal:
            require_allowed(broken.model, [rules], "t1")
        for words in (broken.where, broken.rule, violation.remedy, rules.compiler):
            assert words in str(refusal.value)


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_graph_passes(name: str) -> None:
    """The negative twins: the same operators within the rules break none, where the version has the operator."""
    newer = name in ("attention", "cache")
    for rules in LISTS.values():
        if newer and rules.name == "tensorrt-10.3":
            assert {v.rule for v in check_graph(SOUND[name], rules)} == {"opset", "operator"}
        else:
            assert check_graph(SOUND[name], rules) == ()


def test_a_new_operator_in_the_primitive_dialect_is_refused() -> None:
    """Opset 23's RMSNormalization: too new for TensorRT 10.3 both as an opset and as an operator, fine for 10.15."""
    model = graph([node("RMSNormalization", ["k_cache_0", "u"], ["y"], "norm")], half("u", 64), opset=23)
    found = check_graph(model, LISTS["tensorrt-10.3"])
    assert [(v.node, v.op, v.rule) for v in found] == [
        ("graph", "model", "opset"),
        ("norm", "RMSNormalization", "operator"),
    ]
    assert "--dialect primitive" in found[0].remedy
    assert check_graph(model, LISTS["tensorrt-10.15"]) == ()


def test_violations_of_several_lists_are_named_once() -> None:
    """Two versions of TensorRT share most rules; the user reads each finding once."""
    with pytest.raises(RefusedGraphError) as refusal:
        require_allowed(BROKEN["mixed-add"].model, list(LISTS.values()), "t1")
    assert len(refusal.value.violations) == 1


def test_constants_without_their_data_are_judged() -> None:
    """Types and shapes of external data are known from the graph: no file is opened."""
    model = add(np.float32)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="not-there.bin")
    assert [v.rule for v in check_graph(model, LISTS[RTX])] == ["mixed-types"]


def test_a_zero_point_that_cannot_be_read_is_refused() -> None:
    """Symmetric must be seen, not believed."""
    model = rounded(0)
    model.graph.initializer.remove(model.graph.initializer[1])
    model.graph.input.append(value("z", TensorProto.INT8, []))
    assert [v.found for v in check_graph(model, LISTS[RTX])] == ["z is no constant that lies in the graph"] * 2


@pytest.mark.parametrize("name", [*BROKEN, *SOUND])
def test_tensorrt_rtx_does_what_the_lists_say(name: str, tmp_path: Path) -> None:
    """Its builder refuses what breaks a rule marked "refuses", and builds what breaks one marked "accepts"."""
    pytest.importorskip("tensorrt_rtx_bindings", reason='needs TensorRT-RTX: pip install "eopc[tensorrt-rtx]"')
    broken = BROKEN.get(name)
    builds = broken.builds if broken else True
    if broken:
        marks = {rule.rtx for rules in LISTS.values() for rule in rules.rules if rule.name == broken.rule}
        assert marks <= {"accepts" if builds else "refuses", "varies"}
    compiler, settings = open_compiler("tensorrt_rtx", "a test"), BuildSettings(128, 64, 32)
    model = broken.model if broken else SOUND[name]
    if builds:
        assert build_plan(compiler, model, tmp_path, 86, settings).bytes > 1000
    else:
        with pytest.raises(EngineBuildError, match=r"did not (parse|build) this graph for SM86"):
            build_plan(compiler, model, tmp_path, 86, settings)


def test_the_lists_name_their_versions() -> None:
    """Four compilers; what each adds to the one before."""
    assert set(LISTS) == {"tensorrt-10.3", "tensorrt-10.15", "tensorrt-11.4", RTX}
    new = set(LISTS["tensorrt-10.15"].operators) - set(LISTS["tensorrt-10.3"].operators)
    assert new == {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert not {"topk-sorted", "int4", "fp8"} & names(LISTS[RTX])


def names(rules: AllowList) -> set[str]:
    return {rule.name for rule in rules.rules}
