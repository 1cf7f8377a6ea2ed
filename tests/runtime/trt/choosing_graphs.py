"""A bundle of hand-made graphs whose tiers t1 and t2 choose channels by their prompts, in numbers that can be read.

A token adds 1 to the energy of the channel of its number. Logits are the same for all words but for the channels
chosen: a channel of layer 0 adds UNIT to the word of its number, one of layer 1 ten times as much (see `chosen`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from eopc_runtime.bundle import Manifest, ModelInfo, Workload
from eopc_runtime.bundle_files import file_entry
from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.tier_info import LayerInfo, PrefillInfo, SelectorInfo, TierInfo

CONTEXT, WORDS, HEAD_DIM = 256, 8, 2  # a row has a number for every word
KINDS = {"gate": (1, 1), "up": (2, 3), "down": (3, 5)}  # what a row holds at its channel, and by what it is multiplied
UNIT = 1 * 1 + 2 * 3 + 3 * 5
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
POOL = (6, 5, 0)  # by layer; the third has no choice
TIERS = {  # layers, channels chosen by layer, layers a prompt runs through
    "t0": (3, None, 0),
    "t1": (3, (2, 1, 0), 3),
    "t2": (3, (1, 1, 0), 1),
    "t3": (1, None, 0),
}
node, value = helper.make_node, helper.make_tensor_value_info


def chosen(logits: Any) -> tuple[set[int], set[int]]:
    """The channels of layers 0 and 1 that logits [1, WORDS] tell of."""
    units = np.round((logits[0] - logits[0].min()) / UNIT, 6)
    assert np.array_equal(units, units.round()), "rows of one kind stand where another's belong"
    return {j for j, n in enumerate(units) if n % 10 == 1}, {j for j, n in enumerate(units) if n >= 10}


def write_bundle(root: Path) -> Path:
    """Write the bundle."""
    tiers = []
    for tier, (count, picks, depth) in TIERS.items():
        folder = root / "tiers" / tier
        folder.mkdir(parents=True)
        (folder / "mask.json").write_text("{}")
        save(decode_graph(count, picks or ()), folder / "model.onnx")
        cost = TierCost(count, 1000, 16, 1e3, 1e2, 8)
        extras: dict[str, Any] = {}
        if picks:
            save(prefill_graph(count, picks, depth), folder / "prefill.onnx")
            save(gather_graph(picks), folder / "gather.onnx")
            core = tuple(WORDS - pool for pool in POOL)
            extras["prefill"] = PrefillInfo(depth, f"tiers/{tier}/prefill.onnx")
            extras["selector"] = SelectorInfo(f"tiers/{tier}/gather.onnx", core, POOL, picks)
            cost = TierCost(count, 1000, 16, 1e3, 1e2, 8, prefill=cost, gather_bytes=100)
        layers = tuple(LayerInfo(i, 1, WORDS) for i in range(count))
        shares = {"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0}
        tiers.append(
            TierInfo(
                tier, None, 0.1, "prior", None, None, {}, 1000, shares, layers, cost, f"tiers/{tier}/model.onnx",
                f"tiers/{tier}/mask.json", "", {}, **extras,
            )
        )  # fmt: skip
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_text("{}")
    (root / "weights.bin").write_bytes(b"none")
    prices = tuple(TierEnergy(t.tier, 0.1, 0.01, 0.0, 0.1, 0.001, 0.001, "prior") for t in tiers)
    own = tuple(t.tier for t in tiers if t.selector)
    (root / "energy.json").write_text(json.dumps(EnergyTable("orin", "prior", 0.0, prices, own_prompts=own).to_json()))
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    model = ModelInfo("hand-made", "tests", "llama", WORDS, WORDS, HEAD_DIM, 3, CONTEXT, None, ())
    manifest = Manifest(
        "0", model, "orin", "native", 20, "fp32", "float32", Workload(8, 8), CONTEXT, tuple(tiers),
        tuple(file_entry(root, name) for name in names), {}, 0, {},
    )  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return root


def decode_graph(layers: int, picks: Sequence[int]) -> Any:
    """Logits: a little of the tokens so far for all words, and what the gathered rows hold."""
    nodes, inputs, outputs = caches(layers)
    nodes += [
        node("Greater", ["attn_mask", "below"], ["visible"]),
        node("Cast", ["visible"], ["seen"], to=FLOAT),
        node("MatMul", ["seen", "k_cache_0_out"], ["sums"]),
        node("ReduceSum", ["sums", "head_axes"], ["context"], keepdims=0),
        node("Gather", ["context", "logits_index"], ["wanted"], axis=0),
        node("Expand", ["wanted_column", "words"], ["level"]),
    ]
    nodes.insert(-1, node("Reshape", ["wanted", "column"], ["wanted_column"]))
    total = "level"
    for i in (i for i, count in enumerate(picks) if count):
        for kind, (_, factor) in KINDS.items():
            rows = f"{kind}_rows_{i}"
            inputs.append(value(rows, FLOAT, [picks[i], WORDS]))
            nodes += [
                node("ReduceSum", [rows, "first_axis"], [f"{rows}.sum"], keepdims=0),
                node("Mul", [f"{rows}.sum", f"factor_{factor * 10**i}"], [f"{rows}.part"]),
                node("Add", [total, f"{rows}.part"], [f"{rows}.total"]),
            ]
            total = f"{rows}.total"
    nodes.append(node("Identity", [total], ["logits"]))
    inputs.append(value("logits_index", INT64, ["wanted"]))
    outputs.append(value("logits", FLOAT, [1, "wanted", WORDS]))
    factors = [constant(f"factor_{f * 10**i}", np.float32(f * 10**i)) for i in (0, 1) for _, f in KINDS.values()]
    return model_of(
        nodes, inputs, outputs, *factors, constant("below", np.float32(-1)), constant("head_axes", [0, 1, 3]),
        constant("first_axis", [0]), constant("column", [1, -1, 1]), constant("words", [1, 1, WORDS]),
    )  # fmt: skip


def prefill_graph(layers: int, picks: Sequence[int], depth: int) -> Any:
    """Fills the caches, and adds to the energies of layers that choose and that the prompt runs through."""
    nodes, inputs, outputs = caches(layers)
    nodes.append(node("Squeeze", ["input_ids", "first_axis"], ["tokens"]))
    for i in (i for i, count in enumerate(picks[:depth]) if count):
        name = f"ffn_energy_{i}"
        inputs.append(value(name, FLOAT, [POOL[i]]))
        outputs.append(value(f"{name}_out", FLOAT, [POOL[i]]))
        nodes += [
            node("OneHot", ["tokens", f"pool_{i}", "off_on"], [f"{name}.each"]),  # none for a token beyond the pool
            node("ReduceSum", [f"{name}.each", "first_axis"], [f"{name}.chunk"], keepdims=0),
            node("Add", [name, f"{name}.chunk"], [f"{name}_out"]),
        ]
    pools = [constant(f"pool_{i}", pool) for i, pool in enumerate(POOL)]
    return model_of(
        nodes, inputs, outputs, *pools, constant("off_on", np.array([0, 1], np.float32)), constant("first_axis", [0])
    )


def gather_graph(picks: Sequence[int], words: int = WORDS) -> Any:
    """Rows of the channels with most energy: a number at the word of the channel."""
    nodes, inputs, outputs, constants = [], [], [], []
    for i in (i for i, count in enumerate(picks) if count):
        inputs.append(value(f"ffn_energy_{i}", FLOAT, [POOL[i]]))
        nodes.append(node("TopK", [f"ffn_energy_{i}", f"count_{i}"], [f"most_{i}", f"where_{i}"]))
        constants.append(constant(f"count_{i}", [picks[i]]))
        for kind, (number, _) in KINDS.items():
            nodes.append(node("Gather", [f"{kind}_table_{i}", f"where_{i}"], [f"{kind}_rows_{i}"]))
            outputs.append(value(f"{kind}_rows_{i}", FLOAT, [picks[i], words]))
            constants.append(constant(f"{kind}_table_{i}", number * np.eye(POOL[i], words, dtype=np.float32)))
    return model_of(nodes, inputs, outputs, *constants)


def caches(layers: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Nodes, inputs and outputs that write the number of each token into every cache at its position."""
    nodes = [
        node("Reshape", ["position_ids", "slots"], ["positions"]),
        node("Expand", ["positions", "heads"], ["where"]),
        node("Cast", ["input_ids"], ["numbers"], to=FLOAT),
        node("Reshape", ["numbers", "slots"], ["update"]),
        node("Expand", ["update", "heads"], ["what"]),
    ]
    inputs = [
        value("input_ids", INT64, [1, "seq"]),
        value("position_ids", INT64, [1, "seq"]),
        value("write_index", INT64, [1]),
        value("attn_mask", FLOAT, [1, 1, "seq", "cache_len"]),
    ]
    outputs = []
    for name in (f"{kind}_cache_{i}" for i in range(layers) for kind in "kv"):
        inputs.append(value(name, FLOAT, [1, 1, "cache_len", HEAD_DIM]))
        outputs.append(value(f"{name}_out", FLOAT, [1, 1, "cache_len", HEAD_DIM]))
        nodes.append(node("ScatterElements", [name, "where", "what"], [f"{name}_out"], axis=2))
    return nodes, inputs, outputs


def model_of(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], *constants: Any) -> Any:
    """A model; the shapes that `caches` needs are among its constants."""
    shapes = [constant("slots", [1, 1, -1, 1]), constant("heads", [1, 1, 1, HEAD_DIM])]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), [*shapes, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def constant(name: str, content: Any) -> Any:
    """An initializer."""
    return numpy_helper.from_array(np.asarray(content), name)


def save(model: Any, path: Path) -> None:
    """Check a model and write it."""
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
