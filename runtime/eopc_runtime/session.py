"""One bundle, ready to generate: tokens within a joule budget, and never a joule more.

A sequence runs a plan: the prompt on the prefill tier, the answer on the decode tier, which gets the KV cache
handed down. Before every step its price is booked in the ledger; when the rest no longer fits, the sequence
moves down the ladder, and when nothing fits it stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eopc_runtime.chat import ChatTemplate, Message
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError, PromptError, UsageError
from eopc_runtime.ledger import Ledger, next_action
from eopc_runtime.policy import Plan, Request, affordable_tokens, fits, pick_tier
from eopc_runtime.sampling import SamplingParams, sample
from eopc_runtime.stopping import StopScanner, check_stops
from eopc_runtime.tokenizer import Tokenizer
from eopc_runtime.units import format_energy, parse_energy

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.base import Logits, RunnerPool

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token: the text that became certain with it, and the joules spent so far."""

    text: str
    token: int
    energy_j: float
    tier: str  # the tier that computed the token


@dataclass(frozen=True, slots=True)
class Result:
    """A finished sequence; the fields are the keys of `eopc run --json`."""

    text: str
    tier: str  # the tier the decode began on
    plan: str
    tiers_used: tuple[str, ...]
    budget_j: float | None
    energy_j: float
    energy_source: str
    finish_reason: str  # stop | length | budget
    prompt_tokens: int
    completion_tokens: int  # an end-of-sequence token counts: it costs as much as any other
    ttft_s: float
    decode_tokens_per_s: float | None  # None when there was no decode step

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `eopc run --json`."""
        return {**asdict(self), "tiers_used": list(self.tiers_used)}


class Generation(Iterator[Event]):
    """The running sequence: iterate for events, then read `result` (which runs the rest if there is any)."""

    def __init__(self, steps: Generator[Event, None, Result]) -> None:
        self._steps = steps
        self._result: Result | None = None

    def __next__(self) -> Event:
        try:
            return next(self._steps)
        except StopIteration as stop:
            if stop.value is not None:
                self._result = stop.value
            raise

    @property
    def result(self) -> Result:
        """The finished sequence; RuntimeError after `close`, or after an error ended it early."""
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError("the sequence was closed before it finished")
        return self._result

    def close(self) -> None:
        """End the sequence now."""
        self._steps.close()


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request: everything a sequence needs, decided before the first joule."""

    ids: tuple[int, ...]
    plan: Plan
    budget_j: float | None
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingParams


