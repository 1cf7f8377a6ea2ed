"""What clients may ask: the fields of OpenAI's two endpoints that are served, read strictly, and `energy_budget_j`.

A field that is not known is refused with the nearest known one; a field of OpenAI's that is not served is refused
unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import did_you_mean, shown
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.serve.api_error import ApiError
from eopc_runtime.stopping import check_stops

MAX_LOGPROBS = 20  # most likely tokens per place; OpenAI gives 5 in completions and 20 in chats
MAX_STOPS = 16
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on until it ends by itself
TEMPERATURE = 1.0  # OpenAI's default

_ANY = object()
# Fields of OpenAI's API that are accepted with the values that change nothing here.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "user": (_ANY,),
    "store": (False,),
    "metadata": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (_ANY,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
}
COMMON = frozenset(
    ("model", "max_tokens", "stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream")
) | {"stream_options", "energy_budget_j", "logprobs"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION = COMMON | {"prompt", "echo"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request to either endpoint."""

    chat: bool
    model: str
    messages: list[Any]  # of a chat
    prompts: tuple[Prompt, ...]  # of a completion
    max_tokens: int | None  # None: until it ends by itself
    sampling: SamplingParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    budget_j: float | None
    logprobs: int | None  # most likely tokens to name in every place
    echo: bool

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt itself are wanted."""
        return self.echo and self.logprobs is not None


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; ApiError when it is none. A field that is null counts as left out."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON ({error}). Send one JSON object.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body is JSON, but not an object. Send one JSON object.", code="invalid_json")
    return {name: item for name, item in value.items() if item is not None}


def parse_ask(body: Mapping[str, Any], *, chat: bool) -> Ask:
    """Check every field of a request; ApiError names the field that is wrong."""
    known = CHAT if chat else COMPLETION
    for name, value in body.items():
        if name in known:
            continue
        if name not in NEUTRAL:
            near = did_you_mean(name, sorted(known))
            raise _bad(name, f'There is no field "{shown(name)}".{near}', code="unknown_field")
        if not any(allowed is _ANY or _same(value, allowed) for allowed in NEUTRAL[name]):
            served = " or ".join(json.dumps(v) for v in NEUTRAL[name])
            raise _bad(name, f'"{name}" is served only with {served}. Leave it out.', code="unsupported_field")
    read = _Reader(body)
    stream = read.flag("stream")
    options = _Reader(read.typed("stream_options", dict, "an object", {}), "stream_options.")
    for name in options.body:
        if name not in ("include_usage", "include_obfuscation"):
            said = f'There is no field "stream_options.{shown(name)}".'
            raise _bad(f"stream_options.{name}", said, code="unknown_field")
    if "stream_options" in body and not stream:
        raise _bad("stream_options", '"stream_options" needs "stream": true.')
    ask = Ask(
        chat=chat,
        model=read.typed("model", str, "a string"),
        messages=read.typed("messages", list, "a list of messages") if chat else [],
        prompts=() if chat else _prompts(body),
        max_tokens=_max_tokens(read, chat),
        sampling=_sampling(read),
        stop=_stops(body),
        stream=stream,
        include_usage=options.flag("include_usage"),
        budget_j=read.number("energy_budget_j", above=0.0),
        logprobs=_logprobs(read, chat),
        echo=read.flag("echo"),
    )
    return _check_together(ask)


def _check_together(ask: Ask) -> Ask:
    if ask.max_tokens == 0 and not ask.scores:
        raise _bad("max_tokens", '"max_tokens" is 0, which is for "echo" with "logprobs". Ask for 1 or more.')
    if ask.scores and (ask.max_tokens or 0) > 1:
        raise _bad("max_tokens", '"echo" with "logprobs" is served with "max_tokens" 0 or 1.')
    if ask.stream and ask.scores:
        raise _bad("stream", '"echo" with "logprobs" is not streamed. Leave out "stream".')
    if ask.stream and len(ask.prompts) > 1:
        raise _bad("prompt", 'A stream answers one prompt. Send one, or leave out "stream".')
    return ask


def _max_tokens(read: _Reader, chat: bool) -> int | None:
    if chat and "max_completion_tokens" in read.body:
        if "max_tokens" in read.body:
            raise _bad("max_tokens", 'Give "max_completion_tokens" or "max_tokens", not both.')
        return read.integer("max_completion_tokens", least=1)
    return read.integer("max_tokens", least=1 if chat else 0, default=None if chat else COMPLETION_TOKENS)


def _logprobs(read: _Reader, chat: bool) -> int | None:
    if not chat:
        return read.integer("logprobs", least=0, most=MAX_LOGPROBS)
    top = read.integer("top_logprobs", least=0, most=MAX_LOGPROBS)
    if read.flag("logprobs"):
        return top or 0
    if top is not None:
        raise _bad("top_logprobs", '"top_logprobs" needs "logprobs": true.')
    return None


def _sampling(read: _Reader) -> SamplingParams:
    temperature = read.number("temperature", least=0.0, most=2.0)
    seed = read.integer("seed")
    try:
        return SamplingParams(
            temperature=TEMPERATURE if temperature is None else temperature,
            top_k=read.integer("top_k"),
            top_p=read.number("top_p"),
            min_p=read.number("min_p"),
            repetition_penalty=1.0 if (penalty := read.number("repetition_penalty")) is None else penalty,
            seed=None if seed is None else seed % 2**64,  # any whole number may be a seed in OpenAI's API
        )
    except UsageError as error:
        raise _bad(str(error).split(" ", 1)[0], str(error)) from None


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop", [])
    try:
        stops = check_stops([value] if isinstance(value, str) else value)
    except (UsageError, TypeError):
        raise _bad("stop", '"stop" must be a text or a list of texts, none of them empty.') from None
    if len(stops) > MAX_STOPS:
        raise _bad("stop", f'"stop" has {len(stops)} texts; {MAX_STOPS} are served.')
    return stops


def _prompts(body: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """One text, one list of token ids, or a list of either."""
    value = body.get("prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(_is_int(item) for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and all(map(_is_int, item)) for item in value):
            return tuple(tuple(item) for item in value)
    raise _bad("prompt", '"prompt" must be a text, a list of token ids, or a list of texts or of lists of token ids.')


class _Reader:
    """Typed access to the fields of an object."""

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self.body, self._prefix = body, prefix

    def typed(self, name: str, kind: type, words: str, default: Any = None) -> Any:
        """A field of a JSON type; required where there is no default."""
        value = self.body.get(name, default)
        if not isinstance(value, kind):
            said = "is missing; it" if name not in self.body else ""
            raise _bad(self._prefix + name, f'"{self._prefix}{name}" {said} must be {words}.'.replace("  ", " "))
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is left out."""
        return bool(self.typed(name, bool, "true or false", False))

    def integer(
        self, name: str, *, least: int | None = None, most: int | None = None, default: int | None = None
    ) -> int | None:
        """A whole number, within bounds; 3.0 counts as 3."""
        value = self.body.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not _within(value, least, most):
            raise _bad(name, f'"{name}" must be a whole number{_bounds(least, most)}.')
        return value

    def number(
        self, name: str, *, least: float | None = None, most: float | None = None, above: float | None = None
    ) -> float | None:
        """A finite number, within bounds."""
        value = self.body.get(name)
        if value is None:
            return None
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not (ok and math.isfinite(value) and _within(value, least, most) and (above is None or value > above)):
            bounds = f" above {above:g}" if above is not None else _bounds(least, most)
            raise _bad(name, f'"{name}" must be a number{bounds}.')
        return float(value)


def _bad(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: object, allowed: object) -> bool:
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    return "" if least is None else f" of {least:g} or more"
