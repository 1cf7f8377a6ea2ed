"""One bundle, ready to generate: tokens within a joule budget, and never a joule more.

A sequence runs a plan: the prompt on the prefill tier, the answer on the decode tier, which gets the KV cache
handed down. Before every step its price is booked in the ledger; when the rest no longer fits, the sequence
moves down the ladder, and when nothing fits it stops. A live meter, where there is one, corrects the ledger
upwards as the sequence runs. What is decided is decided in `controller`; here are the clock and the meter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from eopc_runtime.admission import Terms
from eopc_runtime.chat import ChatTemplate, Message
from eopc_runtime.controller import Controller, Seen, Start
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError, MeterLostError, PromptError, UsageError
from eopc_runtime.explain import Explanation, explain
from eopc_runtime.generation import Event, Generation, Result
from eopc_runtime.logprobs import TokenLogprobs, check_logprobs, token_logprobs
from eopc_runtime.policy import Request
from eopc_runtime.power.base import MEASURED
from eopc_runtime.reconcile import Guard
from eopc_runtime.sampling import SamplingParams, sample
from eopc_runtime.scoring import Scoring
from eopc_runtime.stopping import StopScanner, check_stops
from eopc_runtime.tokenizer import Tokenizer
from eopc_runtime.units import parse_energy

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.base import Logits, RunnerPool
    from eopc_runtime.runners.choose import Chosen

DEFAULT_NEW_TOKENS = 128


class Meter(Protocol):
    """A power meter with named windows; any call may raise MeterLostError."""

    def begin(self, name: str) -> object:
        """Open a window."""

    def energy_so_far_j(self, name: str) -> float:
        """Joules of an open window until now, as far as the sensor has seen."""

    def end(self, name: str) -> object:
        """Close a window."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request: everything a sequence needs, decided before the first joule."""

    ids: tuple[int, ...]
    controller: Controller
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    logprobs: int | None
    meter: Meter | None
    times: list[tuple[float, float]]  # monotonic and wall clock, at the start and at the end


