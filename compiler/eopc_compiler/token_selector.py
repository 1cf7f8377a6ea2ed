"""Tokens of a prompt that run through a layer, chosen anew in every one (EOP-style): how many is fixed, which is not.

Of the layers behind a prompt's `depth`, every one but the last runs FREE of the S tokens that it is given, and a share
of those beyond: FREE + ceil(share · (S - FREE)). The others pass it unchanged, as all do in prefill-only pruning (POP,
arXiv 2602.03295). Of a short prompt every token counts: a question of 37, of which 12 ran through the last 12 of
SmolLM2-135M's 30 layers, was answered beside the point. Keys and values are written of all of them, at their own
positions, and the last layer has nothing else to give to a prompt. Tokens are ranked by a score that is linear in what
the layer reads,

    s_t = w · norm(x_t)

but the first FIRST of a sequence and the last LAST of a pass always come first. Nothing is drawn, and nothing but the
tokens of the pass has a say; later tokens have, so a pass is for prompts alone, which are known to their end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eopc_runtime.tier_info import FREE, PASS, running_layers

FIRST, LAST = 4, 8  # attention rests on a sequence's first tokens, and an answer looks at a prompt's last ones most
PARTS = 16  # shares are multiples of 1/16, so that counts are exact
ALWAYS = 1e6  # above every score, and exact in fp32 after positions are subtracted


@dataclass(frozen=True, slots=True)
class PromptPath:
    """How the tokens of a prompt run, all but its last one, where that is not the whole model.

    Args:
        depth: layers that all of them run through, at least 1.
        share: of them, beyond FREE, that run through each of the others but the last; 0 for none.
    """

    depth: int
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.depth < 1 or not 0 <= self.share < 1 or self.share * PARTS % 1:
            raise ValueError(f"a prompt runs through 1 layer or more, and a share of it in sixteenths, not {self}")

    def running(self, layers: int) -> int:
        """How many of so many layers all or some of the tokens run through: the first ones."""
        return running_layers(self.depth, self.share, layers)

    def chosen(self, layers: int) -> range:
        """The layers that only a share of the tokens runs through, of so many."""
        return range(self.depth, self.running(layers))

    def kept(self, tokens: int) -> int:
        """How many of these tokens run through such a layer."""
        return kept_tokens(tokens, round(self.share * PARTS))

    @property
    def most(self) -> tuple[float, float]:
        """(a, b): of any S tokens, in passes of PASS or more, at most a S + b run through a layer that chooses some."""
        beyond = (1 - self.share) * FREE + (PARTS - 1) / PARTS if self.share else 0.0  # of a pass, above its share
        return self.share + beyond / PASS, beyond


TokenScorers = Mapping[int, Tensor]  # by layer, w [hidden, 1]: a matrix, as graphs multiply it


@dataclass(frozen=True, slots=True)
class PrunedPrompt:
    """A path, and what ranks the tokens in the layers that it chooses some for.

    Args:
        stands_for: tokens of a pass that shorter prompts, of a calibration text, stand for: as large a part of them
            runs, though FREE is more of a short prompt; None for prompts as they are.
    """

    path: PromptPath
    scorers: TokenScorers = field(default_factory=dict)
    stands_for: int | None = None

    def kept(self, tokens: int) -> int:
        """How many of so many tokens run through a layer that chooses some."""
        if self.stands_for is None or tokens >= self.stands_for:
            return self.path.kept(tokens)
        return math.ceil(tokens * self.path.kept(self.stands_for) / self.stands_for)


def kept_tokens(tokens: int, parts: int) -> int:
    """FREE + ceil((tokens - FREE) · parts / PARTS), or all; also of a length that is only known when a graph runs.

    In this form torch.export sees for itself that the result is never above `tokens`.
    """
    beyond: int = torch.sym_max(tokens - FREE, 0)  # type: ignore[no-untyped-call]
    return tokens - beyond * (PARTS - parts) // PARTS


class TokenScorer(nn.Module):
    """Chooses the tokens of one layer."""

    def __init__(self, hidden: int, share: float) -> None:
        super().__init__()
        self.parts = round(share * PARTS)
        self.weight = nn.Parameter(torch.empty(hidden, 1, dtype=torch.float32), requires_grad=False)

    def forward(self, normed: Tensor, position_ids: Tensor) -> Tensor:
        """Indices [k] of the tokens that run, from what the layer reads of them [1, S, hidden]."""
        scores = token_scores(normed, self.weight, position_ids)
        return torch.topk(scores[0], kept_tokens(scores.shape[1], self.parts)).indices


def token_scores(normed: Tensor, weight: Tensor, position_ids: Tensor) -> Tensor:
    """Scores [n, S], fp32, of normed inputs [n, S, hidden] at positions [n, S]; those that always run are the highest.

    Among these, the first come first, where a share of very few tokens is less than all of them.
    """
    scores = torch.matmul(normed.float(), weight)[..., 0]
    always = (position_ids < FIRST) | (position_ids > position_ids[:, -1:] - LAST)
    return torch.where(always, ALWAYS - position_ids.float(), scores)
