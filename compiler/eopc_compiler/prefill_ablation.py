"""Prefill-only pruning (POP, arXiv 2602.03295) with each of its parts left out, or with a token selector in its place.

Token selectors are those of `token_selector.py`, with other ways to choose beside them: by how much the last tokens
look at each (as LazyLLM does, arXiv 2407.14057), or by chance. A reference for tables and tests; builds use
`prompt_cache.PromptCache`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from eopc_compiler.model import Llama
from eopc_compiler.sequences import Past, attention_received, keys_and_values, next_token_losses, run_layer
from eopc_compiler.token_selector import FIRST, LAST, PARTS, TokenScorers, kept_tokens

OBSERVERS = 16  # last tokens of a prompt whose attention ranks the others


@dataclass(frozen=True, slots=True)
class PrefillPruning:
    """Which layers a prompt skips, and how."""

    skipped: frozenset[int]
    independent_kv: bool = True  # a skipped layer writes keys and values of its input; else it holds none of the prompt
    boundary: bool = True  # the prompt's last token runs through the whole model; else it skips as well
    share: float = 0.0  # of the prompt's tokens that run through a skipped layer all the same
    chosen_by: Literal["score", "attention", "chance"] = "score"
    scorers: TokenScorers = field(default_factory=dict)  # of the skipped layers


def last(layers: int, count: int) -> frozenset[int]:
    """The deepest layers: the paper's choice."""
    return frozenset(range(layers - count, layers))


def first(_layers: int, count: int) -> frozenset[int]:
    """The shallowest layers."""
    return frozenset(range(count))


def interleaved(layers: int, count: int) -> frozenset[int]:
    """Layers at even distances."""
    return frozenset(round((i + 0.5) * layers / count - 0.5) for i in range(count))


@torch.no_grad()
def continuation_losses(model: Llama, tokens: Tensor, prompt: int, pruning: PrefillPruning) -> Tensor:
    """Losses [n, S - prompt] in nats of the continuation's tokens, the whole model answering.

    The prompt's last token predicts the first of them: without a boundary, from where it stopped.

    Args:
        tokens: ids [n, S].
        prompt: tokens of the prompt, at least 2.
    """
    if prompt < 2 or not set(pruning.skipped) <= set(range(len(model.blocks))):
        raise ValueError("a prompt has at least 2 tokens, and only layers of the model can be skipped")
    border = prompt - 1 if pruning.boundary else prompt
    x = model.model.embed_tokens(tokens)
    skipping, running = x[:, :border], x[:, border:]
    for index, layer in enumerate(model.blocks):
        held: Past | None = keys_and_values(model, layer, skipping)
        if index not in pruning.skipped:
            skipping = run_layer(model, layer, skipping)
        elif pruning.share:
            ids = _chosen(model, index, skipping, pruning)[..., None].expand(-1, -1, skipping.shape[-1])
            skipping = skipping.scatter(1, ids, run_layer(model, layer, skipping).gather(1, ids))
        elif not pruning.independent_kv:
            held = None  # rotary positions only count as distances, so the answer alone may start at 0
        running = run_layer(model, layer, running, held)
    last_of_prompt = running[:, :0] if pruning.boundary else skipping[:, -1:]
    return next_token_losses(model, torch.cat([last_of_prompt, running], 1), tokens[:, prompt - 1 :])


def _chosen(model: Llama, index: int, x: Tensor, pruning: PrefillPruning) -> Tensor:
    """Ids [n, k] of the tokens that run through a layer, from its inputs x [n, S, hidden]."""
    n, length, _ = x.shape
    layer = model.blocks[index]
    if pruning.chosen_by == "score":
        scores = (layer.input_layernorm(x) @ pruning.scorers[index])[..., 0]
    elif pruning.chosen_by == "attention":
        scores = attention_received(model, layer, x, OBSERVERS)
    else:
        scores = torch.rand(n, length, generator=torch.Generator().manual_seed(index))
    scores[:, :FIRST] = scores[:, length - LAST :] = torch.inf
    return torch.topk(scores, kept_tokens(length, round(pruning.share * PARTS))).indices
