"""Hadamard matrices, and values turned by them in groups: a product that spreads a large value over its neighbours."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def hadamard(size: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix [size, size] of a power of two; it is symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")  # kept, whatever the default is just now
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.div(matrix, math.sqrt(size)).float()


def turned(x: Tensor, group: int) -> Tensor:
    """x [..., width], every run of `group` values multiplied by the Hadamard matrix of that size: its own inverse."""
    return torch.matmul(x.reshape(*x.shape[:-1], -1, group), hadamard(group).to(x.device)).reshape(x.shape)
