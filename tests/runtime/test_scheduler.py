"""Many threads on one session: the same tokens as alone, bounded waiting, failures and cancellations kept apart."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.async_session import AsyncSession
from eopc_runtime.errors import (
    BudgetError,
    DeviceLostError,
    DrainingError,
    PromptError,
    QueueFullError,
    SequenceCancelledError,
    SequenceError,
    UsageError,
)
from eopc_runtime.reconcile import Guard
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.scheduler import Scheduler, choose
from eopc_runtime.session import Session

from .conftest import Device, FakeMeter, FakePool
from .test_session import FakeTier, bundle, byte_tokenizer, session, table

PATIENT_S = 20.0  # a test that waits longer has failed


class Gate:
    """Lets a session's steps through one by one, and can make one fail."""

    def __init__(self, box: Session) -> None:
        self.steps = threading.Semaphore(0)
        self.arrived: list[str] = []  # prompts of the steps that were begun
        self.failure: Exception | None = None
        self.fails_for = ""
        inner = box.pool.get

        def get(tier: str) -> Any:
            runner: Any = inner(tier)
            forward = runner.forward

            def gated(cache: Any, tokens: Any, **options: Any) -> Any:
                out = forward(cache, tokens, **options)
                self.arrived.append(box.tokenizer.decode(cache.tokens[: cache.prompt]))
                assert self.steps.acquire(timeout=PATIENT_S)
                if self.failure is not None and cache.tokens[0] == box.tokenizer.encode(self.fails_for)[0]:
                    raise self.failure
                return out

            runner.forward = gated
            return runner

        box.pool.get = get  # type: ignore[method-assign]

    def open(self, steps: int = 1_000) -> None:
        self.steps.release(steps)


@pytest.fixture
def gated() -> Iterator[tuple[Scheduler, Gate]]:
    """Two sequences run, two may wait, and every step waits for the gate."""
    box = session("abcdefgh")
    gate = Gate(box)
    with Scheduler(box, max_running=2, max_waiting=2) as scheduler:
        yield scheduler, gate
        gate.open()


def test_many_threads_get_what_each_would_get_alone() -> None:
    """12 threads, different prompts, budgets, seeds and stops: tokens and joules are those of the session by itself."""
    requests = [
        {
            "prompt": "x" * (1 + i % 5),
            "budget": [None, 12.0, 30.0][i % 3],
            "max_new_tokens": 5 + i,
            "sampling": SamplingParams(temperature=1.0, seed=i),
            "stop": ["zq"],
        }
        for i in range(12)
    ]
    alone = [session(flat=True).generate(**request) for request in requests]  # type: ignore[arg-type]
    together: dict[int, Any] = {}
    with Scheduler(session(flat=True), max_running=4, max_waiting=12) as scheduler:

        def ask(i: int) -> None:
            handle = scheduler.submit(**requests[i])
            events = list(handle)
            together[i] = (events, handle.result(PATIENT_S))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENT_S)
    for i, expected in enumerate(alone):
        events, result = together[i]
        assert (result.text, result.energy_j, result.plan) == (expected.text, expected.energy_j, expected.plan)
        assert "".join(event.text for event in events) == expected.text
        assert events[-1].energy_j == expected.energy_j


def test_running_sequences_take_turns(gated: tuple[Scheduler, Gate]) -> None:
    """Two sequences of equal length are stepped alternately."""
    scheduler, gate = gated
    handles = [scheduler.submit(prompt, max_new_tokens=4) for prompt in "xy"]
    gate.open()
    for handle in handles:
        handle.result(PATIENT_S)
    assert "".join(gate.arrived).count("x") == 4
    assert all(one != following for one, following in itertools.pairwise(gate.arrived[1:-1])), gate.arrived


def test_a_full_queue_refuses_with_an_estimate(gated: tuple[Scheduler, Gate]) -> None:
    """Two run and two wait: the fifth is told when to ask again, and gets in when one has ended."""
    scheduler, gate = gated
    handles = [scheduler.submit("x", max_new_tokens=2) for _ in range(4)]
    with pytest.raises(QueueFullError, match="Ask again in about") as caught:
        scheduler.submit("x")
    assert 0 < caught.value.retry_after_s < 60
    gate.open()
    for handle in handles:
        handle.result(PATIENT_S)
    assert scheduler.submit("x", max_new_tokens=2).result(PATIENT_S).completion_tokens == 2


