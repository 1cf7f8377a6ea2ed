"""What clients get: OpenAI's objects, with joules in `usage`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eopc_runtime.generation import Result
from eopc_runtime.logprobs import TokenLogprobs
from eopc_runtime.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the objects of one answer share."""

    chat: bool
    model: str
    ident: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """An answer in one piece."""
        return self._object("chat.completion" if self.chat else "text_completion", choices, usage=usage)

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        """A piece of a streamed answer, as a server-sent event."""
        value = self._object("chat.completion.chunk" if self.chat else "text_completion", choices, **more)
        return sse(value)

    def _object(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        ident = f"chatcmpl-{self.ident}" if self.chat else f"cmpl-{self.ident}"
        head = {"id": ident, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices), **more}


def sse(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(
    prompt_tokens: int, completion_tokens: int, by_phase_j: Mapping[str, float], more: Mapping[str, Any]
) -> dict[str, Any]:
    """OpenAI's token counts; `energy_j`, and what is to know about these joules in `energy`."""
    energy = {f"{phase}_j": by_phase_j.get(phase, 0.0) for phase in ("prefill", "decode", "metered")}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "energy_j": sum(energy.values()),
        "energy": {**energy, **more},
    }


def energy_of(result: Result, budget_j: float | None, downshifted: bool) -> dict[str, Any]:
    """What is to know about a result's joules, beside their phases.

    Args:
        budget_j: as asked for; under an allowance the result was run with what it was granted.
        downshifted: whether that was less than it wanted.
    """
    return {
        "source": result.energy_source,
        "budget_j": budget_j,
        "granted_j": result.budget_j,
        "enforced_by": result.enforced_by,
        "ended_by": result.finish_reason,
        "plan": result.plan,
        "tiers_used": list(result.tiers_used),
        "downshifted": downshifted,
        "warnings": list(result.warnings),
    }


def finish_reason(ended_by: str) -> str:
    """OpenAI's word; a budget that was reached is a limit like any other, and `usage.energy.ended_by` names it."""
    return "stop" if ended_by == "stop" else "length"


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The log-probabilities of a chat's tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {"content": [{**entry(t.token, t.logprob), "top_logprobs": [entry(*top) for top in t.top]} for t in tokens]}


class CompletionLogprobs:
    """The log-probabilities of a completion, token by token, with the place of each in the text."""

    def __init__(self, tokenizer: Tokenizer, before: str = "") -> None:
        """Begin behind a text that is not covered."""
        self._tokenizer, self._pieces = tokenizer, tokenizer.detokenizer()
        self._offset = len(before)

    def first(self, token: int) -> dict[str, Any]:
        """The entry of a text's first token, of which nothing is known."""
        return self._lists([token], [None], [None])

    def of(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The entries of the tokens that come next."""
        # the best last: of tokens with one text, such as parts of characters, its log-probability stays
        tops = [{token_text(self._tokenizer, i): p for i, p in reversed(t.top)} or None for t in tokens]
        return self._lists([t.token for t in tokens], [t.logprob for t in tokens], tops)

    def _lists(self, tokens: Sequence[int], logprobs: list[Any], tops: list[Any]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._pieces.push(token))
        texts = [token_text(self._tokenizer, token) for token in tokens]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def joined(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Several of a completion's log-probability objects as one."""
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; a part of a character reads as marks."""
    return tokenizer.decode([token], skip_special_tokens=False)
