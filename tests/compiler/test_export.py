"""Exported graphs in ONNX Runtime against PyTorch on the same bytes, and what graphs may contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import write_weights
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.export import export_tier
from eopc_compiler.importance import observe
from eopc_compiler.initializers import PREFIX
from eopc_compiler.ladder import Mask, full_mask, tier_config
from eopc_compiler.load_tiers import load_tier
from eopc_compiler.model import Cache, Llama, build_model, causal_mask
from eopc_compiler.parity import unround, without_rounded_inputs
from eopc_compiler.storage import Storage
from eopc_compiler.tier_graphs import STEP
from eopc_compiler.tracing import Target, trace
from eopc_compiler.weight_table import WeightTable
from eopc_compiler.weights import WeightReader
from eopc_runtime.graph_check import read_graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
Array = npt.NDArray[Any]

CONTEXT, PROMPT, STEPS = 48, 9, 8
# layer 1 dropped, the others with different KV groups and FFN widths, of 4 groups and 128 channels
PRUNED = Mask((LayerDims(0, 1, 64), LayerDims(2, 3, 96)))
KINDS = [  # dialect, compute type, precision
    ("primitive", "float32", "fp32"),
    ("primitive", "float32", "int8"),
    ("primitive", "float16", "fp16"),
    ("primitive", "float16", "int8"),
    ("native", "float32", "fp32"),
    ("native", "float32", "int8"),
    ("native", "float32", "int4"),
    ("native", "float32", "int8-static"),  # normed inputs rounded to int8 codes too
    ("native", "float32", "int8-codes"),  # all inputs
]
NATIVE_ONLY = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}


@dataclass(frozen=True)
class Ladder:
    """Two exported tiers in a folder laid out like a bundle."""

    root: Path
    config: LlamaConfig
    masks: tuple[Mask, ...]
    table: WeightTable
    bytes_by_type: dict[str, int]
    kind: tuple[str, str, str]

    def graph(self, tier: int, name: str = "model.onnx") -> Any:
        """The graph's protobuf, external data left where it is."""
        return onnx.load(self.root / f"tiers/t{tier}/{name}", load_external_data=False)

    def reference(self, tier: int) -> Llama:
        """The tier in PyTorch, fp32, from the same bytes."""
        config = tier_config(self.config, self.masks[tier])
        return load_tier(config, self.table, WeightReader(self.root / "weights.bin"), CONTEXT)

    def unrounded(self, tier: int) -> Llama:
        """The reference with its inputs left as they are, as `Runner` runs the graph unless told otherwise."""
        model = self.reference(tier)
        unround(model)
        return model


class Runner:
    """A tier in ONNX Runtime, fed as the graph contract says, with unbound buffers and inputs that are not rounded."""

    def __init__(self, ladder: Ladder, tier: int, rounded: bool = False, name: str = "model.onnx") -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # 1: activations stay floating point, so that what differs is the order of sums
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(ladder.root))
        data = (ladder.root / f"tiers/t{tier}/{name}").read_bytes()
        if not rounded:
            data = without_rounded_inputs(data)
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.layers, self.head_dim = ladder.masks[tier].layers, ladder.config.head_dim
        self.dtype = ladder.kind[1]

    def cache(self, capacity: int) -> list[Array]:
        """Zeroed buffers: keys of all layers, then values."""
        shapes = [(1, d.num_key_value_heads, capacity, self.head_dim) for d in self.layers]
        return [np.zeros(s, dtype=self.dtype) for s in shapes * 2]

    def forward(self, cache: list[Array], ids: list[int], start: int, wanted: list[int]) -> tuple[Array, list[Array]]:
        """Logits [len(wanted), vocab] and the written caches."""
        positions = torch.arange(start, start + len(ids))
        mask = causal_mask(positions, cache[0].shape[2], getattr(torch, self.dtype))
        names = [f"{kind}_cache_{i}" for kind in "kv" for i in range(len(self.layers))]
        feeds = {
            "input_ids": np.array([ids]),
            "position_ids": positions[None].numpy(),
            "write_index": np.array([start]),
            "attn_mask": mask.numpy(),
            "logits_index": np.array(wanted),
            **dict(zip(names, cache, strict=True)),
        }
        logits, *written = self.session.run(None, feeds)
        return logits[0], written


