"""A ladder with a tier that chooses FFN channels by the prompt, from the build to the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.errors import BudgetError, BundleError
from eopc_runtime.policy import Request, pick_tier
from eopc_runtime.prior import prior_table
from eopc_runtime.profiles import load_profile
from eopc_runtime.runners.ort import OrtCache, OrtTier
from eopc_runtime.session import Session
from eopc_runtime.tier_info import TierInfo

pytest.importorskip("torch", reason="the compiler extra is not installed")

PROMPT, OTHER = list(range(40, 90)), list(range(130, 180))
FFN = 384  # in parcels of 64: two of ten cost little


@pytest.fixture(scope="module")
def chosen_bundle(
    write_checkpoint: Callable[..., Path],
    build_settings: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """t0, a tier that chooses a part of its channels, trained for seconds, and a static one as dear; read only."""
    from eopc_compiler.build import build
    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.state import Workload

    folder = tmp_path_factory.mktemp("selectors")
    checkpoint = write_checkpoint(folder / "wide", intermediate_size=FFN)
    config = open_checkpoint(str(checkpoint)).config
    args = build_settings(checkpoint, folder / "out.eopc", workload=Workload(16, 232), selectors="on")
    budget = price(config, 256) + 0.036  # of fixed channels, and of gathering
    build(replace(args, budgets_j=(10.0, budget), train_selectors_minutes=0.05))
    return folder / "out.eopc"


def price(config: Any, width: int) -> float:
    """Joules of the workload on the cpu profile with so many channels in every layer."""
    from eopc_compiler.dialects import DIALECTS
    from eopc_compiler.ladder import Mask
    from eopc_compiler.storage import Storage

    storage = Storage.choose("fp32", "float32", DIALECTS["native"], {64}, 4)
    mask = Mask(tuple(replace(d, intermediate_size=width) for d in config.layers))
    table = prior_table(load_profile("cpu"), {"t0": storage.cost(config, mask)}, "fp32", 0.0)
    return table.plan_price_j(0, 0, 16, 232)


@pytest.fixture
def bundle(chosen_bundle: Path) -> Bundle:
    return Bundle.open(chosen_bundle)


@pytest.fixture
def info(bundle: Bundle) -> TierInfo:
    (found,) = (t for t in bundle.manifest.tiers if t.selector)
    return found


def rows(cache: OrtCache) -> dict[str, np.ndarray[Any, Any]]:
    """The weights gathered for a sequence, by name."""
    assert cache.chosen is not None
    return {name: value.numpy() for name, value in cache.chosen.weights.items()}


def test_the_tier_keeps_all_layers_and_stands_before_the_static_one(bundle: Bundle, info: TierInfo) -> None:
    """Both have the same budget; the choosing one has a core, a pool of all the rest, and three graphs."""
    assert info.selector is not None and info.prefill is not None
    t0, *_, last = bundle.manifest.tiers
    assert info.budget_j == last.budget_j and info.energy_j <= info.budget_j
    assert len(info.layers) == len(t0.layers) == info.prefill.depth
    counts = list(zip(info.selector.core, info.selector.pool, info.selector.chosen, strict=True))
    assert any(n for *_, n in counts)
    assert all(core + pool == FFN and n < pool if n else pool == 0 for core, pool, n in counts)
    assert {Path(g).name for g in info.graphs} == {"prefill.onnx", "gather.onnx", "decode.onnx"}
    assert info.params < t0.params and "trained" in info.note


def test_its_parity_with_pytorch_was_measured(info: TierInfo) -> None:
    """Prompt, choice and 16 cached steps, against the same in PyTorch."""
    assert 0 < float(str(info.parity["max_logit_error"])) <= 1e-3


def test_the_choice_follows_the_prompt(bundle: Bundle, info: TierInfo) -> None:
    """Other prompts choose other channels; the same prompt chooses the same, bit for bit, whoever ran in between."""
    tier = OrtTier(bundle, info)
    found = []
    for prompt in (PROMPT, OTHER, PROMPT):
        cache = tier.new_cache()
        logits = tier.prefill(cache, prompt).copy()
        found.append((rows(cache), logits))
    (first, one), (second, _), (again, two) = found
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert np.array_equal(one, two)


def test_sequences_in_turns_keep_their_own_choices(bundle: Bundle, info: TierInfo) -> None:
    """Two sequences stepped in turns say what each says alone."""
    tier = OrtTier(bundle, info)

    def alone(prompt: list[int]) -> list[int]:
        cache = tier.new_cache()
        return [int(tier.prefill(cache, prompt)[-1].argmax()), *follow(cache, 6)]

    def follow(cache: OrtCache, steps: int) -> list[int]:
        return [int(tier.forward(cache, [60 + i])[-1].argmax()) for i in range(steps)]

    caches = [tier.new_cache(), tier.new_cache()]
    together = [[int(tier.prefill(c, p)[-1].argmax())] for c, p in zip(caches, (PROMPT, OTHER), strict=True)]
    for i in range(6):
        for said, cache in zip(together, caches, strict=True):
            said.append(int(tier.forward(cache, [60 + i])[-1].argmax()))
    assert together == [alone(PROMPT), alone(OTHER)]


def test_a_prompt_in_chunks_chooses_as_in_one(bundle: Bundle, info: TierInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies of chunks add up."""
    from eopc_runtime.runners import ort

    whole, parts = OrtTier(bundle, info), OrtTier(bundle, info)
    one, two = whole.new_cache(), parts.new_cache()
    whole.prefill(one, PROMPT)
    monkeypatch.setattr(ort, "PREFILL_CHUNK", 7)
    parts.prefill(two, PROMPT)
    assert one.chosen is not None and two.chosen is not None
    for name, energy in one.chosen.energies.items():
        np.testing.assert_allclose(two.chosen.energies[name], energy, rtol=1e-4)


