"""Many clients at once on `eopc serve`: wrong and lost answers, overspends, refusals, own time per token, memory.

    python benchmarks/serve_load.py BUNDLE [--clients 16] [--requests 200] [--threads 1] [--waiting 8]

The server runs in this process, so that its memory is this process's, and the clients in another. Answers are compared
with those that the session gives alone, for requests with different prompts, seeds and budgets. A request that is
refused is sent again after Retry-After; clients give way to the server (nice 19), as they would on other machines.
Own time per token: from the end of the step that computed it until its chunk was handed to the socket; it holds what
other processes take from this one, so measure it on a machine that has nothing else to do. Own CPU per token: what the
server's event loop used in that time, for this token and any other; `own_cpu_ms` is all that it used over the tokens.
Printed: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import httpx

from eopc_runtime.allowance import BudgetPolicy
from eopc_runtime.generation import Event, Result
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.scheduler import Handle, Scheduler
from eopc_runtime.serve.app import make_app
from eopc_runtime.serve.run import Server, bind
from eopc_runtime.serve.service import Limits, Service
from eopc_runtime.session import Session
from eopc_runtime.windows import Allowance

KINDS = 24  # different requests
ALLOWANCE = "1000kJ/day"
Times = tuple[float, float]  # of the clock, and of the event loop's processor, seconds
ENDED: contextvars.ContextVar[list[Times]] = contextvars.ContextVar("ended")  # when steps of this request ended
LOOP = [time.CLOCK_THREAD_CPUTIME_ID]  # the processor clock of the event loop's thread, once there is one


def now() -> Times:
    """Both clocks."""
    return time.perf_counter(), time.clock_gettime(LOOP[0])


class TimedScheduler(Scheduler):
    """Notes when the worker has an event."""

    def submit(self, prompt: Any = None, *, deliver: Any = None, **request: Any) -> Handle[Result]:
        ended = ENDED.get()

        def timed(event: Event | None) -> None:
            if event is not None:
                ended.append(now())
            deliver(event)

        return super().submit(prompt, deliver=timed, **request)


class TimedApp:
    """Notes how long after its step every token's chunk was sent."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.own_s = array("d")  # small beside the memory that is measured
        self.own_cpu_s = array("d")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ended: list[Times] = []
        ENDED.set(ended)
        count = 0

        async def timed(message: Any) -> None:
            nonlocal count
            await send(message)
            if b'"logprobs":{' in message.get("body", b""):
                own_s, own_cpu_s = (after - before for after, before in zip(now(), ended[count], strict=True))
                self.own_s.append(own_s)
                self.own_cpu_s.append(own_cpu_s)
                count += 1

        await self._app(scope, receive, timed)


def make_requests(session: Session) -> list[dict[str, Any]]:
    """Requests whose answers are known: with a seed, and one in two with a budget below the whole price."""
    made = []
    for i in range(KINDS):
        prompt, tokens = f"Story number {i}: " + "once upon a time " * (i % 4), 8 + i % 9
        whole_j = session.explain(prompt, raw=True, max_new_tokens=tokens).whole_j
        budget_j = whole_j * (0.5 + 0.04 * i) if i % 2 else None
        alone = session.generate(
            prompt,
            raw=True,
            max_new_tokens=tokens,
            budget=budget_j,
            sampling=SamplingParams(temperature=0.8, seed=i),
        )
        body = {"model": "load", "prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": i, "logprobs": 0}
        extra = {} if budget_j is None else {"energy_budget_j": budget_j}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        made.append({"body": {**body, **extra, **stream}, "text": alone.text, "budget_j": budget_j})
    return made


async def drive(url: str, requests: list[dict[str, Any]], clients: int, each: int) -> dict[str, Any]:
    """Send the requests from so many clients, one after the other each; count what comes back."""
    found = {"answers": 0, "wrong": 0, "lost": 0, "overspent": 0, "refused": 0, "refused_without_retry_after": 0}
    found["energy_j"] = 0
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

        async def client(number: int) -> None:
            order = random.Random(number)
            for _ in range(each):
                await ask(http, url, order.choice(requests), found)

        await asyncio.gather(*(client(number) for number in range(clients)))
    return found


