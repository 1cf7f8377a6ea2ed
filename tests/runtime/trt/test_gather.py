"""Tiers that choose channels by their prompts, on the fakes: whose rows they are, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from eopc_runtime.engines import read_engines, write_engines
from eopc_runtime.errors import BundleError, DeviceError
from eopc_runtime.runners.choose import open_tensorrt
from eopc_runtime.runners.ort_pool import OrtPool

from .choosing_graphs import CONTEXT, HEAD_DIM, TIERS, chosen, gather_graph, write_bundle

KEY = "orin-sm87"
ONES = [1, 1, 1, 3, 3, 0, 6]  # before its last token: most of 1, then 3
FOURS = [4, 4, 2, 2, 4, 7]
FAVOURITES = ({0, 1}, {0})  # of equal energies the first channels count more, which calibration puts there


@pytest.fixture
def choosing_bundle(tmp_path: Path) -> Path:
    """The bundle without engines."""
    return write_bundle(tmp_path / "choosing.eopc")


@pytest.fixture
def bundle(choosing_bundle: Path, make_engines: Any, gpu: Any) -> Any:
    """Engines of the hand-made graphs, four tokens of a prompt at a time."""
    return make_engines(source=choosing_bundle, tokens=4)


def test_the_rows_follow_the_prompt(bundle: Any, gpu: Any) -> None:
    """Energies of all chunks count, the rows stay for the whole sequence, and ONNX Runtime says the same."""
    runner, reference = open_tensorrt(bundle).pool.get("t1"), OrtPool(bundle).get("t1")
    for prompt, expected in ((ONES, ({1, 3}, {1})), (FOURS, ({2, 4}, {4}))):
        cache, twin = runner.new_cache(), reference.new_cache()
        gpu.trt.runs.clear()
        found, wanted = runner.prefill(cache, prompt), reference.prefill(twin, prompt)
        np.testing.assert_array_equal(found, wanted)
        assert chosen(found) == expected
        for token in (5, 5, 5, 0):
            found, wanted = runner.forward(cache, [token]), reference.forward(twin, [token])
            np.testing.assert_array_equal(found, wanted)
            assert chosen(found) == expected
        graphs = [graph.rpartition("/")[2] for graph, _ in gpu.trt.runs]
        assert graphs == ["prefill.onnx"] * 2 + ["gather.onnx"] + ["model.onnx"] * 5


def test_layers_that_a_prompt_skips_keep_their_favourites(bundle: Any) -> None:
    """The prompts of t2 run through the first layer alone: the other one's energies stay at none."""
    runner = open_tensorrt(bundle).pool.get("t2")
    assert chosen(runner.prefill(runner.new_cache(), FOURS)) == ({4}, {0})


def test_without_a_prefill_the_favourites_are_chosen(bundle: Any) -> None:
    """A text that is scored, and a prompt of one token: no energies, whatever a sequence before left in the memory."""
    pool: Any = open_tensorrt(bundle).pool
    runner = pool.get("t1")
    runner.prefill(runner.new_cache(), FOURS)
    for logits in (runner.forward(runner.new_cache(), FOURS), runner.prefill(runner.new_cache(), [4])):
        assert chosen(logits) == FAVOURITES
    assert len(pool._arenas) == 1, "all three used the same memory"


def test_two_sequences_do_not_see_each_others_rows(bundle: Any, gpu: Any) -> None:
    """Step by step in turns; the decode graph is captured again for each, and gathers nothing again."""
    runner = open_tensorrt(bundle).pool.get("t1")
    first, second = runner.new_cache(), runner.new_cache()
    runner.prefill(first, ONES)
    runner.prefill(second, FOURS)
    gpu.trt.runs.clear()
    for _ in range(2):
        for cache, expected in ((first, ({1, 3}, {1})), (second, ({2, 4}, {4}))):
            captures = gpu.cuda.captures
            for token in (5, 0, 5):
                assert chosen(runner.forward(cache, [token])) == expected
            assert gpu.cuda.captures == captures + 1
    assert {graph for graph, _ in gpu.trt.runs} == {"tiers/t1/model.onnx"}


