"""What a decode step binds once per sequence, and updates in place from token to token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from eopc_runtime.runners.ort import OrtCache


@dataclass(slots=True)
class StepBinding:
    """Inputs and outputs of a decode step, as NumPy views on the bound buffers."""

    mark: object  # of the loaded tier that it was made for
    binding: Any
    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    write: npt.NDArray[np.int64]
    mask: npt.NDArray[Any]
    logits: npt.NDArray[np.float32]

    @classmethod
    def create(
        cls, mark: object, binding: Any, share: Callable[[Any], Any], mask: npt.NDArray[Any], vocab: int
    ) -> StepBinding:
        """Bind everything but caches and gathered weights.

        Args:
            share: makes an OrtValue of an array's own memory.
            mask: of the step, [1, 1, 1, capacity]; slots that later steps see are opened by them.
        """
        step = cls(
            mark,
            binding,
            ids=np.zeros((1, 1), dtype=np.int64),
            positions=np.zeros((1, 1), dtype=np.int64),
            write=np.zeros(1, dtype=np.int64),
            mask=mask,
            logits=np.zeros((1, 1, vocab), dtype=np.float32),
        )
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": step.ids,
            "position_ids": step.positions,
            "write_index": step.write,
            "attn_mask": step.mask,
            "logits_index": np.zeros(1, dtype=np.int64),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, share(array))
        binding.bind_ortvalue_output("logits", share(step.logits))
        return step


def bind_weights(binding: Any, cache: OrtCache) -> None:
    """Bind the weights that were gathered for a sequence, if its tier has any."""
    for name, value in (cache.chosen.weights if cache.chosen else {}).items():
        binding.bind_ortvalue_input(name, value)
