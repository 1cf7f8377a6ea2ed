"""Where patterns are evaluated: in this process, in a pool of processes, or on a Ray cluster.

All three are sources of losses (`fitness.Losses`) with the same numbers, so a search with one seed ends alike on each.
Workers load the model once, from the checkpoint, and get the tokens once. Patterns are handed out in the order of the
forward pass, as neighbouring chunks, so that most shared prefixes stay within a worker.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from eopc_compiler.checkpoint import Checkpoint, open_checkpoint
from eopc_compiler.evop.fitness import Losses, ModelLosses, Work, check_stages, stage_key
from eopc_compiler.evop.pattern import Pattern
from eopc_compiler.model import build_model
from eopc_runtime.errors import EopcError, MissingExtraError

CHUNKS_PER_WORKER = 2  # more would even out workers, fewer share longer prefixes
Chunk = tuple[int, ...]  # indices into the patterns of one call


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to evaluate patterns; plain data, so that it can be sent."""

    checkpoint: str | None  # as for `open_checkpoint`
    stages: tuple[npt.NDArray[np.int64], ...]  # token ids [n, S]
    dtype: str = "float32"  # or bfloat16
    threads: int = 0  # of torch in a worker; 0 leaves its own choice

    @property
    def tokens(self) -> tuple[torch.Tensor, ...]:
        """The stages as tensors."""
        return tuple(torch.from_numpy(np.array(stage)) for stage in self.stages)  # a copy: Ray's arrays are read-only

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype by its name."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


class Executor(Losses, Protocol):
    """A source of losses that holds resources while it is open."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_losses(job: Job, checkpoint: Checkpoint | None = None) -> ModelLosses:
    """The model and tokens of a job in this process."""
    if job.threads:
        torch.set_num_threads(job.threads)
    found = checkpoint or open_checkpoint(job.checkpoint)
    context = max((stage.shape[-1] for stage in job.stages), default=0)
    model = build_model(found.config, {name: found.tensor(name) for name in found.tensor_names}, context)
    return ModelLosses(model, job.tokens, job.torch_dtype, found.fingerprint)


class InProcess:
    """Patterns one after the other, here."""

    def __init__(self, job: Job) -> None:
        self._losses = open_losses(job)
        self.work, self.keys, self.weights = self._losses.work, self._losses.keys, self._losses.weights

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """As `Losses.score`."""
        return self._losses.score(patterns, stage)


class _Workers:
    """What the two kinds of workers have in common: keys without a model in memory, and the handing out of chunks."""

    def __init__(self, job: Job, workers: int) -> None:
        assert workers > 0, f"{workers} workers"
        checkpoint = open_checkpoint(job.checkpoint)  # a checkpoint that cannot be read is refused here, not in workers
        check_stages(job.tokens, checkpoint.config.vocab_size)
        key = checkpoint.fingerprint
        self.job, self.workers, self.work = job, workers, Work()
        self.keys = tuple(stage_key(key, job.torch_dtype, tokens) for tokens in job.tokens)
        self.weights = tuple(tokens[:, 1:].numel() for tokens in job.tokens)

    def chunks(self, patterns: Sequence[Pattern]) -> list[Chunk]:
        """Indices in the order of the walk, cut into neighbouring pieces of nearly the same length."""
        order = sorted(range(len(patterns)), key=lambda i: patterns[i].path)
        count = min(len(order), self.workers * CHUNKS_PER_WORKER)
        cuts = [len(order) * i // count for i in range(count + 1)] if count else []
        return [tuple(order[start:stop]) for start, stop in itertools.pairwise(cuts)]

    def collect(self, chunk: Chunk, done: tuple[list[float], Work]) -> Iterator[tuple[int, float]]:
        """The losses of a finished chunk under the indices of the whole call."""
        losses, work = done
        self.work.add(work)
        yield from zip(chunk, losses, strict=True)


class ProcessPool(_Workers):
    """Worker processes on this machine. Started by spawn: torch's threads do not survive a fork."""

    def __enter__(self) -> ProcessPool:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start, initargs=(self.job,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers; what has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """As `Losses.score`; EopcError if a worker dies."""
        running: dict[Future[tuple[list[float], Work]], Chunk] = {}
        try:
            for chunk in self.chunks(patterns):
                running[self._pool.submit(_evaluate, [patterns[i] for i in chunk], stage)] = chunk
            for future in as_completed(running):
                yield from self.collect(running[future], future.result())
        except BrokenProcessPool as error:
            raise EopcError(
                f"One of {self.workers} worker processes ended before its result was there, which usually means that "
                "memory ran out. Use fewer workers; with a journal nothing is evaluated again."
            ) from error


class Evaluator:
    """The model and tokens of one worker."""

    def __init__(self, job: Job) -> None:
        self._losses = open_losses(job)

    def evaluate(self, patterns: list[Pattern], stage: int) -> tuple[list[float], Work]:
        """Losses in the order of the patterns, and the work they took."""
        self._losses.work = Work()
        found = dict(self._losses.score(patterns, stage))
        return [found[i] for i in range(len(patterns))], self._losses.work


_EVALUATOR: list[Evaluator] = []  # of a worker process: concurrent.futures gives its initializer no other place


def _start(job: Job) -> None:
    _EVALUATOR.append(Evaluator(job))


def _evaluate(patterns: list[Pattern], stage: int) -> tuple[list[float], Work]:
    return _EVALUATOR[0].evaluate(patterns, stage)


class RayPool(_Workers):
    """Ray actors, on this machine or on the cluster at `address`, where every node must find the checkpoint."""

    def __init__(self, job: Job, workers: int, address: str | None = None) -> None:
        """MissingExtraError if Ray is not installed."""
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("Evaluating patterns on Ray", "ray", "ray") from error
        super().__init__(job, workers)
        self._ray: Any = ray
        self._address, self._started = address, False

    def __enter__(self) -> RayPool:
        ray = self._ray
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a compiler does not call home
            local = {} if self._address else {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **local)
            self._started = True
        job = ray.put(self.job)  # once into the object store, not once per actor
        self._actors = [ray.remote(Evaluator).options(num_cpus=1).remote(job) for _ in range(self.workers)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the actors, and Ray itself if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        """As `Losses.score`; EopcError if an actor dies."""
        running: dict[Any, Chunk] = {}
        for number, chunk in enumerate(self.chunks(patterns)):
            actor = self._actors[number % self.workers]
            running[actor.evaluate.remote([patterns[i] for i in chunk], stage)] = chunk
        try:
            while running:
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                yield from self.collect(running.pop(done), self._ray.get(done))
        except self._ray.exceptions.RayError as error:
            raise EopcError(
                f"One of {self.workers} Ray workers failed ({type(error).__name__}). Check that every node has the "
                "checkpoint and enough memory; with a journal nothing is evaluated again."
            ) from error
