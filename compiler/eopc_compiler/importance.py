"""Ladder v1's importance: activation statistics of the dense model on the calibration text, nothing trained.

* A unit inside a layer (KV group, FFN channel): S_j = E[x_j²] ‖W_j‖², the energy that input j of o_proj or down_proj
  puts into the layer's output; a KV group sums over its query heads. It is the WIFV score of FLAP (arXiv 2312.11983)
  with the second moment in place of the variance, because v1 compensates no mean.
* A layer: block influence of ShortGPT (arXiv 2403.03853), 1 - cos(input, output), averaged over tokens.

A later search replaces the choice made from these numbers (planner.py), not the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.ladder import Mask, UnitOrder
from eopc_compiler.model import Llama
from eopc_compiler.sequences import next_token_losses, run_layer


@dataclass(frozen=True, slots=True)
class LayerScores:
    """Importance of one layer's units, as shares of the layer's output energy, and of the layer itself."""

    kv_groups: tuple[float, ...]
    ffn_channels: tuple[float, ...]
    influence: float  # 1 - cos(input, output), in 0..2

    def order(self) -> UnitOrder:
        """Units from most to least important; ties keep their original order."""
        return UnitOrder(_descending(self.kv_groups), _descending(self.ffn_channels))


@dataclass(frozen=True, slots=True)
class InputPeaks:
    """Largest magnitude of every input channel of a layer's two output matrices, original order."""

    o: Tensor  # [q_heads * head_dim]
    down: Tensor  # [ffn]


@dataclass(frozen=True, slots=True)
class Observations:
    """What one pass of the calibration text through the dense model tells."""

    scores: tuple[LayerScores, ...]
    peaks: tuple[InputPeaks, ...]


Report = Callable[[int, int], None]  # done, total


def observe(model: Llama, batches: Sequence[Tensor], report: Report | None = None) -> Observations:
    """Score every unit of a checkpoint-form model, and record input peaks, on token batches [n, S]."""
    scores, peaks = [], []
    hidden = [model.model.embed_tokens(tokens) for tokens in batches]
    for index, layer in enumerate(model.blocks):
        attention, mlp = layer.self_attn, layer.mlp
        with capture_inputs({"o": attention.o_proj, "down": mlp.down_proj}) as inputs:
            after = [run_layer(model, layer, x) for x in hidden]
        cosines = torch.cat([F.cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(hidden, after, strict=True)])
        heads = _energy(inputs["o"], attention.o_proj.weight)
        per_group = heads.view(model.config.layers[index].num_key_value_heads, -1).sum(1)
        channels = _energy(inputs["down"], mlp.down_proj.weight)
        scores.append(
            LayerScores(
                _shares(per_group),
                _shares(channels),
                max(0.0, 1.0 - float(cosines.mean())),  # rounding may put a cosine above 1
            )
        )
        peaks.append(InputPeaks(**{name: _peaks(values) for name, values in inputs.items()}))
        hidden = after
        if report:
            report(index + 1, len(model.blocks))
    return Observations(tuple(scores), tuple(peaks))


def loss_under_mask(
    model: Llama, batches: Sequence[Tensor], mask: Mask, orders: Sequence[UnitOrder], config: LlamaConfig
) -> float:
    """Mean next-token loss of the dense model with the dropped units silenced: what slicing would compute.

    For choosing only; a shipped tier is really sliced and measured again through the runtime.
    """
    total, count = 0.0, 0
    kept = {d.source_layer: d for d in mask.layers}
    hooks = []
    for index, layer in enumerate(model.blocks):
        if (dims := kept.get(index)) is None:
            continue
        order = orders[index]
        width = config.query_group_size * config.head_dim
        groups = torch.zeros(len(order.kv_groups), 1)
        groups[list(order.kv_groups[: dims.num_key_value_heads])] = 1.0
        channels = torch.zeros(len(order.ffn_channels))
        channels[list(order.ffn_channels[: dims.intermediate_size])] = 1.0
        for module, gate in (
            (layer.self_attn.o_proj, groups.expand(-1, width).flatten()),
            (layer.mlp.down_proj, channels),
        ):
            hooks.append(module.register_forward_pre_hook(lambda _m, args, gate=gate: (args[0] * gate,)))
    try:
        for tokens in batches:
            x = model.model.embed_tokens(tokens)
            for index, layer in enumerate(model.blocks):
                if index in kept:
                    x = run_layer(model, layer, x)
            total += float(next_token_losses(model, x, tokens).sum())
            count += tokens[:, 1:].numel()
    finally:
        for hook in hooks:
            hook.remove()
    return total / count


@contextmanager
def capture_inputs(modules: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of modules, flattened to [tokens, width], while the block runs."""
    captured: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _module, args: captured[name].append(args[0].detach().flatten(0, -2))

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _energy(inputs: Sequence[Tensor], weight: Tensor) -> Tensor:
    """E[x_j²] ‖W_:,j‖² per input j of a checkpoint-form matrix [out, in], in fp64."""
    moment = sum(x.double().pow(2).sum(0) for x in inputs)
    assert isinstance(moment, Tensor)
    return moment * weight.double().pow(2).sum(0)


def _shares(energy: Tensor) -> tuple[float, ...]:
    """Energies as shares of their sum; all zero where nothing reaches the output."""
    return tuple((energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)).tolist())


def _peaks(inputs: Sequence[Tensor]) -> Tensor:
    """Largest magnitude per column over all rows."""
    return torch.stack([x.abs().amax(0) for x in inputs]).amax(0)


def _descending(values: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(values)), key=lambda i: (-values[i], i)))
