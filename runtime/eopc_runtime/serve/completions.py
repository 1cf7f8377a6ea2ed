"""The two endpoints that generate: a chat or a completion, in one piece or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from eopc_runtime.generation import Event, Result
from eopc_runtime.logprobs import TokenLogprobs, token_logprobs
from eopc_runtime.sampling import sample
from eopc_runtime.serve.api_error import ApiError, as_api_error
from eopc_runtime.serve.requests import Ask, Prompt, parse_ask, parse_body
from eopc_runtime.serve.responses import (
    DONE,
    CompletionLogprobs,
    Envelope,
    chat_logprobs,
    energy_of,
    finish_reason,
    joined,
    sse,
    usage,
)
from eopc_runtime.serve.service import Running, Service

T = TypeVar("T")


async def answer(service: Service, request: Request, *, chat: bool) -> Response:
    """Answer a request to either endpoint; EopcError says why not."""
    ask = parse_ask(parse_body(await read_body(request, service)), chat=chat)
    if ask.stream:
        return await _stream(service, ask)
    return await _whole(service, ask, request)


async def read_body(request: Request, service: Service) -> bytes:
    """Read a JSON body; ApiError for another type, one that is too large, and one that does not arrive."""
    limits = service.limits
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # browsers ask before they send this type to another origin, so no page can spend joules here unasked
        raise ApiError(415, "The body must be JSON. Send it with Content-Type: application/json.")

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise ApiError(
                    413, f"The body is larger than the {limits.max_body_bytes} bytes that are taken. Send less."
                )
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_timeout_s)
    except ClientDisconnect:
        raise ApiError(400, "The client went away before its body had arrived.") from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {limits.body_timeout_s:g} s. Send it again.") from None


async def allowance_headers(service: Service) -> dict[str, str]:
    """What is left of the allowances: the least of all, and each with its reset, as header fields."""
    left = await asyncio.to_thread(service.policy.left)
    if not left:
        return {}
    return {
        "x-eopc-allowance-remaining-j": f"{min(item.left_j for item in left):.3f}",
        "x-eopc-allowance": ", ".join(
            f"{i.allowance.period};limit={i.allowance.limit_j:g};remaining={i.left_j:.3f};reset={i.reset_s:.0f}"
            for i in left
        ),
    }


async def _whole(service: Service, ask: Ask, request: Request) -> Response:
    """Answer in one piece; several prompts one after the other, so that they take one place in the queue."""
    envelope, choices, usages = Envelope(ask.chat, ask.model), [], []
    for index, prompt in enumerate(ask.prompts or (None,)):
        if ask.scores and prompt is not None:
            choice, used = await _scored(service, ask, prompt, request)
        else:
            choice, used = await _generated(service, ask, prompt, request)
        choices.append({"index": index, **choice})
        usages.append(used)
    return JSONResponse(envelope.whole(choices, _summed(usages)), headers=await allowance_headers(service))


async def _generated(
    service: Service, ask: Ask, prompt: Prompt | None, request: Request
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One choice, and its usage."""
    running = await service.start(ask, prompt)
    found: list[TokenLogprobs] = []

    async def collect() -> Result:
        found.extend([event.logprobs async for event in running if event.logprobs is not None])
        return await running.result()

    result = await _unless_gone(request, running, collect())
    tokenizer = service.session.tokenizer
    choice: dict[str, Any] = {"finish_reason": finish_reason(result.finish_reason), "logprobs": None}
    if ask.chat:
        choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
        if ask.logprobs is not None:
            choice["logprobs"] = chat_logprobs(tokenizer, found)
    else:
        before = _echoed(service, prompt) if ask.echo else ""
        choice["text"] = before + result.text
        if ask.logprobs is not None:
            choice["logprobs"] = CompletionLogprobs(tokenizer, before).of(found)
    return choice, _usage(running, result)


