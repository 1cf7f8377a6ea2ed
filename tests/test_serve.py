"""`eopc serve` as users run it: a process on a real bundle, OpenAI's own client, signals, and kill -9 at random."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from eopc_runtime.evaluation.texts import window_nll
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.session import Session

openai: Any = pytest.importorskip("openai", reason="the official client comes with the test extra")

PATIENT_S = 60.0
KEY = "a-key-of-sixteen-characters-or-more"
KEYED = {"Authorization": f"Bearer {KEY}"}
KILLS = int(os.environ.get("EOPC_KILLS", "3"))  # EOPC_KILLS=100 takes a few minutes


class Process:
    """A server in a process of its own."""

    def __init__(self, bundle: Path, *options: str, folder: Path) -> None:
        command = [sys.executable, "-m", "eopc_runtime.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
        self.child = subprocess.Popen(
            [*command, *options], cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "EOPC_API_KEY": KEY}
        )
        assert self.child.stderr is not None
        self.said: list[str] = []
        for line in self.child.stderr:
            self.said.append(line)
            if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                return
        raise AssertionError(f"the server did not start: {self.said}")

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, timeout=PATIENT_S, max_retries=0, **options)

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def end(self) -> str:
        """Wait for the end and return the rest of what it said, nothing the second time."""
        assert self.child.stderr is not None
        if self.child.stderr.closed:
            return ""
        rest = self.child.stderr.read()
        self.child.wait(PATIENT_S)
        self.child.stderr.close()
        return rest


@contextmanager
def running(bundle: Path, *options: str, folder: Path) -> Iterator[Process]:
    process = Process(bundle, *options, folder=folder)
    try:
        yield process
    finally:
        process.signal(signal.SIGKILL)
        process.end()


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(tiny_bundle, folder=tmp_path_factory.mktemp("served")) as process:
        yield process


ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


@pytest.mark.parametrize("budget_j", [None, 0.3])
def test_the_official_client_streams(server: Process, tiny_bundle: Path, budget_j: float | None) -> None:
    """With and without a budget, the pieces are the text that the session itself generates, within the budget."""
    stream = server.client().chat.completions.create(
        **ASK,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={} if budget_j is None else {"energy_budget_j": budget_j},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    with Session.open(tiny_bundle, threads=1, verify=False) as session:
        alone = session.generate(messages=ASK["messages"], max_new_tokens=24, budget=budget_j)
    assert text == alone.text
    used = chunks[-1].usage
    assert used.completion_tokens == alone.completion_tokens
    assert used.energy_j == pytest.approx(alone.energy_j)
    assert used.energy["plan"] == alone.plan
    assert budget_j is None or used.energy_j <= budget_j


def test_the_official_client_sees_errors_as_its_own(server: Process) -> None:
    """400, 401 and 404 arrive as the classes the client has for them."""
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="energy_budget_j"):
        client.chat.completions.create(**ASK, extra_body={"energy_budget": 1})
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.chat.completions.create(**{**ASK, "model": "gpt-4"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny:t0"]


@pytest.mark.parametrize("tier", ["t0", "t2"])
def test_log_likelihoods_are_those_of_eval(server: Process, tiny_bundle: Path, tier: str) -> None:
    """As lm-evaluation-harness asks (token ids, echo, max_tokens 1, logprobs 1): the sum is the NLL of `eopc eval`."""
    with Session.open(tiny_bundle, threads=1, verify=False) as session:
        ids = session.tokenizer.encode("The sea was told where the rocks are, every evening. " * 3)
        expected = window_nll(session.pool.get(tier), ids)
    answer = server.client().completions.create(
        model=f"tiny:{tier}", prompt=ids, echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234
    )
    found = answer.choices[0].logprobs
    assert len(found.token_logprobs) == len(found.tokens) == len(found.top_logprobs) == len(ids) + 1
    assert -sum(found.token_logprobs[1:-1]) == pytest.approx(expected, rel=1e-5)
    assert found.text_offset == sorted(found.text_offset)


def test_sixteen_clients_get_the_answer_that_is_theirs(server: Process, tiny_bundle: Path) -> None:
    """Different prompts, seeds and budgets at once: every answer is what the session gives alone."""
    asked = [
        {"prompt": f"Number {i}: " + "x" * i, "max_tokens": 6 + i % 5, "seed": i, "temperature": 0.9} for i in range(16)
    ]
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = server.client().completions.create(model="tiny", **asked[i]).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT_S)
    with Session.open(tiny_bundle, threads=1, verify=False) as session:
        for i, request in enumerate(asked):
            sampling = SamplingParams(temperature=0.9, seed=i)
            alone = session.generate(
                request["prompt"], raw=True, max_new_tokens=request["max_tokens"], sampling=sampling
            )
            assert answers[i] == alone.text


def test_sigterm_finishes_what_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    """The answer under way is whole, the process ends by itself with 0, and nothing is left set aside."""
    with running(tiny_bundle, "--allowance", "1000J/day", folder=tmp_path) as process:
        pieces = []
        stream = process.client().chat.completions.create(**ASK, max_tokens=60, stream=True)
        for chunk in stream:
            pieces.append(chunk)
            if len(pieces) == 3:
                process.signal(signal.SIGTERM)
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        assert "Stopped." in process.end()
        assert process.child.returncode == 0
        spent_j = json.loads((tmp_path / "allowance.json").read_text())["windows"]["day"]["spent_j"]
        assert spent_j == pytest.approx(pieces[-1].energy_j)


def test_kill_9_in_mid_stream_leaves_an_account_and_the_next_start_works(tiny_bundle: Path, tmp_path: Path) -> None:
    """Three times, a little later each: the account never has less than was said to be spent; a client sees the end."""
    said_j = 0.0
    for round_ in range(3):
        process = Process(tiny_bundle, "--allowance", "1000J/day", folder=tmp_path)
        client = process.client()
        done = client.chat.completions.create(**ASK, max_tokens=3)
        said_j += done.usage.energy_j
        # the first chunk that a client ever reads takes it longer than the tiny model takes for a whole answer
        list(client.chat.completions.create(**ASK, max_tokens=3, stream=True))
        stream = client.chat.completions.create(**ASK, max_tokens=200, stream=True)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for count, chunk in enumerate(stream):
                last_j = getattr(chunk, "energy_j", None) or 0.0
                if count == 2 + 3 * round_:
                    process.signal(signal.SIGKILL)
                    time.sleep(0.2)
        said_j += last_j
        process.end()
        spent_j = json.loads((tmp_path / "allowance.json").read_text())["windows"]["day"]["spent_j"]
        assert said_j <= spent_j < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["allowance.json", "allowance.lock"]
    with running(tiny_bundle, "--allowance", "1000J/day", folder=tmp_path) as process:
        assert "left." in process.said[0]
        live = httpx.get(f"{process.url}/live", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert live["allowances"][0]["left_j"] == pytest.approx(1000 - spent_j)


def test_kill_9_of_the_server_at_random_leaves_an_account_and_the_next_start_works(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """At random moments: the account never has less than was said to be spent, no file piles up."""
    said_j, spent_j, cut = 0.0, 0.0, 0
    for round_ in range(KILLS):
        process = Process(tiny_bundle, "--allowance", "1000kJ/day", folder=tmp_path)
        live = httpx.get(f"{process.url}/live", headers=KEYED).json()
        assert live["allowances"][0]["left_j"] == pytest.approx(1e6 - spent_j)
        said_j += process.client().chat.completions.create(**ASK, max_tokens=3).usage.energy_j
        timer = threading.Timer(random.Random(round_).uniform(0, 0.5), process.signal, [signal.SIGKILL])
        timer.start()
        last_j = 0.0
        try:
            while True:  # until it is gone
                for chunk in process.client().chat.completions.create(**ASK, max_tokens=200, stream=True):
                    last_j = getattr(chunk, "energy_j", None) or last_j
                said_j, last_j = said_j + last_j, 0.0
        except (openai.APIError, httpx.HTTPError):
            cut += last_j > 0
        said_j += last_j
        timer.join()
        process.end()
        spent_j = json.loads((tmp_path / "allowance.json").read_text())["windows"]["day"]["spent_j"]
        assert said_j <= spent_j * (1 + 1e-12)  # the same joules summed in another order
    assert cut or KILLS < 10  # of so many, some died in mid-stream
    with running(tiny_bundle, "--allowance", "1000kJ/day", folder=tmp_path) as process:
        assert "left." in process.said[0]
        process.client().chat.completions.create(**ASK, max_tokens=3)
        # a write that was cut short is written over
        assert sorted(path.name for path in tmp_path.iterdir()) == ["allowance.json", "allowance.lock"]


def test_kill_9_of_a_client_frees_its_sequence(server: Process) -> None:
    """At random moments: nothing runs or waits for it a moment later, and the next answer is what it always was."""
    ask = {**ASK, "max_tokens": 8}
    answer = server.client().chat.completions.create(**ask).choices[0].message.content
    post = f"httpx.post({server.url + '/v1/chat/completions'!r}, json={ {**ASK, 'max_tokens': 200, 'stream': True}!r}"
    code = f"import httpx\nwhile True: {post}, headers={KEYED!r}).raise_for_status()"
    for round_ in range(KILLS):
        client = subprocess.Popen([sys.executable, "-c", code])
        while not in_work(server):
            assert client.poll() is None
        time.sleep(random.Random(round_).uniform(0, 0.2))
        client.kill()
        client.wait()
        patient = time.monotonic() + PATIENT_S
        while in_work(server):
            assert time.monotonic() < patient, "the sequence of a client that is gone still runs"
            time.sleep(0.01)
        assert server.client().chat.completions.create(**ask).choices[0].message.content == answer


def in_work(server: Process) -> int:
    """Sequences that run or wait."""
    live = httpx.get(f"{server.url}/live", headers=KEYED).json()
    return int(live["running"]) + int(live["waiting"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--allowance", "5J/fortnight"], "is not known"),
        (["--budget", "5J", "--max-budget", "1J"], "above --max-budget"),
        (["--api-key", "short"], "16 or more"),
        (["--api-key", "nowhere"], "cannot be read"),
        (["--port", "PORT"], "cannot be listened on"),
        (["--allowance", "5J/day", "--state", "damaged"], "delete it"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(
    tiny_bundle: Path, tmp_path: Path, server: Process, options: list[str], words: str
) -> None:
    """Exit code 1, one error, no traceback."""
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "damaged").write_text("{")
    options = [server.url.rsplit(":", 1)[1] if option == "PORT" else option for option in options]
    environment = {name: value for name, value in os.environ.items() if name != "EOPC_API_KEY"}
    done = subprocess.run(
        [sys.executable, "-m", "eopc_runtime.cli", "serve", str(tiny_bundle), "--threads", "1", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENT_S,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"^Error: ", done.stderr, re.MULTILINE)) == 1