class Session:
    """Holds a bundle's runners, tokenizer and prices. Not thread-safe: one sequence at a time."""

    def __init__(
        self,
        bundle: Bundle,
        pool: RunnerPool,
        tokenizer: Tokenizer,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.bundle = bundle
        self.pool = pool
        self.tokenizer = tokenizer
        self.table: EnergyTable = bundle.energy
        self.context = bundle.manifest.context
        self.eos_token_ids = frozenset(bundle.manifest.model.eos_token_ids)
        self.tiers = tuple(tier.tier for tier in self.table.tiers)
        self._clock = clock
        self._template: ChatTemplate | None = None

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, *, verify: bool = True) -> Session:
        """Open a bundle on this machine's CPU; tiers are loaded when they are first used.

        Raises BundleError for a bundle that is missing or damaged, MissingExtraError without onnxruntime.
        """
        from eopc_runtime.bundle import Bundle
        from eopc_runtime.runners.ort import OrtPool, import_onnxruntime

        bundle = Bundle.open(Path(path), verify=verify)
        import_onnxruntime()  # say now, not at the first token, that it is missing
        return cls(bundle, OrtPool(bundle, threads), Tokenizer.open(bundle.root / "tokenizer"))

    def close(self) -> None:
        """Release the runners."""
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
        return cache, runner.forward(cache, ids)[-1]

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
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        budget: float | str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        raw: bool = False,
        tier: str | None = None,
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
        ).result

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        budget: float | str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        raw: bool = False,
        tier: str | None = None,
    ) -> Generation:
        """Generate one sequence token by token.

        Args:
            prompt: text of one user turn; with `raw`, or without a chat template, the text to continue.
            messages: a conversation instead of a prompt, [{"role", "content"}, ...].
            budget: joules, or a text such as "500mJ"; None sets no limit.
            max_new_tokens: most tokens to generate; the bundle's context may allow fewer.
            stop: texts that end the sequence; no part of one is ever returned.
            tier: start on this tier instead of the plan's; the sequence may still move down.

        Before anything runs it raises PromptError (empty, malformed or too long), BudgetError (not even one
        token fits), BundleError (no such tier) or UsageError (another bad argument).
        """
        ids = self.encode_prompt(prompt, messages=messages, raw=raw)
        budget_j = _budget_j(budget)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of 1 or more.")
        request = Request(len(ids), min(max_new_tokens, self.context - len(ids)))
        plan = pick_tier(self.table, budget_j, request) if tier is None else self._forced(tier, budget_j, request)
        return Generation(
            self._run(
                _Job(
                    ids=tuple(ids),
                    plan=plan,
                    budget_j=budget_j,
                    max_new_tokens=request.max_new_tokens,
                    stop=check_stops(stop),
                    sampling=sampling or SamplingParams(),
                )
            )
        )

    def encode_prompt(
        self, prompt: str | None = None, *, messages: Sequence[Message] | None = None, raw: bool = False
    ) -> list[int]:
        """Return the ids of a prompt or conversation.

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

    def _encode(self, prompt: str | None, messages: Sequence[Message] | None, raw: bool) -> list[int]:
        if (prompt is None) == (messages is None):
            raise PromptError("give either a prompt or messages, not both and not neither.")
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

    def _forced(self, name: str, budget_j: float | None, request: Request) -> Plan:
        """Return the plan that starts on one tier; BudgetError when it cannot pay for the first token."""
        tier = self.bundle.tier_index(name)
        tokens = request.max_new_tokens
        first_j = self.table.prefill_price_j(tier, request.prompt_tokens)
        if budget_j is not None:
            if not fits(first_j, budget_j):
                raise BudgetError(
                    f"{name} needs {format_energy(first_j, round_up=True)} ({self.table.source}) for "
                    f"{request.prompt_tokens} prompt tokens and one new token, but the budget is "
                    f"{format_energy(budget_j)}. "
                    "Raise the budget, or leave the tier to the policy."
                )
            tokens = affordable_tokens(self.table, tier, tier, budget_j, request)
        return Plan(tier, tier, self.table.plan_price_j(tier, tier, request.prompt_tokens, tokens), tokens)

    def _run(self, job: _Job) -> Generator[Event, None, Result]:
        """Run a checked request: one event per token, the result at the end."""
        ledger, rng = Ledger(job.budget_j), job.sampling.rng()
        scanner, decoder = StopScanner(job.stop), self.tokenizer.detokenizer()
        history, texts = list(job.ids), list[str]()
        used = [self.tiers[job.plan.prefill]]
        tier, produced, decode_s = job.plan.decode, 0, 0.0

        self.pool.get(used[0])  # loading a tier is not part of the time to the first token
        self._book(ledger, "prefill", self.table.prefill_price_j(job.plan.prefill, len(job.ids)), used[0])
        start = self._clock()
        cache, logits = self.prefill(job.ids, used[0])
        token = sample(logits, history, job.sampling, rng)
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
            elif (lower := self._next_tier(ledger, tier, cache.length, job.max_new_tokens - produced)) is None:
                finish = "budget"
            else:
                tier = lower
            if finish is not None:
                text += scanner.push(decoder.finish()) + scanner.finish()
            texts.append(text)
            yield Event(text, token, ledger.spent_j, used[-1])
            if finish is not None:
                break
            if used[-1] != self.tiers[tier]:
                used.append(self.tiers[tier])
                self.pool.get(used[-1])  # nor is it part of the decode time
            self._book(ledger, "decode", self.table.step_price_j(tier, cache.length + 1), used[-1])
            start = self._clock()
            cache, logits = self.decode(cache, token, used[-1])
            token = sample(logits, history, job.sampling, rng)
            decode_s += self._clock() - start

        return Result(
            text="".join(texts),
            tier=self.tiers[job.plan.decode],
            plan=job.plan.label,
            tiers_used=tuple(used),
            budget_j=job.budget_j,
            energy_j=ledger.spent_j,
            energy_source=self.table.source,
            finish_reason=finish,
            prompt_tokens=len(job.ids),
            completion_tokens=produced,
            ttft_s=ttft_s,
            decode_tokens_per_s=(produced - 1) / decode_s if decode_s > 0 else None,
        )

    def _next_tier(self, ledger: Ledger, tier: int, context: int, remaining: int) -> int | None:
        """Return the tier of the next step, this one or one below, or None when no tier affords it."""
        while (action := next_action(self.table, ledger, tier, context, remaining)) == "downshift":
            tier += 1
        affordable = ledger.affords(self.table.step_price_j(tier, context + 1))
        return tier if action == "step" and affordable else None

    @staticmethod
    def _book(ledger: Ledger, phase: str, joules: float, tier: str) -> None:
        """Book a step before it runs; a refusal here is our own mistake, since the step was found to fit."""
        if not ledger.debit(phase, joules, tier):
            raise AssertionError(f"{phase} on {tier} needs {joules} J, and {ledger.remaining_j} J are left")


def _budget_j(budget: float | str | None) -> float | None:
    """Return the budget in joules; BudgetError on anything that is no positive energy."""
    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_energy(budget)
    if isinstance(budget, bool) or not (math.isfinite(budget) and budget > 0):
        raise BudgetError(f"The budget is {budget} J. Give a positive energy, for example 5J or 500mJ.")
    return float(budget)