def write_ladder(
    root: Path,
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    kind: tuple[str, str, str],
    masks: tuple[Mask, ...],
    graphs: bool = True,
) -> Ladder:
    """weights.bin and one graph per mask, as a build writes them; quantised kinds are equalised as well."""
    dialect, dtype, precision = DIALECTS[kind[0]], kind[1], kind[2]
    generator = torch.Generator().manual_seed(3)
    calibration = [torch.randint(0, config.vocab_size, (4, 32), generator=generator)]
    observed = observe(build_model(config, tensors, CONTEXT), [Batch(0, 1.0, t) for t in calibration], 32)
    orders = [s.order() for s in observed.curves]
    precision, _, inputs = precision.partition("-")
    group = 32 if inputs == "codes" else None
    storage = Storage.choose(
        precision, dtype, dialect, {config.hidden_size, 32}, len(config.layers), bool(inputs), group
    )
    root.mkdir(parents=True, exist_ok=True)
    table, bytes_by_type = write_weights(
        root / "weights.bin", config, tensors.__getitem__, orders, masks, storage, CONTEXT, observed, calibration
    )
    if graphs:
        for tier, mask in enumerate(masks):
            folder, target = root / f"tiers/t{tier}", Target(dialect, storage.dtype, CONTEXT)
            export_tier(tier_config(config, mask), target, table, folder / "model.onnx")
            if storage.single_tokens:
                export_tier(tier_config(config, mask), target, table, folder / STEP, single=True)
    return Ladder(root, config, masks, table, bytes_by_type, (kind[0], storage.dtype, kind[2]))


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def ladder(
    request: pytest.FixtureRequest, make_tiny: MakeTiny, cached_traces: None, tmp_path_factory: pytest.TempPathFactory
) -> Ladder:
    """t0 and a pruned t1 of the tiny llama, in every dialect, compute type and precision."""
    config, tensors = make_tiny()
    return write_ladder(tmp_path_factory.mktemp("bundle"), config, tensors, request.param, (full_mask(config), PRUNED))


def tolerance(kind: tuple[str, str, str]) -> float:
    """Largest allowed deviation of logits, relative to the largest logit."""
    if kind[1] == "float16":
        # fp16 activations against an fp32 reference: 2⁻¹¹ per rounding, through 3 layers; 3e-4 to 6e-4 observed
        return 4e-3
    # fp32 sums in another order: 3e-7 to 5e-7 observed, quantised or not
    return 1e-4 if kind[2] == "fp32" else 1e-3


def deviations(
    ladder: Ladder, tier: int, ids: list[int], capacity: int, name: str = "model.onnx"
) -> tuple[float, float]:
    """Largest relative deviation of logits, and of the caches, over a prefill and teacher-forced steps."""
    model, runner = ladder.unrounded(tier), Runner(ladder, tier, name=name)
    theirs, ours = Cache.empty(model.config, capacity, torch.float32), runner.cache(capacity)
    want = [model.step(theirs, ids[:PROMPT]).numpy()]
    logits, ours = runner.forward(ours, ids[:PROMPT], 0, list(range(PROMPT)))
    got = [logits]
    for position in range(PROMPT, len(ids)):
        want.append(model.step(theirs, [ids[position]]).numpy())
        logits, ours = runner.forward(ours, [ids[position]], position, [0])
        got.append(logits)
    a, b = np.concatenate(got), np.concatenate(want)
    assert a.shape == b.shape == (len(ids), ladder.config.vocab_size) and a.dtype == np.float32
    caches = [(x, y.numpy()) for x, y in zip(ours, theirs.keys + theirs.values, strict=True)]
    return (
        float(np.abs(a - b).max() / np.abs(b).max()),
        max(float(np.abs(x.astype(np.float32) - y).max() / np.abs(y).max()) for x, y in caches),
    )


@pytest.mark.parametrize("kind", KINDS[-2:], ids="-".join)
def test_inputs_are_rounded_as_in_pytorch(make_tiny: MakeTiny, tmp_path: Path, kind: tuple[str, str, str]) -> None:
    """Rounding moves the logits, and the graph's rounding moves them to where PyTorch's does."""
    config, tensors = make_tiny(num_hidden_layers=1)  # one layer, in which values on a border between codes are few
    ladder = write_ladder(tmp_path, config, tensors, kind, (full_mask(config),))
    ids = random_ids(config)
    got, _ = Runner(ladder, 0, rounded=True).forward(Runner(ladder, 0).cache(len(ids)), ids, 0, list(range(len(ids))))
    rounded, unrounded = (m.score(torch.tensor([ids]))[0].numpy() for m in (ladder.reference(0), ladder.unrounded(0)))
    error, effect = np.linalg.norm(got - rounded), np.linalg.norm(rounded - unrounded)
    assert effect > 1e-3 * np.linalg.norm(rounded)
    assert error < 0.1 * effect


