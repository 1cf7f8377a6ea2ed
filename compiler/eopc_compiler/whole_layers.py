"""Pruning methods that remove whole layers: round(ratio x layers) of them, chosen by `eopc_compiler.evop`.

* `evop`: evolutionary search for the pattern with the smallest loss (EvoP, arXiv 2502.14910), the package's default.
* `sleb`: greedy, one layer at a time (SLEB, arXiv 2402.09025; re-implementation).
* `shortgpt`: the lowest block influence (ShortGPT, arXiv 2403.03853; re-implementation), one pass over all the text.

With `sub_blocks`, searches leave out as many attentions and as many FFNs instead, each of any layer.

Searches score patterns on a few windows of every domain, in two stages, so that a pattern costs little.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import Llama
from eopc_compiler.prune_request import PruneRequest
from eopc_compiler.pruned import Choice, keep_all
from eopc_runtime.errors import UsageError

STAGES = (1, 1)  # windows of every domain per stage
EVALUATIONS = 400  # different patterns that `evop` may look at


def evop(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Search for layers that the calibration text misses least."""
    return _searched("evolve", EVALUATIONS, model, calibration, request)


def sleb(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Remove the layer that is missed least, and again; first and last stay."""
    layers = len(model.config.layers)
    return _searched("sleb", layers * layers, model, calibration, request)  # more than greedy removal can ask for


def shortgpt(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Remove the layers that turn the residual stream least."""
    count = layers_to_remove(model.config, request)
    if not count:
        return Choice(keep_all(model.config))
    baselines, pattern = _evop("baselines"), _evop("pattern")
    influence = baselines.block_influence(model, torch.split(calibration.tokens, 4))
    chosen = baselines.least_influential(pattern.Space(len(model.config.layers), count), influence)
    return Choice(chosen.kept(model.config))


def layers_to_remove(config: LlamaConfig, request: PruneRequest) -> int:
    """round(ratio x layers).

    Raises:
        UsageError: that is none although the ratio is not 0, or all; or FFN channels alone were asked for.
    """
    layers = len(config.layers)
    count = round(request.ratio * layers)
    if request.units != "all":
        raise UsageError("a method that removes whole layers takes attention and FFN alike. Leave --units out.")
    if request.ratio and not 0 < count < layers:
        raise UsageError(
            f"--ratio {request.ratio:g} of {layers} layers rounds to {count}, and between 1 and {layers - 1} can go. "
            f"Choose another --ratio."
        )
    return count


def stages(calibration: CalibrationSet) -> list[Tensor]:
    """Windows [n, S] of every stage, the next ones of every domain; a stage without windows is left out."""
    found, start = [], 0
    for count in STAGES:
        windows = torch.cat([tokens[start : start + count] for _, tokens in calibration.domains])
        found += [windows] if len(windows) else []
        start += count
    return found


def what_goes(pattern: Any) -> str:
    """The removed layers by number, or the attentions and the FFNs."""
    attention, ffn = (", ".join(map(str, layers)) for layers in (pattern.attention, pattern.ffn))
    return f"attentions {attention} and FFNs {ffn}" if pattern.sub_blocks else f"layers {attention}"


def _searched(
    searcher: str, evaluations: int, model: Llama, calibration: CalibrationSet, request: PruneRequest
) -> Choice:
    count = layers_to_remove(model.config, request)
    if not count:
        return Choice(keep_all(model.config))
    search, fitness = _evop("search"), _evop("fitness")

    def report(progress: Any) -> None:
        request.tick(f"{searcher}: {progress.evaluations} patterns, loss {progress.best_loss:.3f}")

    result = search.search_pattern(
        fitness.Fitness(fitness.ModelLosses(model, stages(calibration))),
        len(model.config.layers),
        count,
        searcher,
        evaluations,
        request.seed,
        report=report,
        sub_blocks=request.sub_blocks,
    )
    request.say(f"{searcher}: {result.evaluations} patterns, {what_goes(result.pattern)} go")
    return Choice(result.pattern.kept(model.config))


def _evop(name: str) -> Any:
    """A module of the search package, imported late: the other methods do without it."""
    return importlib.import_module(f"eopc_compiler.evop.{name}")
