"""One bundle, ready to generate: tokens within a joule budget, and never a joule more.

A sequence runs a plan: the prompt on the prefill tier, the answer on the decode tier, which gets the KV cache
handed down. Before every step its price is booked in the ledger; when the rest no longer fits, the sequence
moves down the ladder, and when nothing fits it stops. A live meter, where there is one, corrects the ledger
upwards as the sequence runs. Here requests are checked; `running` runs them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eopc_runtime.admission import Terms
from eopc_runtime.chat import Message
from eopc_runtime.controller import Controller, Start
from eopc_runtime.energy import EnergyTable
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.explain import Explanation, explain
from eopc_runtime.generation import Generation, Result
from eopc_runtime.logprobs import check_logprobs
from eopc_runtime.policy import Request
from eopc_runtime.prompts import Prompts
from eopc_runtime.reconcile import Guard
from eopc_runtime.running import Job, Machine, Meter, run
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.scoring import Scoring
from eopc_runtime.stopping import check_stops
from eopc_runtime.tokenizer import Tokenizer
from eopc_runtime.units import parse_energy

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.base import Logits, RunnerPool
    from eopc_runtime.runners.choose import Chosen

DEFAULT_NEW_TOKENS = 128


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
        self._machine = Machine(pool, tokenizer, self.tiers, self.eos_token_ids, clock, wall)
        self._prompts = Prompts(tokenizer, self.context, bundle.manifest.model.vocab_size)
        self._meter = meter
        self._guard = guard or Guard()
        self.runner: Chosen | None = None  # how the pool was chosen, where `open` chose it
        self._numbers = itertools.count(1)

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
        return self._machine.prefill(ids, tier)

    def decode(self, cache: Any, token: int, tier: str | None = None) -> tuple[Any, Logits]:
        """Append one token on the cache's tier, or on a lower one that takes the cache over. Books nothing.

        Returns the cache to go on with and the logits [vocab], which are valid until the next step.
        """
        return self._machine.decode(cache, token, tier)

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
        job = Job(
            ids=tuple(ids),
            controller=Controller(self.table, start),
            max_new_tokens=start.request.max_new_tokens,
            stop=check_stops(stop),
            sampling=sampling or SamplingParams(),
            logprobs=check_logprobs(logprobs, self.bundle.manifest.model.vocab_size),
            meter=self._meter,
            window=f"sequence {next(self._numbers)}",
            times=[],
            learn=self._learn,
        )
        return Generation(run(job, self._machine), job.controller, job.times)

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
        """Return the ids of a prompt or conversation; see `prompts.Prompts.encode`."""
        return self._prompts.encode(prompt, messages, raw)

    def _learn(self, drift: float) -> None:
        """Expect of the next sequence what the meter has shown of this one."""
        self.drift = drift


def _budget_j(budget: float | str | None) -> float | None:
    """Return the budget in joules; BudgetError on anything that is no positive energy."""
    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_energy(budget)
    if isinstance(budget, bool) or not (math.isfinite(budget) and budget > 0):
        raise BudgetError(f"The budget is {budget} J. Give a positive energy, for example 5J or 500mJ.")
    return float(budget)
