"""Prefill-only pruning: what the prompt leaves in the cache, in PyTorch and as a graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eopc_compiler import sequences
from eopc_compiler.assemble import write_weights
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.export import export_prompt_pass
from eopc_compiler.extras import TierExtras
from eopc_compiler.handover import ContinuationLoss, inherited
from eopc_compiler.importance import observe
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.load_tiers import load_prompt_pass
from eopc_compiler.model import Cache, Llama, build_model, causal_mask
from eopc_compiler.parity import unround, without_rounded_inputs
from eopc_compiler.prefill_ablation import (
    PrefillPruning,
    continuation_losses,
    first,
    interleaved,
    last,
)
from eopc_compiler.prompt_cache import PromptCache
from eopc_compiler.prompt_pass import PromptPass
from eopc_compiler.sequences import attention_received, run_blocks, run_layer
from eopc_compiler.storage import Storage
from eopc_compiler.tier_repair import repair_tier
from eopc_compiler.token_selector import PromptPath, PrunedPrompt
from eopc_compiler.tracing import Target
from eopc_compiler.weights import WeightReader

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
PROMPT, LENGTH, CONTEXT = 70, 80, 96
PATHS = [PromptPath(1), PromptPath(2), PromptPath(3), PromptPath(1, 0.5), PromptPath(1, 0.75)]  # of 3 layers
SCORERS = {1: torch.randn(64, 1, generator=torch.Generator().manual_seed(11))}


def deployed(make_tiny: MakeTiny, **changes: bool) -> Llama:
    config, tensors = make_tiny(**changes)
    return build_model(config, tensors, CONTEXT).fuse()


def prompt_pass(model: Llama, path: PromptPath) -> PromptPass:
    """The pass of a deployment-form model, on its tensors."""
    fresh = PromptPass(model.config, path, context=CONTEXT)
    state = {n: t for n, t in model.state_dict().items() if n in fresh.state_dict()}
    state |= {f"model.layers.{i}.token_scorer.weight": SCORERS[i] for i in path.chosen(len(model.blocks))}
    for index, layer in list(enumerate(model.blocks))[path.running(len(model.blocks)) :]:
        attention = layer.self_attn
        assert attention.qkv_proj is not None
        queries = attention.q_heads * attention.head_dim
        state[f"model.layers.{index}.self_attn.kv_proj.weight"] = attention.qkv_proj.weight[:, queries:]
        if attention.qkv_proj.bias is not None:
            state[f"model.layers.{index}.self_attn.kv_proj.bias"] = attention.qkv_proj.bias[queries:]
    fresh.load_state_dict(state)
    return fresh


def tokens_of(count: int, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 160, (count, length), generator=torch.Generator().manual_seed(5))


def filled(model: Llama, path: PromptPath, ids: list[int]) -> Cache:
    """The cache of a prompt: all but its last token by the pass, the last one by the whole model."""
    cache = Cache.empty(model.config, CONTEXT, model.dtype)
    if path.depth < len(model.blocks):
        prompt_pass(model, path).fill(cache, ids[:-1])
        model.step(cache, ids[-1:])
    else:
        model.step(cache, ids)
    return cache


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in fp32 also where the processor has bfloat16."""
    monkeypatch.setattr(sequences, "native_bfloat16", lambda: False)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("path", PATHS)
def test_the_pass_leaves_what_the_planner_reckons_with(make_tiny: MakeTiny, path: PromptPath, biased: bool) -> None:
    """Keys and values of every layer are those of `PromptCache`, the boundary token's included."""
    model = deployed(make_tiny, attention_bias=biased)
    tokens = tokens_of(1)
    cache = filled(model, path, tokens[0, :PROMPT].tolist())
    walk, x = PromptCache(model, PROMPT, PrunedPrompt(path, SCORERS)), model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.blocks):
        (keys, values), _ = walk.enter(index, x)
        torch.testing.assert_close(keys, cache.keys[index][:, :, :PROMPT], atol=1e-5, rtol=0)
        torch.testing.assert_close(values, cache.values[index][:, :, :PROMPT], atol=1e-5, rtol=0)
        x = run_layer(model, layer, x)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("path", PATHS)
