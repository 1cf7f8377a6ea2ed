"""From modules to ONNX graphs: what each of a bundle's graphs reads and writes, traced without a weight in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.model import Llama
from eopc_compiler.prompt_pass import Pool, PromptPass
from eopc_compiler.selector import ChannelSelector, Selector
from eopc_compiler.token_selector import PromptPath


@dataclass(frozen=True, slots=True)
class Target:
    """What a graph is written for.

    Args:
        dtype: compute type of activations and caches, float32 or float16.
        context: positions the rotary tables hold.
    """

    dialect: Dialect
    dtype: str
    context: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute type in PyTorch."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def trace(config: LlamaConfig, target: Target, chosen: Sequence[int] = ()) -> ir.Model:
    """The graph of one tier, opset and operators as the dialect says, initializers without meaningful values."""
    with torch.device("meta"):
        llama = Llama(config, target.dialect.ops, target.context).to(target.torch_dtype).fuse()
    inputs = _Inputs.of_tokens(config, target)
    dim = torch.export.Dim("n_logits", min=1)
    inputs.add("logits_index", torch.zeros(3, dtype=torch.long), {0: dim})
    inputs.add_caches(config, target)
    for name, n in selected_names(chosen).items():
        inputs.add(name, torch.zeros(n, config.hidden_size, dtype=target.torch_dtype), {}, group="rows")
    return _trace(_Traced(llama, chosen), inputs, ["logits", *inputs.written()], target)


def trace_prompt_pass(
    config: LlamaConfig, path: PromptPath, target: Target, pools: Sequence[Pool | None] = ()
) -> ir.Model:
    """The graph that fills a cache and runs only part of the layers, initializers without meaningful values."""
    with torch.device("meta"):
        prompt = PromptPass(config, path, target.dialect.ops, target.context, pools).to(target.torch_dtype)
    inputs = _Inputs.of_tokens(config, target)
    inputs.add_caches(config, target)
    for i, pool in prompt.recorded.items():
        inputs.add(f"ffn_energy_{i}", torch.zeros(pool.size), {}, group="energies")
    return _trace(_TracedPrompt(prompt), inputs, inputs.written(), target)


def trace_selector(config: LlamaConfig, selector: Selector, target: Target) -> ir.Model:
    """The graph that gathers chosen channels, initializers without meaningful values."""
    with torch.device("meta"):
        chooser = ChannelSelector(config, selector, target.torch_dtype)
    inputs = _Inputs({})
    for i, pool in selector.pools.items():
        inputs.add(f"ffn_energy_{i}", torch.zeros(pool.size), {}, group="energies")
    return _trace(_TracedSelector(chooser), inputs, list(selected_names(selector.chosen)), target)


def selected_names(chosen: Sequence[int]) -> dict[str, int]:
    """Names of the gathered weights, and the channels each holds: gate, up and down of every layer that has any."""
    return {f"{kind}_rows_{i}": n for i, n in enumerate(chosen) if n for kind in ("gate", "up", "down")}


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Inputs of a graph in their order: a tensor and its open dimensions; those of a group are one list."""

    values: dict[str, Any]  # by name of an argument: (tensor, dims), or a list of (name, tensor, dims)

    @classmethod
    def of_tokens(cls, config: LlamaConfig, target: Target) -> _Inputs:
        """What every graph reads of the tokens it appends to a cache."""
        length, capacity = 7, 32  # any sizes but 0 and 1, which tracing would specialise
        s, t = (torch.export.Dim(name, min=low) for name, low in (("seq", 1), ("cache_len", 2)))
        mask = torch.zeros(1, 1, length, capacity, dtype=target.torch_dtype)
        return cls(
            {
                "input_ids": (torch.zeros(1, length, dtype=torch.long), {1: s}),
                "position_ids": (torch.arange(length)[None], {1: s}),
                "write_index": (torch.zeros(1, dtype=torch.long), {}),
                "attn_mask": (mask, {2: s, 3: t}),
            }
        )

    def add(self, name: str, value: Tensor, dims: dict[int, Any], group: str | None = None) -> None:
        """Append an input, to a list of them with `group`."""
        if group is None:
            self.values[name] = (value, dims)
        else:
            self.values.setdefault(group, []).append((name, value, dims))

    def add_caches(self, config: LlamaConfig, target: Target) -> None:
        """Append keys of all layers, then values: one tensor each, as torch.export merges inputs of one object."""
        mask, dims = self.values["attn_mask"]
        for kind in "kv":
            for i, d in enumerate(config.layers):
                shape = (1, d.num_key_value_heads, mask.shape[3], config.head_dim)
                cache = torch.zeros(shape, dtype=target.torch_dtype)
                self.add(f"{kind}_cache_{i}", cache, {2: dims[3]}, group="caches")

    def names(self) -> list[str]:
        """Names of all inputs."""
        return [
            n for name, v in self.values.items() for n in ([row[0] for row in v] if isinstance(v, list) else [name])
        ]

    def written(self) -> list[str]:
        """Names of what a graph writes back: caches and energies."""
        return [f"{name}_out" for name in self.names() if "_cache_" in name or "ffn_energy_" in name]

    def tensors(self) -> tuple[Any, ...]:
        """The arguments of a module's forward."""
        return tuple([row[1] for row in v] if isinstance(v, list) else v[0] for v in self.values.values())

    def dims(self) -> tuple[Any, ...]:
        """Open dimensions in the same structure."""
        return tuple([row[2] for row in v] if isinstance(v, list) else v[1] for v in self.values.values())


