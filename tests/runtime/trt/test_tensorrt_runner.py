"""The TensorRT runner on fake TensorRT and CUDA modules that run the same graphs and keep the API's rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eopc_runtime.errors import (
    BundleError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    EngineMismatchError,
    PromptError,
)
from eopc_runtime.runners.choose import open_tensorrt
from eopc_runtime.runners.ort_pool import OrtPool
from eopc_runtime.session import Session

PROMPT = list(b"The quick brown fox jumps over the lazy dog, again and again and again.")  # 71 tokens, three chunks
TOLERANCE = 2e-4  # fp32; attention sums over 256 slots here and over the used ones there (seen: 1e-5)


def test_a_session_generates_the_same_tokens_as_on_the_cpu(make_engines: Any, gpu: Any) -> None:
    """Greedy text of every tier equals ONNX Runtime's; the same sequence again, and decode runs as a CUDA graph."""
    root = make_engines().root
    with Session.open(root, runner="ort") as session:
        wanted = [session.generate("Once upon a time", tier=tier, max_new_tokens=24).text for tier in session.tiers]
    with Session.open(root, runner="tensorrt") as session:
        for _ in range(2):
            for tier, text in zip(session.tiers, wanted, strict=True):
                assert session.generate("Once upon a time", tier=tier, max_new_tokens=24).text == text
        assert session.runner is not None
        assert (session.runner.version, session.notes) == ("TensorRT 10.3.0, Orin", ())
    assert gpu.cuda.launches > 2 * 3 * 15
    assert gpu.trt.profile_switches == 0
    assert (gpu.cuda.used, gpu.cuda.host, gpu.cuda.graphs, gpu.cuda.streams, gpu.trt.live_engines) == (0, {}, {}, {}, 0)


def test_chunks_and_single_steps_give_the_logits_of_one_pass(make_engines: Any, gpu: Any) -> None:
    """A prompt longer than the profile runs in chunks; all of its logits can be had from an engine that gives one."""
    bundle = make_engines()
    want = run_all(OrtPool(bundle).get("t1"), PROMPT)
    runner = open_tensorrt(bundle).pool.get("t1")
    np.testing.assert_allclose(run_all(runner, PROMPT), want, atol=TOLERANCE)
    cache = runner.new_cache()
    gpu.trt.runs.clear()
    last = runner.forward(cache, PROMPT)
    assert [n for _, n in gpu.trt.runs] == [24, 24, 23]
    np.testing.assert_allclose(last, want[-1:], atol=TOLERANCE)
    assert (cache.length, last.dtype) == (len(PROMPT), np.float32)


def test_a_pruned_prefill_runs_on_an_engine_without_logits(make_engines: Any, prefill_bundle: Any, gpu: Any) -> None:
    """Prompts in chunks of its engine, their last token on the other; whole texts are scored by the whole model."""
    bundle = make_engines(source=prefill_bundle)
    cpu, runner = OrtPool(bundle).get("t1"), open_tensorrt(bundle).pool.get("t1")
    want, cache = cpu.new_cache(), runner.new_cache()
    first = cpu.prefill(want, PROMPT).copy()
    gpu.trt.runs.clear()
    np.testing.assert_allclose(runner.prefill(cache, PROMPT), first, atol=TOLERANCE)
    assert [n for _, n in gpu.trt.runs] == [24, 24, 22, 1]
    assert [g.rpartition("/")[2] for g, _ in gpu.trt.runs] == ["prefill.onnx"] * 3 + ["decode.onnx"]
    np.testing.assert_allclose(runner.forward(cache, [7]), cpu.forward(want, [7]), atol=TOLERANCE)
    np.testing.assert_allclose(run_all(runner, PROMPT[:9]), run_all(cpu, PROMPT[:9]), atol=TOLERANCE)


