"""How much each layer matters to either stage of a sequence: the virtual gates of POP (arXiv 2602.03295, section 3).

Both branches of a layer are multiplied by one gate, y = x + Attn(x) g and x' = y + FFN(y) g, with a gate of its own for
the prompt (all positions but its last) and for the answer. With the answer drawn from the model itself the curvature of
L = -sum log p(answer) in a gate is the Fisher information: I = E[(dL/dg)²], one forward and backward pass a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.model import Cache, Llama
from eopc_compiler.sequences import attend


@dataclass(frozen=True, slots=True)
class StageImportance:
    """Per layer, mean over samples of the squared gate gradients [layers]; fp64."""

    prefill: Tensor
    decode: Tensor


def stage_importance(
    model: Llama,
    prompts: Sequence[Tensor],
    new_tokens: int,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> StageImportance:
    """The importance of every layer for prompt and answer.

    Args:
        model: any form; its parameters must not require gradients.
        prompts: token ids [n], each of 2 or more.
        new_tokens: length of the answers, drawn at temperature 1.
        report: called with (done, total) samples.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(2, len(model.blocks), dtype=torch.float64)
    for done, prompt in enumerate(prompts, start=1):
        answer = sample_answer(model, prompt.tolist(), new_tokens, generator)
        total += gate_gradients(model, torch.cat([prompt, answer]), len(prompt)).square()
        if report:
            report(done, len(prompts))
    prefill, decode = total / len(prompts)
    return StageImportance(prefill, decode)


def sample_answer(model: Llama, prompt: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Token ids [count] drawn from the model after a prompt, at temperature 1."""
    cache = Cache.empty(model.config, len(prompt) + count, model.dtype)
    logits, drawn = model.step(cache, prompt)[-1], list[int]()
    for _ in range(count):
        drawn.append(int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)))
        if len(drawn) < count:
            logits = model.step(cache, drawn[-1:])[-1]
    return torch.tensor(drawn)


def gate_gradients(model: Llama, tokens: Tensor, prompt: int) -> Tensor:
    """dL/dg [2, layers] of the prompt's and the answer's gates, L summed over the answer; fp64.

    Args:
        tokens: ids [S] of prompt and answer.
        prompt: tokens of the prompt; its last one predicts the answer's first and belongs to the answer's stage.
    """
    with torch.enable_grad():
        gates = torch.ones(2, len(model.blocks), requires_grad=True)
        stage = (torch.arange(len(tokens)) >= prompt - 1).long()  # 0: prompt, 1: answer
        x = model.model.embed_tokens(tokens[None]).detach()
        for index, layer in enumerate(model.blocks):
            gate = gates[stage, index][None, :, None]
            if layer.self_attn.kv_heads:
                x = x + layer.self_attn.o_proj(attend(model, layer, layer.input_layernorm(x))) * gate
            if layer.mlp.width:
                x = x + layer.mlp(layer.post_attention_layernorm(x)) * gate
        logits = model.lm_head(model.model.norm(x[0, prompt - 1 : -1])).float()
        (found,) = torch.autograd.grad(F.cross_entropy(logits, tokens[prompt:], reduction="sum"), gates)
    return found.double()