class Session:
    """Holds a bundle's runners, tokenizer and prices.

    One thread runs sequences; it may step several in turn, without a live meter, which cannot tell them apart. What
    runs nothing (`stream` before its first step, `explain`, `encode_prompt`) may be called from any thread. For many
    threads there is `scheduler.Scheduler`.
    """

    def __init__(
        self,
        bundle: Bundle,
        pool: RunnerPool,
        tokenizer: Tokenizer,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
        meter: Meter | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Hold what is given; `meter` corrects the ledger while a sequence runs, `guard` says how it is read."""
        self.bundle = bundle
        self.pool = pool
        self.tokenizer = tokenizer
        self.table: EnergyTable = bundle.energy
        self.context = bundle.manifest.context
        self.eos_token_ids = frozenset(bundle.manifest.model.eos_token_ids)
        self.tiers = tuple(tier.tier for tier in self.table.tiers)
        self.drift = 1.0  # measured over predicted joules of late, as the meter showed
        self._clock, self._wall = clock, wall
        self._meter = meter
        self._guard = guard or Guard()
        self.runner: Chosen | None = None  # how the pool was chosen, where `open` chose it
        self._count = 0
        self._template: ChatTemplate | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        threads: int | None = None,
        *,
        runner: str = "auto",
        verify: bool = True,
        key: Path | None = None,
        meter: Meter | None = None,
        guard: Guard | None = None,
    ) -> Session:
        """Open a bundle on this machine; tiers are loaded when they are first used.

        Args:
            runner: auto takes the bundle's TensorRT engines where they fit this machine, else the CPU; see
                `runners.choose.RUNNERS`.
            verify: hash every file first.
            key: a public key, whose owner must have signed the bundle; prices and engines may be this device's own.

        Raises BundleError for a bundle that is missing or damaged, SignatureError for one that another or nobody
        signed, MissingExtraError without onnxruntime; with a
        runner named, also what `runners.choose.open_pool` raises.
        """
        from eopc_runtime.bundle import Bundle
        from eopc_runtime.runners.choose import open_pool

        if key is not None:
            from eopc_runtime.signature import verify as verify_signature

            verify_signature(Path(path), key, allow_own=True)  # hashes every file
        bundle = Bundle.open(Path(path), verify=verify and key is None)
        tokenizer = Tokenizer.open(bundle.root / "tokenizer")
        chosen = open_pool(bundle, runner, threads)
        session = cls(bundle, chosen.pool, tokenizer, meter=meter, guard=guard)
        session.runner = chosen
        return session

    def use(self, *, meter: Meter | None = None, table: EnergyTable | None = None) -> None:
        """From the next sequence on, read this meter and charge these prices of the same ladder."""
        self._meter = meter or self._meter
        self.table = table or self.table

    def keep_loaded(self) -> bool:
        """Load every tier and let none go, where memory allows it (`OrtPool.keep_loaded`); whether they are kept."""
        keep = getattr(self.pool, "keep_loaded", None)  # engines share memory, and are let go by other rules
        return keep is not None and bool(keep())

    @property
    def metered(self) -> bool:
        """Whether a live meter corrects the ledger, so that only one sequence may run at a time."""
        return self._meter is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the runner: why it is not another one, what it could not do."""
        return self.runner.remarks if self.runner else ()

    def close(self) -> None:
        """Release the runners; a meter belongs to whoever opened it."""
        self.pool.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prefill(self, ids: Sequence[int], tier: str = "t0") -> tuple[Any, Logits]:
        """Run a prompt on a tier; return its cache and the next token's logits [vocab]. Books nothing."""
        runner = self.pool.get(tier)
        cache = runner.new_cache()
        return cache, runner.prefill(cache, ids)[-1]

    def decode(self, cache: Any, token: int, tier: str | None = None) -> tuple[Any, Logits]:
        """Append one token on the cache's tier, or on a lower one that takes the cache over. Books nothing.

        Returns the cache to go on with and the logits [vocab], which are valid until the next step.
        """
        runner = self.pool.get(tier or cache.tier)
        if runner.tier != cache.tier:
            cache = runner.adopt(cache)
        return cache, runner.forward(cache, [token])[-1]

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        budget: float | str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        raw: bool = False,
        tier: str | None = None,
        strict: bool = False,
        safety: float = 1.0,
    ) -> Result:
        """Generate one sequence to its end; see `stream` for the arguments and errors."""
        return self.stream(
            prompt,
            messages=messages,
            budget=budget,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            raw=raw,
            tier=tier,
            strict=strict,
            safety=safety,
        ).result

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        budget: float | str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        raw: bool = False,
        tier: str | None = None,
        strict: bool = False,
        safety: float = 1.0,
        logprobs: int | None = None,
    ) -> Generation:
        """Generate one sequence token by token.

        Args:
            prompt: text of one user turn; with `raw`, or without a chat template, the text to continue. Token ids
                are run as they are.
            messages: a conversation instead of a prompt, [{"role", "content"}, ...].
            budget: joules, or a text such as "500mJ"; None sets no limit.
            max_new_tokens: most tokens to generate; the bundle's context may allow fewer.
            stop: texts that end the sequence; no part of one is ever returned.
            tier: start on this tier instead of the plan's; the sequence may still move down.
            strict: refuse a budget that the prices cannot promise (not measured, or lengths not calibrated).
            safety: factor on every price, 1 or more.
            logprobs: give every event its token's log-probability, and those of so many most likely tokens.

        Before anything runs it raises PromptError (empty, malformed or too long), BudgetError (not even one
        token fits), BundleError (no such tier) or UsageError (another bad argument).
        """
        ids = self.encode_prompt(prompt, messages=messages, raw=raw)
        start = self._start(ids, budget, max_new_tokens, tier, Terms(strict=strict, safety=safety, drift=self.drift))
        job = _Job(
            ids=tuple(ids),
            controller=Controller(self.table, start),
            max_new_tokens=start.request.max_new_tokens,
            stop=check_stops(stop),
            sampling=sampling or SamplingParams(),
            logprobs=check_logprobs(logprobs, self.bundle.manifest.model.vocab_size),
            meter=self._meter,
            times=[],
        )
        return Generation(self._run(job), job.controller, job.times)

    def explain(
        self,
        prompt: str | Sequence[int] | None = None,
        budget: float | str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        raw: bool = False,
        tier: str | None = None,
        strict: bool = False,
        safety: float = 1.0,
    ) -> Explanation:
        """Say which plan `stream` would run with these arguments, and why; nothing runs.

        A budget that no plan fits is an explanation too, without a plan; other errors are those of `stream`.
        """
        ids = self.encode_prompt(prompt, messages=messages, raw=raw)
        terms = Terms(strict=strict, safety=safety, drift=self.drift)
        return explain(self.table, self._start(ids, budget, max_new_tokens, tier, terms))

    def score(
        self, ids: Sequence[int], *, tier: str | None = None, budget: float | str | None = None, top: int = 0
    ) -> Scoring:
        """Compute the log-probability of every token of a text; see `scoring.Scoring`.

        Raises PromptError (empty or too long), BudgetError (it fits on no tier), BundleError (no such tier).
        """
        return Scoring(
            self.pool,
            self.table,
            self.encode_prompt(ids),
            tier=None if tier is None else self.bundle.tier_index(tier),
            budget_j=_budget_j(budget),
            drift=self.drift,
            top=check_logprobs(top, self.bundle.manifest.model.vocab_size) or 0,
        )

    def _start(
        self, ids: Sequence[int], budget: float | str | None, max_new_tokens: int, tier: str | None, terms: Terms
    ) -> Start:
        """What the decisions of a sequence depend on; raises as `stream` does."""
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of 1 or more.")
        return Start(
            request=Request(len(ids), min(max_new_tokens, self.context - len(ids))),
            budget_j=_budget_j(budget),
            terms=terms,
            tier=None if tier is None else self.bundle.tier_index(tier),
            metered=self._meter is not None,
            guard=self._guard,
        )

    def encode_prompt(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        raw: bool = False,
    ) -> list[int]:
        """Return the ids of a prompt or conversation; token ids are checked and returned.

        Raises PromptError when it is empty, leaves no room for a new token, or the chat template refuses it.
        """
        ids = self._encode(prompt, messages, raw)
        if not ids:
            raise PromptError("the prompt is empty; give at least one token of text.")
        if len(ids) > self.context - 1:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; this bundle's context of {self.context} leaves room for "
                f"{self.context - 1} and one new token. Shorten the prompt, or build with a larger --context."
            )
        return ids

    def _encode(self, prompt: str | Sequence[int] | None, messages: Sequence[Message] | None, raw: bool) -> list[int]:
        if (prompt is None) == (messages is None):
            raise PromptError("give either a prompt or messages, not both and not neither.")
        if prompt is not None and not isinstance(prompt, str):
            return _check_ids(prompt, self.bundle.manifest.model.vocab_size)
        if messages is None:
            if not prompt:
                raise PromptError("the prompt is empty; give at least one token of text.")
            if raw or self.tokenizer.chat_template is None:
                return self.tokenizer.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
        elif raw or self.tokenizer.chat_template is None:
            why = "raw was asked for" if raw else "this bundle has no chat template"
            raise PromptError(f"messages need a chat template, but {why}. Give a plain prompt instead.")
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer.chat_template or "", self.tokenizer.special_tokens)
        # the template writes special tokens itself, so none are added here
        return self.tokenizer.encode(self._template.render(messages), add_special_tokens=False)

    def _run(self, job: _Job) -> Generator[Event, None, Result]:
        """Run a checked request: one event per token, the result at the end."""
        controller, rng = job.controller, job.sampling.rng()
        scanner, decoder = StopScanner(job.stop), self.tokenizer.detokenizer()
        history, texts = list(job.ids), list[str]()
        used = [self.tiers[controller.plan.prefill]]
        produced, decode_s = 0, 0.0

        self.pool.get(used[0])  # loading a tier is not part of the time to the first token
        self._count += 1
        window = f"sequence {self._count}"
        opened = self._open(window, job.meter)
        job.times.append((opened.time_s, self._wall()))
        try:
            controller.begin(opened)
            start = self._clock()
            cache, logits = self.prefill(job.ids, used[0])
            token = sample(logits, history, job.sampling, rng)
            logprobs = self._logprobs(logits, token, job)
            ttft_s = self._clock() - start

            while True:
                produced += 1
                history.append(token)
                ended = token in self.eos_token_ids
                text = "" if ended else scanner.push(decoder.push(token))
                finish: str | None = None
                if ended or scanner.stopped:
                    finish = "stop"
                elif produced == job.max_new_tokens:
                    finish = "length"
                elif (decision := controller.next(self._look(window, job))).action == "stop":
                    finish = "budget"
                if finish is not None:
                    text += scanner.push(decoder.finish()) + scanner.finish()
                texts.append(text)
                yield Event(text, token, controller.ledger.spent_j, used[-1], logprobs)
                if finish is not None:
                    break
                if used[-1] != self.tiers[decision.tier]:
                    used.append(self.tiers[decision.tier])
                    self.pool.get(used[-1])  # nor is it part of the decode time
                start = self._clock()
                cache, logits = self.decode(cache, token, used[-1])
                token = sample(logits, history, job.sampling, rng)
                logprobs = self._logprobs(logits, token, job)
                decode_s += self._clock() - start
        finally:
            job.times.append((self._clock(), self._wall()))
            if job.meter is not None:
                self.drift = controller.drift
                if opened.lost is None:
                    with suppress(MeterLostError):  # the result says already who kept the budget
                        job.meter.end(window)

        return Result(
            text="".join(texts),
            tier=self.tiers[controller.plan.decode],
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

    def _logprobs(self, logits: Logits, token: int, job: _Job) -> TokenLogprobs | None:
        return None if job.logprobs is None else token_logprobs(logits, token, job.logprobs)

    def _open(self, window: str, meter: Meter | None) -> Seen:
        """Open the meter's window; a meter that does not answer is lost from the start."""
        if meter is not None:
            try:
                meter.begin(window)
            except MeterLostError as error:
                return Seen(self._clock(), lost=str(error))
        return Seen(self._clock())

    def _look(self, window: str, job: _Job) -> Seen:
        """Read the clock, and the meter if the controller wants a reading."""
        now = self._clock()
        if job.meter is None or not job.controller.wants_reading(now):
            return Seen(now)
        try:
            metered_j = job.meter.energy_so_far_j(window)
        except MeterLostError as error:
            return Seen(now, lost=str(error))
        return Seen(now, metered_j) if math.isfinite(metered_j) else Seen(now, lost=f"it reads {metered_j} J")


def _enforced_by(job: _Job) -> str | None:
    """Who kept the budget; time x an assumed power is a model, also where it comes as a meter."""
    sensor = getattr(job.meter, "sensor", None)
    assumed = sensor is not None and sensor.source != MEASURED
    kept_by = job.controller.enforced_by
    return "model" if assumed and kept_by == "meter" else kept_by


def _check_ids(ids: Sequence[int], vocab: int) -> list[int]:
    """Return token ids of a prompt; PromptError for one that the model does not know."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise PromptError(f"the prompt holds the token id {token!r}; this model knows 0 to {vocab - 1}.")
    return list(ids)


def _budget_j(budget: float | str | None) -> float | None:
    """Return the budget in joules; BudgetError on anything that is no positive energy."""
    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_energy(budget)
    if isinstance(budget, bool) or not (math.isfinite(budget) and budget > 0):
        raise BudgetError(f"The budget is {budget} J. Give a positive energy, for example 5J or 500mJ.")
    return float(budget)