def test_an_engine_with_logits_of_every_position_gives_them_at_once(make_engines: Any, gpu: Any) -> None:
    """No step per token where the profile allows more logits."""
    bundle = make_engines(logits=24)
    gpu.trt.runs.clear()
    found = run_all(open_tensorrt(bundle).pool.get("t0"), PROMPT)
    assert [n for _, n in gpu.trt.runs] == [24, 24, 23]
    np.testing.assert_allclose(found, run_all(OrtPool(bundle).get("t0"), PROMPT), atol=TOLERANCE)


def test_prefill_after_a_captured_decode_and_decode_again(make_engines: Any, gpu: Any) -> None:
    """What crashed on Orin with one context: graph, other profile, graph. No context changes its profile here."""
    bundle = make_engines()
    runner, reference = open_tensorrt(bundle).pool.get("t0"), OrtPool(bundle).get("t0")
    cache, other = runner.new_cache(), reference.new_cache()
    for part in (PROMPT[:20], [1], [2], [3], PROMPT[20:60], [4], [5], [6]):
        np.testing.assert_allclose(runner.forward(cache, part), reference.forward(other, part), atol=TOLERANCE)
    assert gpu.cuda.captures == 1  # the buffers stay where they are, so one graph serves on
    assert gpu.cuda.launches == 5
    assert gpu.trt.profile_switches == 0


def test_the_fake_loses_the_device_when_a_profile_changes_after_capture(make_engines: Any, gpu: Any) -> None:
    """The negative twin: the rule that the runner keeps is enforced."""
    runner = open_tensorrt(make_engines()).pool.get("t0")
    cache = runner.new_cache()
    for token in (1, 2, 3):
        runner.forward(cache, [token])
    runner._decode._context.set_optimization_profile_async(0, runner._decode._space.stream)  # type: ignore[attr-defined]
    with pytest.raises(DeviceLostError, match="CUDA error 700"):
        runner.forward(cache, [4])


def test_a_refused_capture_falls_back_to_plain_steps_and_says_so(make_engines: Any, gpu: Any) -> None:
    """Same tokens, no graph, one attempt, one note."""
    root = make_engines().root
    gpu.trt.capture_refused = True
    with Session.open(root, runner="ort") as session:
        want = session.generate("Once upon a time", tier="t1", max_new_tokens=12).text
    with Session.open(root, runner="tensorrt") as session:
        for _ in range(2):
            assert session.generate("Once upon a time", tier="t1", max_new_tokens=12).text == want
        (note,) = session.notes
    assert note.startswith("t1 decode runs without a CUDA graph: TensorRT did not enqueue a step")
    assert "operation not permitted when stream is capturing" in note
    assert (gpu.cuda.launches, gpu.cuda.captures) == (0, 0)


@pytest.mark.parametrize("lower", ["t1", "t2"])
def test_a_sequence_moves_down_without_a_copy(make_engines: Any, gpu: Any, lower: str) -> None:
    """The lower tier goes on from the kept layers and heads, in the same memory, as on the CPU."""
    bundle = make_engines()
    pool, reference = open_tensorrt(bundle).pool, OrtPool(bundle)
    upper, other = pool.get("t0"), reference.get("t0")
    cache, twin = upper.new_cache(), other.new_cache()
    for part in (PROMPT[:30], [7], [8], [9]):
        upper.forward(cache, part)
        other.forward(twin, part)
    blocks = set(gpu.cuda.blocks)
    runner, reference_runner = pool.get(lower), reference.get(lower)
    cache, twin = runner.adopt(cache), reference_runner.adopt(twin)
    assert cache.length == 33
    for part in ([10], [11], [12], PROMPT[30:40], [13], [14]):
        np.testing.assert_allclose(runner.forward(cache, part), reference_runner.forward(twin, part), atol=TOLERANCE)
    arena = cache.lease.arena.base
    assert arena in blocks
    with pytest.raises(ValueError, match="handed down the ladder"):
        upper.adopt(cache)


