"""From a prepared graph to a plan: one builder for TensorRT and TensorRT-RTX.

A parse is not a build: TensorRT's parser accepts graphs that its builder then refuses, so only a written plan counts.
One plan holds both phases as optimisation profiles, 0 for a prefill of 1 to `max_prompt_tokens` tokens, 1 for decode;
where a tier has a graph per phase, each gets a plan with its one profile. The graph that gathers weights reads no
tokens: its shapes are fixed, and TensorRT gives such an engine a profile of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eopc_compiler.board.compilers import Compiler
from eopc_runtime.errors import EopcError
from eopc_runtime.profiles import ENGINE_COMPILERS

LAYER_LIST = "Layers:"  # how the verbose message begins that names every engine layer
NO_KERNEL = "not supported by a dedicated kernel"  # native attention with fewer than four query heads, or in fp32
ATTENTION_KERNEL = re.compile(r"^Name: [^,]*(mha|attention)", re.IGNORECASE)
SHOWN_MESSAGES = 3
SETTINGS_VERSION = 1  # counts changes of this module that make other plans from the same settings

Report = Callable[[str, int, int], None]  # phase, steps done, steps in all


class EngineBuildError(EopcError):
    """TensorRT refused a graph; the message carries TensorRT's own words."""


class BuilderCrashError(EngineBuildError):
    """The builder ended without a word: a crash, or no memory. It says nothing of the graph."""


MOST_CHOSEN = 3839  # elements of a TopK, below the builder's limit (allow_lists, topk-size)


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What a plan is built for."""

    cache_len: int  # slots of every KV cache
    max_prompt_tokens: int  # of one prefill step; longer prompts run in several
    usual_prompt_tokens: int  # what TensorRT tunes prefill for
    workspace_bytes: int | None = None  # limit of a layer's scratch memory; None is TensorRT's own

    def __post_init__(self) -> None:
        if not 1 <= self.usual_prompt_tokens <= self.max_prompt_tokens <= self.cache_len or self.cache_len < 2:
            raise ValueError(f"settings do not fit together: {self}")  # an update longer than the cache is refused

    def profiles(self, phase: str) -> tuple[tuple[int, int, int], ...]:
        """Fewest, usual and most tokens of a step, by profile; none where weights are gathered."""
        prefill, decode = (1, self.usual_prompt_tokens, self.max_prompt_tokens), (1, 1, 1)
        return {"both": (prefill, decode), "prefill": (prefill,), "decode": (decode,), "gather": ()}[phase]

    def slots(self, phase: str) -> int | None:
        """Slots of the caches of a phase's graph; None where weights are gathered, which reads no cache."""
        return None if phase == "gather" else self.cache_len

    def sha256(self, phase: str) -> str:
        """The hash of everything but graph and machine that a plan depends on."""
        content = {"version": SETTINGS_VERSION, "phase": phase, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan, how long it took, and what it is made of."""

    plan: Any  # a buffer of bytes
    seconds: float
    layers: tuple[str, ...]  # one line each, all profiles; text for people, not an interface
    profiles: int
    fallback: bool  # attention without a fused kernel was allowed to be split into plain operators
    timing_cache: bytes | None

    @property
    def bytes(self) -> int:
        """Size of the plan."""
        return int(self.plan.nbytes)

    @property
    def attention_layers(self) -> int:
        """Fused attention kernels of one profile, by their names."""
        return sum(bool(ATTENTION_KERNEL.match(line)) for line in self.layers) // self.profiles


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


def build_plan(
    compiler: Compiler,
    model: Any,
    data_root: Path,
    compute_capability: int,
    settings: BuildSettings,
    phase: str = "both",
    timing_cache: Path | None = None,
    report: Report | None = None,
) -> BuiltPlan:
    """Build a prepared graph.

    Args:
        model: from `prepare_for_tensorrt`, or its serialised bytes.
        data_root: the folder that external data names are relative to.
        compute_capability: of the target, 86 for SM 8.6.
        phase: one of `engines.PHASES`: which profiles the plan gets.
        timing_cache: a file of earlier measurements; read only.
        report: called with TensorRT's own progress.

    Raises:
        DeviceError: the compiler does not build for this architecture.
        EngineBuildError: the graph does not parse or does not build.
    """
    trt, log, start = compiler.trt, _Log(), time.perf_counter()
    refused = f"{ENGINE_COMPILERS[compiler.name]} did not {{}} this graph for SM{compute_capability}: "
    builder = trt.Builder(_logger(trt, log))
    network = builder.create_network(compiler.network_flags())
    config = builder.create_builder_config()
    compiler.set_target(config, compute_capability)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    compiler.load_timing_cache(config, timing_cache)
    monitor = None if report is None else _monitor(trt, report)  # TensorRT keeps no reference of its own
    if monitor is not None:
        config.progress_monitor = monitor
    parser = trt.OnnxParser(network, builder.logger)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    # TensorRT looks for external data beside the file named here, which itself need not exist
    if not parser.parse(data, str((data_root / "model.onnx").resolve())):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineBuildError(refused.format("parse") + _words([*found, *log.errors]))
    profiles = settings.profiles(phase)
    _add_profiles(builder, network, config, profiles)
    plan = builder.build_serialized_network(network, config)
    fallback = plan is None and any(NO_KERNEL in message for message in log.errors)
    if fallback:
        for attention in _attentions(trt, network):
            attention.decomposable = True
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(refused.format("build") + _words(log.errors))
    seconds = time.perf_counter() - start
    layers = layer_lines(log.layer_list) or compiler.inspect(builder.logger, plan)
    return BuiltPlan(plan, seconds, layers, max(len(profiles), 1), fallback, compiler.timing_cache(config))


def profile_shapes(name: str, shape: Sequence[int], tokens: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """Smallest, usual and largest shape of an input whose open dimension (-1) is a number of tokens.

    Logits are asked for at one position.
    """
    sizes = (1, 1, 1) if name == "logits_index" else tokens
    return tuple(tuple(size if d == -1 else d for d in shape) for size in sizes)


def layer_lines(message: str) -> tuple[str, ...]:
    """The engine layers in TensorRT's verbose list; whatever follows a blank line (bindings) is left out."""
    _, _, body = message.partition(LAYER_LIST)
    return tuple(line.strip() for line in body.strip().partition("\n\n")[0].splitlines() if line.strip())


def _add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[tuple[int, int, int]]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for tokens in profiles:
        shapes = builder.create_optimization_profile()
        for tensor in inputs:
            if -1 in tuple(tensor.shape):
                shapes.set_shape(tensor.name, *profile_shapes(tensor.name, tensor.shape, tokens))
        config.add_optimization_profile(shapes)


def _attentions(trt: Any, network: Any) -> list[Any]:
    """The attention operators of a network, each found through the layer its inputs enter."""
    kind, found = getattr(trt.LayerType, "ATTENTION_INPUT", None), []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's own way down from ILayer in Python
            found.append(layer.attention)
    return found


def _logger(trt: Any, log: _Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity <= trt.ILogger.ERROR, message)

    return Logger()


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                report(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            except OSError:
                return False  # nobody listens any more: give the build up
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _words(messages: Sequence[str]) -> str:
    return " | ".join(dict.fromkeys(m.strip()[:300] for m in messages[:SHOWN_MESSAGES])) or "no message was given"
