"""One session for many threads: sequences wait in a bounded queue, and one worker steps the running ones in turn.

Every sequence has a cache and a ledger of its own, so its tokens and joules are those it would have alone. Stepping
needs its tier loaded, and a pool may hold fewer tiers than are in use: sequences whose tier is loaded go first, and
one whose tier is not waits up to `patience_s` for its turn, so that tiers are not loaded anew for every token. With a
live meter one sequence runs at a time, since a meter cannot tell two apart.

An error ends its own sequence only. What is decided is decided in `choose`; here are the threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from eopc_runtime.errors import (
    DrainingError,
    EopcError,
    QueueFullError,
    SequenceCancelledError,
    SequenceError,
    UsageError,
)
from eopc_runtime.generation import Event, Result
from eopc_runtime.memory import release_memory
from eopc_runtime.scoring import Score
from eopc_runtime.session import Session

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Deliver = Callable[[Event | None], None]  # takes every event, and None at the end; called by the worker

_MEMORY = 0.2  # weight of the last finished sequence in the estimate of how long one takes


class Work(Protocol[R_co]):
    """What is stepped: a `generation.Generation` or a `scoring.Scoring`."""

    def __next__(self) -> Event | None:
        """Run one step; StopIteration at the end."""

    @property
    def result(self) -> R_co:
        """What came of it."""

    @property
    def next_tier(self) -> str:
        """The tier that the next step needs."""

    @property
    def spent_j(self) -> float:
        """Joules booked so far."""

    @property
    def spent_by_phase_j(self) -> dict[str, float]:
        """The same by phase."""

    def close(self) -> None:
        """End it now."""


class Handle(Generic[R]):
    """A submitted sequence: iterate for its events, or wait for its `result`. Safe to use from any thread."""

    def __init__(self, start: Callable[[], Work[R]], deliver: Deliver | None, cancel: Callable[[Handle[Any]], None]):
        self._start = start
        self._cancel = cancel
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._deliver = deliver or self._events.put
        self._ended = threading.Event()
        self._read_all = False
        self._work: Work[R] | None = None
        self._result: R | None = None
        self.error: EopcError | None = None  # what ended it early
        self.cancelled = False  # asked to end; it does so before its next step

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """Wait for the next event; raises what ended the sequence early, if anything did."""
        event = None if self._read_all else self._events.get()
        if event is not None:
            return event
        self._read_all = True
        if self.error is not None:
            raise self.error
        raise StopIteration

    def result(self, timeout_s: float | None = None) -> R:
        """Wait for the end and return the result.

        Raises SequenceError (or another EopcError) when the sequence failed, SequenceCancelledError when it was
        cancelled, TimeoutError when it has not ended in time.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the sequence has not ended in {timeout_s} s")
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """End the sequence before its next step, or take it from the queue; nothing happens after its end."""
        self._cancel(self)

    @property
    def ended(self) -> bool:
        """Whether it has finished, failed, or been cancelled."""
        return self._ended.is_set()

    @property
    def spent_j(self) -> float:
        """Joules booked so far; 0 while it waits."""
        return 0.0 if self._work is None else self._work.spent_j

    @property
    def spent_by_phase_j(self) -> dict[str, float]:
        """The same by phase; read it after the end."""
        return {} if self._work is None else self._work.spent_by_phase_j

    @property
    def next_tier(self) -> str:
        """The tier that the next step needs; only of a sequence that was begun."""
        assert self._work is not None
        return self._work.next_tier

    def _begin(self) -> None:
        self._work = self._start()

    def _step(self) -> bool:
        """Run one step; False at the end."""
        assert self._work is not None
        try:
            event = next(self._work)
        except StopIteration:
            return False
        if event is not None:
            self._deliver(event)
        return True

    def _finish(self, error: EopcError | None = None) -> None:
        """Close the work and tell whoever waits."""
        if self._work is not None:
            self._work.close()
            if error is None:
                self._result = self._work.result
        self.error = error
        self._ended.set()
        with suppress(Exception):  # whoever listened may have gone
            self._deliver(None)


@dataclass(slots=True, eq=False)
class _Turn:
    """A running sequence, when it was last stepped, and how long it has been stepped in all."""

    handle: Handle[Any]
    stepped_s: float
    busy_s: float = 0.0


