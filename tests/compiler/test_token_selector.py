"""Tokens of a prompt that run through a layer: how many, which always, and what has no say in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eopc_compiler import sequences
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.model import Llama, build_model
from eopc_compiler.prompt_cache import PromptCache
from eopc_compiler.sequences import Past, next_token_losses, run_layer
from eopc_compiler.token_fit import fit_token_scorers, token_effects
from eopc_compiler.token_selector import FIRST, LAST, PromptPath, PrunedPrompt, TokenScorer
from eopc_compiler.tracing import Target, trace_prompt_pass
from eopc_runtime.tier_info import FREE

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
PROMPT, LENGTH = 80, 88
HALF = PromptPath(1, 0.5)
SCORERS = {1: torch.randn(64, 1, generator=torch.Generator().manual_seed(3))}


@pytest.fixture
def model(make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Three layers in deployment form, products in fp32 on every processor."""
    monkeypatch.setattr(sequences, "native_bfloat16", lambda: False)
    config, tensors = make_tiny()
    return build_model(config, tensors, LENGTH).fuse()


def tokens_of(count: int, seed: int = 5) -> Tensor:
    return torch.randint(0, 160, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def held(model: Llama, tokens: Tensor, pruned: PrunedPrompt) -> list[Past]:
    """What every layer holds of the prompts."""
    walk, x, found = PromptCache(model, PROMPT, pruned), model.model.embed_tokens(tokens), []
    for index, layer in enumerate(model.blocks):
        found.append(walk.enter(index, x)[0])
        x = run_layer(model, layer, x)
    return found


def scorer(share: float, seed: int = 3) -> TokenScorer:
    made = TokenScorer(64, share)
    made.weight.data = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize("share", [1 / 16, 0.25, 0.5, 15 / 16])
@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 48, 90])
def test_as_many_tokens_run_as_the_share_says_rounded_up(share: float, tokens: int) -> None:
    """All of the first FREE, and the share of those beyond, whatever is in them; no token twice."""
    normed = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    chosen = scorer(share)(normed, torch.arange(tokens)[None])
    want = min(tokens, FREE) - (-max(tokens - FREE, 0) * round(16 * share) // 16)
    assert len(set(chosen.tolist())) == len(chosen) == want == PromptPath(1, share).kept(tokens)


@pytest.mark.parametrize("start", [0, 100])
def test_the_first_tokens_of_a_sequence_and_the_last_of_a_pass_always_run(start: int) -> None:
    """The others by their scores, highest first."""
    normed, positions = torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(1)), torch.arange(80) + start
    one = scorer(0.5)
    chosen = one(normed, positions[None]).tolist()
    always = [i for i in range(80) if positions[i] < FIRST or i >= 80 - LAST]
    assert set(always) <= set(chosen)
    scores = (normed[0] @ one.weight)[:, 0].tolist()
    others = sorted(set(range(80)) - set(always), key=lambda i: -scores[i])
    assert set(chosen) - set(always) == set(others[: HALF.kept(80) - len(always)])


def test_a_second_run_and_other_sequences_of_a_batch_change_nothing(model: Llama) -> None:
    """The same prompt leaves the same cache: again bit for bit, in company within the rounding of a product."""
    tokens, pruned = tokens_of(3), PrunedPrompt(HALF, SCORERS)
    together, again, alone = held(model, tokens, pruned), held(model, tokens, pruned), held(model, tokens[1:2], pruned)
    for a, b, c in zip(together, again, alone, strict=True):
        for kind in range(2):
            assert torch.equal(a[kind], b[kind])
            torch.testing.assert_close(a[kind][1:2], c[kind], atol=1e-5, rtol=0)


