"""The cache a prompt leaves behind: of the whole model, or of prefill-only pruning (POP).

POP (arXiv 2602.03295): the prompt skips the layers from `depth` on. A skipped layer still writes keys and values of
what enters it, through its own norm and projections (independent KV), so all of them see the hidden states in front of
layer `depth`; or a share of the tokens runs through them all the same (`token_selector.py`). The prompt's last token is
the boundary: it runs through the whole model, as every token after it does. Nothing is trained, and with `depth` at the
number of layers nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eopc_compiler.model import Block, Llama
from eopc_compiler.sequences import Past, fast_math, keys_and_values, run_layer
from eopc_compiler.token_selector import PrunedPrompt, token_scores


class PromptCache:
    """Walks the layers of a model upwards and tells what every one of them holds of the prompt.

    Args:
        model: the whole model, which is left as it is.
        prompt: tokens of the prompt, at least 2 where layers are skipped.
        pruned: how the prompt runs; None for through all layers.
    """

    def __init__(self, model: Llama, prompt: int, pruned: PrunedPrompt | None = None) -> None:
        if pruned is not None and prompt < 2:
            raise ValueError("a prompt of one token is its own boundary: it skips nothing")
        self.model, self.prompt, self._pruned = model, prompt, pruned
        self.depth = len(model.blocks) if pruned is None else pruned.path.depth
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
            self._skipping = self._pass(index, layer, skipping), run_layer(self.model, layer, running, past).float()
            return (torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)), running[:, 1:]

    def _pass(self, index: int, layer: Block, x: Tensor) -> Tensor:
        """The prompt behind a layer that none of its tokens [n, S, hidden] run through, or a share of them."""
        assert self._pruned is not None
        path = self._pruned.path
        if index not in path.chosen(len(self.model.blocks)):
            return x
        positions = torch.arange(x.shape[1])[None].expand(len(x), -1)
        scores = token_scores(layer.input_layernorm(x), self._pruned.scorers[index], positions)
        ids = torch.topk(scores, self._pruned.kept(x.shape[1])).indices[..., None].expand(-1, -1, x.shape[2])
        return x.scatter(1, ids, run_layer(self.model, layer, x).float().gather(1, ids))
