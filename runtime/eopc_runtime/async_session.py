"""A session for asyncio: `async for event in sequence`, on top of the scheduler's worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

from eopc_runtime.generation import Event, Result
from eopc_runtime.scheduler import Deliver, Handle, Scheduler
from eopc_runtime.scoring import Score

R = TypeVar("R")


class AsyncHandle(AsyncIterator[Event], Generic[R]):
    """A submitted sequence: `async for` its events, or await its `result`. For the event loop it was made in.

    A task that is cancelled while it waits here cancels the sequence. One that leaves the events early calls `cancel`.
    """

    def __init__(self, submit: Callable[[Deliver], Handle[R]], on_event: Callable[[Event], None] | None = None) -> None:
        """Submit a sequence; `submit` is given where its events go, and raises what is wrong with it.

        `on_event` is called in the event loop with every event, also when nobody iterates.
        """
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._ended = asyncio.Event()
        self._read_all = False
        self._on_event = on_event

        def deliver(event: Event | None) -> None:  # in the worker; raises once the loop is closed, ending the sequence
            loop.call_soon_threadsafe(self._take, event)

        self.handle = submit(deliver)

    def _take(self, event: Event | None) -> None:
        self._events.put_nowait(event)
        if event is None:
            self._ended.set()
        elif self._on_event is not None:
            self._on_event(event)

    async def __anext__(self) -> Event:
        """Wait for the next event; raises what ended the sequence early, if anything did."""
        try:
            event = None if self._read_all else await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if event is not None:
            return event
        self._read_all = True
        if self.handle.error is not None:
            raise self.handle.error
        raise StopAsyncIteration

    async def wait(self) -> None:
        """Wait for the end, whatever it is; cancelling this leaves the sequence alone."""
        await self._ended.wait()

    async def result(self) -> R:
        """Wait for the end and return the result; errors as those of `Handle.result`."""
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.handle.result()

    def cancel(self) -> None:
        """End the sequence before its next step."""
        self.handle.cancel()


class AsyncSession:
    """The scheduler of a session, for coroutines. Arguments and errors are those of `Scheduler`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def stream(
        self, prompt: Any = None, *, on_event: Callable[[Event], None] | None = None, **request: Any
    ) -> AsyncHandle[Result]:
        """Queue a sequence and return it; see `Scheduler.submit`, and `AsyncHandle` for `on_event`."""
        return AsyncHandle(lambda deliver: self.scheduler.submit(prompt, deliver=deliver, **request), on_event)

    async def generate(self, prompt: Any = None, **request: Any) -> Result:
        """Run a sequence to its end."""
        return await self.stream(prompt, **request).result()

    def score(self, ids: Sequence[int], **request: Any) -> AsyncHandle[Score]:
        """Queue a text to be scored; see `Scheduler.score`."""
        return AsyncHandle(lambda deliver: self.scheduler.score(ids, deliver=deliver, **request))