def test_the_continuation_loss_is_that_of_decoding_behind_the_pass(make_tiny: MakeTiny, path: PromptPath) -> None:
    """Step by step through the cache, as the runtime goes: the mean loss of the answer's tokens."""
    model, tokens = deployed(make_tiny), tokens_of(3)
    want = []
    for row in tokens.tolist():
        cache = filled(model, path, row[:PROMPT])
        logits = torch.stack([model.step(cache, [token])[-1] for token in row[PROMPT:]])
        want.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[PROMPT + 1 :])))
    losses = ContinuationLoss(model, [Batch(0, 1.0, tokens)], PROMPT, PrunedPrompt(path, SCORERS))
    assert losses.of_mask(full_mask(model.config))[0] == pytest.approx(float(sum(want) / len(want)), abs=1e-5)


def test_skipping_nothing_is_the_dense_cache_bit_for_bit(make_tiny: MakeTiny) -> None:
    """With all layers run, depth makes no difference to a loss."""
    model, batches = deployed(make_tiny), [Batch(0, 1.0, tokens_of(3))]
    full = full_mask(model.config)
    assert ContinuationLoss(model, batches, PROMPT, PrunedPrompt(PromptPath(len(model.blocks)))).of_mask(
        full
    ) == ContinuationLoss(model, batches, PROMPT).of_mask(full)


def test_layers_below_the_first_skipped_one_hold_what_they_held(make_tiny: MakeTiny) -> None:
    """Bit for bit: nothing below a skipped layer can know of it."""
    model, ids = deployed(make_tiny), tokens_of(1)[0, :PROMPT].tolist()
    dense, pruned = Cache.empty(model.config, CONTEXT, model.dtype), Cache.empty(model.config, CONTEXT, model.dtype)
    prompt_pass(model, PromptPath(3)).fill(dense, ids)
    prompt_pass(model, PromptPath(1)).fill(pruned, ids)
    same = [torch.equal(a, b) for a, b in zip(dense.keys + dense.values, pruned.keys + pruned.values, strict=True)]
    assert same == [True, True, False] * 2  # layer 1 writes before it is skipped


@pytest.mark.usefixtures("exact")
def test_repair_is_fitted_on_the_pruned_prompt(make_tiny: MakeTiny) -> None:
    """A decode tier repaired behind a skipping prompt loses less behind one than a tier repaired behind a dense one."""
    model, batches = deployed(make_tiny), [Batch(0, 1.0, tokens_of(64))]
    halved = Mask(tuple(LayerDims(i, 4, 64) for i in range(3)))
    pruned = PrunedPrompt(PromptPath(1))
    losses = ContinuationLoss(model, batches, PROMPT, pruned)
    ours, other = (repair_tier(model, halved, batches, PROMPT, {0, 1, 2}, pruned=p)[0] for p in (pruned, None))
    assert apart(losses, ours, halved) < apart(losses, other, halved)


def apart(losses: ContinuationLoss, tier: Llama, mask: Mask) -> float:
    """Mean squared distance of the residual stream behind the last layer from the dense model's."""
    (batch,), prompt = losses.batches, losses.prompt
    dense = run_blocks(losses.model, batch.tokens)[:, prompt:]
    x = losses.model.model.embed_tokens(batch.tokens)
    walk, ours = PromptCache(losses.model, prompt, losses.pruned), x[:, prompt:]
    for index, layer in enumerate(losses.model.blocks):
        past, _ = walk.enter(index, x)
        ours = run_layer(tier, tier.blocks[index], ours, inherited(past, mask.layers[index].num_key_value_heads))
        x = run_layer(losses.model, layer, x)
    return float((ours - dense).pow(2).mean())


def test_a_prompt_of_one_token_skips_nothing(make_tiny: MakeTiny) -> None:
    """It is its own boundary."""
    with pytest.raises(ValueError, match="boundary"):
        PromptCache(deployed(make_tiny), 1, PrunedPrompt(PromptPath(2)))