def test_a_cache_that_was_written_over_is_refused(make_engines: Any, gpu: Any) -> None:
    """The same prefix may be handed down twice, one after the other; the first heir cannot go on then."""
    pool = open_tensorrt(make_engines()).pool
    upper, lower = pool.get("t0"), pool.get("t1")
    cache = upper.new_cache()
    upper.forward(cache, PROMPT[:10])
    first, second = lower.adopt(cache), lower.adopt(cache)
    a = [lower.forward(first, [t]) for t in (1, 2, 3)]
    b = [lower.forward(second, [t]) for t in (1, 2, 3)]
    np.testing.assert_allclose(a, b, atol=TOLERANCE)
    with pytest.raises(ValueError, match="written over"):
        lower.forward(first, [4])
    upper.forward(cache, [5])
    with pytest.raises(ValueError, match="written over"):
        lower.adopt(second) if second.tier != lower.tier else lower.forward(second, [4])


def test_memory_is_shared_by_tiers_and_used_again(make_engines: Any, gpu: Any) -> None:
    """One arena for sequences one after another, a second for two at a time; scratch is the maximum, not the sum."""
    bundle = make_engines(plan={"scratch": [1 << 20, 1 << 16]})
    pool: Any = open_tensorrt(bundle).pool
    for tier in ("t0", "t1", "t2", "t0"):
        cache = pool.get(tier).new_cache()
        pool.get(tier).forward(cache, PROMPT[:5])
    assert pool._space.scratch.nbytes == 1 << 20
    assert len(pool._arenas) == 2  # the loop's old cache lived until its name was taken
    layers = bundle.manifest.tiers[0].layers
    heads = sum(layer.kv_heads for layer in layers)
    assert cache.nbytes == 2 * heads * 256 * 16 * 4
    second = pool.get("t0").new_cache()
    assert len(pool._arenas) == 2
    del cache, second
    pool.get("t1").new_cache()
    assert len(pool._arenas) == 2


def test_a_larger_scratch_of_a_later_tier_moves_what_earlier_ones_use(make_engines: Any, gpu: Any) -> None:
    """A captured graph knows the old address: it is captured again, and the logits stay right."""
    bundle = make_engines()
    pool: Any = open_tensorrt(bundle).pool
    reference = OrtPool(bundle).get("t1")
    runner = pool.get("t1")
    cache, twin = runner.new_cache(), reference.new_cache()
    for token in (1, 2, 3, 4):
        runner.forward(cache, [token])
        reference.forward(twin, [token])
    pool._space.scratch.reserve(1 << 22)
    for token in (5, 6, 7):
        np.testing.assert_allclose(runner.forward(cache, [token]), reference.forward(twin, [token]), atol=TOLERANCE)
    assert gpu.cuda.captures == 2


def test_separate_engines_for_prefill_and_decode(make_engines: Any, gpu: Any) -> None:
    """Where the phases have a plan each, both are loaded, and the sequence is the same."""
    bundle = make_engines(apart=("t0", "t2"))
    for tier in ("t0", "t2"):
        got, want = open_tensorrt(bundle).pool.get(tier), OrtPool(bundle).get(tier)
        a, b = got.new_cache(), want.new_cache()
        for part in (PROMPT[:30], [1], [2], [3]):
            np.testing.assert_allclose(got.forward(a, part), want.forward(b, part), atol=TOLERANCE)


def test_tiers_are_let_go_when_memory_ends(make_engines: Any, gpu: Any) -> None:
    """Loading a tier that does not fit beside the others lets them go first; alone too large, it is one sentence."""
    bundle = make_engines(plan={"weights": 1 << 20})
    pool: Any = open_tensorrt(bundle).pool
    pool.get("t0")
    gpu.cuda.memory_bytes = gpu.cuda.used + (1 << 19)
    pool.get("t1")
    assert (pool.resident, gpu.trt.live_engines) == (("t1",), 1)
    gpu.cuda.memory_bytes = 1 << 19
    with pytest.raises(DeviceMemoryError, match=r"no memory left.*OutOfMemory.*lower tier"):
        pool.get("t2")
    gpu.cuda.memory_bytes = 1 << 30
    cache = pool.get("t2").new_cache()
    assert pool.get("t2").forward(cache, PROMPT[:5]).shape == (1, 258)
    pool.close()
    assert gpu.cuda.used == 0


