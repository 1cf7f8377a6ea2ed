"""A request on its way: joules granted, queued, run, settled and counted, whatever becomes of its client."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from eopc_runtime.allowance import BudgetPolicy, Grant
from eopc_runtime.async_session import AsyncHandle, AsyncSession
from eopc_runtime.errors import BudgetError, EopcError, SequenceCancelledError
from eopc_runtime.generation import Event, Result
from eopc_runtime.scheduler import Scheduler
from eopc_runtime.scoring import Score
from eopc_runtime.serve.activity import Activity, Done
from eopc_runtime.serve.api_error import ApiError, as_api_error
from eopc_runtime.serve.metrics import Metrics
from eopc_runtime.serve.requests import Ask, Prompt
from eopc_runtime.units import format_energy

R = TypeVar("R", Result, Score)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request gets that does not say, and what none may exceed; joules, None for no limit."""

    budget_j: float | None = None
    max_budget_j: float | None = None
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt with the joules it may spend."""

    ids: list[int]
    asked_j: float | None  # the request's budget, or the server's default
    budget_j: float | None  # what the sequence is run with; None: there is no limit
    grant: Grant


class Running(AsyncIterator[Event], Generic[R]):
    """A sequence of a request: iterate for events, await its result; `cancel` it when its client has gone."""

    def __init__(self, prepared: Prepared, activity: Activity) -> None:
        self.prepared = prepared
        self.settled = asyncio.Event()  # its joules are accounted for
        self.tokens = 0
        self.by_tier: Counter[str] = Counter()
        self._activity = activity
        self._seen_j = 0.0
        self._handle: AsyncHandle[R] | None = None

    @property
    def handle(self) -> AsyncHandle[R]:
        """The sequence in the scheduler."""
        assert self._handle is not None
        return self._handle

    @handle.setter
    def handle(self, handle: AsyncHandle[R]) -> None:
        self._handle = handle

    async def __anext__(self) -> Event:
        return await anext(self.handle)

    async def result(self) -> R:
        """Wait until it has ended and is accounted for; errors as those of `AsyncHandle.result`."""
        result = await self.handle.result()
        await self.settled.wait()
        return result

    def cancel(self) -> None:
        """End it before its next step."""
        self.handle.cancel()

    def see(self, event: Event) -> None:
        """Count a token and the joules booked with it."""
        self.tokens += 1
        self.by_tier[event.tier] += 1
        self._activity.tier = event.tier
        self._activity.book(event.energy_j - self._seen_j)
        self._seen_j = event.energy_j

    def see_rest(self, spent_j: float) -> None:
        """Count joules that came with no event."""
        self._activity.book(spent_j - self._seen_j)
        self._seen_j = spent_j


class Service:
    """Takes requests for one session; everything but the session's work runs in one event loop."""

    def __init__(
        self, scheduler: Scheduler, policy: BudgetPolicy, name: str, limits: Limits, metrics: Metrics | None = None
    ) -> None:
        self.scheduler, self.policy, self.name, self.limits = scheduler, policy, name, limits
        self.session = scheduler.session
        self.metrics = metrics or Metrics()
        self.activity = Activity()
        self.started_s = int(time.time())
        self._async = AsyncSession(scheduler)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch()

    def models(self) -> list[str]:
        """Names a request may give: the bundle, whose tiers the policy chooses, and every tier by itself."""
        return [self.name, *(f"{self.name}:{tier}" for tier in self.session.tiers)]

    def tier_of(self, model: str) -> str | None:
        """The tier that a model's name asks for; ApiError when there is no such model."""
        if model not in self.models():
            raise ApiError(
                404,
                f'There is no model "{model}"; there are {", ".join(self.models())}.',
                code="model_not_found",
                param="model",
            )
        return model[len(self.name) + 1 :] or None

    async def start(self, ask: Ask, prompt: Prompt | None) -> Running[Result]:
        """Grant joules to a prompt (None: the messages) and queue it; EopcError says why not."""
        tier = self.tier_of(ask.model)
        most = ask.max_tokens or self.session.context

        def prepare() -> Prepared:
            ids = self._encode(ask, prompt)
            told = self.session.explain(ids, max_new_tokens=most, tier=tier)
            return self._grant(ids, self._budget_j(ask), told.whole_j, told.least_j)

        def submit(running: Running[Result]) -> AsyncHandle[Result]:
            return self._async.stream(
                running.prepared.ids,
                on_event=running.see,
                budget=running.prepared.budget_j,
                max_new_tokens=most,
                stop=ask.stop,
                sampling=ask.sampling,
                tier=tier,
                logprobs=ask.logprobs,
            )

        return await self._queue(prepare, submit)

    async def score(self, ask: Ask, prompt: Prompt) -> Running[Score]:
        """The same for a prompt whose own log-probabilities are wanted; it gets all of its price or none."""
        tier = self.tier_of(ask.model)

        def prepare() -> Prepared:
            ids = self._encode(ask, prompt)
            budget_j = self._budget_j(ask)
            price_j = self.session.score(ids, tier=tier, budget=budget_j).price_j
            return Prepared(ids, budget_j, budget_j, self.policy.request(price_j, price_j))

        def submit(running: Running[Score]) -> AsyncHandle[Score]:
            ready = running.prepared
            return self._async.score(ready.ids, tier=tier, budget=ready.budget_j, top=ask.logprobs or 0)

        return await self._queue(prepare, submit)

    def live(self) -> dict[str, Any]:
        """What the live page shows."""
        left = [
            {"period": i.allowance.period, "limit_j": i.allowance.limit_j, "left_j": i.left_j, "reset_s": i.reset_s}
            for i in self.policy.left()
        ]
        state = {
            "model": self.name,
            "source": self.session.table.source,
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "draining": self.scheduler.draining,
            "allowances": left,
        }
        return {**state, **self.activity.to_json()}

    async def drained(self) -> None:
        """Wait until every sequence is settled and counted."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Cancel what runs, and settle it."""
        await asyncio.to_thread(self.scheduler.close)
        await self.drained()

    def _encode(self, ask: Ask, prompt: Prompt | None) -> list[int]:
        if prompt is None:
            return self.session.encode_prompt(messages=ask.messages)
        return self.session.encode_prompt(prompt, raw=True)

    def _budget_j(self, ask: Ask) -> float | None:
        """The joules asked for, or the default; never more than any request may have."""
        most_j = self.limits.max_budget_j
        if ask.budget_j is not None and most_j is not None and ask.budget_j > most_j:
            raise ApiError(
                400,
                f'"energy_budget_j" is {ask.budget_j:g}; this server gives a request at most {format_energy(most_j)}.',
                param="energy_budget_j",
                code="budget_too_large",
            )
        return next((j for j in (ask.budget_j, self.limits.budget_j, most_j) if j is not None), None)

    def _grant(self, ids: list[int], budget_j: float | None, whole_j: float, least_j: float) -> Prepared:
        """Book the joules that a sequence may spend: those of its budget, or all that it can cost."""
        if budget_j is not None and budget_j < least_j:
            need = format_energy(least_j, round_up=True)
            raise BudgetError(
                f"The budget is {format_energy(budget_j)}, but {len(ids)} prompt tokens and one new token need {need} "
                f"({self.session.table.source}). Raise it to {need} or more, or shorten the prompt."
            )
        grant = self.policy.request(whole_j if budget_j is None else min(budget_j, whole_j), least_j)
        return Prepared(ids, budget_j, grant.joules if self.policy.allowances else budget_j, grant)

    async def _queue(
        self, prepare: Callable[[], Prepared], submit: Callable[[Running[R]], AsyncHandle[R]]
    ) -> Running[R]:
        try:
            running: Running[R] = Running(await asyncio.to_thread(prepare), self.activity)  # writes the account
            try:
                running.handle = submit(running)
            except EopcError:
                await asyncio.to_thread(self.policy.settle, running.prepared.grant, 0.0)  # nothing ran
                raise
        except EopcError as error:
            self.metrics.refusals.labels(as_api_error(error).code or "invalid_request").inc()
            raise
        task = asyncio.create_task(self._see_through(running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return running

    async def _see_through(self, running: Running[R]) -> None:
        """Wait for the end of a sequence, then settle and count it."""
        await running.handle.wait()
        handle, ready = running.handle.handle, running.prepared
        try:
            await asyncio.to_thread(self.policy.settle, ready.grant, handle.spent_j)
            running.see_rest(handle.spent_j)
            self._count(running, handle.spent_j, handle.spent_by_phase_j)
        finally:
            running.settled.set()

    def _count(self, running: Running[R], spent_j: float, by_phase_j: Mapping[str, float]) -> None:
        metrics, handle, ready = self.metrics, running.handle.handle, running.prepared
        plan = ended_by = "scored"
        if handle.error is not None:
            plan, ended_by = "-", "cancelled" if isinstance(handle.error, SequenceCancelledError) else "failed"
        elif isinstance(result := handle.result(), Result):
            plan, ended_by = result.plan, result.finish_reason
        for phase, joules in by_phase_j.items():
            metrics.energy.labels(phase, self.session.table.source).inc(joules)
        metrics.sequences.labels(ended_by).inc()
        metrics.per_sequence.observe(spent_j)
        if by_phase_j:  # it was begun
            metrics.tokens.labels("prompt").inc(len(ready.ids))
        if running.tokens:
            metrics.tokens.labels("completion").inc(running.tokens)
            metrics.per_token.observe(spent_j / running.tokens)
            for tier, tokens in running.by_tier.items():
                metrics.tier_tokens.labels(tier).inc(tokens)
        if ended_by == "budget":
            metrics.budget_stops.inc()
        self.activity.end(Done(time.time(), plan, len(ready.ids), running.tokens, spent_j, ready.asked_j, ended_by))

    def _watch(self) -> None:
        """Gauges that are read when Prometheus asks."""
        metrics, scheduler = self.metrics, self.scheduler
        metrics.watch("eopc_queue_length", "Sequences that wait.", lambda: scheduler.waiting)
        metrics.watch("eopc_running_sequences", "Sequences that are stepped in turn.", lambda: scheduler.running)
        metrics.watch("eopc_drift_ratio", "Measured over predicted joules of late.", lambda: self.session.drift)
        metrics.watch("eopc_watts", "Mean power of the joules booked of late.", self.activity.watts)
        for allowance in self.policy.allowances:
            metrics.allowances.labels(allowance.period).set_function(partial(self._left_j, allowance.period))

    def _left_j(self, period: str) -> float:
        return next(left.left_j for left in self.policy.left() if left.allowance.period == period)
