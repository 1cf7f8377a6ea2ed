"""The graphs of one tier.

One for both phases, or one for each where prompts run through a graph of their own. Where inputs are rounded to codes,
which pays for many tokens at once, one more for single tokens: the same weights, inputs as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from eopc_compiler.export import export_prompt_pass, export_selector, export_tier
from eopc_compiler.ladder import tier_config
from eopc_compiler.state import CompileState
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.tracing import Target
from eopc_runtime import __version__


@dataclass(frozen=True, slots=True)
class TierGraphs:
    """Written graphs, in the cache.

    Args:
        answer: what every token of an answer runs through; prompts too, without the next.
        prompt: what all of a prompt but its last token runs through.
        gather: what turns a prompt's energies into weights.
        step: what a single token runs through in place of `answer`.
    """

    answer: Path
    prompt: Path | None = None
    gather: Path | None = None
    step: Path | None = None

    def in_bundle(self, index: int) -> dict[str, Path]:
        """The graphs by their paths in the bundle."""
        return {tier_path(index, part): path for part, path in self._parts().items() if path is not None}

    def _parts(self) -> dict[str, Path | None]:
        name = ANSWER if self.prompt is None else DECODE
        return {name: self.answer, PROMPT: self.prompt, GATHER: self.gather, STEP: self.step}


ANSWER, DECODE, PROMPT, GATHER, STEP = "model.onnx", "decode.onnx", "prefill.onnx", "gather.onnx", "step.onnx"


def tier_path(index: int, part: str) -> str:
    """Where a graph of a tier lies in the bundle."""
    return f"tiers/t{index}/{part}"


def write_graphs(state: CompileState, index: int) -> TierGraphs:
    """Trace and write the graphs of a tier, each once for the same inputs."""
    assert state.dialect and state.storage and state.table and state.weights
    tier, extras, full, storage = state.plan[index], state.extras[index], state.config, state.storage
    target = Target(state.dialect, storage.dtype, state.args.context)
    table = state.table.with_extras(extras.table)
    config, selector = extras.config(tier_config(full, tier.mask)), tier.selector

    def written(part: str, write: Callable[[Path], None]) -> Path:
        inputs = {
            "version": __version__,
            "torch": torch.__version__,
            "part": part,
            "config": asdict(config),
            "prompt": asdict(tier.prompt) if tier.prompt else None,
            "selector": asdict(selector) if selector else None,
            "dialect": target.dialect.name,
            "dtype": target.dtype,
            "weights": state.weights and state.weights.parent.name,
            "extras": extras.table.to_json(),
            "context": target.context,
        }
        return state.cache.get(f"graph-t{index}-{part.removesuffix('.onnx')}", inputs, ".onnx", write)

    def step(chosen: Sequence[int] = ()) -> Path | None:
        if not storage.single_tokens:
            return None
        return written(STEP, lambda path: export_tier(config, target, table, path, chosen, single=True))

    if run := tier.prompt:  # it keeps everything: its answers run the graphs of t0
        prompt = written(PROMPT, lambda path: export_prompt_pass(config, run, target, table, path))
        return replace(state.graphs[0], prompt=prompt)
    if selector is None:
        return TierGraphs(written(ANSWER, lambda path: export_tier(config, target, table, path)), step=step())
    shared, pools, every = state.table, selector.recorded, PromptPath(len(full.layers))
    return TierGraphs(
        written(DECODE, lambda path: export_tier(config, target, table, path, selector.chosen)),
        written(PROMPT, lambda path: export_prompt_pass(full, every, target, shared, path, pools)),
        written(GATHER, lambda path: export_selector(config, selector, target, table, path)),
        step(selector.chosen),
    )
