"""Joint recovery of a nested ladder: one set of weights, trained so that every prefix of it is a good model.

The sandwich rule (universally slimmable networks, arXiv 1903.05134): each step runs the largest tier, the smallest and
one drawn between, all on the same text against the same frozen original, and adds their gradients up in the shared
tensors. The whole model is the largest tier; its own KL to the original is zero at first and holds it in place. What it
loses nevertheless is measured at the end, and bounded: the result is mixed with the start until the bound holds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import rotary_tables
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, tier_config
from eopc_compiler.model import Llama
from eopc_compiler.pruned import KeptLayer, slice_tensor
from eopc_compiler.recover.distil import Distiller, plain_tensors, run_fingerprint
from eopc_compiler.recover.loss import Domains, selection_losses
from eopc_compiler.recover.settings import RecoverSettings, choose_bf16
from eopc_compiler.recover.text import TrainingText
from eopc_compiler.recover.train import Clock, Say, Trainer, TrainState
from eopc_runtime.errors import UsageError

_MIX_CHECKS = 6  # bisection steps: the factor is known to 1/64


@dataclass(frozen=True)
class LadderReport:
    """The shared tensors after joint recovery, and what every tier gained."""

    tensors: dict[str, Tensor]  # dense shapes, original unit order, by Hugging Face name; a tied head is not listed
    before: tuple[dict[str, float], ...]  # per tier, t0 first: selection loss by domain, nats
    after: tuple[dict[str, float], ...]
    mix: float  # share of the way from the start to the trained weights that the bound on t0 allowed
    bf16: bool
    tokens: int  # of text trained on, repeats counted; every one ran through up to three tiers
    state: TrainState


def recover_ladder(
    teacher: Llama,
    shared: Llama,
    masks: Sequence[Mask],
    orders: Sequence[UnitOrder],
    text: TrainingText,
    selection: Domains,
    settings: RecoverSettings,
    *,
    folder: Path | None = None,
    clock: Clock = time.monotonic,
    report: Say | None = None,
) -> LadderReport:
    """Train the weights that all tiers share; the models given stay as they are.

    Args:
        teacher: the frozen original.
        shared: the same shapes: the original, or with weights that are already changed.
        masks: tiers from large to small, each nested in the one before; the whole model may be left out.
        orders: one per layer; a tier keeps prefixes of them.

    Raises:
        UsageError: low-rank updates were asked for, or no tier below the whole model was given.
    """
    below = [mask for mask in masks if mask != full_mask(shared.config)]
    if settings.rank or not below:
        wrong = f"rank {settings.rank}" if settings.rank else "no tier below the whole model"
        raise UsageError(f"joint recovery trains whole matrices of a ladder; it was given {wrong}. Recover each tier.")
    say = report or (lambda _: None)
    bf16 = choose_bf16(settings.precision, teacher.config.hidden_size)
    problem = _Sandwich(teacher, shared, below, orders, text, selection, settings, bf16)
    start = {name: p.detach().clone() for name, p in problem.parameters.items()}
    identity = run_fingerprint(settings, bf16, text, selection, dict(shared.named_parameters())) + repr(masks)
    state = Trainer(problem, settings, clock, say, folder, identity).run()
    before = problem.by_tier(state.losses(0))
    mix = _hold_bound(problem, start, settings.t0_bound)
    if mix < 1:
        say(f"the whole model would lose more than {settings.t0_bound} nats: {mix:.0%} of the way is kept")
    after = problem.by_tier(problem.selection())
    if sum(map(_mean, after)) > sum(map(_mean, before)):  # a mixture between may be worse than either end
        _mix(problem.parameters, start, start, 0.0)
        mix, after = 0.0, before
    return LadderReport(problem.tensors(), before, after, mix, bf16, state.step * problem.tokens_per_step, state)


class _Sandwich:
    """The problem of recovering a ladder: shared parameters in sorted unit order, tiers as views of their prefixes."""

    final_checks = 1.0 + _MIX_CHECKS  # the bisection, and all tiers once more

    def __init__(
        self,
        teacher: Llama,
        shared: Llama,
        below: Sequence[Mask],
        orders: Sequence[UnitOrder],
        text: TrainingText,
        selection: Domains,
        settings: RecoverSettings,
        bf16: bool,
    ) -> None:
        self._config, self._orders = shared.config, orders
        self._distiller = Distiller(teacher, text, settings, bf16, ())
        self.tokens_per_step = self._distiller.tokens_per_step
        self._selection, self._settings, self._bf16 = selection, settings, bf16
        plain = plain_tensors(shared)
        in_blocks = {n: t for n, t in plain.items() if n.startswith("model.layers.")}
        self._rest = {n: t for n, t in plain.items() if n not in in_blocks}
        ordered = _permuted(self._config, in_blocks, [_kept(i, o) for i, o in enumerate(orders)])
        self.parameters = {n: nn.Parameter(t) for n, t in ordered.items() if t.numel()}
        self._masks = [full_mask(self._config), *below]
        context = shared.get_buffer("cos").shape[0]
        self._tiers = [_shell(tier_config(self._config, mask), context) for mask in self._masks]

    def backward(self, step: int) -> float:
        chosen = self._chosen(step)
        weights = {tier: self._settings.t0_weight if tier == 0 else 1.0 for tier in chosen}
        total = 0.0
        for tokens, target, share in self._distiller.parts(step):
            for tier, weight in weights.items():
                loss = self._distiller.loss(self._bound(tier), tokens, target, step, ())
                loss = loss * (weight * share / sum(weights.values()))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def selection(self) -> dict[str, float]:
        """Losses by tier and domain, as `tier/domain`."""
        return {f"t{i}/{name}": loss for i in range(len(self._tiers)) for name, loss in self.tier_losses(i).items()}

    def tier_losses(self, tier: int) -> dict[str, float]:
        """Selection losses of one tier by domain."""
        with torch.no_grad():
            return selection_losses(self._bound(tier), self._selection, self._bf16)

    def by_tier(self, losses: Mapping[str, float]) -> tuple[dict[str, float], ...]:
        """What `selection` returned, as one dictionary per tier."""
        tiers: list[dict[str, float]] = [{} for _ in self._tiers]
        for key, loss in losses.items():
            tier, _, name = key.partition("/")
            tiers[int(tier[1:])][name] = loss
        return tuple(tiers)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by Hugging Face name, units back in their original order."""
        trained = {n: p.detach() for n, p in self.parameters.items()}
        back = [
            _kept(i, UnitOrder(_inverse(o.kv_groups), _inverse(o.ffn_channels))) for i, o in enumerate(self._orders)
        ]
        return self._rest | _permuted(self._config, trained, back)

    def _chosen(self, step: int) -> list[int]:
        """The largest tier, the smallest, and one drawn between where there is any."""
        last = len(self._tiers) - 1
        middle = [random.Random(f"{self._settings.seed}:tier:{step}").randrange(1, last)] if last > 1 else []
        return [0, *middle, last]

    def _bound(self, tier: int) -> Llama:
        """The tier's model over views of the shared parameters as they are now."""
        model = self._tiers[tier]
        views = dict(self._rest)
        if self._config.tie_word_embeddings:
            views["lm_head.weight"] = views["model.embed_tokens.weight"]
        for index, dims in enumerate(self._masks[tier].layers):
            for name, parameter in self._layer_parameters(dims.source_layer).items():
                views[f"model.layers.{index}.{name}"] = _prefix(self._config, name, parameter, dims)
        _bind(model, views)
        return model

    def _layer_parameters(self, source: int) -> dict[str, nn.Parameter]:
        start = f"model.layers.{source}."
        return {n.removeprefix(start): p for n, p in self.parameters.items() if n.startswith(start)}