async def _scored(
    service: Service, ask: Ask, prompt: Prompt, request: Request
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One choice whose log-probabilities begin with those of the prompt, and its usage."""
    running = await service.score(ask, prompt)
    score = await _unless_gone(request, running, running.result())
    ids, tokenizer = running.prepared.ids, service.session.tokenizer
    logprobs = CompletionLogprobs(tokenizer)
    parts, following = [logprobs.first(ids[0]), logprobs.of(score.tokens)], list[int]()
    if ask.max_tokens:
        following = [sample(score.following, ids, ask.sampling, ask.sampling.rng())]
        parts.append(logprobs.of([token_logprobs(score.following, following[0], ask.logprobs or 0)]))
    choice = {
        "finish_reason": "length",
        "text": _echoed(service, prompt) + tokenizer.decode(following),
        "logprobs": joined(parts),
    }
    energy = {
        "source": score.energy_source,
        "budget_j": score.budget_j,
        "granted_j": score.budget_j,
        "enforced_by": None if score.budget_j is None else "model",
        "ended_by": "length",
        "plan": score.tier,
        "tiers_used": [score.tier],
        "downshifted": False,
        "warnings": [],
    }
    return choice, usage(len(ids), len(following), running.handle.handle.spent_by_phase_j, energy)


async def _stream(service: Service, ask: Ask) -> Response:
    """Answer as server-sent events; what can be refused is refused before the first."""
    prompt = ask.prompts[0] if ask.prompts else None
    running = await service.start(ask, prompt)
    events = _events(service, ask, prompt, running)
    headers = {**await allowance_headers(service), "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventStream(running, events, media_type="text/event-stream", headers=headers)


class EventStream(StreamingResponse):
    """A streamed answer, whose sequence ends when the client goes."""

    def __init__(self, running: Running[Any], *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()  # nothing happens after its end


async def _events(service: Service, ask: Ask, prompt: Prompt | None, running: Running[Result]) -> AsyncIterator[bytes]:
    """A chunk for every token, one that says why it ended, the usage if it was asked for, and the end."""
    envelope, tokenizer = Envelope(ask.chat, ask.model), service.session.tokenizer
    before = _echoed(service, prompt) if ask.echo else ""
    logprobs = CompletionLogprobs(tokenizer, before)

    def choice(text: str, event: Event | None, finish: str | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        found = [event.logprobs] if event is not None and event.logprobs is not None else []
        if ask.chat:
            made["delta"] = {"content": text} if event is not None else {}
            made["logprobs"] = chat_logprobs(tokenizer, found) if found else None
        else:
            made["text"] = text
            made["logprobs"] = logprobs.of(found) if found else None
        return made

    try:
        if ask.chat:
            opening = {"index": 0, "finish_reason": None, "logprobs": None}
            yield envelope.chunk([{**opening, "delta": {"role": "assistant", "content": ""}}])
        async for event in running:
            if before or event.text or event.logprobs is not None:
                yield envelope.chunk([choice(before + event.text, event)], energy_j=event.energy_j)
                before = ""
        result = await running.result()
        yield envelope.chunk([choice(before, None, finish_reason(result.finish_reason))], energy_j=result.energy_j)
        if ask.include_usage:
            yield envelope.chunk([], usage=_usage(running, result))
        yield DONE
    except Exception as error:
        yield sse(as_api_error(error).to_json())  # the status is gone; clients look for this object


async def _unless_gone(request: Request, running: Running[Any], work: Coroutine[Any, Any, T]) -> T:
    """Await work for a client; cancel the sequence when the client goes away before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            running.cancel()
        return await task
    finally:
        gone.cancel()
        running.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(running: Running[Result], result: Result) -> dict[str, Any]:
    energy = energy_of(result, running.prepared.asked_j, running.prepared.grant.downshifted)
    return usage(result.prompt_tokens, result.completion_tokens, running.handle.handle.spent_by_phase_j, energy)


def _summed(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts: sums, and what is to know of the first."""
    if len(usages) == 1:
        return usages[0]
    total = {**usages[0], "energy": dict(usages[0]["energy"])}
    for used in usages[1:]:
        for name in ("prompt_tokens", "completion_tokens", "total_tokens", "energy_j"):
            total[name] += used[name]
        for name in ("prefill_j", "decode_j", "metered_j"):
            total["energy"][name] += used["energy"][name]
    return total


def _echoed(service: Service, prompt: Prompt | None) -> str:
    """The prompt as text."""
    return prompt if isinstance(prompt, str) else service.session.tokenizer.decode(prompt or ())
