"""Low-rank updates (LoRA, arXiv 2106.09685): W + B A with B [out, r], A [r, in], folded into W at the end.

The matrices themselves get no gradient and no Adam moments: less memory, and a backward pass with one product of three
left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eopc_compiler.model import Llama, Projection

_SCALE = 2.0  # of B A: alpha / r of the paper, fixed, so that one step size suits every rank


class LowRank(Projection):
    """A frozen projection with a trained update of rank r, zero at first."""

    def __init__(self, base: Projection, rank: int, generator: torch.Generator) -> None:
        super().__init__(0, 0, bias=False)
        fan_out, fan_in = base.weight.shape
        self.weight, self.bias = base.weight, base.bias
        self.lower = nn.Parameter(torch.randn(rank, fan_in, generator=generator) / fan_in**0.5)  # A
        self.upper = nn.Parameter(torch.zeros(fan_out, rank))  # B

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lower), self.upper)
        return F.linear(x, self.weight, self.bias) + _SCALE * update

    def folded(self) -> Tensor:
        """The weight [out, in] of one plain projection that computes the same."""
        return (self.weight + _SCALE * self.upper @ self.lower).detach()


def add_low_rank(model: Llama, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Replace the blocks' projections in place; returns the updates' parameters by name, which need gradients."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, nn.Parameter] = {}
    for path, module in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(module, Projection) and module.weight.numel():
            update = LowRank(module, rank, generator)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], update)
            found |= {f"{path}.lower": update.lower, f"{path}.upper": update.upper}
    return found


def folded_weights(model: Llama) -> dict[str, Tensor]:
    """The weights of all low-rank projections with their updates added, by Hugging Face name."""
    return {f"{path}.weight": m.folded() for path, m in model.named_modules() if isinstance(m, LowRank)}
