"""Who may ask: API keys, and names of this machine where there is none; and every answer is counted."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eopc_runtime.errors import UsageError
from eopc_runtime.serve.api_error import ApiError
from eopc_runtime.serve.metrics import Metrics

KEY_VARIABLE = "EOPC_API_KEY"
OPEN = ("/", "/health", "/ready")  # hold nothing secret; a page has to be there before it can ask for a key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LEAST_KEY = 16  # characters


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, and of the environment; UsageError when one can be guessed."""
    keys = [os.environ.get(KEY_VARIABLE, "")]
    if path is not None:
        try:
            keys += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as a file of API keys ({error}).") from error
    found = tuple(key.strip() for key in keys if key.strip())
    if path is not None and not found:
        raise UsageError(f"{path} holds no API key; write one a line.")
    for key in found:
        if len(key) < _LEAST_KEY or not key.isascii():
            raise UsageError(
                f"An API key has {len(key)} characters; it needs {_LEAST_KEY} or more of ASCII, for example those of "
                "`openssl rand -hex 32`."
            )
    return found


def check_host(host: str, keys: Sequence[str]) -> None:
    """Refuse to listen to other machines without a key; UsageError."""
    if host not in LOOPBACK and not keys:
        raise UsageError(
            f"--host {host} lets other machines ask, and there is no API key. Name a file of keys with --api-key, or "
            f"set {KEY_VARIABLE}."
        )


class Gate:
    """Lets requests through to an app that may pass."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics, routes: Sequence[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(Request(scope))
        if refusal is None:
            await self._app(scope, receive, counted)
        else:
            await refusal.response()(scope, receive, counted)

    def _refusal(self, request: Request) -> ApiError | None:
        if not self._digests:
            # a page of another site can make its own name point here; it cannot choose the name browsers send
            name = request.headers.get("host", "").rsplit("]", 1)[0].lstrip("[")
            name = name if name.count(":") > 1 else name.partition(":")[0]
            if name.lower() in LOOPBACK:
                return None
            return ApiError(403, f"This server answers to {', '.join(LOOPBACK)} only. Use one of these names.")
        if request.url.path in OPEN:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1", "replace"))
        # every key is compared, and in constant time: how long it takes says nothing about any
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() == "bearer" and any(matches):
            return None
        return ApiError(
            401,
            "The API key is missing or wrong. Send it as Authorization: Bearer KEY.",
            code="invalid_api_key",
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
