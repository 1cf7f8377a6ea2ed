"""A server on loopback in a thread of this process, on a session whose model is a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from eopc_runtime.allowance import BudgetPolicy
from eopc_runtime.scheduler import Scheduler
from eopc_runtime.serve.app import make_app
from eopc_runtime.serve.run import Server, bind
from eopc_runtime.serve.service import Limits, Service
from eopc_runtime.session import Session
from eopc_runtime.windows import Allowance

from ..test_scheduler import Gate
from ..test_session import TEMPLATE, session

PATIENT_S = 20.0


@dataclass
class Site:
    """A running server."""

    url: str
    service: Service
    server: Server
    gate: Gate | None

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENT_S, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENT_S, **options)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, 0 where it is missing."""
        for found in self.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rsplit(" ", 1)[1])
        return 0.0


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    """Start servers; each is told to end, and has ended, when the test is over."""
    with ExitStack() as stack:

        def start(
            box: Session | None = None,
            *,
            gated: bool = False,
            keys: tuple[str, ...] = (),
            allowances: tuple[str, ...] = (),
            limits: Limits | None = None,
            **options: Any,
        ) -> Site:
            box = box or session("abcdefgh", template=TEMPLATE)
            gate = Gate(box) if gated else None
            scheduler = stack.enter_context(Scheduler(box, **options))
            policy = stack.enter_context(BudgetPolicy([Allowance.parse(text) for text in allowances]))
            service = Service(scheduler, policy, "tiny", limits or Limits())
            listener = bind("127.0.0.1", 0)
            server = Server(make_app(service, keys), service, grace_s=PATIENT_S)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()

            def end() -> None:
                if gate is not None:
                    gate.open()
                server.should_exit = True
                thread.join(PATIENT_S)
                listener.close()
                assert not thread.is_alive()

            stack.callback(end)
            wait_for(lambda: server.started)
            return Site(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, gate)

        yield start


def wait_for(condition: Callable[[], object], seconds: float = PATIENT_S) -> None:
    """Wait until a condition holds, or fail."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
