"""What a backend must offer to run a tier: a cache, a forward step, and adoption of a higher tier's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from eopc_runtime.errors import PromptError

if TYPE_CHECKING:
    from eopc_runtime.tier_info import LayerInfo

Logits = npt.NDArray[np.float32]  # [n, vocab]
Wanted = Literal["last", "all", "none"]

MASK_VALUE = -30000.0  # drops a position after softmax, and stays finite in fp16 when added to any score


class Cache(Protocol):
    """The keys and values of one sequence on one tier."""

    tier: str
    length: int  # tokens held

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""


class TierRunner(Protocol):
    """Executes one tier. Not thread-safe: one sequence steps at a time."""

    tier: str

    def new_cache(self) -> Any:
        """An empty cache of this tier."""

    def forward(self, cache: Any, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        """Append tokens to the cache and return logits [n, vocab]: of the last, of all, or of none of them.

        Raises:
            PromptError: the cache would grow beyond the bundle's context.
        """

    def prefill(self, cache: Any, tokens: Sequence[int]) -> Logits:
        """Append a prompt to an empty cache and return the logits [1, vocab] of its last token.

        As `forward`, unless the tier prunes its prefill: then all tokens but the last skip its deepest layers.
        """

    def adopt(self, cache: Any) -> Any:
        """The cache of a higher tier restricted to the layers and KV heads this tier keeps.

        The restriction of a nested ladder's cache is a valid cache of every tier below; the other direction is
        undefined and raises ValueError.
        """


class RunnerPool(Protocol):
    """Hands out runners by tier name and decides how many stay loaded."""

    def get(self, tier: str) -> TierRunner:
        """The runner of a tier, loaded if it is not."""

    def close(self) -> None:
        """Release everything."""


def causal_mask(start: int, count: int, capacity: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Additive mask [1, 1, count, capacity]: the token at position start + s sees cache slots 0..start + s."""
    visible = np.arange(capacity)[None, :] <= (start + np.arange(count))[:, None]
    return np.where(visible, 0.0, MASK_VALUE).astype(dtype)[None, None]


def check_room(length: int, count: int, context: int) -> None:
    """Refuse tokens that would not fit the context.

    Raises:
        PromptError: length + count is above context.
    """
    if length + count > context:
        raise PromptError(
            f"{length + count} tokens do not fit this bundle's context of {context}. "
            f"Shorten the prompt, or build with a larger --context."
        )


def adoption(upper: Sequence[LayerInfo], lower: Sequence[LayerInfo]) -> list[tuple[int, int]]:
    """For every layer of the lower tier: the index of its source layer in the upper tier, and the heads to keep.

    Raises:
        ValueError: the lower tier is not nested in the upper one.
    """
    where = {layer.source_layer: i for i, layer in enumerate(upper)}
    rows = []
    for layer in lower:
        i = where.get(layer.source_layer)
        if i is None or layer.kv_heads > upper[i].kv_heads:
            raise ValueError("a cache can only be handed down the ladder")
        rows.append((i, layer.kv_heads))
    return rows
