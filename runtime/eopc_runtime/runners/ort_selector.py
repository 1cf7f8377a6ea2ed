"""Channels chosen by a prompt, in ONNX Runtime: energies that the prompt adds up, and weights gathered after it.

Graphs meet in names. The gather graph reads `ffn_energy_<layer>` and writes `gate_rows_<layer>`, `up_rows_<layer>` and
`down_rows_<layer>`, which the decode graph reads; the prefill graph reads the energies too and writes each to the same
name with `_out`. All belong to a sequence and stay where its cache is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eopc_runtime.runners.ort_session import execute

Share = Callable[[Any], Any]  # a buffer as an OrtValue on the same memory


@dataclass(slots=True)
class Chosen:
    """What a sequence's prompt did in every pool, and the weights chosen by it; none before the prompt has ended."""

    energies: dict[str, Any] = field(default_factory=dict)  # buffers [pool], fp32
    weights: dict[str, Any] = field(default_factory=dict)  # OrtValues [chosen, hidden]


class Selector:
    """Runs the gather graph of a tier."""

    def __init__(self, session: Any, device: str) -> None:
        """Hold a loaded gather graph; `device` is where the gathered weights stay."""
        self._session, self._device = session, device
        self._shapes = {x.name: tuple(x.shape) for x in session.get_inputs()}
        self._weights = tuple(x.name for x in session.get_outputs())

    def begin(self, buffer: Callable[[Any], Any]) -> Chosen:
        """The state of a sequence that has read nothing: no energy, by which the calibration's favourites are chosen.

        Args:
            buffer: an array as a cache keeps it.
        """
        return Chosen({name: buffer(np.zeros(shape, dtype=np.float32)) for name, shape in self._shapes.items()})

    def choose(self, chosen: Chosen, share: Share) -> None:
        """Gather the weights that the energies favour; once for a sequence."""
        binding = self._session.io_binding()
        for name, energy in chosen.energies.items():
            binding.bind_ortvalue_input(name, share(energy))
        for name in self._weights:
            binding.bind_output(name, self._device)
        execute(self._session, binding, "the choice of channels")
        chosen.weights = dict(zip(self._weights, binding.get_outputs(), strict=True))


def bind_energies(binding: Any, energies: Mapping[str, Any], outputs: frozenset[str], share: Share) -> None:
    """Let a prefill graph add to the energies in place; layers that a prompt skips have none."""
    for name, energy in energies.items():
        if f"{name}_out" in outputs:
            value = share(energy)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"{name}_out", value)