def test_a_failure_ends_its_own_sequence_only(gated: tuple[Scheduler, Gate]) -> None:
    """One runs into an error of the runner: it says so, the other finishes, and the next works."""
    scheduler, gate = gated
    gate.failure, gate.fails_for = RuntimeError("[ONNXRuntimeError] : 1 : FAIL\nmore"), "b"
    bad, good = scheduler.submit("bad", max_new_tokens=3), scheduler.submit("good", max_new_tokens=3)
    gate.open()
    with pytest.raises(SequenceError, match=r"failed in mid-run \(RuntimeError: \[ONNXRuntimeError\] : 1 : FAIL\)"):
        list(bad)
    assert good.result(PATIENT_S).completion_tokens == 3
    assert scheduler.submit("next", max_new_tokens=2).result(PATIENT_S).completion_tokens == 2


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [(MemoryError(), SequenceError, "no memory left"), (DeviceLostError("The GPU is gone."), DeviceLostError, "gone")],
)
def test_what_failed_is_said(
    gated: tuple[Scheduler, Gate], failure: Exception, kind: type[Exception], words: str
) -> None:
    """Out of memory gets a sentence of its own; errors that have one keep it."""
    scheduler, gate = gated
    gate.failure, gate.fails_for = failure, "b"
    handle = scheduler.submit("bad", max_new_tokens=3)
    gate.open()
    with pytest.raises(kind, match=words):
        handle.result(PATIENT_S)
    assert handle.spent_j > 0  # what was booked before the failure stays booked


def test_cancelling_frees_a_running_and_a_waiting_sequence(gated: tuple[Scheduler, Gate]) -> None:
    """Neither runs another step; both say that they were cancelled; what has run stays paid."""
    scheduler, gate = gated
    running = [scheduler.submit(prompt, max_new_tokens=30) for prompt in "xy"]
    waiting = scheduler.submit("z", max_new_tokens=30)
    gate.open(4)
    next(running[0])
    next(running[1])
    running[0].cancel()
    waiting.cancel()
    gate.open()
    for handle in (running[0], waiting):
        with pytest.raises(SequenceCancelledError):
            handle.result(PATIENT_S)
    assert waiting.spent_j == 0.0
    assert 0.5 < running[0].spent_j < 30
    assert "z" not in gate.arrived
    assert running[1].result(PATIENT_S).completion_tokens == 30
    running[1].cancel()  # after its end nothing happens
    assert running[1].result().completion_tokens == 30


def test_a_sequence_that_has_ended_keeps_no_cache() -> None:
    """Finished or failed, its cache is gone while its handle is still held."""
    box, caches = session("abc"), list[Any]()
    new_cache = FakeTier.new_cache

    def remember(self: FakeTier) -> Any:
        cache = new_cache(self)
        caches.append(weakref.ref(cache))
        if len(caches) == 2:
            raise PromptError("This one fails.")
        return cache

    with pytest.MonkeyPatch.context() as patch, Scheduler(box) as scheduler:
        patch.setattr(FakeTier, "new_cache", remember)
        good = scheduler.submit("x", max_new_tokens=3)
        good.result(PATIENT_S)
        bad = scheduler.submit("x", max_new_tokens=3)
        with pytest.raises(PromptError):
            bad.result(PATIENT_S)
        scheduler.drain(PATIENT_S)
        gc.collect()
        assert [cache() for cache in caches] == [None, None]


def test_draining_finishes_what_there_is_and_refuses_the_rest(gated: tuple[Scheduler, Gate]) -> None:
    """Running and waiting sequences end as usual."""
    scheduler, gate = gated
    handles = [scheduler.submit("x", max_new_tokens=3) for _ in range(3)]
    assert scheduler.drain(0.01) is False
    with pytest.raises(DrainingError):
        scheduler.submit("x")
    gate.open()
    assert scheduler.drain(PATIENT_S) is True
    assert [handle.result().completion_tokens for handle in handles] == [3, 3, 3]