def random_ids(config: LlamaConfig, count: int = PROMPT + STEPS) -> list[int]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()


@pytest.mark.parametrize("tier", [0, 1], ids=["t0", "t1"])
def test_graph_equals_torch_over_prefill_and_eight_cached_steps(ladder: Ladder, tier: int) -> None:
    """All logits of the prompt, of eight decode steps, and the caches are PyTorch's on the same bytes."""
    logits, caches = deviations(ladder, tier, random_ids(ladder.config), capacity=24)
    assert logits < tolerance(ladder.kind)
    assert caches < tolerance(ladder.kind)


ROUNDING = pytest.mark.parametrize("ladder", KINDS[-2:], ids="-".join, indirect=True)  # of inputs, to codes


@ROUNDING
@pytest.mark.parametrize("tier", [0, 1], ids=["t0", "t1"])
def test_the_graph_of_single_tokens_computes_the_same_with_inputs_as_they_are(ladder: Ladder, tier: int) -> None:
    """Its logits and caches are PyTorch's on the same bytes: it reads no other than the graph of prompts."""
    assert "QuantizeLinear" not in {n.op_type for n in ladder.graph(tier, STEP).graph.node}
    assert max(deviations(ladder, tier, random_ids(ladder.config), 24, STEP)) < tolerance(ladder.kind)
    prompts, steps = (external_ranges(ladder.graph(tier, name)) for name in ("model.onnx", STEP))
    assert set(steps.values()) == set(prompts.values())
    read_graph(ladder.root, f"tiers/t{tier}/{STEP}", {"weights.bin": (ladder.root / "weights.bin").stat().st_size})


@ROUNDING
def test_onnx_runtime_reads_every_matrix_of_single_tokens_by_its_codes(ladder: Ladder) -> None:
    """Five fused products a tier's layer, gate and up in one, and the head's: none on weights that were unpacked."""
    for tier, mask in enumerate(ladder.masks):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(ladder.root))
        options.optimized_model_filepath = str(ladder.root / "optimized.onnx")
        graph = (ladder.root / f"tiers/t{tier}/{STEP}").read_bytes()
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(ladder.root / "optimized.onnx", load_external_data=False).graph.node
        products = [n.op_type for n in nodes if "MatMul" in n.op_type and "hadamard_32" not in n.input]
        assert products == ["MatMulNBits"] * (4 * len(mask.layers) + 1)


def test_quantised_tiers_stay_close_to_the_dense_model(ladder: Ladder, make_tiny: MakeTiny) -> None:
    """t0's logits are those of the checkpoint, up to the precision of its weights."""
    config, tensors = make_tiny()
    ids = torch.tensor([random_ids(config)])
    dense = build_model(config, tensors, CONTEXT).score(ids)
    error = float((ladder.reference(0).score(ids) - dense).norm() / dense.norm())
    # observed: 4e-7, 6e-4, 0.013 to 0.02 and 0.23: four bits of random weights and random activations
    assert error < {"fp32": 1e-5, "fp16": 3e-3, "int4": 0.3}.get(ladder.kind[2], 0.05)


def test_the_capacity_of_the_cache_is_free(ladder: Ladder) -> None:
    """The same graph gives the same logits with more cache slots, and with a prompt of one token."""
    runner, ids = Runner(ladder, 1), random_ids(ladder.config, 6)
    results = [runner.forward(runner.cache(capacity), ids, 0, [5])[0] for capacity in (6, CONTEXT)]
    np.testing.assert_allclose(results[0], results[1], atol=tolerance(ladder.kind) * np.abs(results[0]).max())
    first, cache = runner.forward(runner.cache(8), ids[:1], 0, [0])
    assert first.shape == (1, ladder.config.vocab_size)
    for position in range(1, 6):
        first, cache = runner.forward(cache, [ids[position]], position, [0])
    np.testing.assert_allclose(first, results[0], atol=tolerance(ladder.kind) * np.abs(first).max())


