"""Text that the model writes itself: calibration text of its own distribution, where nothing is downloaded.

Self-calibration (Williams, Chrysostomou, Aletras: arXiv 2410.17170): documents drawn token by token from the model,
behind the token that begins a text. The paper lowers a temperature as it goes; here it stays 1, so that statistics are
those of what the model would write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eopc_compiler.model import Cache, Llama

ROWS = 64  # documents that are drawn side by side: a step reads all weights once for them
OWN = "own"  # name of the domain


class Decoder(Protocol):
    """Anything that turns token ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@torch.no_grad()
def write_tokens(
    model: Llama, first: int, count: int, length: int, seed: int = 0, report: Callable[[int, int], None] | None = None
) -> Tensor:
    """Token ids [count, length] drawn from the model at temperature 1, every row behind the token `first`.

    Args:
        model: any form; `length` is at most its context.
        report: called with (done, total) tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    zero, parts, done = torch.zeros(1, dtype=torch.int64), list[Tensor](), 0
    for tokens in torch.split(torch.full((count, 1), first), ROWS):
        rows, drawn = len(tokens), list[Tensor]()
        cache = Cache.empty(model.config, length, model.dtype, rows)
        for t in range(length):
            used = ([x[:, :, : t + 1] for x in half] for half in (cache.keys, cache.values))  # views, written in place
            mask = torch.zeros(1, 1, 1, t + 1, dtype=model.dtype)
            logits, _, _ = model(tokens, zero.expand(rows, 1) + t, zero + t, mask, zero, *used)
            tokens = torch.multinomial(torch.softmax(logits[:, 0], -1), 1, generator=generator)
            drawn.append(tokens)
            done += rows
            if report:
                report(done, count * length)
        parts.append(torch.cat(drawn, 1))
    return torch.cat(parts)


def own_documents(
    model: Llama,
    tokenizer: Decoder,
    first: int,
    count: int,
    length: int,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The same as text, special tokens left out; see `write_tokens`."""
    return [tokenizer.decode(row) for row in write_tokens(model, first, count, length, seed, report).tolist()]