def test_closing_cancels_what_there_is() -> None:
    """No handle is left waiting, and the worker has ended."""
    scheduler = Scheduler(session("abc"), max_running=1)
    handles = [scheduler.submit("x", max_new_tokens=60) for _ in range(5)]
    scheduler.close()
    assert all(handle.ended for handle in handles)
    with pytest.raises(DrainingError):
        scheduler.submit("x")


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"prompt": ""}, PromptError),
        ({"prompt": [1, 300]}, PromptError),
        ({"prompt": "x", "budget": 0.001}, BudgetError),
        ({"prompt": "x", "stop": [""]}, UsageError),
        ({"prompt": "x", "max_new_tokens": 0}, UsageError),
        ({"prompt": "x", "logprobs": -1}, UsageError),
    ],
)
def test_a_bad_request_is_refused_at_once(request_: dict[str, Any], error: type[Exception]) -> None:
    """The error comes from `submit`, not from the worker."""
    with Scheduler(session("abc")) as scheduler, pytest.raises(error):
        scheduler.submit(**request_)


def test_under_a_live_meter_sequences_run_one_after_the_other() -> None:
    """The meter never has two windows open, every sequence is corrected by its own, and the drift is handed on."""
    device = Device(factor=1.3)
    meter = FakeMeter(device)
    guard = Guard(lag_s=0.0, reconcile_s=0.05, settle_s=0.0)
    box = Session(bundle(table()), FakePool(device), byte_tokenizer(), clock=device.clock, meter=meter, guard=guard)
    most = 0
    begin = meter.begin

    def counted(name: str) -> None:
        nonlocal most
        begin(name)
        most = max(most, len(meter._open))

    meter.begin = counted  # type: ignore[method-assign]
    with Scheduler(box, max_running=4) as scheduler:
        handles = [scheduler.submit("x" * 8, max_new_tokens=20) for _ in range(5)]
        for handle in handles:
            handle.result(PATIENT_S)
    assert meter.windows == 5
    assert most == 1
    assert box.drift != 1.0


def test_a_loaded_tier_goes_first_until_patience_ends() -> None:
    """A sequence whose tier is not loaded waits its patience out, then goes before all others."""
    assert choose([("t0", 0.9), ("t1", 0.1), ("t1", 0.2)], ("t1",), patience_s=1.0) == 2
    assert choose([("t0", 1.1), ("t1", 0.1), ("t1", 0.2)], ("t1",), patience_s=1.0) == 0
    assert choose([("t0", 0.3), ("t2", 0.2)], ("t1",), patience_s=1.0) == 0
    assert choose([("t0", 0.3), ("t2", 0.4)], None, patience_s=1.0) == 1


@given(st.lists(st.tuples(st.sampled_from(["t0", "t1", "t2"]), st.floats(0, 5)), min_size=1), st.floats(0, 3))
def test_nobody_starves(waits: list[tuple[str, float]], patience_s: float) -> None:
    """Whoever has waited longest, and longer than its patience, has the next turn."""
    longest = max(s for _, s in waits)
    if longest >= patience_s:
        assert waits[choose(waits, ("t1",), patience_s)][1] == longest


def test_asyncio_streams_and_cancellation_frees_the_sequence() -> None:
    """Events arrive in the loop; a task cancelled in the middle cancels its sequence; the next works."""
    box = session("abcdefgh")
    gate = Gate(box)

    async def talk() -> tuple[str, str]:
        asked = AsyncSession(scheduler)
        texts: list[str] = []
        seen = asyncio.Event()
        endless = asked.stream("x", max_new_tokens=40)

        async def listen() -> None:
            async for event in endless:
                texts.append(event.text)
                seen.set()

        task = asyncio.create_task(listen())
        gate.open(3)
        await asyncio.wait_for(seen.wait(), PATIENT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await asyncio.wait_for(endless.wait(), PATIENT_S)
        with pytest.raises(SequenceCancelledError):
            await endless.result()
        done = await asyncio.wait_for(asked.generate("x", max_new_tokens=5), PATIENT_S)
        return "".join(texts), done.text

    with Scheduler(box, max_running=1) as scheduler:
        begun, whole = asyncio.run(talk())
    assert begun
    assert len(begun) < 8
    assert whole == "abcde"


def test_a_listener_whose_loop_is_gone_ends_its_sequence() -> None:
    """A closed event loop cannot take events: the sequence is given up, and the worker lives on."""
    gate = Gate(box := session("abcdefgh"))

    async def leave() -> Any:
        return AsyncSession(scheduler).stream("x", max_new_tokens=40).handle

    with Scheduler(box) as scheduler:
        handle = asyncio.run(leave())
        gate.open()
        with pytest.raises(SequenceError):
            handle.result(PATIENT_S)
        assert scheduler.submit("x", max_new_tokens=3).result(PATIENT_S).text == "abc"
