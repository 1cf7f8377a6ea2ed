"""`build()`: the main job as a function, with its settings checked first and its result moved into place last."""

from __future__ import annotations

import errno
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopc_compiler.cache import StageCache
from eopc_compiler.pipeline import run_passes
from eopc_compiler.stage_bundle import move_into_place
from eopc_compiler.state import BuildArgs, CompileState
from eopc_runtime.errors import EopcError, UsageError
from eopc_runtime.profiles import load_profile


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build reports."""

    bundle: Path
    state: CompileState
    elapsed_s: float
    peak_rss_bytes: int
    resumed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The keys of `eopc build --json`."""
        state = self.state
        assert state.storage and state.dialect
        planned = [
            {
                "tier": f"t{i}",
                "budget_j": t.budget_j,
                "energy_j": t.energy_j,
                "energy_source": state.profile.energy_source,
                "perplexity": None,
                "perplexity_dense": None,
                "note": t.note,
            }
            for i, t in enumerate(state.plan)
        ]
        return {
            "bundle": str(self.bundle),
            "device": state.profile.name,
            "dialect": state.dialect.name,
            "precision": state.storage.precision,
            "workload": {
                "prompt_tokens": state.args.workload.prompt_tokens,
                "new_tokens": state.args.workload.new_tokens,
            },
            "tiers": list(state.tiers) or planned,
            "weight_bytes": state.bytes_by_type,
            "elapsed_s": round(self.elapsed_s, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "resumed": list(self.resumed),
            "dry_run": state.args.dry_run,
        }


def build(
    args: BuildArgs,
    say: Callable[[str], None] = lambda _text: None,
    tick: Callable[[str], None] = lambda _text: None,
) -> BuildResult:
    """Compile a checkpoint into a bundle.

    Args:
        say: called with one line whenever something new begins.
        tick: called with a count that replaces the one before.

    Raises:
        EopcError: any user mistake; nothing is written then, and finished stages stay for a resume.
    """
    start = time.monotonic()
    check_output(args.output)
    if args.workload.prompt_tokens + args.workload.new_tokens > args.context:
        raise UsageError(f"the workload {args.workload} does not fit --context {args.context}. Raise --context.")
    profile = load_profile(args.device)
    cache = StageCache(args.output.with_name(f".{args.output.name}.work"), args.resume)
    state = CompileState(args, cache, profile, say, tick)
    try:
        state = run_passes(state)
        if state.staged is not None:
            move_into_place(state.staged, args.output)
            cache.clear()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            cache.clear()
            raise EopcError(
                f"the disk is full: writing beside {args.output} failed. Nothing was left behind; a build needs about "
                f"three times the size of the weights. Free space, or choose another -o."
            ) from error
        raise EopcError(f"writing beside {args.output} failed: {error.strerror or error}.") from error
    finally:
        for leftover in staged_folders(args.output):
            shutil.rmtree(leftover, ignore_errors=True)
        if cache.folder.is_dir() and not any(cache.folder.iterdir()):
            cache.folder.rmdir()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return BuildResult(args.output, state, time.monotonic() - start, peak, tuple(cache.reused))


def check_output(output: Path) -> None:
    """Refuse an output that would overwrite something that is not a bundle.

    Raises:
        UsageError: it is a file, or a folder with other content.
    """
    if output.is_file():
        raise UsageError(f"{output} is a file; -o names the folder of the bundle. Choose another name.")
    if output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        only_plan = [p.name for p in output.iterdir()] == ["plan.json"]  # what --dry-run leaves
        if not only_plan:
            raise UsageError(f"{output} is not empty and not a bundle. Choose another folder with -o.")


def staged_folders(output: Path) -> Sequence[Path]:
    """Staging folders of this output that were not renamed."""
    return list(output.parent.glob(f".{output.name}.staged-*")) if output.parent.is_dir() else []
