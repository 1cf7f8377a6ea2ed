"""Which runner executes a bundle here: its TensorRT engines where they fit this machine, else ONNX Runtime.

Asked for by name, a runner that cannot run is an error that says why. Left to `auto`, the CPU takes over, and a note
says so where the bundle does have engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopc_runtime.errors import BundleError, EopcError, UsageError

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.engines import EngineRecord
    from eopc_runtime.gpu_probe import Gpu
    from eopc_runtime.runners.base import RunnerPool

RUNNERS = ("auto", "ort", "tensorrt", "ort-cuda", "ort-tensorrt")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A pool of runners, with what a user should know of the choice."""

    runner: str  # a name of RUNNERS other than auto
    pool: RunnerPool
    version: str  # what executes, and the GPU if one does; prices of another are other prices
    notes: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does the work, so that its power is the one to read."""
        return self.runner != "ort"

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what the runners have found since, for example that a CUDA graph was refused."""
        return (*self.notes, *getattr(self.pool, "notes", ()))


def open_pool(bundle: Bundle, runner: str = "auto", threads: int | None = None) -> Chosen:
    """Open the runners of a bundle; tiers are loaded when they are first used.

    Raises:
        UsageError: there is no runner of this name.
        MissingExtraError: what it needs is not installed.
        DeviceError: no GPU answers, and the runner needs one.
        EngineMismatchError: the bundle's engines do not fit this machine, and they were asked for.
        BundleError: the bundle has no engines, and they were asked for.
    """
    if runner not in RUNNERS:
        raise UsageError(f'there is no runner "{runner}"; choose {", ".join(RUNNERS)}.')
    if runner == "tensorrt":
        return open_tensorrt(bundle)
    if runner.startswith("ort-"):
        return _open_ort_gpu(bundle, runner, threads)
    if runner == "auto" and has_plans(bundle.root):
        try:
            return open_tensorrt(bundle)
        except EopcError as error:
            return _open_ort(bundle, threads, (f"the CPU runs this bundle, not its engines: {error}",))
    return _open_ort(bundle, threads, ())


def has_plans(bundle_root: Path) -> bool:
    """Whether a bundle has engines to run; proxies leave none."""
    from eopc_runtime.engines import ENGINES_FOLDER

    return any((bundle_root / ENGINES_FOLDER).glob("*/*.plan"))


def open_tensorrt(bundle: Bundle, key: str | None = None) -> Chosen:
    """Open the first set of engines that fits this machine; nothing of NVIDIA's is imported before a GPU answered.

    Args:
        key: this set and no other.

    Raises:
        BundleError, EngineMismatchError, DeviceError, MissingExtraError: see `open_pool`.
    """
    from eopc_runtime.gpu_probe import require_gpu
    from eopc_runtime.profiles import ENGINE_COMPILERS

    if not has_plans(bundle.root):
        raise BundleError(f"{bundle.root} has no engines. Build them: eopc engine {bundle.root}")
    gpu, driver = require_gpu("TensorRT")
    key, records = find_set(bundle, gpu, driver, key)

    from eopc_runtime.runners.tensorrt.api import Loader, import_compiler
    from eopc_runtime.runners.tensorrt.cuda import CudaDevice
    from eopc_runtime.runners.tensorrt.pool import RESIDENT_SHARE, TensorRtPool

    built = records[0].fingerprint
    device = CudaDevice()
    loader = Loader(import_compiler(built.compiler))
    pool = TensorRtPool(bundle, key, records, loader, device, int(RESIDENT_SHARE * gpu.memory_bytes))
    failed = tuple(
        f"{record.file} does not compute what its graph says: eopc engine {bundle.root} --check"
        for record in records
        if record.check and not record.check.ok
    )
    return Chosen("tensorrt", pool, f"{ENGINE_COMPILERS[built.compiler]} {built.version}, {gpu.name}", failed)


def find_set(bundle: Bundle, gpu: Gpu, driver: str, wanted: str | None = None) -> tuple[str, tuple[EngineRecord, ...]]:
    """The key and records of a set of engines that may be loaded on this GPU: the one wanted, or the first.

    Raises:
        EopcError: none may; the error is that of the set that came nearest, a mismatch before a missing package.
    """
    from eopc_runtime.engines import list_engine_sets, read_engines
    from eopc_runtime.errors import EngineMismatchError

    errors: list[EopcError] = []
    for key in list_engine_sets(bundle.root) if wanted is None else (wanted,):
        try:
            records = read_engines(bundle.root, key)
            if not all(record.proxy for record in records):
                _check_set(bundle, records, gpu, driver)
                return key, records
        except EopcError as error:  # noqa: PERF203  # a handful of sets, and the next may fit
            errors.append(error)
    errors.sort(key=lambda error: not isinstance(error, EngineMismatchError))
    raise errors[0] if errors else BundleError(f"{bundle.root} has no engines. Build: eopc engine {bundle.root}")


def _check_set(bundle: Bundle, records: tuple[EngineRecord, ...], gpu: Gpu, driver: str) -> None:
    """Compare every record of a set with this machine and with the bundle as it is now."""
    from eopc_runtime.engines import Machine, check_engine, graph_sha256
    from eopc_runtime.runners.tensorrt.api import import_compiler

    for record in records:
        compiler = record.fingerprint.compiler
        version = str(import_compiler(compiler).__version__)
        machine = Machine(compiler, version, gpu.compute_capability, gpu.name, driver)
        check_engine(record, machine, graph_sha256(bundle, bundle.tier(record.tier)), bundle.root)


def _open_ort(bundle: Bundle, threads: int | None, notes: tuple[str, ...]) -> Chosen:
    from eopc_runtime.runners.ort import import_onnxruntime
    from eopc_runtime.runners.ort_pool import OrtPool

    ort = import_onnxruntime()  # say now, not at the first token, that it is missing
    return Chosen("ort", OrtPool(bundle, threads), _ort_version(ort), notes)


def _open_ort_gpu(bundle: Bundle, runner: str, threads: int | None) -> Chosen:
    from eopc_runtime.gpu_probe import require_gpu
    from eopc_runtime.runners.ort import import_onnxruntime
    from eopc_runtime.runners.ort_gpu import PROVIDERS, OrtGpuPool, check_providers

    ort = import_onnxruntime()
    offered = ort.get_available_providers()
    if PROVIDERS[runner][0] not in offered:
        check_providers(["CPUExecutionProvider"], PROVIDERS[runner], ort)
    gpu, _ = require_gpu(f"--runner {runner}")
    version = f"{_ort_version(ort)} {PROVIDERS[runner][0]}, {gpu.name}"
    return Chosen(runner, OrtGpuPool(bundle, runner, threads), version)


def _ort_version(ort: object) -> str:
    return f"onnxruntime {getattr(ort, '__version__', 'unknown')}"