def test_least_recently_used_engines_go_at_the_byte_limit(make_engines: Any, gpu: Any) -> None:
    """Two of the three fit the limit."""
    pool: Any = open_tensorrt(make_engines()).pool
    pool._limit = 2 * max(map(pool._plan_bytes, ("t0", "t1", "t2")))
    for tier in ("t0", "t1", "t0", "t2"):
        pool.get(tier)
    assert pool.resident == ("t0", "t2")


def test_no_memory_for_a_cache_is_one_sentence(make_engines: Any, gpu: Any) -> None:
    """What was asked for, for what, and what to do."""
    runner = open_tensorrt(make_engines()).pool.get("t0")
    gpu.cuda.memory_bytes = gpu.cuda.used
    with pytest.raises(DeviceMemoryError, match=r"keys and values of 256 tokens.*shorter context"):
        runner.new_cache()


def test_a_lost_device_ends_in_one_sentence_and_closes_quietly(make_engines: Any, gpu: Any) -> None:
    """In the middle of a sequence; what is freed afterwards raises nothing more."""
    root = make_engines().root
    with Session.open(root, runner="tensorrt") as session:
        steps = session.stream("Once upon a time", max_new_tokens=12)
        for _ in range(4):
            next(steps)
        gpu.cuda.lose()
        with pytest.raises(DeviceLostError, match=r"stopped answering.*CUDA error 719.*dmesg"):
            list(steps)


def test_a_plan_that_tensorrt_refuses_names_the_command(make_engines: Any, gpu: Any) -> None:
    """The record fits and the plan does not: it is TensorRT's own words, and how to build it again."""
    bundle = make_engines(plan={"version": "10.16.1"})
    with pytest.raises(EngineMismatchError, match=r"not compatible with this version.*eopc engine .*with.eopc"):
        open_tensorrt(bundle).pool.get("t0")


def test_a_sequence_ends_where_the_engines_caches_end(make_engines: Any, gpu: Any) -> None:
    """Engines built for fewer tokens than the bundle's context refuse what does not fit."""
    runner = open_tensorrt(make_engines(slots=32)).pool.get("t0")
    cache = runner.new_cache()
    runner.forward(cache, PROMPT[:31])
    with pytest.raises(PromptError, match="33 tokens do not fit"):
        runner.forward(cache, [1, 2])


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"rename": {"attn_mask": "bias"}}, "other inputs and outputs.*attn_mask, bias"),
        ({"slots": 128}, "not of the graph that manifest.json describes"),
        ({"graph": "tiers/t2/model.onnx"}, "not of the graph that manifest.json describes"),
    ],
)
def test_an_engine_of_another_graph_is_refused(make_engines: Any, gpu: Any, plan: dict[str, Any], words: str) -> None:
    """Other inputs, other caches, another tier: nothing is bound to it."""
    with pytest.raises(BundleError, match=words):
        open_tensorrt(make_engines(plan=plan)).pool.get("t0")


def test_a_refused_step_carries_tensorrts_words(make_engines: Any, gpu: Any) -> None:
    """The phase, what TensorRT said, and the command that builds again."""
    runner = open_tensorrt(make_engines()).pool.get("t0")
    gpu.trt.fault = "Error Code 3: API Usage Error"
    with pytest.raises(DeviceError, match=r"enqueue a step in the t0 prefill phase: Error Code 3.*eopc engine"):
        runner.forward(runner.new_cache(), PROMPT[:20])


def run_all(runner: Any, tokens: list[int]) -> Any:
    """Logits of every position."""
    return runner.forward(runner.new_cache(), tokens, logits="all")
