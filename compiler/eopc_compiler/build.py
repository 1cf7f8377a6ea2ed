"""`build()`: the main job as a function, with its settings checked first and its result moved into place last."""

from __future__ import annotations

import errno
import glob
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eopc_compiler.cache import StageCache
from eopc_compiler.pipeline import run_passes
from eopc_compiler.stage_bundle import move_into_place
from eopc_compiler.state import BuildArgs, CompileState
from eopc_runtime.cli.machine import peak_rss_bytes
from eopc_runtime.engines import list_engine_sets, set_folder
from eopc_runtime.errors import EopcError, UsageError
from eopc_runtime.profiles import load_profile
from eopc_runtime.report.write import REPORT_NAME


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
    if args.output.is_symlink():  # the folder it leads to is replaced, not the link
        args = replace(args, output=args.output.resolve())
    check_output(args.output, args.dry_run)
    if math.isnan(args.max_added_loss) or args.max_added_loss < 0:
        raise UsageError(f"--max-added-loss {args.max_added_loss} is no number of nats of 0 or more, for example 0.02.")
    if args.workload.prompt_tokens + args.workload.new_tokens > args.context:
        raise UsageError(f"the workload {args.workload} does not fit --context {args.context}. Raise --context.")
    if args.train_selectors_minutes and args.selectors == "off":
        raise UsageError("--train-selectors trains what --selectors off leaves out. Give --selectors on, or only one.")
    profile = load_profile(args.device)
    try:
        cache = StageCache(args.output.with_name(f".{args.output.name}.work"), args.resume)
    except OSError as error:
        raise EopcError(
            f"{args.output} cannot be written: {error.filename}: {error.strerror}. Choose another folder with -o."
        ) from error
    if list_engine_sets(args.output):
        say(f"the engines in {args.output} belong to the bundle that is replaced; eopc engine builds new ones")
    state = CompileState(args, cache, profile, say, tick)
    try:
        restore_old(args.output)
        state = run_passes(state)
        if cache.reused:
            say(f"reused from an earlier run: {', '.join(cache.reused)}")
        if state.staged is not None:
            move_into_place(state.staged, args.output)
            cache.clear()
    except EopcError:
        raise
    except Exception as error:
        if disk_is_full(error):
            cache.clear()
            raise EopcError(
                f"the disk is full: writing beside {args.output} failed. Nothing was left behind; a build needs about "
                f"three times the size of the weights. Free space, or choose another -o."
            ) from error
        if not isinstance(error, OSError):
            raise
        where = error.filename or f"a file beside {args.output}"
        raise EopcError(
            f"the build stopped at {where}: {error.strerror or error}. Mend that and run it again; finished stages "
            f"are reused."
        ) from error
    finally:
        for leftover in siblings(args.output, "staged"):
            shutil.rmtree(leftover, ignore_errors=True)
        cache.close()
    return BuildResult(args.output, state, time.monotonic() - start, peak_rss_bytes(), tuple(cache.reused))


def check_output(output: Path, dry_run: bool) -> None:
    """Refuse an output that would overwrite something that is not a bundle.

    Raises:
        UsageError: it is no folder one can replace, or holds files that are not of a bundle.
    """
    if output.name in ("", ".."):
        raise UsageError(f"-o {output} has no name of its own, and the folder is replaced. Write -o NAME.eopc.")
    try:
        if not output.exists():
            return
        if not output.is_dir():
            raise UsageError(f"{output} is a file; -o names the folder of the bundle. Choose another name.")
        names = {p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()}
    except OSError as error:
        raise UsageError(f"{output} cannot be read: {error.strerror}. Choose another folder with -o.") from error
    if names <= {"plan.json"}:  # empty, or what --dry-run leaves
        return
    listed = bundle_files(output)
    if listed is None:
        raise UsageError(f"{output} is not empty and not a bundle. Choose another folder with -o.")
    if dry_run:
        raise UsageError(f"{output} is a finished bundle, which a plan would spoil. Choose another folder with -o.")
    if others := sorted(names - listed):
        raise UsageError(
            f"{output} holds {others[0]}, which is not of the bundle there and would be lost. Move it, or choose "
            f"another folder with -o."
        )


def bundle_files(folder: Path) -> set[str] | None:
    """Names of the files of a bundle, damaged or not, as its manifest lists them, of its engines and its report.

    None if it has no such manifest.
    """
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
        content["eopc_version"]  # a manifest.json of something else has none
        engines = (path for key in list_engine_sets(folder) for path in set_folder(folder, key).iterdir())
        # made from the bundle, and of no use without it
        own = (path.relative_to(folder).as_posix() for path in engines)
        return {"manifest.json", REPORT_NAME, *(entry["path"] for entry in content["files"]), *own}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def restore_old(output: Path) -> None:
    """Bring back the bundle that a build killed while replacing it had put aside."""
    for old in siblings(output, "old"):
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)


def siblings(output: Path, kind: str) -> Sequence[Path]:
    """Temporary folders of builds of this output: kind "staged" (not yet renamed) or "old" (being replaced)."""
    return list(output.parent.glob(f".{glob.escape(output.name)}.{kind}-*"))


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an exception stems from a full disk or quota; libraries wrap the system's errors in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
