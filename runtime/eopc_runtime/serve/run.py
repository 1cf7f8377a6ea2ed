"""The server's process: listens, and on SIGTERM finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import gc
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from eopc_runtime.errors import DeviceError
from eopc_runtime.serve.service import Service

_BACKLOG = 128


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. DeviceError when it is taken or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)  # who connects before the server runs is answered a little later, not refused
    except (OSError, OverflowError) as error:
        listener.close()
        raise DeviceError(f"{host} port {port} cannot be listened on ({error}). Name another with --port.") from error
    listener.set_inheritable(True)
    return listener


class Server(uvicorn.Server):
    """Uvicorn that, told to end, first refuses new sequences and finishes those there are, for `grace_s` at most.

    Meanwhile it answers: /ready and requests to generate with 503. A second signal ends it at once.
    """

    def __init__(self, app: ASGIApp, service: Service, grace_s: float) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service, self._grace_s = service, grace_s
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; called by a signal, in the main thread."""
        if self._ending is None and self.started:
            asyncio.get_running_loop().call_soon_threadsafe(self.begin_end)
        else:
            super().handle_exit(sig, frame)

    def begin_end(self) -> None:
        """Begin to end; call it in the server's loop."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end; what is loaded by then is left out of collections, which stop all threads."""
        gc.collect()
        gc.freeze()
        try:
            super().run(sockets)
        finally:
            gc.unfreeze()

    async def _end(self) -> None:
        await asyncio.to_thread(self._service.scheduler.drain, self._grace_s)
        await self._service.close()
        self.should_exit = True


def serve(app: ASGIApp, service: Service, listener: socket.socket, grace_s: float) -> None:
    """Serve until SIGTERM or SIGINT."""
    Server(app, service, grace_s).run(sockets=[listener])