async def ask(http: httpx.AsyncClient, url: str, request: dict[str, Any], found: dict[str, Any]) -> None:
    """Send one request until it is taken, and compare its answer."""
    while True:
        response = await http.post(f"{url}/v1/completions", json=request["body"])
        if response.status_code != 429:
            break
        found["refused"] += 1
        found["refused_without_retry_after"] += "retry-after" not in response.headers
        await asyncio.sleep(min(float(response.headers.get("retry-after", 1)), 5.0))
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    if response.status_code != 200 or lines[-1:] != ["[DONE]"]:
        found["lost"] += 1
        return
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    spent_j = chunks[-1]["usage"]["energy_j"]
    found["answers"] += 1
    found["wrong"] += text != request["text"]
    found["overspent"] += request["budget_j"] is not None and spent_j > request["budget_j"]
    found["energy_j"] += spent_j


def rss_bytes() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Parse arguments, serve, let the clients loose, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200, help="Of every client.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--waiting", type=int, default=8, help="Places in the queue; 4 run.")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:  # the process of the clients
        requests = json.loads(sys.stdin.read())
        found = asyncio.run(drive(args.drive, requests, args.clients, args.requests))
        sys.stdout.write(json.dumps(found))
        return
    with Session.open(args.bundle, threads=args.threads, verify=False) as session, tempfile.TemporaryDirectory() as tmp:
        session.keep_loaded()  # as `eopc serve` does
        requests = make_requests(session)
        with (
            BudgetPolicy([Allowance.parse(ALLOWANCE)], Path(tmp) / "allowance.json") as policy,
            TimedScheduler(session, max_waiting=args.waiting) as scheduler,
        ):
            sys.stdout.write(json.dumps(load(Service(scheduler, policy, "load", Limits()), requests, args), indent=1))
            sys.stdout.write("\n")


def load(service: Service, requests: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Serve until the clients have ended: first a tenth of the load, to be warm, then all of it."""
    timed = TimedApp(make_app(service))
    listener = bind("127.0.0.1", 0)
    server = Server(timed, service, grace_s=60.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert thread.ident is not None
    LOOP[0] = time.pthread_getcpuclockid(thread.ident)
    command = ["nice", "-n", "19", sys.executable, __file__, str(args.bundle), "--clients", str(args.clients)]
    command += ["--drive", f"http://127.0.0.1:{listener.getsockname()[1]}"]

    def clients(each: int) -> dict[str, Any]:
        done = subprocess.run(
            [*command, "--requests", str(each)],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    warm = clients(max(args.requests // 10, 2))
    before = rss_bytes()
    del timed.own_s[:], timed.own_cpu_s[:]
    begun = now()
    found = clients(args.requests)
    elapsed_s, cpu_s = (after - before for after, before in zip(now(), begun, strict=True))
    left_j = service.policy.left_j
    spent_j = Allowance.parse(ALLOWANCE).limit_j - left_j
    own, own_cpu = sorted(timed.own_s), sorted(timed.own_cpu_s)
    server.should_exit = True
    thread.join()
    listener.close()
    return {
        **found,
        "account_minus_answers_j": spent_j - found["energy_j"] - warm["energy_j"],
        "elapsed_s": round(elapsed_s, 1),
        "tokens": len(own),
        "own_cpu_ms": round(1e3 * cpu_s / len(own), 3),
        "own_ms_median": round(1e3 * own[len(own) // 2], 3),
        "own_ms_p99": round(1e3 * own[int(len(own) * 0.99)], 3),
        "own_cpu_ms_p99": round(1e3 * own_cpu[int(len(own) * 0.99)], 3),
        "rss_mb_warm": round(before / 1e6, 1),
        "rss_mb_end": round(rss_bytes() / 1e6, 1),
        "rss_growth": round(rss_bytes() / before - 1, 4),
    }


if __name__ == "__main__":
    main()
