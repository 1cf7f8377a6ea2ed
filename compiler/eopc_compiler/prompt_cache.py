"""The cache a prompt leaves behind: of the whole model, or of prefill-only pruning (POP).

POP (arXiv 2602.03295): the prompt skips the layers from `depth` on. A skipped layer still writes keys and values of
what enters it, through its own norm and projections (independent KV), so all of them see the hidden states in front of
layer `depth`. The prompt's last token is the boundary: it runs through the whole model, as every token after it does.
Nothing is trained, and with `depth` at the number of layers nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eopc_compiler.model import Llama
from eopc_compiler.sequences import Past, fast_math, keys_and_values, run_layer


class PromptCache:
    """Walks the layers of a model upwards and tells what every one of them holds of the prompt.

    Args:
        model: the whole model, which is left as it is.
        prompt: tokens of the prompt, at least 2 where layers are skipped.
        depth: layers that the prompt runs through; None for all of them.
    """

    def __init__(self, model: Llama, prompt: int, depth: int | None = None) -> None:
        if depth is not None and prompt < 2:
            raise ValueError("a prompt of one token is its own boundary: it skips nothing")
        self.model, self.prompt = model, prompt
        self.depth = len(model.blocks) if depth is None else depth
        self._skipping: tuple[Tensor, Tensor] | None = None  # what skips, and what runs on: boundary and answer

    def enter(self, index: int, x: Tensor) -> tuple[Past, Tensor]:
        """What layer `index` holds of the prompt, and the hidden states behind the prompt in front of it.

        Layers are entered one after the other, from 0 on.

        Args:
            x: hidden states [n, S, hidden] in front of the layer in the whole model, S >= prompt; from layer depth + 1
                on they are not looked at.

        Returns:
            Keys and values [n, kv_heads, prompt, head_dim], hidden states [n, S - prompt, hidden]; `fast_math`.
        """
        layer, prompt = self.model.blocks[index], self.prompt
        with fast_math():
            if index < self.depth:
                return keys_and_values(self.model, layer, x[:, :prompt]), x[:, prompt:]
            skipping, running = self._skipping or (x[:, : prompt - 1], x[:, prompt - 1 :])
            past = keys_and_values(self.model, layer, skipping)
            own = keys_and_values(self.model, layer, running[:, :1], prompt - 1)
            self._skipping = skipping, run_layer(self.model, layer, running, past).float()
            return (torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)), running[:, 1:]
