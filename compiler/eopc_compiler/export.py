"""From a tier's shape to model.onnx: trace the one model file, then point its initializers into weights.bin.

The trace never sees weights (parameters are uninitialised memory), so exporting costs no memory and every tier is
traced the same way. Afterwards each initializer is replaced by what the bundle stores (`initializers.py`).

External data is named "weights.bin", relative to the bundle's root: loaders pass that folder (ONNX Runtime
`session.model_external_initializers_file_folder_path`, TensorRT's `parse(bytes, path)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir

from eopc_compiler.config import LlamaConfig
from eopc_compiler.initializers import attach_weights
from eopc_compiler.prompt_pass import Pool
from eopc_compiler.selector import Selector
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.tracing import Target, trace, trace_prompt_pass, trace_selector
from eopc_compiler.weight_table import WeightTable


def export_tier(
    config: LlamaConfig,
    target: Target,
    table: WeightTable,
    path: Path,
    chosen: Sequence[int] = (),
    single: bool = False,
) -> None:
    """Write a tier's graph.

    Args:
        config: of the sliced model.
        path: the .onnx file to write; its weights stay in weights.bin.
        chosen: per layer, FFN channels whose weights are inputs; empty for none.
        single: write the graph for single tokens.
    """
    _write(_traced(config, target, tuple(chosen)).clone(), config, target, table, path, single)


def export_prompt_pass(
    config: LlamaConfig,
    prompt: PromptPath,
    target: Target,
    table: WeightTable,
    path: Path,
    pools: Sequence[Pool | None] = (),
) -> None:
    """Write the graph that fills a cache: the layers that the prompt runs through, of the others keys and values.

    Args:
        table: has what `TierExtras.write_prompt` wrote for that prompt.
        pools: per layer, FFN channels whose energies are added up; empty for none.
    """
    _write(trace_prompt_pass(config, prompt, target, pools), config, target, table, path)


def export_selector(config: LlamaConfig, selector: Selector, target: Target, table: WeightTable, path: Path) -> None:
    """Write the graph that gathers the chosen channels' weights; `table` has what `TierExtras.write_selector` wrote."""
    _write(trace_selector(config, selector, target), config, target, table, path)


@lru_cache(maxsize=1)  # a tier's graph for single tokens is written right after the other
def _traced(config: LlamaConfig, target: Target, chosen: tuple[int, ...]) -> ir.Model:
    return trace(config, target, chosen)


def _write(
    model: ir.Model,
    config: LlamaConfig,
    target: Target,
    table: WeightTable,
    path: Path,
    single: bool = False,
) -> None:
    attach_weights(model, config, target.dialect, table, single)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)