def _hold_bound(problem: _Sandwich, start: dict[str, Tensor], bound: float) -> float:
    """Move the parameters back towards the start as far as t0's bound needs; returns the share of the way kept."""
    trained = {name: p.detach().clone() for name, p in problem.parameters.items()}

    def lost(mix: float) -> float:
        _mix(problem.parameters, start, trained, mix)
        return _mean(problem.tier_losses(0))

    limit = lost(0.0) + bound
    if lost(1.0) <= limit:
        return 1.0
    low, high = 0.0, 1.0  # `low` always holds the bound
    for _ in range(_MIX_CHECKS):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) <= limit else (low, middle)
    _mix(problem.parameters, start, trained, low)
    return low


@torch.no_grad()
def _mix(parameters: Mapping[str, nn.Parameter], a: Mapping[str, Tensor], b: Mapping[str, Tensor], mix: float) -> None:
    """Set every parameter to (1 - mix) a + mix b."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(a[name], b[name], mix))


def _shell(config: LlamaConfig, context: int) -> Llama:
    """A model without weights: `_bind` gives them."""
    with torch.device("meta"):
        model = Llama(config, context=context)
    model.cos, model.sin = rotary_tables(config, context)
    return model.eval()


def _bind(model: Llama, tensors: Mapping[str, Tensor]) -> None:
    """Let a model compute with these tensors, views with a gradient included, in place of its parameters."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters.pop(attribute, None)
        setattr(owner, attribute, tensor)  # a plain attribute: a view is no nn.Parameter


def _prefix(config: LlamaConfig, name: str, tensor: Tensor, dims: LayerDims) -> Tensor:
    """The rows or columns of a sorted layer tensor that a tier keeps, as a view."""
    head, groups = config.head_dim, dims.num_key_value_heads
    if "q_proj" in name:
        return tensor[: groups * config.query_group_size * head]
    if "k_proj" in name or "v_proj" in name:
        return tensor[: groups * head]
    if "gate_proj" in name or "up_proj" in name:
        return tensor[: dims.intermediate_size]
    if "o_proj.weight" in name:
        return tensor[:, : groups * config.query_group_size * head]
    if "down_proj.weight" in name:
        return tensor[:, : dims.intermediate_size]
    return tensor


def _permuted(config: LlamaConfig, tensors: Mapping[str, Tensor], kept: Sequence[KeptLayer]) -> dict[str, Tensor]:
    """Layer tensors with their units in the order given, as copies."""
    return {n: slice_tensor(config, n, t, kept[int(n.split(".")[2])]).clone() for n, t in tensors.items()}


def _kept(source: int, order: UnitOrder) -> KeptLayer:
    return KeptLayer(source, order.kv_groups, order.ffn_channels)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Where every original unit stands in the order."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)