def test_a_tier_adopts_with_no_energies_and_ends_the_choice_before(bundle: Any) -> None:
    """What another tier's prompt did says nothing of this one's pools; and the memory of the choice is this one's."""
    pool = open_tensorrt(bundle).pool
    dense, upper, lower = (pool.get(tier) for tier in ("t0", "t1", "t2"))
    cache = dense.new_cache()
    dense.forward(cache, FOURS)
    heir = upper.adopt(cache)
    assert chosen(upper.forward(heir, [4])) == FAVOURITES
    cache = upper.new_cache()
    upper.prefill(cache, ONES)
    heir = lower.adopt(cache)
    assert chosen(lower.forward(heir, [4])) == ({0}, {0})
    with pytest.raises(ValueError, match="written over"):
        upper.forward(cache, [4])


def test_a_choice_is_handed_down_to_a_tier_without_one(bundle: Any) -> None:
    """As any cache, and the tokens of the prompt are there; the upper tier may even go on from where it was."""
    pool, reference = open_tensorrt(bundle).pool, OrtPool(bundle)
    upper, lower = pool.get("t1"), pool.get("t3")
    cache, twin = upper.new_cache(), reference.get("t1").new_cache()
    upper.prefill(cache, ONES)
    reference.get("t1").prefill(twin, ONES)
    heir, other = lower.adopt(cache), reference.get("t3").adopt(twin)
    np.testing.assert_array_equal(lower.forward(heir, [2]), reference.get("t3").forward(other, [2]))
    assert chosen(upper.forward(cache, [2])) == ({1, 3}, {1})


