"""A decode tier on the cache it inherits: its loss, and its repair."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler import tier_repair
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.handover import ContinuationLoss, losses_of_tiers
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.model import Cache, Llama, build_model
from eopc_compiler.quantize import Quantized, round_to_nearest
from eopc_compiler.sequences import mean_loss
from eopc_compiler.tier_model import tier_view
from eopc_compiler.tier_repair import apply_repair, needs_repair, next_source, repair_tier, repair_tiers

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
LENGTH, PROMPT = 32, 12
WHOLE = tuple(LayerDims(i, 4, 128) for i in range(3))
GAP = Mask((WHOLE[0], WHOLE[2]))
HALVED = Mask(tuple(LayerDims(i, 4, 64) for i in range(3)))


def sampled(model: Llama, count: int, seed: int) -> Tensor:
    """Windows that the model itself has written, so that any other model loses more on them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 160, (count, 1), generator=generator)
    while tokens.shape[1] < LENGTH:
        chances = torch.softmax(model.score(tokens)[:, -1], -1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens


def batches_of(*windows: Tensor) -> list[Batch]:
    return [Batch(i, 1 / (len(windows) * w.numel()), w) for i, w in enumerate(windows)]


def random_windows(*counts: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(6)
    return batches_of(*(torch.randint(0, 160, (n, LENGTH), generator=generator) for n in counts))


def reference(model: Llama, tier: Llama, mask: Mask, tokens: Tensor) -> float:
    """Window by window through the caches of the graph contract: the prompt on `model`, the rest on `tier`."""
    losses = []
    for row in tokens.tolist():
        cache = Cache.empty(model.config, LENGTH, torch.float32)
        model.step(cache, row[:PROMPT])
        kept = [(d.source_layer, d.num_key_value_heads) for d in mask.layers]
        keys, values = ([b[i][:, :n].clone() for i, n in kept] for b in (cache.keys, cache.values))
        logits = tier.step(Cache(keys, values, PROMPT), row[PROMPT:-1])
        losses.append(F.cross_entropy(logits, torch.tensor(row[PROMPT + 1 :]), reduction="none"))
    return float(torch.cat(losses).mean())


def deployed(make_tiny: MakeTiny, twins: bool = False, **changes: bool) -> Llama:
    """The tiny model in deployment form; with `twins` channels 64.. compute what channels 0..63 do."""
    config, tensors = make_tiny(**changes)
    tensors["lm_head.weight"] *= 3  # sure of itself, so that a lost layer costs something
    for name, rows in tensors.items():
        if twins and ("gate_proj" in name or "up_proj" in name):
            rows[64:] = rows[:64]
    return build_model(config, tensors, LENGTH).fuse()


def test_the_full_mask_has_the_plain_loss_of_the_continuation(make_tiny: MakeTiny) -> None:
    """Nothing left out: the loss of the whole model on the tokens behind the first of the continuation, by domain."""
    model, batches = deployed(make_tiny), random_windows(3, 2)
    got = ContinuationLoss(model, batches, PROMPT).of_mask(full_mask(model.config))
    for domain, _, tokens in batches:
        logits = model.score(tokens)[:, PROMPT:-1].flatten(0, 1)
        assert got[domain] == pytest.approx(float(F.cross_entropy(logits, tokens[:, PROMPT + 1 :].flatten())), abs=1e-5)


LAYERS = [c for n in (1, 2, 3) for c in combinations(range(3), n)]


@pytest.mark.parametrize("kept", LAYERS, ids=str)
@pytest.mark.parametrize("narrowed", [None, 0, -1], ids=["whole", "first", "last"])
def test_shared_layers_computed_once_change_no_loss(
    make_tiny: MakeTiny, kept: tuple[int, ...], narrowed: int | None
) -> None:
    """Whatever layers are left out or cut, the loss is that of running the tier from its first layer."""
    model, batches = deployed(make_tiny, attention_bias=True), random_windows(2)
    dims = [WHOLE[i] for i in kept]
    if narrowed is not None:
        dims[narrowed] = LayerDims(dims[narrowed].source_layer, 2, 96)
    mask = Mask(tuple(dims))
    want = reference(model, tier_view(model, mask), mask, batches[0].tokens)
    assert ContinuationLoss(model, batches, PROMPT).of_mask(mask)[0] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("own", [frozenset[int](), frozenset({0})], ids=["bias", "matrix"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
def test_what_a_tier_has_of_its_own_counts(make_tiny: MakeTiny, own: frozenset[int], biased: bool) -> None:
    """A repaired layer in front of a gap is not taken for the shared one, also where only its bias is its own."""
    model, batches = deployed(make_tiny, mlp_bias=biased), random_windows(2)
    losses = ContinuationLoss(model, batches, PROMPT)
    tier, _ = repair_tier(model, GAP, batches, PROMPT, own)
    got = losses.of_tier(tier, GAP)[0]
    assert got == pytest.approx(reference(model, tier, GAP, batches[0].tokens), abs=1e-5)
    assert abs(got - losses.of_mask(GAP)[0]) > 1e-3
    assert losses.evaluations == 2


def test_losses_of_tiers_are_those_of_each(make_tiny: MakeTiny) -> None:
    """A batch at a time, in domains of unequal batches: the same means over windows."""
    model = deployed(make_tiny)
    one, two = sampled(model, 9, 1), sampled(model, 5, 2)
    batches = [Batch(d, 1.0, part) for d, w in enumerate((one, two)) for part in torch.split(w, 4)]
    tiers = [(tier_view(model, mask), mask) for mask in (GAP, HALVED)]
    whole = ContinuationLoss(model, batches, PROMPT)
    for got, (tier, mask) in zip(losses_of_tiers(model, batches, PROMPT, tiers), tiers, strict=True):
        assert got == pytest.approx(whole.of_tier(tier, mask), abs=1e-6)


def test_nothing_removed_is_nothing_repaired(make_tiny: MakeTiny) -> None:
    """The full mask needs no repair, and its tier is the model."""
    model, batches = deployed(make_tiny), random_windows(2)
    tier, repaired = repair_tier(model, full_mask(model.config), batches, PROMPT, {0, 1, 2})
    assert repaired == ()
    assert torch.equal(tier.score(batches[0].tokens), model.score(batches[0].tokens))


def test_layers_that_were_cut_or_stand_before_a_gap_need_repair(make_tiny: MakeTiny) -> None:
    """The last kept layer stands before a gap where the model goes on."""
    model = deployed(make_tiny)
    mask = Mask((WHOLE[0], LayerDims(1, 3, 128)))
    assert [needs_repair(mask, i, model) for i in (0, 1)] == [False, True]
    assert [needs_repair(GAP, i, model) for i in (0, 1)] == [True, False]
    assert [next_source(GAP, i, model) for i in (0, 1)] == [2, 3]
    assert needs_repair(Mask(WHOLE[:2]), 1, model)


def test_twins_that_go_are_made_up_for_exactly(make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ridge to speak of, half of the channels go and the tier computes what the whole model does."""
    monkeypatch.setattr(tier_repair, "repair", partial(tier_repair.repair, damping=1e-6))
    model = deployed(make_tiny, twins=True)
    batches = batches_of(sampled(model, 48, 3))
    losses = ContinuationLoss(model, batches, PROMPT)
    tier, repaired = repair_tier(model, HALVED, batches, PROMPT, {0, 1, 2})
    assert [r.source_layer for r in repaired] == [0, 1, 2]
    dense, bare, fitted = (
        losses.of_mask(full_mask(model.config))[0],
        losses.of_mask(HALVED)[0],
        losses.of_tier(tier, HALVED)[0],
    )
    assert abs(bare - dense) > 0.05
    assert fitted == pytest.approx(dense, abs=2e-3)


@pytest.mark.parametrize("mask", [GAP, HALVED, Mask((LayerDims(0, 3, 96), WHOLE[1]))], ids=["gap", "halved", "end"])
def test_repair_lowers_the_loss_it_is_fitted_for(make_tiny: MakeTiny, mask: Mask) -> None:
    """On the calibration windows: a matrix of its own beats a bias, and a bias beats nothing."""
    model = deployed(make_tiny)
    batches = batches_of(sampled(model, 48, 1), sampled(model, 24, 2))
    losses = ContinuationLoss(model, batches, PROMPT)

    def mean(by_domain: dict[int, float]) -> float:
        return sum(by_domain.values()) / len(by_domain)

    dense, bare = mean(losses.of_mask(full_mask(model.config))), mean(losses.of_mask(mask))
    fitted, biased = (
        mean(losses.of_tier(repair_tier(model, mask, batches, PROMPT, own)[0], mask)) for own in ({0, 1, 2}, ())
    )
    assert dense < fitted < biased < bare
    assert bare - fitted > 0.1 * (bare - dense)


def test_without_a_prompt_a_tier_is_repaired_for_whole_windows(make_tiny: MakeTiny) -> None:
    """Nothing is inherited; the repaired tier loses less on the windows it is fitted to."""
    model = deployed(make_tiny)
    text = batches_of(sampled(model, 48, 1))
    tier, _ = repair_tier(model, HALVED, text, 0, range(3))
    assert mean_loss(tier, text[0].tokens) < mean_loss(tier_view(model, HALVED), text[0].tokens)


def test_layers_outside_own_get_a_bias_that_keeps_the_mean(make_tiny: MakeTiny) -> None:
    """Without a matrix of its own a layer is stored as a bias alone."""
    model, batches = deployed(make_tiny), random_windows(8)
    _, repaired = repair_tier(model, HALVED, batches, PROMPT, {1})
    assert [r.weight is None for r in repaired] == [True, False, True]
    assert all(r.bias.shape == (64,) and float(r.bias.abs().max()) > 0 for r in repaired)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_of_a_change_only_what_unseen_windows_confirm_is_kept(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The map moves that share of the way from the shared weights to what all windows would have: here, too far."""
    monkeypatch.setattr(tier_repair, "repair", partial(tier_repair.repair, damping=1e-2))  # for so few windows, little
    model, batches = deployed(make_tiny), random_windows(8)

    def first_map() -> Tensor:
        tier, _ = repair_tier(model, HALVED, batches, PROMPT, {0})
        return tier.blocks[0].mlp.down_proj.weight

    def fixed(value: float) -> Tensor:
        monkeypatch.setattr(tier_repair, "held_share", lambda *_: value)
        return first_map()

    measured, shared, moved = first_map(), tier_view(model, HALVED).blocks[0].mlp.down_proj.weight, fixed(1.0)
    assert torch.allclose(fixed(share), torch.lerp(shared, moved, share), atol=1e-6)
    assert 0 < float((measured - shared).norm()) < float((moved - shared).norm())


def test_one_window_is_fitted_without_another_to_confirm_it(make_tiny: MakeTiny) -> None:
    """There is no second half; the fit is the plain one."""
    model = deployed(make_tiny)
    text = batches_of(sampled(model, 1, 1))
    tier, _ = repair_tier(model, HALVED, text, 0, range(3))
    assert mean_loss(tier, text[0].tokens) < mean_loss(tier_view(model, HALVED), text[0].tokens)


def test_later_layers_see_the_matrix_as_it_is_stored(make_tiny: MakeTiny) -> None:
    """`round_weight` gets the layer and the covariance of its inputs; what it returns is in the tier and the result."""
    model, batches = deployed(make_tiny), random_windows(8)
    seen = []

    def coarse(source: int, weight: Tensor, covariance: Tensor) -> Quantized:
        seen.append((source, weight.shape, covariance.shape))
        return round_to_nearest(weight, "int4", 32, torch.float32)

    tier, repaired = repair_tier(model, HALVED, batches, PROMPT, {0, 2}, coarse)
    assert seen == [(i, (64, 64), (64, 64)) for i in (0, 2)]
    stored = repaired[0].weight
    assert isinstance(stored, Quantized)
    assert torch.equal(tier.blocks[0].mlp.down_proj.weight, stored.dequantize())
    exact = repair_tier(model, HALVED, batches, PROMPT, {0, 2})[1]
    assert not torch.equal(exact[1].bias, repaired[1].bias)


def test_what_was_repaired_can_be_put_into_a_fresh_view(make_tiny: MakeTiny) -> None:
    """`apply_repair` rebuilds the repaired tier; the whole model stays as it was; progress counts layers."""
    model, batches = deployed(make_tiny), random_windows(8)
    tokens, heard = batches[0].tokens, list[tuple[int, int]]()
    want = model.score(tokens)
    tier, repaired = repair_tier(model, GAP, batches, PROMPT, {0}, report=lambda *row: heard.append(row))
    again = apply_repair(tier_view(model, GAP), GAP, repaired)
    assert torch.equal(again.score(tokens), tier.score(tokens))
    assert torch.equal(model.score(tokens), want)
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_tiers_repaired_together_are_as_each_would_be_alone(make_tiny: MakeTiny) -> None:
    """One walk of the whole model serves tiers with gaps in other places, to the last bit."""
    model, batches = deployed(make_tiny), random_windows(8)
    jobs = [(GAP, {0}), (HALVED, {0, 2}), (full_mask(model.config), {0})]
    together = repair_tiers(model, jobs, batches, PROMPT)
    for (mask, own), (_, repaired) in zip(jobs, together, strict=True):
        alone = repair_tier(model, mask, batches, PROMPT, own)[1]
        assert [r.source_layer for r in repaired] == [r.source_layer for r in alone]
        for ours, theirs in zip(repaired, alone, strict=True):
            assert torch.equal(ours.bias, theirs.bias)
            assert (ours.weight is None) == (theirs.weight is None)
            assert ours.weight is None or torch.equal(ours.weight, theirs.weight)
