"""Engines of a bundle's tiers: built one after the other, each recorded as soon as it is complete.

A run that is killed leaves the plans it finished, with their records; the next one goes on from there, as a plan whose
fingerprint is what would be built is not built again. Plans of one set serve the same caches, so a set never mixes
compilers, machines or cache lengths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from eopc_compiler.board.engine_job import EngineJob, JobResult, run_job
from eopc_compiler.board.engine_memory import check_memory, graph_bytes
from eopc_compiler.board.engine_target import BuildTarget, check_target, resolve_target
from eopc_compiler.board.tensorrt_build import MOST_CHOSEN, BuildSettings
from eopc_compiler.cache import lock_folder
from eopc_runtime.bundle import Bundle, Manifest
from eopc_runtime.cli.output import format_bytes
from eopc_runtime.engines import (
    ENGINES_NAME,
    TIMING_CACHE_NAME,
    EngineRecord,
    Fingerprint,
    check_plan_file,
    graph_sha256,
    phase_graphs,
    plan_name,
    read_engines,
    set_folder,
    write_engines,
)
from eopc_runtime.errors import BundleError, UsageError
from eopc_runtime.tier_info import FREE, PASS, TierInfo

USUAL_MAX_PROMPT = 512  # tokens of a prefill step, unless the workload's prompt is longer

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """Everything `eopc engine` can be told."""

    bundle: Path
    device: str | None = None  # None: the one the bundle was built for
    proxy: bool = False
    tiers: tuple[str, ...] = ()  # none given: all
    cache_len: int | None = None  # None: the bundle's context
    max_prompt_tokens: int | None = None
    workspace_bytes: int | None = None
    rebuild: bool = False
    check_memory: bool = True


@dataclass(frozen=True, slots=True)
class EngineSet:
    """What a run left in a bundle: records of all its engines for a target, and which of them were there before."""

    target: BuildTarget
    settings: BuildSettings
    records: tuple[EngineRecord, ...]
    reused: tuple[tuple[str, str], ...]  # tier and phase of those that were there before


def build_engines(args: EngineArgs, say: Say, tick: Say, run: Callable[..., JobResult] = run_job) -> EngineSet:
    """Build the engines of a bundle's tiers into BUNDLE/engines/KEY.

    Args:
        say: called with one line for every new thing.
        tick: called with TensorRT's progress, which replaces the line before.

    Raises:
        BundleError: the bundle is damaged, or has no such tier.
        DeviceError: the device's engines cannot be built here, or not in this memory.
        MissingExtraError: the compiler is not installed.
        RefusedGraphError: a graph breaks a rule of the TensorRT found here; nothing was compiled.
        EngineBuildError: TensorRT refuses a graph.
    """
    bundle = Bundle.open(args.bundle)
    infos = [bundle.tier(name) for name in args.tiers] or list(bundle.manifest.tiers)
    target = resolve_target(args.device or bundle.manifest.device, args.proxy)
    check_target(target, bundle.manifest.dialect, bundle.manifest.precision)
    for graph in (path for info in infos for path in info.graphs):
        bundle.graph(graph)  # refuses what no bundle's graph may do, before anything else reads it
    settings = choose_settings(bundle.manifest, args)
    check_graphs(bundle, infos, target, settings)
    say(f"building {', '.join(i.tier for i in infos)} with {target.title}")
    for line in check_memory(bundle.manifest, infos, args.check_memory):
        say(line)
    folder = set_folder(bundle.root, target.key)
    lock = lock_folder(folder)
    try:
        return _build_all(bundle, infos, target, settings, args.rebuild, say, tick, run)
    finally:
        for empty in (folder, folder.parent):
            with suppress(OSError):  # not empty: there are engines
                empty.rmdir()
        os.close(lock)


def choose_settings(manifest: Manifest, args: EngineArgs) -> BuildSettings:
    """Shapes from the bundle's context and workload, unless told otherwise; UsageError if they do not fit together."""
    cache_len = args.cache_len or manifest.context
    if not 2 <= cache_len <= manifest.context:
        raise UsageError(f"--cache-len {cache_len} must be between 2 and the bundle's context, {manifest.context}.")
    usual = min(manifest.workload.prompt_tokens, cache_len)
    share = max((t.prefill.share for t in manifest.tiers if t.prefill), default=0.0)
    most = int((MOST_CHOSEN - FREE) / share) + FREE if share else cache_len
    longest = args.max_prompt_tokens or min(max(USUAL_MAX_PROMPT, usual), cache_len, most)
    if longest > cache_len:
        raise UsageError(f"--max-prompt-tokens {longest} is more than the cache holds, {cache_len}. Raise --cache-len.")
    if share and longest < min(PASS, cache_len):
        raise UsageError(
            f"--max-prompt-tokens {longest} is too few: a tier that chooses tokens of a prompt is priced for passes of "
            f"{PASS} or more."
        )
    if longest > most:
        raise UsageError(
            f"--max-prompt-tokens {longest} lets {share:.0%} of so many tokens be chosen at once, more than TensorRT's "
            f"TopK takes. Give at most {most}; longer prompts run in several passes."
        )
    return BuildSettings(cache_len, longest, min(usual, longest), args.workspace_bytes)


