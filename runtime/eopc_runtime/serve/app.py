"""The routes of the server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from eopc_runtime.errors import EopcError
from eopc_runtime.serve.api_error import ApiError, as_api_error
from eopc_runtime.serve.completions import answer
from eopc_runtime.serve.gate import Gate
from eopc_runtime.serve.service import Service

_PAGE_HEADERS = {
    # the page is one file; it may talk to its own server and to nothing else
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

log = logging.getLogger("eopc.serve")


def make_app(service: Service, keys: Sequence[str] = ()) -> ASGIApp:
    """Return the ASGI app of a service."""
    page = (resources.files("eopc_runtime.serve") / "page.html").read_text(encoding="utf-8")

    async def chat(request: Request) -> Response:
        return await answer(service, request, chat=True)

    async def completion(request: Request) -> Response:
        return await answer(service, request, chat=False)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.models()]})

    async def model(request: Request) -> Response:
        service.tier_of(request.path_params["name"])
        return JSONResponse(_model(service, request.path_params["name"]))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        draining = service.scheduler.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def live(request: Request) -> Response:
        return JSONResponse(service.live(), headers={"Cache-Control": "no-store"})

    async def root(request: Request) -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/live", live),
        Route("/", root),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http, EopcError: _eopc, Exception: _unknown})
    return Gate(app, keys, service.metrics, [route.path for route in routes])


async def _eopc(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    if found.status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, found)
    return found.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"There is nothing at {request.url.path}.", 405: f"{request.method} is not served here."}
    return ApiError(error.status_code, words.get(error.status_code, error.detail)).response(error.headers)


async def _unknown(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()  # the framework writes the traceback to the log


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "eopc"}
