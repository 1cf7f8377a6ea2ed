"""The LLaMA family in one file, top-down, with Hugging Face tensor names and per-layer dimensions.

Two visible entry points, both built on `Llama.forward`:

* `prefill(model, ids)` runs a whole prompt into a fresh cache and returns the logits of its last position;
* `decode(model, cache, token)` runs one token against the cache.

A model is either in *checkpoint form* (q_proj, k_proj, v_proj, gate_proj, up_proj as Hugging Face stores them) or,
after `fuse()`, in *deployment form*: q, k and v merged into qkv_proj, every matrix stored [in, out] so that the units a
tier keeps are rows (o_proj, down_proj) or columns (qkv_proj, gate_proj, up_proj), and 1/sqrt(head_dim) folded into the
query columns. Gate and up stay apart: the product of one merged matrix would be split again, which copies all of it.
Exported graphs are always in deployment form. What differs between ONNX dialects (norm, rotary
embedding, attention, cache write) goes through an `Ops` object; see dialects.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import EagerOps, Ops, rotary_tables
from eopc_compiler.quantize import InputRounding

MASK_VALUE = -30000.0  # drops a position after softmax, and stays finite in fp16 when added to any score


def prefill(model: Llama, ids: Sequence[int], capacity: int) -> tuple[Tensor, Cache]:
    """Run a prompt into a fresh cache of `capacity` slots; return the last logits [vocab] and the cache."""
    cache = Cache.empty(model.config, capacity, dtype=model.dtype)
    return model.step(cache, ids)[-1], cache


def decode(model: Llama, cache: Cache, token: int) -> Tensor:
    """Append one token to the cache and return the logits [vocab] that follow it."""
    return model.step(cache, [token])[-1]


@dataclass(slots=True)
class Cache:
    """Keys and values of sequences: per layer one pair [B, kv_heads, capacity, head_dim], `length` slots used."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int

    @classmethod
    def empty(cls, config: LlamaConfig, capacity: int, dtype: torch.dtype, batch: int = 1) -> Cache:
        """Allocate zeroed buffers for every layer of `config`."""
        shapes = [(batch, layer.num_key_value_heads, capacity, config.head_dim) for layer in config.layers]
        return cls([torch.zeros(s, dtype=dtype) for s in shapes], [torch.zeros(s, dtype=dtype) for s in shapes], 0)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


