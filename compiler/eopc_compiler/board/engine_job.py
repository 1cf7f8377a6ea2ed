"""One engine built in a child process.

A build takes a multiple of the weights in memory and runs for long in native code: in a child its memory is returned
after every plan, an interrupt ends it at once, and a crash or the kernel's out-of-memory killer is a message here. The
job goes in as JSON on standard input; progress, and at last the result or the refusal, come out as JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from eopc_compiler.board.tensorrt_build import BuilderCrashError, BuildSettings, EngineBuildError
from eopc_runtime.errors import BundleError, DeviceError, EopcError
from eopc_runtime.files import write_whole

COMMAND = "from eopc_compiler.board.engine_job import main; main()"
INLINE_WEIGHT_BYTES = 1_000_000_000  # above, joined constants go through the disk: one ONNX file holds 2 GB
EVENT_INTERVAL_S = 0.2
REFUSALS: dict[str, type[EopcError]] = {c.__name__: c for c in (EngineBuildError, DeviceError, BundleError)}


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One plan to build; paths are text, as the job travels as JSON."""

    compiler: str
    compute_capability: int
    bundle_root: str
    graph: str  # relative to the bundle
    phase: str
    settings: BuildSettings
    weight_bytes: int
    plan: str | None  # the file to write; None throws the plan away
    timing_cache: str | None  # read and replaced, if the compiler keeps one

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> EngineJob:
        """Read what `asdict` wrote."""
        return cls(**{**content, "settings": BuildSettings(**content["settings"])})


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a child reports of its plan."""

    version: str  # of the compiler
    bytes: int
    sha256: str
    layers: int
    attention_layers: int
    fallback: bool
    seconds: float
    peak_rss_bytes: int


def run_job(job: EngineJob, tick: Callable[[str], None]) -> JobResult:
    """Build one plan in a child process.

    Args:
        tick: called with one line of TensorRT's progress.

    Raises:
        EngineBuildError: TensorRT refuses the graph; as BuilderCrashError, the child crashed.
        DeviceError, BundleError: as in `build_plan` and `prepare_for_tensorrt`.
    """
    roots = {str(Path(sys.modules[name].__file__ or "").parents[1]) for name in ("eopc_compiler", "eopc_runtime")}
    paths = [*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            assert child.stdin and child.stdout
            child.stdin.write(json.dumps(asdict(job)))
            child.stdin.close()
            last = _follow(child.stdout, tick)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        if "result" in last:
            return JobResult(**last["result"])
        if "refused" in last:
            raise REFUSALS.get(last["refused"], EopcError)(last["message"])
        stderr.seek(0)
        raise BuilderCrashError(crash_message(code, stderr.read().decode(errors="replace")))


def _follow(lines: IO[str], tick: Callable[[str], None]) -> dict[str, Any]:
    """Pass progress on until the child ends; return its last word, empty if it had none."""
    last: dict[str, Any] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # native code may print as well
        if isinstance(event, dict) and "step" in event:
            phase, done, total = event["step"]
            tick(f"{phase} {done}/{total}")
        elif isinstance(event, dict):
            last = event
    return last


def crash_message(code: int, stderr: str) -> str:
    """What to say of a child that ended without a word of its own."""
    if code == -signal.SIGKILL:
        return (
            "the engine builder was killed, most likely for lack of memory. Close other programs, add swap, or build "
            "a smaller tier first (--tier)."
        )
    if code < 0:
        return f"the engine builder crashed ({signal.Signals(-code).name}) inside TensorRT. Update it, or report this."
    tail = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "nothing was said")
    return f"the engine builder failed: {tail[:300]}"


def main() -> None:
    """The child's side: one job from standard input."""
    job = EngineJob.from_json(json.load(sys.stdin))
    try:
        _say({"result": asdict(_build(job))})
    except EopcError as error:
        _say({"refused": type(error).__name__, "message": str(error)})


def _build(job: EngineJob) -> JobResult:
    from eopc_compiler.board.compilers import open_compiler
    from eopc_compiler.board.tensorrt_build import build_plan
    from eopc_compiler.board.tensorrt_graph import prepare_for_tensorrt
    from eopc_runtime.cli.machine import peak_rss_bytes

    root = Path(job.bundle_root)
    compiler = open_compiler(job.compiler, "`eopc engine`")
    timing_cache = Path(job.timing_cache) if job.timing_cache else None
    with tempfile.TemporaryDirectory(prefix="eopc-engine-") as folder:
        workspace = Path(folder) if job.weight_bytes > INLINE_WEIGHT_BYTES else None
        model = prepare_for_tensorrt(root, Path(job.graph), job.settings.slots(job.phase), workspace)
        built = build_plan(
            compiler, model, workspace or root, job.compute_capability, job.settings, job.phase, timing_cache, _Steps()
        )
    content = memoryview(built.plan)
    if job.plan is not None:
        write_whole(Path(job.plan), content)
    if timing_cache is not None and built.timing_cache is not None:
        write_whole(timing_cache, built.timing_cache)
    return JobResult(
        version=compiler.version,
        bytes=built.bytes,
        sha256=hashlib.sha256(content).hexdigest(),
        layers=len(built.layers),
        attention_layers=built.attention_layers,
        fallback=built.fallback,
        seconds=built.seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


class _Steps:
    """Reports progress a few times a second."""

    def __init__(self) -> None:
        self.next = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + EVENT_INTERVAL_S
            _say({"step": [phase, done, total]})


def _say(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
