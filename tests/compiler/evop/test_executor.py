"""Processes and Ray give what this process gives, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eopc_compiler.config import LlamaConfig
from eopc_compiler.evop.executor import Executor, InProcess, Job, ProcessPool, RayPool
from eopc_compiler.evop.fitness import Fitness
from eopc_compiler.evop.pattern import Space
from eopc_compiler.evop.search import SearchResult, search_pattern
from eopc_runtime.errors import EopcError, MissingExtraError, ModelError, UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def job(make_tiny: MakeTiny, tiny_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A checkpoint folder of six layers, and two stages of tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    _, tensors = make_tiny(num_hidden_layers=6)
    (folder / "config.json").write_text(json.dumps({**tiny_json, "num_hidden_layers": 6}))
    save_file(tensors, folder / "model.safetensors")
    rng = np.random.default_rng(3)
    stages = tuple(rng.integers(0, 160, shape) for shape in ((1, 12), (2, 20)))
    return Job(str(folder), stages, threads=torch.get_num_threads())


def searched(executor: Executor) -> SearchResult:
    return search_pattern(Fitness(executor), 6, 2, evaluations=14, seed=7)


@pytest.fixture(scope="module")
def here(job: Job) -> SearchResult:
    """The search in this process."""
    with InProcess(job) as executor:
        return searched(executor)


def test_two_processes_find_what_one_finds(job: Job, here: SearchResult) -> None:
    """Pattern, loss and history are equal, and so are the keys of a journal."""
    with ProcessPool(job, 2) as pool, InProcess(job) as alone:
        assert searched(pool) == here
        assert pool.keys == alone.keys and pool.weights == alone.weights
        assert 0 < pool.work.run < pool.work.asked


def test_two_ray_workers_find_what_one_process_finds(job: Job, here: SearchResult) -> None:
    """The same on a Ray started for the test."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "eopc[ray]"')
    with RayPool(job, 2) as pool:
        assert searched(pool) == here
        assert 0 < pool.work.run < pool.work.asked


def test_without_ray_the_message_names_the_extra(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else needs Ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "eopc\[ray\]"'):
        RayPool(job, 2)


def test_chunks_hold_every_pattern_once_in_the_order_of_the_walk(job: Job) -> None:
    """Neighbours in the trie stay together; four chunks for two workers, of nearly the same size; none for nothing."""
    pool = ProcessPool(job, 2)
    patterns = list(Space(6, 2))
    chunks = pool.chunks(patterns)
    paths = [patterns[i].path for chunk in chunks for i in chunk]
    assert paths == sorted(p.path for p in patterns)
    assert [len(chunk) for chunk in chunks] == [3, 4, 4, 4]
    assert [len(chunk) for chunk in pool.chunks(patterns[:2])] == [1, 1]
    assert pool.chunks([]) == []


def test_a_dead_worker_is_one_sentence(job: Job) -> None:
    """A process that is killed, as the system does when memory runs out, is reported with what to do."""
    with ProcessPool(job, 1) as pool:
        os.kill(pool._pool.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(EopcError, match="Use fewer workers"):
            Fitness(pool).losses(list(Space(6, 2))[:1])


@pytest.mark.parametrize("executor", [InProcess, ProcessPool])
def test_what_workers_could_not_load_is_refused_at_once(job: Job, executor: Callable[..., Executor]) -> None:
    """A missing checkpoint and foreign tokens are found in the calling process."""
    more = () if executor is InProcess else (2,)
    with pytest.raises(ModelError, match="not found"):
        executor(Job("no-such-folder", job.stages), *more)
    with pytest.raises(UsageError, match="vocabulary"):
        executor(Job(job.checkpoint, (job.stages[0] + 160,)), *more)
