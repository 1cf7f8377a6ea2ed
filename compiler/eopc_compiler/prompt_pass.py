"""The graph that fills a cache with a prompt where that is another one than the tier's: no logits.

Prefill-only pruning (POP, arXiv 2602.03295) runs only some layers of it, and a share of the tokens through the others
where there are token selectors (`token_selector.py`); a tier that chooses FFN channels by its prompt (`selector.py`)
has it record what the prompt does in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import EagerOps, Ops, rotary_tables
from eopc_compiler.model import Block, Cache, Projection, RMSNorm, Rotary, causal_mask
from eopc_compiler.token_selector import PromptPath, TokenScorer


@dataclass(frozen=True, slots=True)
class Pool:
    """FFN channels of a layer that a tier chooses from: those at `start`..`start + size - 1`."""

    start: int
    size: int

    def energy(self, hidden: Tensor) -> Tensor:
        """Σ z² [size] over tokens, fp32, of what down_proj reads [1, S, width]; squares overflow fp16."""
        z = hidden[..., self.start : self.start + self.size].float()
        return (z * z).sum((0, 1))


class PromptPass(nn.Module):
    """Writes a prompt's keys and values and runs only the first `depth` layers (POP, arXiv 2602.03295); no logits.

    Every later layer writes keys and values of what enters it, through its own norm and projections; in some of them a
    share of the tokens runs. In deployment form only; tensors are named as in `Llama`, but for `self_attn.kv_proj` of
    the layers that are skipped and `token_scorer` of those that choose tokens.

    Args:
        path: the layers that run; all of them where that is their number.
        pools: per layer, channels whose energies are added up for a selector; empty for none.
    """

    def __init__(
        self,
        config: LlamaConfig,
        path: PromptPath,
        ops: Ops | None = None,
        context: int = 2048,
        pools: Sequence[Pool | None] = (),
    ) -> None:
        super().__init__()
        self.config, self.path, layers = config, path, len(config.layers)
        self.pools = tuple(pools) or (None,) * len(config.layers)
        self.ops = ops = ops or EagerOps()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        run = path.running(layers)
        self.model.layers = nn.ModuleList(
            [
                *(Block(config, dims, ops).fuse() for dims in config.layers[:run]),
                *(SkippedBlock(config, dims, ops) for dims in config.layers[run:]),
            ]
        )
        for i in path.chosen(layers):
            self.model.layers[i].token_scorer = TokenScorer(config.hidden_size, path.share)
        cos, sin = rotary_tables(config, min(context, config.max_position_embeddings))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def recorded(self) -> dict[int, Pool]:
        """The pools whose energies are added up, by layer: those of layers that prompts run through."""
        return {i: pool for i, pool in enumerate(self.pools[: self.path.depth]) if pool}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        attn_mask: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        energies: Sequence[Tensor] = (),  # of the recorded pools in their order, [size] fp32
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the written caches and the energies with those of these tokens; else as `Llama.forward`."""
        rotary = Rotary(self.get_buffer("cos"), self.get_buffer("sin"), position_ids)
        x = cast(nn.Embedding, self.model.embed_tokens)(input_ids)
        keys, values, before, after = list(keys), list(values), iter(energies), list[Tensor]()
        for i, layer in enumerate(cast(nn.ModuleList, self.model.layers)):
            if not isinstance(layer, Block):
                keys[i], values[i] = layer(x, rotary, write_index, keys[i], values[i])
                continue
            if i >= self.path.depth:
                scorer = cast(TokenScorer, layer.token_scorer)
                chosen = scorer(layer.input_layernorm(x), position_ids)
                rows, keys[i], values[i] = layer(x, rotary, write_index, attn_mask, keys[i], values[i], chosen)
                x = self.ops.write_rows(x, rows, chosen)
                continue
            x, keys[i], values[i] = layer.attend(x, rotary, write_index, attn_mask, keys[i], values[i])
            if pool := self.pools[i]:
                hidden = layer.mlp.hidden(layer.post_attention_layernorm(x))
                after.append(next(before) + pool.energy(hidden))
                x = x + layer.mlp.down_proj(hidden)
            else:
                x = layer.feed_forward(x)
        return keys, values, after

    @torch.no_grad()
    def fill(self, cache: Cache, ids: Sequence[int]) -> list[Tensor]:
        """Append `ids` to the cache in place; return the energies of the recorded pools."""
        positions = torch.arange(cache.length, cache.length + len(ids))
        mask = causal_mask(positions, cache.capacity, cache.keys[0].dtype)
        start = torch.tensor([cache.length])
        nothing = [torch.zeros(pool.size) for pool in self.recorded.values()]
        cache.keys, cache.values, energies = self(
            torch.tensor([list(ids)]), positions[None], start, mask, cache.keys, cache.values, nothing
        )
        cache.length += len(ids)
        return energies  # type: ignore[no-any-return]


class SkippedBlock(nn.Module):
    """What is left of a decoder layer that a prompt skips: keys and values of its input."""

    def __init__(self, config: LlamaConfig, dims: LayerDims, ops: Ops) -> None:
        super().__init__()
        self.ops, self.head_dim, self.kv_heads = ops, config.head_dim, dims.num_key_value_heads
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        width = 2 * self.kv_heads * self.head_dim
        self.self_attn = nn.Module()
        self.self_attn.kv_proj = Projection(config.hidden_size, width, config.attention_bias).fuse()

    def forward(
        self, x: Tensor, rotary: Rotary, write_index: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.kv_heads:
            return key, value
        batch, length, _ = x.shape
        kv = cast(Projection, self.self_attn.kv_proj)(self.input_layernorm(x))
        k, v = kv.view(batch, length, 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, 1)
        k = self.ops.rotary(k, rotary.cos, rotary.sin, rotary.position_ids)
        return self.ops.write_cache(key, k, write_index), self.ops.write_cache(value, v, write_index)
