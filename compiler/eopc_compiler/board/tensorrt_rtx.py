"""Compile a tier with TensorRT-RTX, which builds plans with no GPU present: a target of its own, a proxy for others.

A parse is not a build: TensorRT's parser accepts graphs that its builder then refuses, so only a written plan counts.
A plan for SM86 says that Orin's graph (SM87) survives TensorRT's optimiser; it says nothing of speed or joules there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eopc_runtime.errors import DeviceError, EopcError, MissingExtraError

LAYER_LIST = "Layers:"  # how the verbose message begins that names every engine layer
NO_KERNEL = "not supported by a dedicated kernel"  # fused attention exists for fp16 and bf16, four query heads or more
SHOWN_MESSAGES = 3


class EngineBuildError(EopcError):
    """TensorRT refused a graph; the message carries TensorRT's own words."""


@dataclass(frozen=True, slots=True)
class ProxyPlan:
    """What a build without a GPU tells: that it passes, how long it took, and what the engine is made of."""

    compute_capability: int  # 86 is SM 8.6
    seconds: float
    plan_bytes: int
    layers: tuple[str, ...]  # one line each, both profiles; text for people, not an interface
    decomposed_attention: bool  # some attention had no fused kernel and was split into plain operators: slower

    @property
    def fused_attention(self) -> int:
        """How many engine layers are attention kernels, by their names."""
        return sum("mha" in line.lower() or "attention" in line.lower() for line in self.layers)


@dataclass(slots=True)
class _Log:
    """TensorRT's messages of one build."""

    errors: list[str] = field(default_factory=list)
    layer_list: str = ""

    def add(self, is_error: bool, message: str) -> None:
        if is_error:
            self.errors.append(message)
        elif message.lstrip().startswith(LAYER_LIST):
            self.layer_list = message


def compile_proxy(
    model: Any, bundle_root: Path, compute_capability: int, prompt_tokens: int = 512, eval_logits: bool = False
) -> ProxyPlan:
    """Build a prepared graph with two optimisation profiles, prefill and decode, and throw the plan away.

    Args:
        model: from `prepare_for_tensorrt`, or its serialised bytes.
        bundle_root: the folder that external data names are relative to.
        compute_capability: of the target, 86 for SM 8.6.
        prompt_tokens: longest prompt of the prefill profile; never more than the cache holds.
        eval_logits: whether prefill may ask for the logits of every position, not of the last alone.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        DeviceError: TensorRT-RTX does not build for this compute capability.
        EngineBuildError: the graph does not parse or does not build.
    """
    trt = import_tensorrt_rtx()
    log = _Log()
    start = time.perf_counter()
    builder = trt.Builder(_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    _set_target(trt, config, compute_capability)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    parser = trt.OnnxParser(network, builder.logger)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    # TensorRT looks for external data beside the file named here, which itself need not exist
    if not parser.parse(data, str((bundle_root / "model.onnx").resolve())):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineBuildError(_refusal("parse", compute_capability, [*found, *log.errors]))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    cache_len = next(t.shape[2] for t in inputs if t.name == "k_cache_0")
    for longest in (min(prompt_tokens, cache_len), 1):  # an update longer than the cache is refused
        shapes = builder.create_optimization_profile()
        for tensor in inputs:
            if -1 in tuple(tensor.shape):
                shapes.set_shape(tensor.name, *profile_shapes(tensor.name, tensor.shape, longest, eval_logits))
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    decompose = plan is None and any(NO_KERNEL in message for message in log.errors)
    if decompose:
        for attention in _attentions(trt, network):
            attention.decomposable = True
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(_refusal("build", compute_capability, log.errors))
    seconds = time.perf_counter() - start
    return ProxyPlan(compute_capability, seconds, int(plan.nbytes), layer_lines(log.layer_list), decompose)


def profile_shapes(
    name: str, shape: Sequence[int], longest: int, eval_logits: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, usual and largest shape of an input whose open dimension (-1) is a number of tokens."""
    if name == "logits_index" and not eval_logits:
        longest = 1
    low, high = (tuple(size if d == -1 else d for d in shape) for size in (1, longest))
    return low, high, high


def layer_lines(message: str) -> tuple[str, ...]:
    """The engine layers in TensorRT's verbose list; whatever follows a blank line (bindings) is left out."""
    _, _, body = message.partition(LAYER_LIST)
    return tuple(line.strip() for line in body.strip().partition("\n\n")[0].splitlines() if line.strip())


def _attentions(trt: Any, network: Any) -> list[Any]:
    """The attention operators of a network, each found through the layer its inputs enter."""
    found = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's own way down from ILayer in Python
            found.append(layer.attention)
    return found


def _set_target(trt: Any, config: Any, compute_capability: int) -> None:
    target = getattr(trt.ComputeCapability, f"SM{compute_capability}", None)
    config.num_compute_capabilities = 1
    if target is None or not config.set_compute_capability(target, 0):
        known = ", ".join(n for n in dir(trt.ComputeCapability) if n.startswith("SM"))
        raise DeviceError(
            f"TensorRT-RTX {trt.__version__} does not build for SM{compute_capability}. It knows {known}; "
            "take the nearest below (SM86 for Orin) and treat the result as a proxy."
        )


def _logger(trt: Any, log: _Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity <= trt.ILogger.ERROR, message)

    return Logger()


def _refusal(step: str, compute_capability: int, messages: Sequence[str]) -> str:
    words = " | ".join(dict.fromkeys(m.strip()[:300] for m in messages[:SHOWN_MESSAGES])) or "no message was given"
    return f"TensorRT-RTX did not {step} this graph for SM{compute_capability}: {words}"


def import_tensorrt_rtx() -> Any:
    """tensorrt_rtx_bindings, imported late.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise MissingExtraError("a proxy compile", "tensorrt_rtx_bindings", "tensorrt-rtx") from error
    return tensorrt_rtx_bindings