def check_graphs(bundle: Bundle, infos: Iterable[TierInfo], target: BuildTarget, settings: BuildSettings) -> None:
    """Hold every graph against what this TensorRT takes, and a proxy's against that of its device too.

    Raises:
        RefusedGraphError: an operator breaks a rule; the message names it, the rule and the remedy.
    """
    from eopc_compiler.board.rules import list_of, lists_for, require_allowed
    from eopc_compiler.board.tensorrt_graph import outline_for_tensorrt

    lists = [list_of(target.compiler, target.release)]
    if target.proxy:
        lists += lists_for(target.device, bundle.manifest.dialect)
    for info in infos:
        for phase, graph in phase_graphs(info).items():
            require_allowed(outline_for_tensorrt(bundle.path(graph), settings.slots(phase)), lists, label(info, phase))


def label(info: TierInfo, phase: str) -> str:
    """What to call the engine of a tier's phase: t0, or t0 prefill."""
    return info.tier if phase == "both" else f"{info.tier} {phase}"


def _build_all(
    bundle: Bundle,
    infos: Sequence[TierInfo],
    target: BuildTarget,
    settings: BuildSettings,
    rebuild: bool,
    say: Say,
    tick: Say,
    run: Callable[..., JobResult],
) -> EngineSet:
    records = keep_compatible(_existing(bundle, target.key), target, settings)
    reused = []
    for info in infos:
        for phase, graph in phase_graphs(info).items():
            wanted = fingerprint(bundle, info, target, settings, phase)
            old = next((r for r in records if (r.tier, r.phase) == (info.tier, phase)), None)
            name = label(info, phase)
            if old and not rebuild and old.fingerprint == wanted and _is_whole(bundle, target.key, old):
                say(f"{name}: there already, {old.seconds:.0f} s saved; --rebuild builds it again")
                reused.append((info.tier, phase))
                continue
            records = tuple(r for r in records if r is not old)
            _publish(bundle, target.key, records)  # a plan without a record is nothing; the reverse is damage
            record, line = build_engine(bundle, info, target, settings, phase, graph, labelled(tick, name), run)
            records = tuple(sorted((*records, record), key=lambda r: (int(r.tier[1:]), r.phase)))
            _publish(bundle, target.key, records)
            say(f"{name}: {line}")
    _remove_strays(set_folder(bundle.root, target.key), records)
    return EngineSet(target, settings, records, tuple(reused))


def build_engine(
    bundle: Bundle,
    info: TierInfo,
    target: BuildTarget,
    settings: BuildSettings,
    phase: str,
    graph: str,
    tick: Say,
    run: Callable[..., JobResult] = run_job,
) -> tuple[EngineRecord, str]:
    """Build one plan, into the folder of its set unless it is a proxy; return its record and a line on it."""
    result = run(_job(bundle, info, target, settings, phase, graph), tick)
    built = replace(fingerprint(bundle, info, target, settings, phase), version=result.version)
    record = describe(info, phase, settings, result, built, target.proxy)
    return record, f"{summary(record, info)}; peak memory {format_bytes(result.peak_rss_bytes)}"


def keep_compatible(
    records: Iterable[EngineRecord], target: BuildTarget, settings: BuildSettings
) -> tuple[EngineRecord, ...]:
    """Records of an earlier run that may stay beside new ones: same compiler and machine, same shapes."""
    new = (target.compiler, target.version, target.gpu, target.driver, settings.cache_len, settings.max_prompt_tokens)
    return tuple(
        r
        for r in records
        if (*_builder(r.fingerprint), r.cache_len, r.max_prompt_tokens) == new and r.proxy == target.proxy
    )


