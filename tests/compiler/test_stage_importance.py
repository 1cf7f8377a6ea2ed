"""Virtual gates: gradients against finite differences, and what the stages see of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama, build_model
from eopc_compiler.sequences import attend
from eopc_compiler.stage_importance import gate_gradients, sample_answer, stage_importance

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
PROMPT = 6


@pytest.fixture
def model(make_tiny: MakeTiny) -> Llama:
    config, tensors = make_tiny()
    return build_model(config, tensors, 64)


def loss(model: Llama, tokens: Tensor, gates: Tensor) -> float:
    """The summed loss of the answer with gates [2, layers]; fp64."""
    model = model.double()
    x = model.model.embed_tokens(tokens[None])
    for index, layer in enumerate(model.blocks):
        gate = torch.cat([gates[:1, index].expand(PROMPT - 1), gates[1:, index].expand(len(tokens) - PROMPT + 1)])
        y = x + layer.self_attn.o_proj(attend(model, layer, layer.input_layernorm(x))) * gate[None, :, None]
        x = y + layer.mlp(layer.post_attention_layernorm(y)) * gate[None, :, None]
    logits = model.lm_head(model.model.norm(x[0, PROMPT - 1 : -1]))
    return float(F.cross_entropy(logits, tokens[PROMPT:], reduction="sum"))


def test_gate_gradients_are_those_of_finite_differences(model: Llama) -> None:
    """Of the paper's gated layer, for both stages of every layer; norms compute in fp32, which bounds the step."""
    tokens = torch.randint(0, 160, (14,), generator=torch.Generator().manual_seed(1))
    found, step = gate_gradients(model, tokens, PROMPT), 1e-2
    for stage in range(2):
        for index in range(len(model.blocks)):
            gates = torch.ones(2, len(model.blocks), dtype=torch.float64)
            gates[stage, index] += step
            up = loss(model, tokens, gates)
            gates[stage, index] -= 2 * step
            slope = (up - loss(model, tokens, gates)) / (2 * step)
            assert float(found[stage, index]) == pytest.approx(slope, rel=1e-2, abs=1e-2)


def test_the_last_layer_does_nothing_for_the_prompt_but_keys_and_values(model: Llama) -> None:
    """What it adds to a prompt's position is read by no one, so its gate has no gradient there."""
    tokens = torch.randint(0, 160, (14,), generator=torch.Generator().manual_seed(2))
    prefill, decode = gate_gradients(model, tokens, PROMPT)
    assert float(prefill[-1]) == 0 and float(decode[-1]) != 0


def test_answers_are_drawn_from_the_model(model: Llama) -> None:
    """The first token of many answers has the frequencies that the model gives it."""
    generator, prompt = torch.Generator().manual_seed(3), [5, 6, 7]
    drawn = torch.stack([sample_answer(model, prompt, 1, generator) for _ in range(400)])[:, 0]
    likely = torch.softmax(model.score(torch.tensor([prompt]))[0, -1], -1)
    expected = float(likely.square().sum())  # how probable the drawn tokens are, on average
    assert float(likely[drawn].mean()) == pytest.approx(expected, rel=0.25)


def test_the_same_seed_gives_the_same_importance(model: Llama) -> None:
    """And no gradient is left on the model."""
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    a, b = (stage_importance(model, prompts, 5, seed=4) for _ in range(2))
    assert torch.equal(a.prefill, b.prefill) and torch.equal(a.decode, b.decode)
    assert all(p.grad is None for p in model.parameters())
