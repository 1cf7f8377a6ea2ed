"""FFN channels chosen once per sequence by what its prompt did in them (EOP-style): how many is fixed, which is not.

Of every layer a `core` of the first channels always runs. Of the `pool` behind it, the `chosen` channels with the
largest utility are gathered between prompt and answer, so a tier's price and shapes do not depend on the prompt. The
utility of channel j is

    u_j = (Σ_t z_tj² + PRIOR_TOKENS E[z_j²]) · ||w_j||²

z is what down_proj reads over the prompt's tokens t, E its mean over the calibration text, and w_j the channel's row of
down_proj: u_j is the squared change of the residual stream when the channel goes. GRIFFIN (arXiv 2404.01365) ranks by
energies of normalised z alone. The expectation stands in for what a short prompt does not show; without a prompt it
decides alone. Ties go to the lower channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import ChannelRows
from eopc_compiler.prompt_pass import Pool

PRIOR_TOKENS = 192  # prompt tokens that the calibration text's mean energy counts as


@dataclass(frozen=True, slots=True)
class Selector:
    """How many channels a tier chooses, per layer of the tier; core[i] + pool[i] is at most the layer's width."""

    core: tuple[int, ...]
    pool: tuple[int, ...]
    chosen: tuple[int, ...]

    @property
    def pools(self) -> dict[int, Pool]:
        """The pools that something is chosen from, by layer."""
        return {i: Pool(c, p) for i, (c, p, n) in enumerate(zip(self.core, self.pool, self.chosen, strict=True)) if n}

    @property
    def recorded(self) -> tuple[Pool | None, ...]:
        """The same, one entry a layer."""
        pools = self.pools
        return tuple(pools.get(i) for i in range(len(self.core)))


class PoolRows(nn.Module):
    """The pool of one layer: rows [pool, hidden] of gate, up and down, and what ranks them, [pool] fp32."""

    def __init__(self, pool: int, chosen: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.chosen = chosen
        for name in ("gate_rows", "up_rows", "down_rows"):
            setattr(self, name, nn.Parameter(torch.empty(pool, hidden, dtype=dtype), requires_grad=False))
        for name in ("prior", "weight"):
            setattr(self, name, nn.Parameter(torch.empty(pool), requires_grad=False))

    def forward(self, energy: Tensor) -> ChannelRows:
        ranks = utility(energy, cast(Tensor, self.prior), cast(Tensor, self.weight))
        ids = torch.topk(ranks, self.chosen).indices
        gate, up, down = (cast(nn.Parameter, getattr(self, f"{name}_rows")) for name in ("gate", "up", "down"))
        return torch.index_select(gate, 0, ids), torch.index_select(up, 0, ids), torch.index_select(down, 0, ids)


class ChannelSelector(nn.Module):
    """Gathers the chosen channels of all layers; tensors are named `model.layers.<i>.mlp.pool.<leaf>`."""

    def __init__(self, config: LlamaConfig, selector: Selector, dtype: torch.dtype) -> None:
        super().__init__()
        self.selector = selector
        self.model = nn.Module()
        layers = [nn.Module() for _ in config.layers]
        for i, pool in selector.pools.items():
            mlp = layers[i].mlp = nn.Module()
            mlp.pool = PoolRows(pool.size, selector.chosen[i], config.hidden_size, dtype)
        self.model.layers = nn.ModuleList(layers)

    def pool(self, layer: int) -> PoolRows:
        """The pool of a layer that has one."""
        return cast(PoolRows, self.get_submodule(f"model.layers.{layer}.mlp.pool"))

    def forward(self, energies: Sequence[Tensor]) -> list[ChannelRows | None]:
        """Rows by layer, from the energies [pool] of the layers that have one."""
        given = iter(energies)
        return [self.pool(i)(next(given)) if n else None for i, n in enumerate(self.selector.chosen)]


def utility(energy: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
    """u [..., pool] of energies [..., pool]."""
    return (energy + prior) * weight


def first_of(utility: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the largest utilities, largest first, ties to the lower index: what ONNX TopK returns."""
    return torch.argsort(utility, dim=-1, descending=True, stable=True)[..., :count]
