"""FFN channels chosen by the prompt: the choice, the fit, and what gathered rows compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from eopc_compiler.calibration import Batch, domain_means
from eopc_compiler.config import LlamaConfig
from eopc_compiler.ladder import full_mask
from eopc_compiler.model import Cache, Llama, build_model
from eopc_compiler.planner import TierPlan
from eopc_compiler.prompt_pass import Pool, PromptPass
from eopc_compiler.selector import ChannelSelector, Selector, first_of
from eopc_compiler.selector_fit import fit_selector, selected_losses, unfitted
from eopc_compiler.selector_planner import Choosing, core_of, plan_selectors, split
from eopc_compiler.token_selector import PromptPath

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
LENGTH, PROMPT = 48, 24


@pytest.fixture
def model(make_tiny: MakeTiny) -> Llama:
    config, tensors = make_tiny()
    return build_model(config, tensors, LENGTH).fuse()


def selector_of(model: Llama, core: int, chosen: int) -> Selector:
    """The same counts in every layer, the pool being all the rest."""
    widths = [d.intermediate_size for d in model.config.layers]
    return Selector((core,) * len(widths), tuple(w - core for w in widths), (chosen,) * len(widths))


def windows(model: Llama, seed: int, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, LENGTH), generator=generator)


def batches(model: Llama, seed: int = 0, count: int = 6) -> list[Batch]:
    tokens = windows(model, seed, count)
    return [Batch(0, 1 / tokens.numel(), tokens)]


def test_ties_go_to_the_lower_channel() -> None:
    """Equal utilities in the order of their numbers, whatever the rest does."""
    found = first_of(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]), 3)
    assert found.tolist() == [[1, 2, 4]]


def test_with_everything_chosen_nothing_is_lost(model: Llama) -> None:
    """A pool that is taken whole gives the dense model's losses."""
    width = model.config.layers[0].intermediate_size
    selector, text = selector_of(model, width // 2, width - width // 2), batches(model)
    (found,) = selected_losses(model, selector, unfitted(model, selector, text, PROMPT), text, PROMPT)
    dense = torch.nn.functional.cross_entropy(
        model.score(text[0].tokens)[:, PROMPT:-1].flatten(0, 1),
        text[0].tokens[:, PROMPT + 1 :].flatten(),
        reduction="none",
    )
    torch.testing.assert_close(found.flatten(), dense, rtol=1e-4, atol=1e-4)


def test_gathered_rows_compute_what_a_mask_computes(model: Llama) -> None:
    """The pass that records energies, the selector and a decode with its rows: the masked losses, per sequence."""
    width = model.config.layers[0].intermediate_size
    selector, text = selector_of(model, width // 2, width // 4), batches(model)
    fitted = fit_selector(model, selector, text, PROMPT)
    (masked,) = selected_losses(model, selector, fitted, text, PROMPT)
    prompt_pass = PromptPass(model.config, PromptPath(len(model.blocks)), context=LENGTH, pools=selector.recorded)
    prompt_pass.load_state_dict(model.state_dict(), strict=False)
    chooser, core = loaded(model, selector, fitted)
    for row, tokens in enumerate(text[0].tokens.tolist()):
        cache = Cache.empty(model.config, LENGTH, torch.float32)
        energies = prompt_pass.fill(cache, tokens[: PROMPT - 1])
        # the reference runs the prompt's last token through the whole model
        model.step(cache, [tokens[PROMPT - 1]])
        logits = core.step(cache, tokens[PROMPT:], chooser(energies))
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[PROMPT + 1 :]), reduction="none")
        torch.testing.assert_close(losses, masked[row], rtol=1e-3, atol=1e-3)


def loaded(model: Llama, selector: Selector, fitted: object) -> tuple[ChannelSelector, Llama]:
    """The selector and the core of a tier, with the weights a build would store."""
    from eopc_compiler.tier_model import tier_view

    chooser = ChannelSelector(model.config, selector, torch.float32)
    core = tier_view(model, core_of(selector, full_mask(model.config)))
    for i, (block, own) in enumerate(zip(model.blocks, fitted, strict=True)):  # type: ignore[call-overload]
        start, rows = selector.core[i], chooser.pool(i)
        rows.gate_rows.data = block.mlp.gate_proj.weight.data[:, start:].t().contiguous()
        rows.up_rows.data = block.mlp.up_proj.weight.data[:, start:].t().contiguous()
        rows.down_rows.data, rows.prior.data, rows.weight.data = own.pool, own.prior, own.weight
        core.blocks[i].mlp.down_proj.weight.data = own.core
        core.blocks[i].mlp.down_proj.bias = torch.nn.Parameter(own.bias, requires_grad=False)
    return chooser, core


def test_a_choice_does_not_depend_on_the_company(model: Llama) -> None:
    """A sequence in a batch of six loses what it loses alone."""
    selector, text = selector_of(model, 32, 32), batches(model)
    fitted = unfitted(model, selector, text, PROMPT)
    (together,) = selected_losses(model, selector, fitted, text, PROMPT)
    alone = [selected_losses(model, selector, fitted, [Batch(0, 1.0, row[None])], PROMPT)[0] for row in text[0].tokens]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)