KINDS = [  # dialect, compute type, precision, static inputs, whether a tier below cuts q/k/v into pieces
    ("primitive", "float32", "fp32", False, True),
    ("primitive", "float16", "int8", False, False),
    ("native", "float32", "int4", False, True),
    ("native", "float32", "int8", True, False),
]


@pytest.mark.parametrize("path", [PromptPath(1), PromptPath(1, 5 / 16)], ids=["layers", "tokens"])
@pytest.mark.parametrize(("dialect", "dtype", "precision", "static", "cut"), KINDS)
def test_the_graph_writes_what_pytorch_writes(
    make_tiny: MakeTiny,
    tmp_path: Path,
    dialect: str,
    dtype: str,
    precision: str,
    static: bool,
    cut: bool,
    path: PromptPath,
) -> None:
    """In two chunks, in every dialect and kind of storage, also where a tier below cuts q/k/v into pieces."""
    config, tensors = make_tiny(attention_bias=True)
    batches = [Batch(0, 1.0, tokens_of(4, 32))]
    observed = observe(build_model(config, tensors, CONTEXT), batches, 32)
    storage = Storage.choose(precision, dtype, DIALECTS[dialect], {config.hidden_size, 32}, len(config.layers), static)
    masks = [full_mask(config), *([Mask((LayerDims(0, 1, 64), LayerDims(2, 3, 96)))] if cut else [])]
    orders = [c.order() for c in observed.curves]
    args = (config, tensors.__getitem__, orders, masks, storage, CONTEXT, observed, [b.tokens for b in batches])
    table, _ = write_weights(tmp_path / "weights.bin", *args)
    reader = WeightReader(tmp_path / "weights.bin")
    TierExtras.write_prompt(tmp_path, "own.bin", table, reader, config, PrunedPrompt(path, SCORERS))
    own = TierExtras.read(tmp_path, "own.bin")
    assert own.path
    own.path.rename(tmp_path / "own.bin")
    table = table.with_extras(own.table)
    export_prompt_pass(config, path, Target(DIALECTS[dialect], dtype, CONTEXT), table, tmp_path / "prefill.onnx")

    reader = WeightReader(tmp_path / "weights.bin", {"own.bin": tmp_path / "own.bin"})
    reference = load_prompt_pass(config, path, table, reader, CONTEXT)
    unround(reference)
    ids, want = tokens_of(1)[0].tolist(), Cache.empty(config, CONTEXT, torch.float32)
    for chunk in (ids[:30], ids[30:]):
        reference.fill(want, chunk)
    got = run_graph(tmp_path, ids, want, dtype)
    scale = max(float(t.abs().max()) for t in want.keys + want.values)
    worst = max(float((a - b).abs().max()) for a, b in zip(got, want.keys + want.values, strict=True))
    assert worst < (4e-3 if dtype == "float16" else 1e-4) * scale  # 2^-11 per rounding through one layer; fp32 sums


def run_graph(root: Path, ids: list[int], like: Cache, dtype: str) -> list[Tensor]:
    """Keys, then values of all layers after the ids were appended in two chunks."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root))
    graph = without_rounded_inputs((root / "prefill.onnx").read_bytes())
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs() if "_cache_" not in x.name] == []  # no logits, no head
    count = len(like.keys)
    names = [f"{kind}_cache_{i}" for kind in "kv" for i in range(count)]
    caches = [np.zeros(tuple(t.shape), dtype=dtype) for t in like.keys + like.values]
    for start, chunk in ((0, ids[:30]), (30, ids[30:])):
        positions = torch.arange(start, start + len(chunk))
        feeds = {
            "input_ids": np.array([chunk]),
            "position_ids": positions[None].numpy(),
            "write_index": np.array([start]),
            "attn_mask": causal_mask(positions, like.capacity, getattr(torch, dtype)).numpy(),
        }
        caches = session.run(None, feeds | dict(zip(names, caches, strict=True)))
    return [torch.from_numpy(c).float() for c in caches]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("path", PATHS)
def test_the_reference_with_all_its_parts_is_what_builds_reckon_with(make_tiny: MakeTiny, path: PromptPath) -> None:
    """The paper's procedure and the choice of tokens, written a second time for ablations, give the same losses."""
    model, tokens = deployed(make_tiny), tokens_of(3)
    scorers = SCORERS | {2: SCORERS[1]}  # the last layer has nothing to give, whichever tokens run through it here
    pruning = PrefillPruning(last(3, 3 - path.depth), share=path.share, scorers=scorers)
    want = continuation_losses(model, tokens, PROMPT, pruning)[:, 1:].mean()  # the first is the prefill tier's
    losses = ContinuationLoss(model, [Batch(0, 1.0, tokens)], PROMPT, PrunedPrompt(path, SCORERS))
    assert losses.of_mask(full_mask(model.config))[0] == pytest.approx(float(want), abs=1e-5)


