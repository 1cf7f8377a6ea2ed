"""Sharing prefixes and remembering losses save work and change no number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.evop.fitness import Fitness, ModelLosses, Work, plain_losses
from eopc_compiler.evop.pattern import Pattern, Space, random_pattern
from eopc_compiler.model import Llama, build_model
from eopc_compiler.pruned import slice_model
from eopc_runtime.errors import UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


def drawn(space: Space, count: int, seed: int = 0) -> list[Pattern]:
    rng = random.Random(seed)
    return [random_pattern(space, rng) for _ in range(count)]


@pytest.mark.parametrize("space", [Space(8, 3), Space(8, 3, sub_blocks=True), Space(8, 1)], ids=str)
def test_the_walk_gives_what_the_plain_loop_gives(
    eight_layers: Llama, stages: tuple[Tensor, ...], space: Space
) -> None:
    """Losses are equal to the last bit, repeats included: the same operations on the same shapes."""
    patterns = drawn(space, 12)
    patterns += patterns[:2]
    found = dict(ModelLosses(eight_layers, stages).score(patterns, 1))
    assert [found[i] for i in range(len(patterns))] == plain_losses(eight_layers, stages[1], patterns)


@pytest.mark.parametrize("sub_blocks", [False, True])
def test_a_skipped_unit_costs_what_a_sliced_one_does(
    make_tiny: MakeTiny, stages: tuple[Tensor, ...], sub_blocks: bool
) -> None:
    """The loss is that of the really sliced model, computed by another code path from its logits."""
    config, tensors = make_tiny(num_hidden_layers=8)
    (pattern,) = drawn(Space(8, 3, sub_blocks), 1, seed=4)
    (loss,) = Fitness(ModelLosses(build_model(config, tensors, 64), stages[1:])).losses([pattern])
    sliced = slice_model(config, tensors.__getitem__, pattern.kept(config)).build(64)
    logits = sliced.score(stages[1])[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, stages[1][:, 1:].flatten()).item()
    assert loss == pytest.approx(want, abs=4e-6)  # another attention kernel; observed 1e-6, two units in the last place


def test_the_walk_runs_each_shared_prefix_once(eight_layers: Llama, stages: tuple[Tensor, ...]) -> None:
    """All C(8,2) patterns: as many halves are run as the trie of their paths has running edges."""
    source = ModelLosses(eight_layers, stages)
    patterns = list(Space(8, 2))
    list(source.score(patterns, 0))
    edges = {p.path[: depth + 1] for p in patterns for depth in range(16) if p.path[depth]}
    assert source.work == Work(asked=28 * 12, run=len(edges))
    assert source.work.layers_saved == (28 * 12 - len(edges)) / 2 > 28 * 6 / 2  # more than half


def test_a_later_generation_runs_only_behind_what_earlier_ones_share(
    eight_layers: Llama, stages: tuple[Tensor, ...]
) -> None:
    """A child that differs from its parent in the last layer costs that layer, on the tokens its parent has seen."""
    source = ModelLosses(eight_layers, stages)
    list(source.score([Pattern(8, False, (2, 5))], 0))
    source.work.run = 0
    list(source.score([Pattern(8, False, (2, 5, 7))], 0))
    assert source.work.run == 2  # behind the last layer nothing is kept, as no pattern goes on from there
    list(source.score([Pattern(8, False, (2, 6))], 0))
    assert source.work.run == 2 + 2 * 2  # layers 5 and 7 in place of 6 and 7
    list(source.score([Pattern(8, False, (2, 6))], 1))
    assert source.work.run == 2 + 2 * 2 + 2 * 6  # other tokens share nothing


@pytest.mark.parametrize("sub_blocks", [False, True])
def test_losses_are_the_same_however_little_memory_prefixes_get(
    eight_layers: Llama, stages: tuple[Tensor, ...], sub_blocks: bool
) -> None:
    """Without any, every pattern runs whole; with room for three states, some do; never is a number changed."""
    patterns = list(dict.fromkeys(drawn(Space(8, 3, sub_blocks), 30)))[:12]
    state = stages[0].numel() * eight_layers.config.hidden_size * 4  # bytes
    run = []
    for limit in (0, 3 * state, 2**30):
        source = ModelLosses(eight_layers, stages, prefix_bytes=limit)
        for part in (patterns[:6], patterns[6:]):
            found = dict(source.score(part, 0))
            assert [found[i] for i in range(6)] == plain_losses(eight_layers, stages[0], part)
        run.append(source.work.run)
    assert sum(sum(p.path) for p in patterns) == run[0] > run[1] > run[2]


class Counting:
    """A source that knows how often it was asked for every pattern and stage."""

    keys = ("a", "b", "c")
    weights = (1, 1, 2)

    def __init__(self) -> None:
        self.work = Work()
        self.asked: list[tuple[str, int]] = []

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        self.asked += [(p.bits, stage) for p in patterns]
        yield from ((i, float(stage + len(p.removed))) for i, p in reversed(list(enumerate(patterns))))


def test_no_loss_is_computed_twice() -> None:
    """Repeats within a call, later calls and higher stages ask the source for what is new only."""
    source = Counting()
    fitness = Fitness(source)
    one, two = Pattern(4, False, (1,)), Pattern(4, False, (1, 2))
    assert fitness.losses([one, two, one], 0) == [1, 2, 1]
    assert fitness.losses([one], 0) == [1]
    assert fitness.knows(one, 0) and not fitness.knows(one, 1)
    assert fitness.losses([one], 1) == [(1 + 2) / 2]
    assert source.asked == [("0100", 0), ("0110", 0), ("0100", 1)]
    assert fitness.computed == 3


def test_the_last_stage_is_the_mean_over_all_tokens() -> None:
    """Stages are weighted by their tokens."""
    fitness = Fitness(Counting())
    assert fitness.losses([Pattern(4, False, (1,))]) == [(1 * 1 + 1 * 2 + 2 * 3) / 4]


def test_stages_add_up_to_one_pass_over_all_windows(eight_layers: Llama, stages: tuple[Tensor, ...]) -> None:
    """Two stages of equally long windows give the loss of both scored at once."""
    parts = [stages[1][:1], stages[1][1:]]
    patterns = drawn(Space(8, 3), 3)
    apart = Fitness(ModelLosses(eight_layers, parts)).losses(patterns)
    assert apart == pytest.approx(Fitness(ModelLosses(eight_layers, stages[1:])).losses(patterns), abs=1e-5)


def test_a_loss_is_told_as_soon_as_it_is_known() -> None:
    """Whoever listens hears every new loss once, with its pattern and stage."""
    fitness = Fitness(Counting())
    heard: list[tuple[str, int, float]] = []
    fitness.on_loss = lambda *entry: heard.append(entry)
    fitness.losses([Pattern(4, False, (1,)), Pattern(4, False, (2,))], 0)
    fitness.losses([Pattern(4, False, (1,))], 1)
    assert heard == [("0010", 0, 1.0), ("0100", 0, 1.0), ("0100", 1, 2.0)]


def test_losses_of_other_tokens_models_or_dtypes_are_not_mixed_up(
    make_tiny: MakeTiny, stages: tuple[Tensor, ...]
) -> None:
    """Keys differ with tokens, shape of windows, weights and dtype; the same of all gives the same key."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, 64)
    other = build_model(config, {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.01}, 64)
    (key,) = ModelLosses(model, stages[:1]).keys
    assert ModelLosses(build_model(config, dict(tensors), 64), stages[:1]).keys == (key,)
    others = (
        ModelLosses(model, stages[1:]),
        ModelLosses(model, [stages[0].reshape(2, -1)]),
        ModelLosses(other, stages[:1]),
        ModelLosses(model, stages[:1], torch.bfloat16),
    )
    assert len({key, *(source.keys[0] for source in others)}) == 5


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_close_and_leaves_the_model_alone(
    make_tiny: MakeTiny, stages: tuple[Tensor, ...], tied: bool
) -> None:
    """Losses in bfloat16 differ by rounding only (8 bits of mantissa, 8 layers; observed 0.01), not by nothing."""
    config, tensors = make_tiny(num_hidden_layers=8, tie_word_embeddings=tied)
    model = build_model(config, tensors, 64)
    patterns = drawn(Space(8, 2), 4)
    exact = Fitness(ModelLosses(model, stages)).losses(patterns)
    rounded = Fitness(ModelLosses(model, stages, torch.bfloat16)).losses(patterns)
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact
    assert model.dtype == torch.float32


def test_a_table_is_a_source() -> None:
    """Losses are looked up by bits; a pattern that is not there is named."""
    fitness = Fitness({"0100": 2.5, "0010": math.nan})
    assert fitness.losses([Pattern(4, False, (1,))]) == [2.5]
    assert fitness.losses([Pattern(4, False, (2,))]) == [math.inf]
    with pytest.raises(UsageError, match="no loss for 1000"):
        fitness.losses([Pattern(4, False, (0,))])


@pytest.mark.parametrize("tokens", [torch.zeros(0, 8), torch.zeros(2, 1), torch.zeros(8), torch.full((1, 4), 160)])
def test_tokens_that_cannot_be_scored_are_refused(eight_layers: Llama, tokens: Tensor) -> None:
    """Empty, without a next token, not a matrix, or outside the vocabulary."""
    with pytest.raises(UsageError, match=r"windows|vocabulary"):
        ModelLosses(eight_layers, [tokens.long()])
    with pytest.raises(UsageError, match="no tokens"):
        ModelLosses(eight_layers, [])
