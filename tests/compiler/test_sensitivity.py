"""The metric predicts what noise on a sub-block's output costs: the divergence from the unperturbed model, in nats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.calibration import Batch
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama, build_model
from eopc_compiler.sensitivity import LayerMetrics, metric_windows, output_metrics

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
LENGTH = 32
STEP = 0.02  # of unit activations: small enough for second order, large enough for fp32


@pytest.fixture
def tokens() -> Tensor:
    """Random windows."""
    return torch.randint(0, 160, (64, LENGTH), generator=torch.Generator().manual_seed(1))


def divergence(model: Llama, tokens: Tensor, layer: int, kind: str, noise: Tensor) -> float:
    """Mean KL of all next-token distributions when `noise` [n, S, hidden] is added to a sub-block's output."""
    block = model.blocks[layer]
    output = block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj
    want = F.log_softmax(model.score(tokens)[:, :-1].double(), -1)
    handle = output.register_forward_hook(lambda _m, _a, out: out + noise)
    got = F.log_softmax(model.score(tokens)[:, :-1].double(), -1)
    handle.remove()
    return float((want.exp() * (want - got)).sum(-1).sum() / tokens.numel())


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_metric_predicts_the_divergence_that_noise_causes(
    make_tiny: MakeTiny, tokens: Tensor, layer: int, kind: str
) -> None:
    """E[Δyᵀ M Δy] is the mean KL to second order, for white noise and for noise in one direction."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, LENGTH)
    metric = getattr(output_metrics(model, [tokens])[layer], kind)
    generator = torch.Generator().manual_seed(3)
    white = STEP * torch.randn(*tokens.shape, 64, generator=generator)
    direction = torch.linalg.eigh(metric).eigenvectors[:, -1].float()
    along = STEP * torch.randn(*tokens.shape, 1, generator=generator) * direction
    for noise in (white, along):
        predicted = float(torch.einsum("nsi,ij,nsj->", noise.double(), metric, noise.double()) / tokens.numel())
        # sampled targets, and noise drawn once, for 2,048 tokens
        assert divergence(model, tokens, layer, kind, noise) == pytest.approx(predicted, rel=0.25)


def test_metrics_are_symmetric_and_positive(make_tiny: MakeTiny, tokens: Tensor) -> None:
    """One pair per layer, [hidden, hidden], no negative eigenvalue."""
    config, tensors = make_tiny()
    metrics = output_metrics(build_model(config, tensors, LENGTH), [tokens[:4]])
    assert len(metrics) == 3
    for layer in metrics:
        for matrix in (layer.attention, layer.ffn):
            assert matrix.shape == (64, 64) and torch.equal(matrix, matrix.t())
            values = torch.linalg.eigvalsh(matrix)
            assert float(values[0]) > -1e-6 * float(values[-1])


def test_batching_does_not_matter_and_the_seed_does(make_tiny: MakeTiny, tokens: Tensor) -> None:
    """Sequences are taken one by one, in order; the drawn targets follow from the seed."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, LENGTH)
    heard: list[tuple[int, int]] = []

    def run(*batches: Tensor, seed: int = 0) -> LayerMetrics:
        return output_metrics(model, batches, seed, lambda *row: heard.append(row))[1]

    whole, parts = run(tokens[:3]), run(tokens[:1], tokens[1:3])
    assert heard == [(1, 3), (2, 3), (3, 3)] * 2
    assert torch.equal(whole.ffn, parts.ffn) and torch.equal(whole.attention, parts.attention)
    assert not torch.equal(run(tokens[:3], seed=1).ffn, whole.ffn)


def test_a_layer_without_sub_blocks_has_a_metric_all_the_same(make_tiny: MakeTiny, tokens: Tensor) -> None:
    """Where both maps are zero, the residual stream behind attention and behind the FFN weighs the same."""
    config, tensors = make_tiny()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    metrics = output_metrics(build_model(config, tensors, LENGTH), [tokens[:2]])
    assert float(metrics[1].ffn.diagonal().sum()) > 0
    torch.testing.assert_close(metrics[1].ffn, metrics[0].ffn, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("batches", "of_each"), [(1, 8), (2, 6), (4, 3), (5, 2), (12, 1), (30, 1)])
def test_a_dozen_windows_stand_for_all_batches_and_every_batch_is_among_them(batches: int, of_each: int) -> None:
    """Equal counts from the start of every batch, a dozen or a little less in all, but never none of a batch."""
    text = [Batch(i, 1.0, torch.arange(8)[:, None] + 100 * i) for i in range(batches)]
    assert [t[:, 0].tolist() for t in metric_windows(text)] == [
        [100 * i + n for n in range(of_each)] for i in range(batches)
    ]