def test_a_forward_writes_its_slots_and_no_others(ladder: Ladder) -> None:
    """Cache slots before and after the written ones keep their content bit by bit."""
    runner = Runner(ladder, 1)
    cache = [np.full_like(buffer, 0.25) for buffer in runner.cache(10)]
    _, written = runner.forward(cache, [5, 6, 7], 4, [2])
    for buffer in written:
        assert (buffer[:, :, :4] == 0.25).all() and (buffer[:, :, 7:] == 0.25).all()
        assert (buffer[:, :, 4:7] != 0.25).any(axis=(0, 1, 3)).all()


def test_logits_index_picks_positions_in_its_own_order(ladder: Ladder) -> None:
    """Wanted positions come back as asked, each once."""
    runner, ids = Runner(ladder, 0), random_ids(ladder.config, 7)
    everything, _ = runner.forward(runner.cache(8), ids, 0, list(range(7)))
    picked, _ = runner.forward(runner.cache(8), ids, 0, [6, 2])
    np.testing.assert_allclose(picked, everything[[6, 2]], atol=tolerance(ladder.kind) * np.abs(everything).max())


def test_only_standard_operators_of_the_dialects_opset(ladder: Ladder) -> None:
    """One operator domain, the dialect's opset, no functions; the primitive dialect stays below the new operators."""
    for tier, mask in enumerate(ladder.masks):
        graph = ladder.graph(tier)
        opsets = {o.domain: o.version for o in graph.opset_import}
        assert opsets == {"": DIALECTS[ladder.kind[0]].opset} and not graph.functions
        assert {n.domain for n in graph.graph.node} == {""}
        ops = [n.op_type for n in graph.graph.node]
        layers = len(mask.layers)
        if ladder.kind[0] == "primitive":
            assert opsets[""] <= 20 and not NATIVE_ONLY & set(ops)
            assert not any(a.name == "block_size" for n in graph.graph.node for a in n.attribute)
        else:
            counts = {op: ops.count(op) for op in NATIVE_ONLY}
            assert counts == {
                "Attention": layers,
                "RotaryEmbedding": layers,  # queries and keys in one call
                "TensorScatter": 2 * layers,
                "RMSNormalization": 2 * layers + 1,
            }
            attention = [n for n in graph.graph.node if n.op_type == "Attention"]
            assert all(len(n.output) == 1 and len(n.input) == 4 for n in attention)  # what TensorRT takes
        assert ("DequantizeLinear" in ops) == (ladder.kind[2] not in ("fp32", "fp16"))
        # q/k/v in one, gate, up, and the other two: each with a pair of its own, which is what runtimes fuse
        assert ops.count("QuantizeLinear") == layers * {"int8-static": 3, "int8-codes": 5}.get(ladder.kind[2], 0)


@pytest.mark.parametrize("tier", [0, 1], ids=["t0", "t1"])
def test_the_runtime_lets_every_exported_graph_in(ladder: Ladder, tier: int) -> None:
    """What a bundle's graph may hold includes all that is exported, and its tensors fill no file twice."""
    name = f"tiers/t{tier}/model.onnx"
    read_graph(ladder.root, name, {"weights.bin": (ladder.root / "weights.bin").stat().st_size})


def test_inputs_and_outputs_are_the_contracts(ladder: Ladder) -> None:
    """Names, order, types and free dimensions are what the runtime binds."""
    types = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
    compute, int64 = types[ladder.kind[1]], onnx.TensorProto.INT64
    for tier, mask in enumerate(ladder.masks):
        graph = ladder.graph(tier).graph
        caches = {
            f"{kind}_cache_{i}": (compute, [1, d.num_key_value_heads, None, ladder.config.head_dim])
            for kind in "kv"
            for i, d in enumerate(mask.layers)
        }
        inputs = {
            "input_ids": (int64, [1, None]),
            "position_ids": (int64, [1, None]),
            "write_index": (int64, [1]),
            "attn_mask": (compute, [1, 1, None, None]),
            "logits_index": (int64, [None]),
            **caches,
        }
        assert signature(graph.input) == inputs
        outputs = signature(graph.output)
        assert list(outputs) == ["logits", *(f"{name}_out" for name in caches)]
        assert outputs["logits"] == (onnx.TensorProto.FLOAT, [1, None, ladder.config.vocab_size])
        assert all(outputs[f"{name}_out"][0] == compute for name in caches)