def _builder(f: Fingerprint) -> tuple[str, str, str | None, str | None]:
    return f.compiler, f.version, f.gpu, f.driver


def fingerprint(
    bundle: Bundle, info: TierInfo, target: BuildTarget, settings: BuildSettings, phase: str
) -> Fingerprint:
    """What the plan of a tier's phase would be built by, for and from."""
    return Fingerprint(
        target.compiler,
        target.version,
        target.compute_capability,
        target.gpu,
        target.driver,
        graph_sha256(bundle, info),
        settings.sha256(phase),
    )


def describe(
    info: TierInfo, phase: str, settings: BuildSettings, result: JobResult, built: Fingerprint, proxy: bool
) -> EngineRecord:
    """The record of a plan; attention is decomposed where fewer kernels are fused than layers have attention."""
    fewer = result.attention_layers < attention_count(info, phase)
    return EngineRecord(
        tier=info.tier,
        phase=phase,
        file=None if proxy else plan_name(info.tier, phase),
        bytes=result.bytes,
        sha256=None if proxy else result.sha256,
        layers=result.layers,
        attention_layers=result.attention_layers,
        decomposed_attention=fewer if result.layers else result.fallback,  # without a list of layers there is no count
        seconds=round(result.seconds, 2),
        cache_len=settings.cache_len,
        max_prompt_tokens=settings.max_prompt_tokens,
        proxy=proxy,
        fingerprint=built,
    )


def attention_count(info: TierInfo, phase: str = "both") -> int:
    """Layers of a tier whose attention a phase runs; none where weights are gathered."""
    if phase == "gather":
        return 0
    count = len(info.layers)
    run = info.prefill.attending(count) if info.prefill and phase == "prefill" else count
    return sum(layer.kv_heads > 0 for layer in info.layers[:run])


def summary(record: EngineRecord, info: TierInfo) -> str:
    """One line of a finished engine."""
    size = f"{record.seconds:.0f} s, {record.layers} engine layers"
    if record.phase == "gather":
        return size
    slow = ", the others in plain operators, slower" if record.decomposed_attention else ""
    count = attention_count(info, record.phase)
    return f"{size}, attention fused in {record.attention_layers} of {count} layers{slow}"


def labelled(tick: Say, name: str) -> Say:
    """Progress that says whose it is."""
    return lambda text: tick(f"{name}: {text}")


def _job(
    bundle: Bundle, info: TierInfo, target: BuildTarget, settings: BuildSettings, phase: str, graph: str
) -> EngineJob:
    folder = set_folder(bundle.root, target.key)
    return EngineJob(
        compiler=target.compiler,
        compute_capability=target.compute_capability,
        bundle_root=str(bundle.root.resolve()),
        graph=graph,
        phase=phase,
        settings=settings,
        weight_bytes=graph_bytes(bundle.manifest, info, phase),
        plan=None if target.proxy else str((folder / plan_name(info.tier, phase)).resolve()),
        timing_cache=str((folder / TIMING_CACHE_NAME).resolve()) if target.compiler == "tensorrt" else None,
    )


def _publish(bundle: Bundle, key: str, records: tuple[EngineRecord, ...]) -> None:
    if records:
        write_engines(bundle.root, key, records)
    else:
        (set_folder(bundle.root, key) / ENGINES_NAME).unlink(missing_ok=True)


def _existing(bundle: Bundle, key: str) -> tuple[EngineRecord, ...]:
    try:
        return read_engines(bundle.root, key)
    except BundleError:  # none yet, or not readable: then they are built again
        return ()


def _is_whole(bundle: Bundle, key: str, record: EngineRecord) -> bool:
    try:
        check_plan_file(bundle.root, key, record)
    except BundleError:
        return False
    return True


def _remove_strays(folder: Path, records: Iterable[EngineRecord]) -> None:
    """Remove plans that no record names any more, and what a killed build left half-written."""
    named = {r.file for r in records}
    for path in folder.iterdir():
        if path.name.startswith(".") or (path.suffix == ".plan" and path.name not in named):
            path.unlink(missing_ok=True)