def test_rows_are_those_of_the_largest_utilities(bundle: Bundle, info: TierInfo) -> None:
    """(energy + prior) x weight, largest first, computed here from the constants of the gather graph."""
    import onnx
    from onnx import numpy_helper

    assert info.selector is not None
    tier = OrtTier(bundle, info)
    cache = tier.new_cache()
    tier.prefill(cache, PROMPT)
    assert cache.chosen is not None
    graph = onnx.load(str(bundle.path(info.selector.graph)), load_external_data=False)
    onnx.external_data_helper.load_external_data_for_model(graph, str(bundle.root))
    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for i, count in enumerate(info.selector.chosen):
        if not count:
            continue
        name = f"model.layers.{i}.mlp.pool"
        utility = (cache.chosen.energies[f"ffn_energy_{i}"] + held[f"{name}.prior"]) * held[f"{name}.weight"]
        ids = np.argsort(-utility, kind="stable")[:count]
        assert np.array_equal(rows(cache)[f"gate_rows_{i}"], held[f"{name}.gate_rows"][ids])


def test_nothing_in_its_graphs_depends_on_the_data_in_shape(bundle: Bundle, info: TierInfo) -> None:
    """TopK with a constant K and Gather; no NonZero, no scatter-add."""
    import onnx

    assert info.selector is not None
    ops = {n.op_type for n in onnx.load(str(bundle.path(info.selector.graph)), load_external_data=False).graph.node}
    assert {"TopK", "Gather"} <= ops and not ops & {"NonZero", "ScatterElements", "ScatterND", "Compress"}


def test_it_answers_only_prompts_it_has_read(bundle: Bundle, info: TierInfo) -> None:
    """No plan hands a cache to it; from it, a sequence may go down to the static tier."""
    table, index = bundle.energy, int(info.tier[1:])
    assert table.own_prompts == (info.tier,)
    assert (index, index) in table.plans() and (index, index + 1) in table.plans()
    assert (0, index) not in table.plans() and table.below(0) == (index + 1,)


def test_a_sequence_within_its_budget_runs_on_it(bundle: Bundle, info: TierInfo) -> None:
    """Without a budget t0 answers; asked for, the tier does, and the ledger says what it spent, gathering included."""
    index = int(info.tier[1:])
    assert pick_tier(bundle.energy, None, Request(16, 40)).label == "t0"
    session = Session.open(bundle.root)
    result = session.generate("a" * 14, budget="10J", max_new_tokens=4, tier=info.tier, raw=True)
    assert result.tiers_used == (info.tier,)
    assert result.energy_j == pytest.approx(
        bundle.energy.plan_price_j(index, index, result.prompt_tokens, result.completion_tokens), rel=1e-9
    )


def test_its_price_counts_what_its_graphs_move(bundle: Bundle, info: TierInfo) -> None:
    """Bytes of a step: the constants of the decode graph and its rows; gathering moves these rows twice."""
    import onnx

    assert info.selector is not None
    chosen = sum(info.selector.chosen) * 3 * 64 * 4
    assert info.cost.gather_bytes == 2 * chosen
    graph = onnx.load(str(bundle.path(info.graph)), load_external_data=False).graph
    matrices = sum(4 * int(np.prod(t.dims)) for t in graph.initializer if len(t.dims) == 2 and "proj" in t.name)
    head = bundle.manifest.model.vocab_size * 64 * 4
    assert info.cost.weight_bytes == matrices + head + chosen