def test_later_tokens_change_no_earlier_loss(model: Llama) -> None:
    """The prompt alone chooses: other words at the end of an answer leave the losses before them as they are."""
    selector, text = selector_of(model, 32, 32), batches(model)
    fitted = unfitted(model, selector, text, PROMPT)
    other = text[0].tokens.clone()
    other[:, -8:] = (other[:, -8:] + 1) % model.config.vocab_size
    (before,) = selected_losses(model, selector, fitted, text, PROMPT)
    (after,) = selected_losses(model, selector, fitted, [Batch(0, 1.0, other)], PROMPT)
    unchanged = LENGTH - PROMPT - 9
    torch.testing.assert_close(after[:, :unchanged], before[:, :unchanged], rtol=0, atol=1e-5)
    assert not torch.allclose(after[:, unchanged:], before[:, unchanged:])


def test_fitting_brings_the_answers_nearer_to_the_dense_model(model: Llama) -> None:
    """On the text it was fitted to, W' explains more of the dense map's output than the map as it is."""
    selector, text = selector_of(model, 32, 32), batches(model, count=40)

    def distance(fitted: object) -> float:
        total = 0.0
        x = model.model.embed_tokens(text[0].tokens)[:, PROMPT:]
        layer, own = model.blocks[0], fitted[0]  # type: ignore[index]
        hidden = layer.mlp.hidden(layer.post_attention_layernorm(x))
        kept = own.kept(torch.ones(len(x), own.down().shape[0]), selector.chosen[0])
        found = hidden * kept[:, None] @ own.down() + own.bias
        total += float((found - layer.mlp.down_proj(hidden)).pow(2).sum())
        return total

    assert distance(fit_selector(model, selector, text, PROMPT)) < distance(unfitted(model, selector, text, PROMPT))


def test_the_mean_counts_domains_alike() -> None:
    """One domain with many losses weighs as much as one with few."""
    losses = [torch.ones(6, 4), torch.full((1, 4), 3.0)]
    text = [Batch(i, 1.0, torch.zeros(1, 1, dtype=torch.long)) for i in (0, 1)]
    assert fmean(domain_means(text, losses).values()) == pytest.approx(2.0)


def plan_of(model: Llama, budget_j: float, loss: float) -> list[TierPlan]:
    full = full_mask(model.config)
    small = core_of(selector_of(model, 32, 0), full)
    return [TierPlan(10.0, full, 10.0, 1.0, "dense"), TierPlan(budget_j, small, budget_j, loss, "pruned")]


def width_price(per_channel: float) -> Callable[..., float]:
    return lambda mask: 1.0 + per_channel * sum(d.intermediate_size for d in mask.layers)


@pytest.mark.parametrize(("static", "expected"), [(2.0, 3), (1.2, 2)])
def test_a_choosing_tier_enters_only_where_it_wins(model: Llama, static: float, expected: int) -> None:
    """In front of a static tier that loses 2 nats it stands, in front of one that loses 1.2 it does not."""
    ladder = planned(model, plan_of(model, 9.0, static), fitted=1.5)
    assert len(ladder) == expected
    if expected == 3:
        assert ladder[1].selector is not None and ladder[1].prefill == 1 and ladder[1].energy_j <= 9.0
        assert ladder[2].prefill == 0


def test_a_budget_that_cannot_pay_for_gathering_gets_none(model: Llama) -> None:
    """Where gathering costs more than all channels, there is nothing to choose."""
    assert len(planned(model, plan_of(model, 9.0, 2.0), fitted=1.5, gathering=100.0)) == 2


def planned(model: Llama, plan: list[TierPlan], fitted: float, gathering: float = 0.2) -> tuple[TierPlan, ...]:
    from eopc_compiler.importance import LayerCurves

    total = sum(d.intermediate_size for d in model.config.layers)
    price = width_price(9.0 / total)
    curves = [
        LayerCurves(
            d,
            8,
            (0,),
            tuple(range(d.intermediate_size)),
            (),
            tuple(0.01 * i for i in range(1, d.intermediate_size // 8)),
            0.1,
        )
        for d in model.config.layers
    ]
    choosing = Choosing(
        price,
        lambda core, s: price(core.widened(s.chosen)) + (gathering if any(s.chosen) else 0.0),
        lambda _selector: fitted,
        lambda ladder, _path: plan[1].loss if ladder == [plan[1].mask] else math.nan,
    )
    return plan_selectors(plan, choosing, curves, 8)


def test_a_split_keeps_the_count(model: Llama) -> None:
    """Core and chosen channels are what the mask runs; the pool is all that is not fixed; whole layers none."""
    full = full_mask(model.config)
    half = replace(full.layers[0], intermediate_size=full.layers[0].intermediate_size // 2)
    mask = type(full)((half, *full.layers[1:]))
    selector = split(mask, full, 8)
    assert selector.core[0] + selector.chosen[0] == half.intermediate_size
    assert selector.core[0] + selector.pool[0] == full.layers[0].intermediate_size
    assert set(selector.chosen[1:]) == {0} and set(selector.pool[1:]) == {0}
    assert selector.pools == {0: Pool(selector.core[0], selector.pool[0])}