@pytest.mark.usefixtures("exact")
def test_skipping_the_last_layer_alone_harms_nothing_but_without_its_keys_and_values(make_tiny: MakeTiny) -> None:
    """It has nothing else to give to a prompt; independent KV is then exact, and holding none is not."""
    model, tokens = deployed(make_tiny), tokens_of(3)
    dense, exact, empty = (
        continuation_losses(model, tokens, PROMPT, pruning)
        for pruning in (
            PrefillPruning(frozenset()),
            PrefillPruning(frozenset({2})),
            PrefillPruning(frozenset({2}), independent_kv=False),
        )
    )
    torch.testing.assert_close(exact, dense, atol=1e-5, rtol=0)
    assert float((empty - dense).abs().max()) > 1e-2


def test_choices_of_layers_are_as_many_as_asked_for() -> None:
    """From the end, from the start, and spread over all of them."""
    assert last(30, 3) == {27, 28, 29} and first(30, 3) == {0, 1, 2}
    for count in (1, 7, 10, 29, 30):
        assert len(interleaved(30, count)) == count and interleaved(30, count) <= set(range(30))


@pytest.mark.usefixtures("exact")
def test_tokens_chosen_for_a_layer_are_as_many_as_asked_for_and_all_of_them_skip_nothing(make_tiny: MakeTiny) -> None:
    """From none, which is the pruned prefill, to all, which is the dense one."""
    model, tokens = deployed(make_tiny), tokens_of(3)
    dense, none, some, every = (
        continuation_losses(
            model, tokens, PROMPT, PrefillPruning(frozenset(skipped), share=share, chosen_by="attention")
        )
        for skipped, share in (((), 0.0), ((1, 2), 0.0), ((1, 2), 0.625), ((1, 2), 1.0))
    )
    torch.testing.assert_close(every, dense, atol=1e-5, rtol=0)
    assert len({round(float(losses.mean()), 6) for losses in (dense, none, some)}) == 3


@pytest.mark.usefixtures("exact")
def test_tokens_are_chosen_by_the_prompt_alone(make_tiny: MakeTiny) -> None:
    """Neither what follows the prompt nor the other sequences of a batch change a loss before the difference."""
    model, tokens = deployed(make_tiny), tokens_of(3)
    pruning = PrefillPruning(frozenset({1, 2}), share=0.625, chosen_by="attention")
    changed = tokens.clone()
    changed[:, PROMPT + 5 :] = (changed[:, PROMPT + 5 :] + 1) % 160
    found, other = (continuation_losses(model, t, PROMPT, pruning) for t in (tokens, changed))
    torch.testing.assert_close(found[:, :5], other[:, :5], atol=1e-5, rtol=0)
    alone = continuation_losses(model, tokens[1:2], PROMPT, pruning)
    torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=0)


def test_attention_received_is_what_the_last_positions_give(make_tiny: MakeTiny) -> None:
    """It sums to 1, and a position after all observers but one gets only that one's."""
    model = deployed(make_tiny)
    x = model.model.embed_tokens(tokens_of(2))
    received = attention_received(model, model.blocks[0], x, 4)
    torch.testing.assert_close(received.sum(1), torch.ones(2))
    last_alone = attention_received(model, model.blocks[0], x, 1)
    torch.testing.assert_close(received[:, -1] * 4, last_alone[:, -1])