class Scheduler:
    """Runs the sequences of one session; it does not close the session."""

    def __init__(
        self,
        session: Session,
        *,
        max_running: int = 4,
        max_waiting: int = 32,
        patience_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the worker.

        Args:
            max_running: sequences stepped in turn, each with a cache; one where the session has a live meter.
            max_waiting: sequences that may wait beside them; more are refused.
            patience_s: how long a sequence waits for a tier that is not loaded while others can go on.
        """
        if max_running < 1 or max_waiting < 0:
            raise UsageError(
                f"The scheduler was given room for {max_running} running and {max_waiting} waiting sequences; it "
                "needs 1 or more and 0 or more."
            )
        self.session = session
        self._max_running, self._max_waiting, self._patience_s = max_running, max_waiting, patience_s
        self._clock = clock
        self._change = threading.Condition()  # guards what follows
        self._waiting: deque[Handle[Any]] = deque()
        self._running: list[_Turn] = []
        self._draining = self._closing = False
        self._sequence_s = 1.0  # busy seconds per finished sequence, of late
        self._worker = threading.Thread(target=self._run, name="eopc-scheduler", daemon=True)
        self._worker.start()

    def submit(self, prompt: Any = None, *, deliver: Deliver | None = None, **request: Any) -> Handle[Result]:
        """Queue a sequence; the arguments are those of `Session.stream`, and so are the errors, raised here and now.

        QueueFullError when too many wait, DrainingError after `drain` or `close`.

        Args:
            deliver: called by the worker with every event, and with None at the end, instead of iterating.
        """
        session = self.session
        if isinstance(prompt, str) or "messages" in request or prompt is None:
            texts = {"messages": request.pop("messages", None), "raw": request.pop("raw", False)}
            prompt = session.encode_prompt(prompt, **texts)
        session.stream(prompt, **request)  # raises what is wrong with it, and runs nothing
        return self._enqueue(lambda: session.stream(prompt, **request), deliver)

    def score(self, ids: Sequence[int], *, deliver: Deliver | None = None, **request: Any) -> Handle[Score]:
        """Queue a text to be scored; the arguments and errors are those of `Session.score` and of `submit`."""
        session, ids = self.session, tuple(ids)
        session.score(ids, **request)
        return self._enqueue(lambda: session.score(ids, **request), deliver)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that are being stepped."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        """Whether new sequences are refused."""
        return self._draining

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new sequences from now on, and wait for those there are; False when they have not ended in time."""
        with self._change:
            self._draining = True
            return self._change.wait_for(lambda: not (self._waiting or self._running), timeout_s)

    def close(self) -> None:
        """Cancel every sequence and end the worker; no sequence runs after this returns."""
        with self._change:
            self._draining = self._closing = True
            for handle in (*self._waiting, *(turn.handle for turn in self._running)):
                handle.cancelled = True
            self._change.notify_all()
        self._worker.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enqueue(self, start: Callable[[], Work[R]], deliver: Deliver | None) -> Handle[R]:
        handle = Handle(start, deliver, self._cancel)
        with self._change:
            if self._draining:
                raise DrainingError("No new sequences are taken: those that run are finished, then this process ends.")
            if len(self._waiting) + len(self._running) >= self._max_waiting + self._limit:
                seconds = max(self._sequence_s, 0.1)
                raise QueueFullError(
                    f"{len(self._running)} sequences run and {len(self._waiting)} wait, as many as may. "
                    f"Ask again in about {seconds:.1f} s.",
                    seconds,
                )
            self._waiting.append(handle)
            self._change.notify_all()
        return handle

    def _cancel(self, handle: Handle[Any]) -> None:
        with self._change:
            handle.cancelled = True
            self._change.notify_all()

    @property
    def _limit(self) -> int:
        return 1 if self.session.metered else self._max_running

    def _run(self) -> None:
        """Step sequences until the scheduler is closed."""
        while (turn := self._next_turn()) is not None:
            handle, error, more = turn.handle, None, False
            start_s = self._clock()
            try:
                if handle.cancelled:
                    raise SequenceCancelledError("The sequence was cancelled before its end.")
                more = handle._step()
            except Exception as failure:  # whatever it is, it is this sequence's and no other's
                error = as_error(failure)
            turn.stepped_s = self._clock()
            turn.busy_s += turn.stepped_s - start_s
            if not more:
                self._end(turn, error)

    def _next_turn(self) -> _Turn | None:
        """Begin what there is room for, and return whose turn it is; wait where there is nothing; None to end."""
        with self._change:
            while not self._admit():
                if self._closing:
                    return None
                self._change.wait()
            for turn in self._running:
                if turn.handle.cancelled:
                    return turn
            now_s = self._clock()
            waits = [(turn.handle.next_tier, now_s - turn.stepped_s) for turn in self._running]
            return self._running[choose(waits, getattr(self.session.pool, "resident", None), self._patience_s)]

    def _admit(self) -> bool:
        """Begin waiting sequences while there is room; True if any runs."""
        for handle in [handle for handle in self._waiting if handle.cancelled]:
            self._waiting.remove(handle)
            handle._finish(SequenceCancelledError("The sequence was cancelled while it waited."))
        while self._waiting and len(self._running) < self._limit:
            handle = self._waiting.popleft()
            try:
                handle._begin()
            except Exception as failure:  # for example prices that have risen since it was submitted
                handle._finish(as_error(failure))
            else:
                self._running.append(_Turn(handle, self._clock()))
        self._change.notify_all()
        return bool(self._running)

    def _end(self, turn: _Turn, error: EopcError | None) -> None:
        with self._change:
            self._running.remove(turn)
            turn.handle._finish(error)
            if error is None:
                self._sequence_s += _MEMORY * (turn.busy_s - self._sequence_s)
            self._change.notify_all()


def choose(waits: Sequence[tuple[str, float]], loaded: Collection[str] | None, patience_s: float) -> int:
    """Return whose turn it is: of the sequences that may step, the one that has waited longest.

    Args:
        waits: for every running sequence the tier of its next step, and the seconds since its last one.
        loaded: tiers that need no loading, None where all are; a sequence on one of them may step, and one on
            another tier when it has waited for `patience_s`, or when no sequence is on a loaded one.
    """
    ready = [i for i, (tier, s) in enumerate(waits) if loaded is None or tier in loaded or s >= patience_s]
    return max(ready or range(len(waits)), key=lambda i: waits[i][1])


def as_error(failure: Exception) -> EopcError:
    """Return a failure as an error for whoever asked for the sequence."""
    if isinstance(failure, EopcError):
        return failure.with_traceback(None)  # which would keep the sequence's cache alive
    if isinstance(failure, MemoryError):
        release_memory()
        return SequenceError(
            "The sequence was ended, since this machine has no memory left for it. Ask for a shorter one, or run fewer "
            "at a time."
        )
    first, *_ = str(failure).splitlines() or [""]
    return SequenceError(
        f"The sequence failed in mid-run ({type(failure).__name__}: {first[:200]}). Others go on; ask again, and "
        "report it if it fails again."
    )