def signature(values: Any) -> dict[str, tuple[int, list[int | None]]]:
    """Element type and shape by name; a free dimension is None."""
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


def external_ranges(graph: Any) -> dict[str, tuple[int, int]]:
    """Byte ranges [from, to) in weights.bin by initializer; fails on any other file, and on big inline data."""
    ranges = {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {e.key: e.value for e in tensor.external_data}
            assert facts["location"] == "weights.bin"
            ranges[tensor.name] = (int(facts["offset"]), int(facts["offset"]) + int(facts["length"]))
        else:
            most = 32 * 32 * 4 + 256 if tensor.name == "hadamard_32" else 256
            assert tensor.ByteSize() < most, f"{tensor.name} is stored in the graph"
    return ranges


def test_all_weights_lie_in_weights_bin_alone(ladder: Ladder) -> None:
    """Graphs hold no weights and no other path; t1 reads nothing but bytes that t0 reads as well."""
    size = (ladder.root / "weights.bin").stat().st_size
    dense, pruned = (external_ranges(ladder.graph(tier)) for tier in (0, 1))
    covered = np.zeros(size, dtype=bool)
    for start, end in dense.values():
        assert 0 <= start < end <= size
        assert not covered[start:end].any()  # every byte belongs to one tensor
        covered[start:end] = True
    assert all(covered[start:end].all() for start, end in pruned.values())
    assert sum(end - start for start, end in dense.values()) == sum(ladder.bytes_by_type.values())


def test_a_second_tier_adds_no_bytes(ladder: Ladder, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A ladder of two tiers stores what the dense tier alone does; only alignment gaps between pieces differ."""
    config, tensors = make_tiny()
    alone = write_ladder(tmp_path, config, tensors, ladder.kind, (full_mask(config),), graphs=False)
    assert alone.bytes_by_type == ladder.bytes_by_type
    pieces = len(external_ranges(ladder.graph(0)))
    grown = (ladder.root / "weights.bin").stat().st_size - (tmp_path / "weights.bin").stat().st_size
    assert grown <= 64 * pieces


def test_graphs_say_nothing_about_the_machine_that_wrote_them(ladder: Ladder) -> None:
    """No stack traces, source paths or notes of the exporter travel in a graph."""
    for tier in (0, 1):
        raw = (ladder.root / f"tiers/t{tier}/model.onnx").read_bytes()
        assert b"site-packages" not in raw and b".py" not in raw and str(ladder.root).encode() not in raw


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[6]], ids="-".join)
def test_a_qwen2_with_biases_and_a_tied_head_equals_torch(
    make_tiny: MakeTiny, tmp_path: Path, kind: tuple[str, str, str]
) -> None:
    """q/k/v biases are cut with their columns, and a tied head is written as a matrix of its own."""
    config, tensors = make_tiny(model_type="qwen2", head_dim=None, hidden_size=128, tie_word_embeddings=True)
    written = write_ladder(tmp_path, config, tensors, kind, (full_mask(config), PRUNED), graphs=False)
    path = tmp_path / "tiers/t1/model.onnx"
    export_tier(tier_config(config, PRUNED), Target(DIALECTS[kind[0]], kind[1], CONTEXT), written.table, path)
    assert max(deviations(written, 1, random_ids(config), capacity=20)) < tolerance(kind)


def test_no_two_parameters_are_merged_whatever_memory_holds(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing starts from unset memory; if all of it is zero, norms of different layers must stay apart."""
    to_empty = Llama.to_empty

    def filled(self: Llama, *, device: Any) -> Llama:
        model = to_empty(self, device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        return model

    monkeypatch.setattr(Llama, "to_empty", filled)
    config, _ = make_tiny(attention_bias=True, mlp_bias=True)
    model = trace(tier_config(config, PRUNED), Target(DIALECTS["native"], "float32", CONTEXT))
    kept = {name for name in model.graph.initializers if name.startswith(PREFIX)}
    with torch.device("meta"):
        whole = Llama(tier_config(config, PRUNED), context=CONTEXT).fuse()
    names = {name for name, _ in (*whole.named_parameters(), *whole.named_buffers())}
    assert kept == {PREFIX + name for name in names}
