"""A sequence as it runs: the prompt on one tier, then token by token, every step booked before it is taken.

What is decided is decided in `controller`; here are the runners, the clock and the meter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from eopc_runtime.controller import Controller, Seen
from eopc_runtime.errors import MeterLostError
from eopc_runtime.generation import Event, Result
from eopc_runtime.logprobs import TokenLogprobs, token_logprobs
from eopc_runtime.power.base import MEASURED
from eopc_runtime.sampling import SamplingParams, sample
from eopc_runtime.stopping import StopScanner
from eopc_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eopc_runtime.runners.base import Logits, RunnerPool


class Meter(Protocol):
    """A power meter with named windows; any call may raise MeterLostError."""

    def begin(self, name: str) -> object:
        """Open a window."""

    def energy_so_far_j(self, name: str) -> float:
        """Joules of an open window until now, as far as the sensor has seen."""

    def end(self, name: str) -> object:
        """Close a window."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs sequences: the runners of a ladder, its tokenizer, and two clocks."""

    pool: RunnerPool
    tokenizer: Tokenizer
    tiers: tuple[str, ...]
    eos_token_ids: frozenset[int]
    clock: Callable[[], float]
    wall: Callable[[], float]

    def prefill(self, ids: Sequence[int], tier: str) -> tuple[Any, Logits]:
        """Run a prompt on a tier; return its cache and the next token's logits [vocab]."""
        runner = self.pool.get(tier)
        cache = runner.new_cache()
        return cache, runner.prefill(cache, ids)[-1]

    def decode(self, cache: Any, token: int, tier: str | None = None) -> tuple[Any, Logits]:
        """Append one token on the cache's tier, or on a lower one that takes the cache over.

        Returns the cache to go on with and the logits [vocab], which are valid until the next step.
        """
        runner = self.pool.get(tier or cache.tier)
        if runner.tier != cache.tier:
            cache = runner.adopt(cache)
        return cache, runner.forward(cache, [token])[-1]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: everything a sequence needs, decided before the first joule."""

    ids: tuple[int, ...]
    controller: Controller
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    logprobs: int | None
    meter: Meter | None
    window: str  # of the meter
    times: list[tuple[float, float]]  # monotonic and wall clock, at the start and at the end
    learn: Callable[[float], None]  # gets the drift that the meter has shown, however the sequence ends


def run(job: Job, machine: Machine) -> Generator[Event, None, Result]:
    """Run a checked request: one event per token, the result at the end."""
    controller, rng, clock = job.controller, job.sampling.rng(), machine.clock
    scanner, decoder = StopScanner(job.stop), machine.tokenizer.detokenizer()
    history, texts = list(job.ids), list[str]()
    used = [machine.tiers[controller.plan.prefill]]
    produced, decode_s = 0, 0.0

    machine.pool.get(used[0])  # loading a tier is not part of the time to the first token
    opened = _open(job, clock)
    job.times.append((opened.time_s, machine.wall()))
    try:
        controller.begin(opened)
        start = clock()
        cache, logits = machine.prefill(job.ids, used[0])
        token = sample(logits, history, job.sampling, rng)
        logprobs = _logprobs(logits, token, job)
        ttft_s = clock() - start

        while True:
            produced += 1
            history.append(token)
            ended = token in machine.eos_token_ids
            text = "" if ended else scanner.push(decoder.push(token))
            finish: str | None = None
            if ended or scanner.stopped:
                finish = "stop"
            elif produced == job.max_new_tokens:
                finish = "length"
            elif (decision := controller.next(_look(job, clock))).action == "stop":
                finish = "budget"
            if finish is not None:
                text += scanner.push(decoder.finish()) + scanner.finish()
            texts.append(text)
            yield Event(text, token, controller.ledger.spent_j, used[-1], logprobs)
            if finish is not None:
                break
            if used[-1] != machine.tiers[decision.tier]:
                used.append(machine.tiers[decision.tier])
                machine.pool.get(used[-1])  # nor is it part of the decode time
            start = clock()
            cache, logits = machine.decode(cache, token, used[-1])
            token = sample(logits, history, job.sampling, rng)
            logprobs = _logprobs(logits, token, job)
            decode_s += clock() - start
    finally:
        job.times.append((clock(), machine.wall()))
        if job.meter is not None:
            job.learn(controller.drift)
            if opened.lost is None:
                with suppress(MeterLostError):  # the result says already who kept the budget
                    job.meter.end(job.window)

    return Result(
        text="".join(texts),
        tier=machine.tiers[controller.plan.decode],
        plan=controller.plan.label,
        tiers_used=tuple(used),
        budget_j=controller.start.budget_j,
        energy_j=controller.ledger.spent_j,
        energy_source=controller.admission.table.source,
        finish_reason=finish,
        prompt_tokens=len(job.ids),
        completion_tokens=produced,
        ttft_s=ttft_s,
        decode_tokens_per_s=(produced - 1) / decode_s if decode_s > 0 else None,
        enforced_by=_enforced_by(job),
        warnings=controller.warnings,
    )


def _logprobs(logits: Logits, token: int, job: Job) -> TokenLogprobs | None:
    return None if job.logprobs is None else token_logprobs(logits, token, job.logprobs)


def _open(job: Job, clock: Callable[[], float]) -> Seen:
    """Open the meter's window; a meter that does not answer is lost from the start."""
    if job.meter is not None:
        try:
            job.meter.begin(job.window)
        except MeterLostError as error:
            return Seen(clock(), lost=str(error))
    return Seen(clock())


def _look(job: Job, clock: Callable[[], float]) -> Seen:
    """Read the clock, and the meter if the controller wants a reading."""
    now = clock()
    if job.meter is None or not job.controller.wants_reading(now):
        return Seen(now)
    try:
        metered_j = job.meter.energy_so_far_j(job.window)
    except MeterLostError as error:
        return Seen(now, lost=str(error))
    return Seen(now, metered_j) if math.isfinite(metered_j) else Seen(now, lost=f"it reads {metered_j} J")


def _enforced_by(job: Job) -> str | None:
    """Who kept the budget; time x an assumed power is a model, also where it comes as a meter."""
    sensor = getattr(job.meter, "sensor", None)
    assumed = sensor is not None and sensor.source != MEASURED
    kept_by = job.controller.enforced_by
    return "model" if assumed and kept_by == "meter" else kept_by
