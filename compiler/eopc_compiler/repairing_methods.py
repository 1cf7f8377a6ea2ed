"""The methods of `eopc prune` that remove units and repair what is left, as settings of one loop (iterative.py).

* `iterative`: several steps, OBS in nats, least squares; the default, and what we found best without training.
* `obs`: the same in one step.
* `wifv`: as Iterative Structured Pruning with Multi-Domain Calibration (arXiv 2601.02674) has it, re-implemented:
  fluctuation importance relative to the layer's output, several steps, only the mean compensated.
"""

from __future__ import annotations

from eopc_compiler.allocate import KINDS, Kind
from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.config import LlamaConfig
from eopc_compiler.iterative import BATCH_WINDOWS, Settings, prune_iteratively
from eopc_compiler.model import Llama
from eopc_compiler.prune_request import PruneRequest, budget, even_counts, unit_costs
from eopc_compiler.pruned import Choice


def iterative(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """OBS with repair in `request.steps` steps."""
    return _prune(model, calibration, request)


def obs(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """OBS with repair in one step."""
    return _prune(model, calibration, request, steps=1)


def wifv(model: Llama, calibration: CalibrationSet, request: PruneRequest) -> Choice:
    """Fluctuation importance and mean compensation in `request.steps` steps."""
    return _prune(model, calibration, request, importance="wifv", repair=False, use_metric=False)


def _prune(model: Llama, calibration: CalibrationSet, request: PruneRequest, **changes: object) -> Choice:
    costs = unit_costs(model.config)
    by_kind = {"kv_groups": costs.kv_group, "ffn": costs.ffn_channel}
    return prune_iteratively(
        model,
        calibration.batches(BATCH_WINDOWS),
        _settings(model.config, request, **changes),
        lambda kind: by_kind[kind],
        lambda what, done, total: request.tick(f"{what}: {done}/{total}"),
    )


def _settings(config: LlamaConfig, request: PruneRequest, **changes: object) -> Settings:
    """Settings of the loop; refuses a ratio out of reach."""
    budget(config, request)
    kinds: tuple[Kind, ...] = KINDS if request.units == "all" else ("ffn",)
    fields = {
        "ratio": request.ratio,
        "kinds": kinds,
        "align": request.align,
        "steps": request.steps,
        "targets": even_counts(config, request) if request.uniform else None,
        "seed": request.seed,
    }
    return Settings(**{**fields, **changes})  # type: ignore[arg-type]  # fields of Settings
