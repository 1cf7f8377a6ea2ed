"""What a search has to beat: greedy removal (SLEB), block influence (ShortGPT), and chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from eopc_compiler.evop.pattern import Pattern, Space, random_pattern
from eopc_compiler.evop.tally import Tally
from eopc_compiler.model import Llama
from eopc_compiler.sequences import cosine_sum, run_layer
from eopc_runtime.errors import UsageError


def sleb(tally: Tally) -> None:
    """SLEB (arXiv 2402.09025): remove the unit whose loss is smallest, and again, until the counts are reached.

    First and last layer are barred, as in the authors' code. On sub-blocks it is BlockPruner's greedy search
    (arXiv 2406.10594) with exact counts of both kinds. Takes about (L - 2) + (L - 3) + ... patterns, K terms.
    """
    space = tally.space
    barred = {0, space.layers - 1}
    removed: tuple[int, ...] = ()
    while len(removed) < space.remove * len(space.kinds):
        candidates = []
        for units in space.kinds:
            if len(set(units).intersection(removed)) < space.remove:
                candidates += [u for u in units if u % space.layers not in barred and u not in removed]
        if not candidates:
            raise UsageError(
                f"SLEB spares the first and the last of {space.layers} layers, so it cannot remove {space.remove}. "
                "Remove fewer, or use another method."
            )
        losses = tally.losses([space.pattern((*removed, unit)) for unit in candidates])
        _, unit = min(zip(losses, candidates, strict=True))
        removed = (*removed, unit)


def best_of_random(tally: Tally, rng: random.Random, batch: int = 16) -> None:
    """Different random patterns until the tally's budget or the space is spent."""
    space = tally.space
    while len(tally.seen) < space.size:
        fresh: dict[Pattern, None] = {}
        while len(fresh) < min(batch, space.size - len(tally.seen)):
            pattern = random_pattern(space, rng)
            if pattern not in tally.seen:
                fresh[pattern] = None
        tally.losses(list(fresh))


@torch.no_grad()
def block_influence(model: Llama, stages: Sequence[Tensor]) -> tuple[float, ...]:
    """ShortGPT's BI (arXiv 2403.03853) per layer, over the tokens of windows [n, S]."""
    totals, count = [0.0] * len(model.blocks), 0
    for tokens in stages:
        hidden: Tensor = model.model.embed_tokens(tokens)
        count += tokens.numel()
        for index, layer in enumerate(model.blocks):
            after = run_layer(model, layer, hidden)
            totals[index] += cosine_sum(hidden, after)
            hidden = after
    return tuple(1.0 - total / count for total in totals)


def least_influential(space: Space, influence: Sequence[float]) -> Pattern:
    """The whole layers with the lowest influence; ties go to the earlier layer. One forward pass, no search."""
    if space.sub_blocks:
        raise UsageError("Block influence is defined for whole layers; use another method for sub-blocks.")
    ranked = sorted(space.units, key=lambda unit: (influence[unit], unit))
    return space.pattern(ranked[: space.remove])
