"""Tiers of a tiny random model as a bundle holds them: weights.bin and tiers/tN/model.onnx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from eopc_compiler.assemble import write_weights
from eopc_compiler.config import LayerDims
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.export import export_prompt_pass, export_tier
from eopc_compiler.extras import EXTRAS_FILE, TierExtras
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, mask_to_json, tier_config
from eopc_compiler.storage import Storage
from eopc_compiler.token_selector import PromptPath, PrunedPrompt
from eopc_compiler.tracing import Target
from eopc_compiler.weights import WeightReader
from eopc_runtime.bundle import Manifest, ModelInfo, Workload
from eopc_runtime.bundle_files import file_entry
from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.tier_info import LayerInfo, PrefillInfo, SelectorInfo, TierInfo

CONTEXT = 256
PRUNED = Mask((LayerDims(0, 1, 128), LayerDims(1, 2, 192)))  # both layers keep pieces, one of them a single KV group
SHORT = Mask((LayerDims(1, 2, 192),))  # a layer dropped, and nothing cut that PRUNED leaves whole
MakeTier = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tier(cached_traces: None, make_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeTier:
    """Writes one tier and returns the folder its weights.bin lies in; the graph is tiers/<tier>/model.onnx.

    With `depth`, also the graph of prompts that run through so many layers of t0, tiers/<tier>/prefill.onnx; with
    `share`, such a share of their tokens through one more, of three layers.
    """
    done: dict[tuple[object, ...], tuple[Path, Any, Any]] = {}

    def make(
        precision: str, dialect: str, dtype: str, tier: str, bias: bool = False, depth: int = 0, share: float = 0
    ) -> Path:
        key, layers = (precision, dialect, dtype, bias, share), 3 if share else 2
        changes = {"model_type": "qwen2"} if bias else {}
        config, tensors = make_tiny(
            hidden_size=128,
            head_dim=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            num_hidden_layers=layers,
            max_position_embeddings=CONTEXT,
            **changes,
        )
        masks = [full_mask(config), PRUNED, SHORT]
        storage = Storage.choose(precision, dtype, DIALECTS[dialect], {128, 192, 256}, layers, precision == "fp8")
        if key not in done:
            root = tmp_path_factory.mktemp("-".join(map(str, key)))
            orders = [UnitOrder(tuple(range(2)), tuple(range(256))) for _ in config.layers]
            tokens = torch.randint(0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
            weights = root / "weights.bin"
            table, _ = write_weights(
                weights, config, tensors.__getitem__, orders, masks, storage, CONTEXT, calibration=[tokens]
            )
            done[key] = root, table, storage
        root, table, storage = done[key]
        path = root / "tiers" / tier / "model.onnx"
        if not path.exists():
            sliced = tier_config(config, masks[int(tier[1:])])
            export_tier(sliced, Target(DIALECTS[dialect], storage.dtype, CONTEXT), table, path)
        if depth and not (prompt := path.with_name("prefill.onnx")).exists():
            pruned = PrunedPrompt(PromptPath(depth, share), {1: torch.linspace(-1, 1, 128)[:, None]})
            TierExtras.write_prompt(root, EXTRAS_FILE, table, WeightReader(root / "weights.bin"), config, pruned)
            own_table = table.with_extras(TierExtras.read(root, EXTRAS_FILE).table)
            target = Target(DIALECTS[dialect], storage.dtype, CONTEXT)
            export_prompt_pass(config, pruned.path, target, own_table, prompt)
        return root

    return make


@pytest.fixture(scope="session")
def make_bundle(make_tier: MakeTier) -> Callable[..., Path]:
    """Writes a bundle of three tiers into a folder; graphs and weights are real, prices are not.

    With `apart`, prompts run through one of t0's two layers, by a graph of their own; with `choosing`, t0 also chooses
    channels of its first layer after them, as far as its gather graph and the manifest tell.
    """

    def make(root: Path, dialect: str, device: str, apart: bool = False, choosing: bool = False) -> Path:
        for tier in ("t0", "t1", "t2"):
            depth = int((apart or choosing) and tier == "t0")
            shutil.copytree(make_tier("fp16", dialect, "float16", tier, depth=depth), root, dirs_exist_ok=True)
        if choosing:
            onnx.save(gather_graph(), str(root / "tiers/t0/gather.onnx"))
        (root / "tokenizer").mkdir()
        (root / "tokenizer/tokenizer.json").write_text("{}")
        energies = tuple(TierEnergy(f"t{i}", 0.1, 0.01, 0.0, 0.5, 0.001, 0.001, "prior") for i in range(3))
        table = EnergyTable(device, "prior", 0.0, energies, own_prompts=("t0",) if choosing else ())
        (root / "energy.json").write_text(json.dumps(table.to_json()))
        write_bundle_manifest(root, dialect, device, apart or choosing, choosing)
        return root

    return make


def with_a_foreign_operator(graph: Path) -> Any:
    """A tier's graph, its logits given by an operator of ONNX Runtime's own at the end, called tail."""
    model = onnx.load(str(graph), load_external_data=False)
    logits = model.graph.output[0].name
    last = next(node for node in model.graph.node if logits in node.output)
    last.output[:] = ["before"]
    model.graph.node.append(helper.make_node("QuickGelu", ["before"], [logits], "tail", domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def with_an_adding_scatter(graph: Path) -> Any:
    """A tier's graph with one more operator, called tail, of a kind that eopc's graphs may have."""
    model = onnx.load(str(graph), load_external_data=False)
    for name, array in {
        "sums": np.zeros(4, np.float32),
        "where": np.zeros(1, np.int64),
        "one": np.ones(1, np.float32),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    tail = helper.make_node("ScatterElements", ["sums", "where", "one"], ["added"], "tail", reduction="add")
    model.graph.node.append(tail)
    return model


def gather_graph(chosen: int = 32, pool: int = 128, stored: str = "fp16", opset: int = 20) -> Any:
    """Rows of width 128 of the channels with most energy: fp16, or int8 with a scale per row, dequantised last."""
    rng = np.random.default_rng(3)
    nodes = [helper.make_node("TopK", ["ffn_energy_0", "count"], ["most", "where"], "most.TopK")]
    constants, outputs = [numpy_helper.from_array(np.array([chosen]), "count")], []
    for kind in ("gate", "up", "down"):
        table, rows = f"{kind}_table_0", f"{kind}_rows_0"
        outputs.append(helper.make_tensor_value_info(rows, TensorProto.FLOAT16, [chosen, 128]))
        if stored == "fp16":
            content = rng.normal(size=(pool, 128)).astype(np.float16)
            nodes.append(helper.make_node("Gather", [table, "where"], [rows], f"{rows}.Gather"))
        else:
            content = rng.integers(-127, 128, (pool, 128)).astype(np.int8)
            scales = rng.uniform(0.01, 0.02, pool).astype(np.float16)
            constants.append(numpy_helper.from_array(scales, f"{table}.scales"))
            nodes += [
                helper.make_node("Gather", [table, "where"], [f"{rows}.codes"]),
                helper.make_node("Gather", [f"{table}.scales", "where"], [f"{rows}.scales"]),
                helper.make_node("DequantizeLinear", [f"{rows}.codes", f"{rows}.scales"], [rows], axis=0),
            ]
        constants.append(numpy_helper.from_array(content, table))
    energy = helper.make_tensor_value_info("ffn_energy_0", TensorProto.FLOAT, [pool])
    graph = helper.make_graph(nodes, "gather", [energy], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def write_bundle_manifest(root: Path, dialect: str, device: str, apart: bool = False, choosing: bool = False) -> None:
    """The manifest of `make_bundle`, listing what is there now."""
    whole = tuple(LayerInfo(i, 2, 256) for i in range(2))
    kept = (whole, *(tuple(LayerInfo(d.source_layer, d.num_key_value_heads, d.intermediate_size) for d in m.layers)
                     for m in (PRUNED, SHORT)))  # fmt: skip
    orders = [UnitOrder(tuple(range(2)), tuple(range(256))) for _ in whole]
    dense = Mask(tuple(LayerDims(i, 2, 256) for i in range(2)))
    for i, mask in enumerate((dense, PRUNED, SHORT)):
        (root / f"tiers/t{i}/mask.json").write_text(json.dumps(mask_to_json(f"t{i}", mask, orders)))
    tiers = tuple(
        TierInfo(
            f"t{i}", None, 0.1, "prior", None, None, {}, 1000, {"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0}, layers,
            TierCost(len(layers), 400_000, 1024, 1e6, 1e5, 1e3), f"tiers/t{i}/model.onnx", f"tiers/t{i}/mask.json",
            "", {},
        )
        for i, layers in enumerate(kept)
    )  # fmt: skip
    if apart:
        cost = replace(tiers[0].cost, prefill=tiers[0].cost)
        tiers = (replace(tiers[0], prefill=PrefillInfo(1, "tiers/t0/prefill.onnx"), cost=cost), *tiers[1:])
    if choosing:
        selector = SelectorInfo("tiers/t0/gather.onnx", core=(128, 256), pool=(128, 0), chosen=(32, 0))
        tiers = (replace(tiers[0], selector=selector, cost=replace(tiers[0].cost, gather_bytes=50_000)), *tiers[1:])
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    model = ModelInfo("tiny", "tests", "llama", 160, 128, 64, 2, CONTEXT, None, ())
    manifest = Manifest(
        "0", model, device, dialect, DIALECTS[dialect].opset, "fp16", "float16", Workload(32, 32), CONTEXT, tiers,
        tuple(file_entry(root, name) for name in names), {}, 0, {},
    )  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest.to_json()))
