"""Hidden states that many patterns share: behind every sub-block of a forward pass, those used last, within a limit.

A state belongs to the sub-blocks that have run up to it, so it serves every pattern that begins alike, in the call that
made it or in a later generation of the search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

LIMIT_BYTES = 2**30

Key = tuple[int, tuple[int, ...]]  # stage of tokens, sub-blocks that have run, ascending
Step = Callable[[int, Tensor], Tensor]  # runs a sub-block on hidden states


class Prefixes:
    """The hidden states [n, S, hidden] kept, least recently used first.

    Args:
        step: what runs the sub-block of an index on hidden states.
        limit_bytes: of all states together. Less than one pattern's own states keeps the shallow ones.
    """

    def __init__(self, step: Step, limit_bytes: int = LIMIT_BYTES) -> None:
        self._step, self._limit, self._bytes = step, limit_bytes, 0
        self._states: OrderedDict[Key, Tensor] = OrderedDict()

    def run(self, stage: int, blocks: Sequence[int], start: Callable[[], Tensor], every: int) -> Tensor:
        """The hidden states behind these sub-blocks, from the deepest state that is known.

        Args:
            stage: of tokens.
            blocks: sub-blocks that run, ascending.
            start: gives the hidden states in front of all of them.
            every: states are kept in front of sub-blocks whose index this divides; 2 keeps whole layers.
        """
        ends = [i for i in range(1, len(blocks)) if blocks[i] % every == 0]  # behind the last, no pattern goes on
        keys = {i: (stage, tuple(blocks[:i])) for i in ends}
        known = next((i for i in reversed(ends) if keys[i] in self._states), 0)
        hidden = self._states[keys[known]] if known else start()
        for i in range(known, len(blocks)):
            hidden = self._step(blocks[i], hidden)
            if i + 1 in keys:
                self._states[keys[i + 1]] = hidden
                self._bytes += hidden.nbytes
        for i in reversed(ends):  # a shallow state serves more patterns than a deep one: it goes last
            if keys[i] in self._states:
                self._states.move_to_end(keys[i])
        while self._bytes > self._limit:
            self._bytes -= self._states.popitem(last=False)[1].nbytes
        return hidden