def test_what_follows_a_prompt_has_no_say(model: Llama) -> None:
    """Another answer, the same cache."""
    tokens, pruned = tokens_of(2), PrunedPrompt(HALF, SCORERS)
    other = torch.cat([tokens[:, :PROMPT], (tokens[:, PROMPT:] + 1) % 160], 1)
    for a, b in zip(held(model, tokens, pruned), held(model, other, pruned), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_tokens_that_pass_a_layer_leave_what_a_skipping_prompt_leaves(model: Llama) -> None:
    """In the last layer, keys and values of those that ran differ from a wholly skipping prompt's, and no others."""
    tokens = tokens_of(1)
    some, none = (held(model, tokens, p)[2] for p in (PrunedPrompt(HALF, SCORERS), PrunedPrompt(PromptPath(1))))
    differ = ((some[1] - none[1]).abs().amax((1, 3)) > 1e-5)[0, : PROMPT - 1]
    x = run_layer(model, model.blocks[0], model.model.embed_tokens(tokens))[:, : PROMPT - 1]
    one = TokenScorer(64, 0.5)
    one.weight.data = SCORERS[1]
    chosen = one(model.blocks[1].input_layernorm(x), torch.arange(PROMPT - 1)[None])
    assert set(differ.nonzero()[:, 0].tolist()) == set(chosen.tolist())


@pytest.mark.parametrize("parts", [1, 4, 7, 13, 15])
def test_graphs_of_every_share_can_be_traced(make_tiny: MakeTiny, parts: int) -> None:
    """The count is one expression of the length: a tracer that cannot bound it would refuse some shares."""
    target = Target(DIALECTS["native"], "float32", LENGTH)
    traced = trace_prompt_pass(make_tiny()[0], PromptPath(1, parts / 16), target)
    assert [node.op_type for node in traced.graph].count("TopK") == 1


def test_short_prompts_that_stand_for_long_ones_run_as_small_a_part() -> None:
    """Of 64 tokens 48 run as they are; in place of 256, of which 144 do, as many as of those: 36."""
    alone, standing = (PrunedPrompt(HALF, SCORERS, length) for length in (None, 256))
    assert (HALF.kept(256), alone.kept(64), standing.kept(64)) == (144, 48, 36)
    assert standing.kept(300) == HALF.kept(300)


@pytest.mark.parametrize("bad", [(0, 0.5), (1, 1.0), (1, -0.5), (1, 0.3)])
def test_a_path_that_cannot_be_is_refused(bad: tuple[int, float]) -> None:
    """At least one layer by all tokens; less than all, in sixteenths, through the others."""
    with pytest.raises(ValueError, match="sixteenths"):
        PromptPath(*bad)


def test_an_effect_is_what_the_loss_changes_by_when_a_token_passes_the_layer(model: Llama) -> None:
    """The slope of the answer's loss in a gate on what layer 1 adds to one token, by finite differences."""
    tokens, step = tokens_of(1), 0.02  # losses are sums of fp32: smaller steps drown in their rounding
    ((_, effects),) = token_effects(model, tokens, PROMPT)

    def loss(token: int, gate: float) -> float:
        x = run_layer(model, model.blocks[0], model.model.embed_tokens(tokens))
        delta = run_layer(model, model.blocks[1], x) - x
        delta[:, token] *= gate
        x = run_layer(model, model.blocks[2], x + delta)
        return float(next_token_losses(model, x[:, PROMPT - 1 :], tokens[:, PROMPT - 1 :]).double().sum())

    with torch.no_grad():
        for token in (0, 7, PROMPT - 2):
            slope = (loss(token, 1 + step) - loss(token, 1 - step)) / (2 * step)
            assert slope == pytest.approx(float(effects[0, token]), rel=0.05, abs=2e-3)


def test_a_fitted_score_ranks_tokens_by_what_the_answer_would_lose(model: Llama) -> None:
    """On text that it was not fitted on: the rank correlation over 3600 tokens (by chance 0.02).

    Tokens are drawn evenly, so nothing but their own features tells what a random model's answer would lose.
    """
    found = fit_token_scorers(model, [Batch(0, 1.0, tokens_of(768))], PROMPT)
    assert set(found) == {1}  # all tokens run through the first layer, and the last one has nothing to give
    ((reads, effects),) = token_effects(model, tokens_of(48, seed=6), PROMPT)
    ranks = [t[:, FIRST:].argsort(1).argsort(1).double().flatten() for t in (effects.abs(), (reads @ found[1])[..., 0])]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.06
