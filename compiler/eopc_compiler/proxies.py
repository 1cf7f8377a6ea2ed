"""The proxy pass: TensorRT's optimiser is shown the staged graphs, as a parse is not a build.

TensorRT-RTX compiles for the architecture of the device or its nearest neighbour, with no GPU, in a child process: the
build's own memory does not grow, and a crash there ends nothing here. By default only the largest and the smallest tier
are compiled: all tiers are the same few sub-blocks at different widths, and those two are the one without any cut and
the one with the most of them, while each costs about a second per layer. What was found, or why nothing was looked
for, stands in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eopc_compiler.board.engine_memory import check_memory
from eopc_compiler.board.engine_set import EngineArgs, build_engine, choose_settings, fingerprint, labelled
from eopc_compiler.board.engine_target import BuildTarget, resolve_target
from eopc_compiler.board.tensorrt_build import BuilderCrashError, BuildSettings, EngineBuildError
from eopc_compiler.stage_bundle import manifest_tiers, write_manifest
from eopc_compiler.state import CompileState
from eopc_runtime.bundle import Bundle
from eopc_runtime.engines import phase_graphs
from eopc_runtime.errors import DeviceError, MissingExtraError
from eopc_runtime.tier_info import TierInfo


def compile_proxies(state: CompileState) -> CompileState:
    """Compile tiers of a TensorRT device with TensorRT-RTX where that is installed, and note the results.

    Raises:
        EngineBuildError: TensorRT refuses a graph; the bundle would be of no use on the device.
    """
    assert state.staged is not None
    if state.profile.engine is None:
        return state
    bundle = Bundle.open(state.staged, verify=False)
    tiers = bundle.manifest.tiers
    ends = (tiers[0], *(t for t in tiers if t.prefill), tiers[-1])  # a graph of its own for prompts is an end, too
    chosen = {"all": tiers, "ends": ends, "none": ()}[state.args.proxy]
    notes: dict[str, dict[str, Any]] = {t.tier: {"skipped": f"--proxy {state.args.proxy}"} for t in tiers}
    if chosen:
        notes |= _compile(state, bundle, list(dict.fromkeys(t.tier for t in chosen)))
    final = replace(bundle.manifest, tiers=tuple(replace(t, proxy=notes[t.tier]) for t in tiers))
    write_manifest(state.staged, final)
    return replace(state, tiers=tuple(manifest_tiers(final)))


def _compile(state: CompileState, bundle: Bundle, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results by tier; a compiler that is missing or does not fit the memory skips them all, with the reason."""
    infos = [bundle.tier(name) for name in names]
    try:
        target = resolve_target(state.profile.name, proxy=True)
        check_memory(bundle.manifest, infos, refuse=True)
    except (MissingExtraError, DeviceError) as error:
        state.say(f"no proxy compile: {error}")
        return {name: {"skipped": str(error)} for name in names}
    settings = choose_settings(bundle.manifest, EngineArgs(bundle.root))
    return {info.tier: _compile_tier(state, bundle, info, target, settings) for info in infos}


def _compile_tier(
    state: CompileState, bundle: Bundle, info: TierInfo, target: BuildTarget, settings: BuildSettings
) -> dict[str, Any]:
    engines = []
    for phase, graph in phase_graphs(info).items():

        def produce(path: Path, phase: str = phase, graph: str = graph) -> None:
            state.say(f"compiling {info.tier} with {target.title}")
            tick = labelled(state.tick, info.tier)
            record, line = build_engine(bundle, info, target, settings, phase, graph, tick)
            state.say(f"{info.tier}: {line}")
            path.write_text(json.dumps(asdict(record)), encoding="utf-8")

        inputs = asdict(fingerprint(bundle, info, target, settings, phase))
        try:
            path = state.cache.get(f"proxy-{info.tier}", inputs, ".json", produce)
        except BuilderCrashError as error:
            state.say(f"no proxy of {info.tier}: {error}")
            return {"skipped": str(error)}
        except EngineBuildError as error:
            raise EngineBuildError(
                f"{info.tier} computes what PyTorch computes, but {error} --proxy none builds the bundle all the same."
            ) from error
        engines.append(json.loads(path.read_text(encoding="utf-8")))
    keys = ("phase", "layers", "attention_layers", "decomposed_attention", "bytes", "seconds")
    return {
        "compiler": target.compiler,
        "version": target.version,
        "target": f"sm{target.compute_capability}",
        "engines": [{key: engine[key] for key in keys} for engine in engines],
    }