def _trace(module: nn.Module, inputs: _Inputs, outputs: list[str], target: Target) -> ir.Model:
    """Trace a module that was made on the meta device."""
    module = module.to_empty(device="cpu")  # address space, not memory: its pages stay untouched
    for i, tensor in enumerate((*module.parameters(), *module.buffers())):
        # the optimizer merges small initializers of equal bytes, and fresh memory is often zero throughout
        tensor.data.view(-1)[0] = i
    with warnings.catch_warnings(), torch.no_grad(), _quiet_logger():
        warnings.simplefilter("ignore")  # the exporter's notes on axis names and missing torchvision
        program = torch.onnx.export(
            module,
            inputs.tensors(),
            dynamo=True,
            dynamic_shapes=inputs.dims(),
            opset_version=target.dialect.opset,
            input_names=inputs.names(),
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        program.optimize()
    model: ir.Model = program.model
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # stack traces: machine paths do not belong in a bundle
    return model


class _Traced(nn.Module):
    """The model with its caches as one flat list: keys of all layers, then values; gathered weights in another."""

    def __init__(self, llama: Llama, chosen: Sequence[int]) -> None:
        super().__init__()
        self.llama, self.chosen = llama, chosen

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        attn_mask: Tensor,
        logits_index: Tensor,
        caches: list[Tensor],
        rows: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        half, given = len(caches) // 2, iter(rows)
        by_layer = [(next(given), next(given), next(given)) if n else None for n in self.chosen]
        logits, keys, values = self.llama(
            input_ids, position_ids, write_index, attn_mask, logits_index, caches[:half], caches[half:], by_layer
        )
        return (logits, *keys, *values)


class _TracedPrompt(nn.Module):
    """The same for the pass that only fills the cache."""

    def __init__(self, prompt: PromptPass) -> None:
        super().__init__()
        self.llama = prompt

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        attn_mask: Tensor,
        caches: list[Tensor],
        energies: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        half = len(caches) // 2
        tokens = (input_ids, position_ids, write_index, attn_mask)
        keys, values, energies = self.llama(*tokens, caches[:half], caches[half:], energies)
        return (*keys, *values, *energies)


class _TracedSelector(nn.Module):
    """The selector with the rows it gathers as one flat list."""

    def __init__(self, chooser: ChannelSelector) -> None:
        super().__init__()
        self.llama = chooser

    def forward(self, energies: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part for rows in self.llama(energies) if rows for part in rows)


class _quiet_logger:  # noqa: N801  # reads as a statement
    """Silences the exporter's registration warnings for its duration."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