def test_graphs_that_do_not_meet_are_refused(chosen_bundle: Path, bundle: Bundle, info: TierInfo) -> None:
    """A manifest that chooses another number of channels than its graphs is said to be wrong."""
    assert info.selector is not None
    fewer = tuple(max(n - 1, 0) for n in info.selector.chosen)
    with pytest.raises(BundleError, match="do not gather and read what"):
        OrtTier(bundle, replace(info, selector=replace(info.selector, chosen=fewer)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": [400, 0, 0, 0]}, "cannot choose 400"),
        ({"core": [1]}, "one number for each of the 4 layers"),
        ({"graph": "tiers/elsewhere.onnx"}, "does not list it"),
    ],
)
def test_a_manifest_with_a_wrong_selector_is_refused(
    chosen_bundle: Path, info: TierInfo, change: dict[str, Any], said: str
) -> None:
    from eopc_runtime.bundle import Manifest

    content = json.loads((chosen_bundle / "manifest.json").read_text(encoding="utf-8"))
    content["tiers"][int(info.tier[1:])]["selector"].update(change)
    with pytest.raises(BundleError, match=said):
        Manifest.from_json(content)


def test_selectors_can_be_left_out(
    write_checkpoint: Callable[..., Path], build_settings: Callable[..., Any], tmp_path: Path
) -> None:
    """With `off` nothing is chosen, whatever it would win."""
    from eopc_compiler.build import build
    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.state import Workload

    checkpoint = write_checkpoint(tmp_path / "wide", intermediate_size=FFN)
    budget = price(open_checkpoint(str(checkpoint)).config, 256) + 0.036
    args = build_settings(checkpoint, tmp_path / "out", workload=Workload(16, 232), selectors="off")
    build(replace(args, budgets_j=(budget,), dry_run=True))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert all(tier["selector"] is None for tier in plan["tiers"])


def test_no_sequence_of_2500_overspends_and_every_joule_is_on_the_price_list(bundle: Bundle, info: TierInfo) -> None:
    """500 prompts under 5 budgets: the account is the sum of the prices of what ran, and within the budget."""
    rng = np.random.default_rng(0)
    table, context = bundle.energy, bundle.manifest.context
    least, most = (table.plan_price_j(t, t, *sizes) for t, sizes in ((-1, (8, 2)), (0, (40, 12))))
    ran, refused = set(), 0
    with Session.open(bundle.root, threads=1) as session:
        for _ in range(500):
            n, wanted = int(rng.integers(1, 41)), int(rng.integers(1, 13))
            prompt = "".join(chr(c) for c in rng.integers(97, 123, n))
            tier = [None, "t0", info.tier][int(rng.integers(3))]
            for budget_j in np.geomspace(least, most, 5).tolist():
                try:
                    running = session.stream(prompt, budget=budget_j, max_new_tokens=wanted, tier=tier, raw=True)
                except BudgetError:
                    refused += 1
                    continue
                steps = [bundle.tier_index(event.tier) for event in running]
                spent, length = running.result.energy_j, running.result.prompt_tokens
                listed = table.prefill_price_j(steps[0], length)
                listed += sum(table.step_price_j(t, length, i) for i, t in enumerate(steps[1:], start=1))
                assert spent <= budget_j
                assert spent == pytest.approx(listed, rel=1e-9)  # two orders of summing
                assert length + len(steps) <= context
                ran.add(running.result.plan)
    assert {"t0", info.tier} <= ran and len(ran) > 3
    assert 0 < refused < 1250


def test_recovery_trains_static_tiers_and_the_choosing_one_is_fitted_to_what_it_left(
    write_checkpoint: Callable[..., Path], build_settings: Callable[..., Any], tmp_path: Path
) -> None:
    """`--recover` with `--selectors on`: said tier by tier under the names they have in the bundle."""
    from eopc_compiler.build import build
    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.state import Workload

    checkpoint, said = write_checkpoint(tmp_path / "wide", intermediate_size=FFN), list[str]()
    budget = price(open_checkpoint(str(checkpoint)).config, 256) + 0.036
    args = build_settings(checkpoint, tmp_path / "out.eopc", workload=Workload(16, 232), selectors="on")
    result = build(replace(args, budgets_j=(10.0, budget), recover_minutes=0.05), said.append)
    names = [t.tier for t in Bundle.open(result.bundle).manifest.tiers if not t.selector]
    assert [line.split(":")[0] for line in said if " nats on selection" in line] == names