class Llama(nn.Module):
    """A decoder of the LLaMA family: LLaMA 2/3, TinyLlama, SmolLM2, Mistral, Qwen2 (q/k/v biases)."""

    def __init__(self, config: LlamaConfig, ops: Ops | None = None, context: int = 2048) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, ops or EagerOps())
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config, min(context, config.max_position_embeddings))
        self.register_buffer("cos", cos, persistent=False)  # [context, head_dim / 2]
        self.register_buffer("sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        """The decoder layers, typed."""
        return [cast(Block, block) for block in self.model.layers]

    def forward(
        self,
        input_ids: Tensor,  # [1, S]
        position_ids: Tensor,  # [1, S]
        write_index: Tensor,  # [1]: first cache slot to write
        attn_mask: Tensor,  # [1, 1, S, T], additive
        logits_index: Tensor,  # [N]: positions in S whose logits are wanted
        keys: list[Tensor],  # per layer [1, kv_heads, T, head_dim]
        values: list[Tensor],
        rows: Rows = (),  # per layer: channels that were chosen for this sequence
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return logits [1, N, vocab] in fp32 and the written caches."""
        rotary = Rotary(self.get_buffer("cos"), self.get_buffer("sin"), position_ids)
        hidden, keys, values = self.model(input_ids, rotary, write_index, attn_mask, logits_index, keys, values, rows)
        return self.lm_head(hidden).float(), keys, values

    @torch.no_grad()
    def step(self, cache: Cache, ids: Sequence[int], rows: Rows = ()) -> Tensor:
        """Append `ids` to the cache in place and return the logits of all of them, [len(ids), vocab]."""
        n, start = len(ids), cache.length
        positions = torch.arange(start, start + n)
        mask = causal_mask(positions, cache.capacity, self.dtype)
        logits, cache.keys, cache.values = self(
            torch.tensor([list(ids)]),
            positions[None],
            torch.tensor([start]),
            mask,
            torch.arange(n),
            cache.keys,
            cache.values,
            rows,
        )
        cache.length += n
        return logits[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """Logits [batch, S, vocab] of whole sequences [batch, S] from scratch, without a cache to keep."""
        batch, length = tokens.shape
        cache = Cache.empty(self.config, length, self.dtype, batch)
        positions = torch.arange(length)
        mask = causal_mask(positions, length, self.dtype)
        zero = torch.zeros(batch, dtype=torch.long)
        logits, _, _ = self(tokens, positions[None].expand(batch, -1), zero, mask, positions, cache.keys, cache.values)
        return logits  # type: ignore[no-any-return]

    def fuse(self) -> Llama:
        """Turn checkpoint form into deployment form, in place, one layer at a time; return self."""
        for layer in self.blocks:
            layer.fuse()
        self.lm_head.fuse()
        return self


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary tables [context, head_dim / 2] and the positions [1, S] of the current tokens."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, dims, ops) for dims in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(
        self,
        input_ids: Tensor,
        rotary: Rotary,
        write_index: Tensor,
        attn_mask: Tensor,
        logits_index: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        rows: Rows = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.embed_tokens(input_ids)  # [1, S, hidden]
        keys, values = list(keys), list(values)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            # Of positions whose logits are not wanted, the last layer has only K and V to give. Not where it is the
            # first: ONNX Runtime 1.32 moves the embedding's DequantizeLinear behind a Gather, with the wrong scales.
            wanted = logits_index if i == last > 0 else None
            chosen = rows[i] if rows else None
            x, keys[i], values[i] = layer(x, rotary, write_index, attn_mask, keys[i], values[i], wanted, chosen)
        return self.norm(x if last else torch.index_select(x, 1, logits_index)), keys, values


class Block(nn.Module):
    """One decoder layer: attention and a gated FFN, each behind a norm and a residual."""

    def __init__(self, config: LlamaConfig, dims: LayerDims, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = Attention(config, dims, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = FeedForward(config, dims)

    def fuse(self) -> Block:
        """Turn checkpoint form into deployment form, in place; return self."""
        self.self_attn.fuse()
        self.mlp.fuse()
        return self

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        write_index: Tensor,
        mask: Tensor,
        key: Tensor,
        value: Tensor,
        wanted: Tensor | None = None,
        rows: ChannelRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run x [B, S, hidden]; with `wanted` [N], keys and values of all positions are written, and N go on."""
        x, key, value = self.attend(x, rotary, write_index, mask, key, value, wanted)
        return self.feed_forward(x, rows), key, value

    def attend(
        self,
        x: Tensor,
        rotary: Rotary,
        write_index: Tensor,
        mask: Tensor,
        key: Tensor,
        value: Tensor,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention half of `forward`."""
        normed = self.input_layernorm(x) if self.self_attn.kv_heads else x
        if wanted is not None:
            x = torch.index_select(x, 1, wanted)
        if self.self_attn.kv_heads:
            attended, key, value = self.self_attn(normed, rotary, write_index, mask, key, value, wanted)
            x = x + attended
        return x, key, value

    def feed_forward(self, x: Tensor, rows: ChannelRows | None = None) -> Tensor:
        """The FFN half of `forward`."""
        if not self.mlp.width and rows is None:
            return x
        added: Tensor = self.mlp(self.post_attention_layernorm(x), rows)
        return x + added


class Attention(nn.Module):
    """Grouped-query attention over a cache that is written first and read whole, masked."""

    def __init__(self, config: LlamaConfig, dims: LayerDims, ops: Ops) -> None:
        super().__init__()
        self.ops, self.head_dim = ops, config.head_dim
        self.kv_heads = dims.num_key_value_heads
        self.q_heads = dims.num_key_value_heads * config.query_group_size
        q_width, kv_width = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Projection(config.hidden_size, q_width, config.attention_bias)
        self.k_proj = Projection(config.hidden_size, kv_width, config.attention_bias)
        self.v_proj = Projection(config.hidden_size, kv_width, config.attention_bias)
        self.o_proj = Projection(q_width, config.hidden_size, config.attention_out_bias)
        self.qkv_proj: Projection | None = None

    def fuse(self) -> None:
        scale = self.head_dim**-0.5  # folded, so that attention kernels run with scale 1, their fast path
        self.q_proj.scale(scale)
        self.qkv_proj = Projection.merged([self.q_proj, self.k_proj, self.v_proj])
        del self.q_proj, self.k_proj, self.v_proj
        self.o_proj.fuse()

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        write_index: Tensor,
        mask: Tensor,
        key: Tensor,
        value: Tensor,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, scale = self.project(x, rotary)
        key = self.ops.write_cache(key, k, write_index)
        value = self.ops.write_cache(value, v, write_index)
        if wanted is not None:
            q, mask = torch.index_select(q, 2, wanted), torch.index_select(mask, 2, wanted)
        out = self.ops.attention(q, key, value, mask, scale)  # [B, q_heads, S or N, head_dim]
        return self.o_proj(out.transpose(1, 2).flatten(2)), key, value

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries [B, q_heads, S, head_dim], keys and values [B, kv_heads, S, head_dim], and the scale of scores."""
        batch, length, _ = x.shape
        if self.qkv_proj is not None:
            qkv, scale = self.qkv_proj(x), 1.0
        else:
            qkv, scale = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1), self.head_dim**-0.5
        heads = qkv.view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, q + 2 kv heads, S, head_dim]
        qk, v = torch.split(heads, [self.q_heads + self.kv_heads, self.kv_heads], 1)
        qk = self.ops.rotary(qk, rotary.cos, rotary.sin, rotary.position_ids)  # queries and keys in one call
        q, k = torch.split(qk, [self.q_heads, self.kv_heads], 1)
        return q, k, v, scale


ChannelRows = tuple[Tensor, Tensor, Tensor]  # gate, up and down of some FFN channels, [n, hidden] each
Rows = Sequence[ChannelRows | None]  # per layer; empty where nothing is chosen


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate) * up), over its own channels and those that are given."""

    def __init__(self, config: LlamaConfig, dims: LayerDims) -> None:
        super().__init__()
        self.width = dims.intermediate_size
        self.gate_proj = Projection(config.hidden_size, self.width, config.mlp_bias)
        self.up_proj = Projection(config.hidden_size, self.width, config.mlp_bias)
        self.down_proj = Projection(self.width, config.hidden_size, config.mlp_out_bias or dims.compensated)

    def fuse(self) -> None:
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.fuse()

    def forward(self, x: Tensor, rows: ChannelRows | None = None) -> Tensor:
        own: Tensor = self.down_proj(self.hidden(x))
        if rows is None:
            return own
        gate, up, down = rows
        return own + torch.matmul(swiglu(torch.matmul(x, gate.t()), torch.matmul(x, up.t())), down)

    def hidden(self, x: Tensor) -> Tensor:
        """What down_proj reads, [..., width]."""
        channels = swiglu(self.gate_proj(x), self.up_proj(x))
        inputs = self.down_proj.inputs
        return channels if inputs is None else inputs.turned(channels)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    product: Tensor = gate * torch.sigmoid(gate) * up
    return product


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Projection(nn.Module):
    """A linear map stored [out, in] as checkpoints do, or [in, out] once fused."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(fan_out), requires_grad=False) if bias else None
        self.transposed = False
        self.inputs: InputRounding | None = None  # how inputs are rounded before they are multiplied
        self.rounds = True  # else they are left as they are, for comparison

    @classmethod
    def merged(cls, parts: Sequence[Projection]) -> Projection:
        """One fused projection whose output is the parts' outputs side by side."""
        whole = cls(0, 0, bias=False)
        whole.weight = nn.Parameter(torch.cat([p.weight.data for p in parts]).t().contiguous(), requires_grad=False)
        if parts[0].bias is not None:
            biases = [p.bias.data for p in parts if p.bias is not None]
            whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        whole.transposed = True
        return whole

    def fuse(self) -> Projection:
        # a new parameter: a head tied to the embedding must not transpose the embedding with it
        self.weight = nn.Parameter(self.weight.data.t().contiguous(), requires_grad=False)
        self.transposed = True
        return self

    def scale(self, factor: float) -> None:
        # new parameters: the old ones may be the caller's tensors
        self.weight = nn.Parameter(self.weight.data * factor, requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.data * factor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        y = torch.matmul(self._rounded(x) if self.rounds else x, self.weight)
        return y if self.bias is None else y + self.bias

    def _rounded(self, x: Tensor) -> Tensor:
        """The inputs as the device gets them; gradients pass straight through."""
        if self.inputs is None:
            return x
        rounded = self.inputs.rounded(x)
        return x + (rounded - x).detach() if x.requires_grad else rounded

    def reads_as(self, other: Projection) -> None:
        """Take over how another one rounds its inputs."""
        self.inputs, self.rounds = other.inputs, other.rounds


def causal_mask(positions: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, S, capacity]: a token at position p sees cache slots 0..p."""
    visible = torch.arange(capacity)[None, :] <= positions[:, None]
    return torch.where(visible, 0.0, MASK_VALUE).to(dtype)[None, None]


def build_model(config: LlamaConfig, tensors: Mapping[str, Tensor], context: int = 2048) -> Llama:
    """An eager fp32 model in checkpoint form that *shares* the given tensors (no copy)."""
    with torch.device("meta"):
        model = Llama(config, context=context)
    for name, parameter in list(model.named_parameters()):
        source = tensors.get(name)
        if source is None and name == "lm_head.weight":
            source = tensors["model.embed_tokens.weight"]
        assert source is not None and source.shape == parameter.shape, f"{name}: {source is not None and source.shape}"
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(source, requires_grad=False))
    cos, sin = rotary_tables(config, min(context, config.max_position_embeddings))
    model.cos, model.sin = cos, sin
    return model.eval()