def test_a_sequence_owns_room_for_its_caches_and_its_choice(bundle: Any, gpu: Any) -> None:
    """Any tier's choice has room behind the caches of the dense one; a tier that chooses nothing does not count it."""
    pool = open_tensorrt(bundle).pool
    caches: dict[str, Any] = {tier: pool.get(tier).new_cache() for tier in TIERS}
    keys_and_values, choice = 2 * 3 * CONTEXT * HEAD_DIM * 4, 8 * 256  # two energies and six blocks of rows, aligned
    sizes = {tier: cache.nbytes for tier, cache in caches.items()}
    whole = keys_and_values + choice
    assert sizes == {"t0": keys_and_values, "t1": whole, "t2": whole, "t3": keys_and_values // 3}
    assert {gpu.cuda.blocks[cache.lease.arena.base].nbytes for cache in caches.values()} == {whole}


def test_an_unloaded_tier_goes_on_with_the_rows_it_had(bundle: Any, gpu: Any) -> None:
    """Rows belong to the sequence, not to the engines."""
    pool: Any = open_tensorrt(bundle).pool
    cache = pool.get("t1").new_cache()
    pool.get("t1").prefill(cache, ONES)
    pool._limit = 1
    pool.get("t0")
    assert (pool.resident, gpu.trt.live_engines) == (("t0",), 1)
    gpu.trt.runs.clear()
    assert chosen(pool.get("t1").forward(cache, [5])) == ({1, 3}, {1})
    assert gpu.trt.runs == [("tiers/t1/model.onnx", 1)]
    pool.close()
    assert gpu.cuda.used == 0


@pytest.mark.parametrize(
    ("graph", "model", "words"),
    [
        ("gather.onnx", gather_graph((1, 1, 0)), r"gate_rows_0 of \(1, 8\) float32, where .* \(2, 8\) float32"),
        ("gather.onnx", gather_graph((2, 1, 0), words=9), r"gate_rows_0 of \(2, 9\) float32"),
        ("gather.onnx", gather_graph((2, 0, 0)), r"other inputs and outputs .*down_rows_1, ffn_energy_1"),
    ],
    ids=["fewer channels", "wider rows", "a layer less"],
)
def test_an_engine_that_gathers_something_else_is_refused(
    graph: str, model: Any, words: str, bundle: Any, gpu: Any
) -> None:
    """It would write beyond its place, or leave rows as they were: nothing is bound to it."""
    onnx.save(model, str(bundle.root / "tiers/t1" / graph))
    with pytest.raises(BundleError, match=words):
        open_tensorrt(bundle).pool.get("t1")
    assert gpu.trt.runs == []


@pytest.mark.parametrize(
    ("graph", "taken", "words"),
    [
        ("model.onnx", "tiers/t2/model.onnx", r"gate_rows_0 of \(1, 8\)"),
        ("model.onnx", "tiers/t0/model.onnx", "t1 decode has other inputs .*down_rows_0"),
        ("prefill.onnx", "tiers/t2/prefill.onnx", "t1 prefill has other inputs .*ffn_energy_1, ffn_energy_1_out"),
    ],
)
def test_the_other_engines_of_a_tier_are_held_to_its_choice_too(
    graph: str, taken: str, words: str, bundle: Any, gpu: Any
) -> None:
    """Decode reads the rows of the manifest and no others; prefill records what the prompt runs through."""
    (bundle.root / "tiers/t1" / graph).write_bytes((bundle.root / taken).read_bytes())
    with pytest.raises(BundleError, match=words):
        open_tensorrt(bundle).pool.get("t1")


def test_rows_are_refused_where_nothing_is_chosen(bundle: Any, gpu: Any) -> None:
    """A tier without a selector has nothing to bind to them."""
    (bundle.root / "tiers/t0/model.onnx").write_bytes((bundle.root / "tiers/t1/model.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"t0 prefill has other inputs .*down_rows_0"):
        open_tensorrt(bundle).pool.get("t0")


@pytest.mark.parametrize("phase", ["gather", "prefill", "decode"])
def test_a_set_without_one_of_the_three_engines_is_refused(
    phase: str, choosing_bundle: Path, make_engines: Any, gpu: Any
) -> None:
    """The tier, the phase, and the command that builds it."""
    bundle = make_engines(source=choosing_bundle, without=(phase,))
    with pytest.raises(BundleError, match=f"have none for t1 {phase}.*eopc engine"):
        open_tensorrt(bundle)


def test_one_engine_for_both_phases_is_no_set_of_a_tier_that_chooses(
    choosing_bundle: Path, make_engines: Any, gpu: Any
) -> None:
    """It has no weights gathered to read."""
    bundle = make_engines(source=choosing_bundle)
    first, *others = (r for r in read_engines(bundle.root, KEY) if r.tier == "t1")
    assert len(others) == 2
    kept = [r for r in read_engines(bundle.root, KEY) if r.tier != "t1"]
    write_engines(bundle.root, KEY, [*kept, replace(first, phase="both")])
    with pytest.raises(BundleError, match="have none for t1 decode and t1 gather and t1 prefill"):
        open_tensorrt(bundle)


def test_a_gathering_that_fails_carries_tensorrts_words_and_is_done_again(bundle: Any, gpu: Any) -> None:
    """The energies are still there, so the sequence goes on as if nothing had been."""
    runner = open_tensorrt(bundle).pool.get("t1")
    cache = runner.new_cache()
    run = runner._gather.run  # type: ignore[attr-defined]

    def fail(arena: Any) -> None:
        gpu.trt.fault = "Error Code 3: API Usage Error"
        try:
            run(arena)
        finally:
            gpu.trt.fault = ""

    runner._gather.run = fail  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match=r"did not gather weights in the t1 gather phase: Error Code 3.*eopc engine"):
        runner.prefill(cache, ONES)
    runner._gather.run = run  # type: ignore[attr-defined]
    assert chosen(runner.forward(cache, ONES[-1:])) == ({1, 3}, {1})
