"""The server over real HTTP: answers, streams, refusals, keys, limits, draining, and clients that go away."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from eopc_runtime.serve.service import Limits

from ..test_session import TEMPLATE, session
from .conftest import PATIENT_S, Site, wait_for

Start = Callable[..., Site]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0,
}
KEY = "0123456789abcdef0123456789abcdef"


def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream, which ends with [DONE]."""
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_is_answered_with_its_joules(site: Start) -> None:
    """OpenAI's object; `usage` tells joules by phase, whose they are, and who kept the budget."""
    answer = site().post(CHAT, {**HELLO, "energy_budget_j": 100})
    value = answer.json()
    assert answer.status_code == 200
    assert value["object"] == "chat.completion"
    (choice,) = value["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abcd", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    used = value["usage"]
    prompt = len("user:hello;")
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (prompt, 4, prompt + 4)
    assert used["energy_j"] == used["energy"]["prefill_j"] + used["energy"]["decode_j"] == prompt * 0.5 + 3 * 4.0
    assert used["energy"]["source"] == "calibrated"
    assert used["energy"]["budget_j"] == 100.0
    assert used["energy"]["enforced_by"] == "model"
    assert used["energy"]["plan"] == "t0"


def test_a_budget_chooses_the_tier_and_is_kept(site: Start) -> None:
    """15 J do not pay for t0: the answer comes from below, and costs no more."""
    value = site().post(CHAT, {**HELLO, "energy_budget_j": 15}).json()
    used = value["usage"]
    assert used["energy"]["plan"] == "t0>t1"
    assert used["energy_j"] <= 15


def test_a_budget_that_ends_an_answer_is_named(site: Start) -> None:
    """OpenAI knows no such reason, so it is `length`; `usage` says `budget`, and the metric counts it."""
    here = site()
    value = here.post(CHAT, {**HELLO, "max_tokens": 30, "energy_budget_j": 5}).json()
    assert value["choices"][0]["finish_reason"] == "length"
    assert value["usage"]["energy"]["ended_by"] == "budget"
    assert here.metric("eopc_budget_stops_total") == 1.0


def test_a_stream_has_the_text_and_the_joules_so_far(site: Start) -> None:
    """Role, one chunk a token, the reason to end, then the usage that was asked for."""
    here = site()
    whole = here.post(CHAT, HELLO).json()
    response = here.post(CHAT, {**HELLO, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *chunks, last, used = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "abcd"
    spent = [chunk["energy_j"] for chunk in chunks]
    assert spent == sorted(spent)
    assert last["choices"][0] == {"index": 0, "finish_reason": "length", "logprobs": None, "delta": {}}
    assert used["choices"] == []
    assert used["usage"] == whole["usage"]
    plain = events(here.post(CHAT, {**HELLO, "stream": True}))
    assert not any("usage" in chunk for chunk in plain)


def test_stop_strings_and_seeds_work_over_http(site: Start) -> None:
    """The text ends before the stop string; equal seeds agree."""
    assert site().post(CHAT, {**HELLO, "max_tokens": 20, "stop": "ef"}).json()["choices"][0] == {
        "index": 0,
        "finish_reason": "stop",
        "logprobs": None,
        "message": {"role": "assistant", "content": "abcd", "refusal": None},
    }
    here = site(session("abc", flat=True, template=TEMPLATE))
    body = {**HELLO, "max_tokens": 20, "temperature": 1.0, "seed": -7}
    texts = [here.post(CHAT, body).json()["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_completion_takes_texts_ids_and_lists_of_either(site: Start) -> None:
    """One choice per prompt, in order; the default is 16 new tokens; `usage` is their sum."""
    here = site()
    ids = here.service.session.tokenizer.encode("xy")
    for prompt, count in (("xy", 1), (ids, 1), (["xy", "xyz"], 2), ([ids, ids, ids], 3)):
        value = here.post(COMPLETIONS, {"model": "tiny", "prompt": prompt, "temperature": 0}).json()
        assert [choice["index"] for choice in value["choices"]] == list(range(count))
        assert {choice["text"] for choice in value["choices"]} == {"abcdefghabcdefgh"}
        assert value["usage"]["completion_tokens"] == 16 * count
        assert value["object"] == "text_completion"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(site: Start, max_tokens: int) -> None:
    """The lists cover every token of the prompt and the new one; the first has no log-probability."""
    here = site()
    body = {"model": "tiny", "prompt": "wxyz", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    value = here.post(COMPLETIONS, body).json()
    (choice,) = value["choices"]
    # the scripted model takes what it is fed at once for the prompt, and says the script's first letter
    new = "a" * max_tokens
    assert choice["text"] == "wxyz" + new
    found = choice["logprobs"]
    assert found["tokens"] == list("wxyz" + new)
    assert found["text_offset"] == list(range(4 + max_tokens))
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert all(len(top) == 1 for top in found["top_logprobs"][1:])
    assert value["usage"]["completion_tokens"] == max_tokens


def test_logprobs_of_what_was_generated(site: Start) -> None:
    """A greedy token is the most likely one; chats and completions each in their own shape, streamed or not."""
    here = site()
    body = {"model": "tiny", "prompt": "xy", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    found = here.post(COMPLETIONS, {**body, "echo": False}).json()["choices"][0]["logprobs"]
    assert found["tokens"] == list("abc")
    assert found["text_offset"] == [0, 1, 2]
    assert [max(top, key=top.get) for top in found["top_logprobs"]] == list("abc")
    streamed = [c["choices"][0]["logprobs"] for c in events(here.post(COMPLETIONS, {**body, "stream": True}))]
    assert [part["text_offset"] for part in streamed if part] == [[0], [1], [2]]
    chat = here.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2}).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in chat] == list("abcd")
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in chat)


def test_models_are_the_bundle_and_its_tiers(site: Start) -> None:
    """A tier by its name runs on that tier; another name is not found."""
    here = site()
    assert [m["id"] for m in here.get("/v1/models").json()["data"]] == ["tiny", "tiny:t0", "tiny:t1", "tiny:t2"]
    assert here.get("/v1/models/tiny:t1").json()["id"] == "tiny:t1"
    assert here.post(CHAT, {**HELLO, "model": "tiny:t2"}).json()["usage"]["energy"]["tiers_used"] == ["t2"]
    for answer in (here.post(CHAT, {**HELLO, "model": "tiny:t9"}), here.get("/v1/models/gpt")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"energy_budgt_j": 1}, 400, "energy_budgt_j", 'Did you mean "energy_budget_j"?'),
        ({"energy_budget_j": 0}, 400, "energy_budget_j", "above 0"),
        ({"energy_budget_j": "5J"}, 400, "energy_budget_j", "number"),
        ({"energy_budget_j": 0.01}, 400, "energy_budget_j", "or more"),
        ({"n": 2}, 400, "n", "only with 1"),
        ({"n": True}, 400, "n", "only with 1"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "Leave it out"),
        ({"temperature": 3}, 400, "temperature", "0 to 2"),
        ({"top_p": 0}, 400, "top_p", "top_p"),
        ({"seed": 1.5}, 400, "seed", "whole number"),
        ({"stop": [""]}, 400, "stop", "none of them empty"),
        ({"stop": 3}, 400, "stop", "list of texts"),
        ({"max_tokens": 0}, 400, "max_tokens", "1 or more"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"messages": []}, 400, None, "empty"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, 400, None, "context"),
        ({"messages": "hello"}, 400, "messages", "list"),
        ({"model": None}, 400, "model", "missing"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs"),
    ],
)
def test_a_bad_request_names_the_field(
    site: Start, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    """OpenAI's error object, one sentence, and nothing ran."""
    here = site()
    answer = here.post(CHAT, {**HELLO, **change})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    assert here.metric("eopc_energy_joules_total") == 0.0


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b'{"model": NaN}', "application/json", 400, "not JSON"),
        (b"\xff\xfe", "application/json", 400, "not JSON"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "not an object"),
        (b"{}", "text/plain", 415, "application/json"),
        (b"{" + b" " * 2_000_000 + b"}", "application/json", 413, "larger than"),
    ],
)
def test_a_body_that_is_no_request(site: Start, content: bytes, kind: str, status: int, words: str) -> None:
    """Malformed, of another type, or too large: an error object each, and the next request works."""
    here = site()
    answer = httpx.post(here.url + CHAT, content=content, headers={"Content-Type": kind}, timeout=PATIENT_S)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert here.post(CHAT, HELLO).status_code == 200


def test_a_body_that_does_not_arrive_times_out(site: Start) -> None:
    """Half a body, then silence: 408 after the time that is allowed."""
    here = site(limits=Limits(body_timeout_s=0.2))
    with socket.create_connection(("127.0.0.1", int(here.url.rsplit(":", 1)[1])), PATIENT_S) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
    assert here.get("/health").status_code == 200


def test_what_is_not_there_is_an_error_object_too(site: Start) -> None:
    """404 and 405 in the same shape."""
    here = site()
    assert here.get("/v1/embeddings").json()["error"]["message"] == "There is nothing at /v1/embeddings."
    assert here.get(CHAT).status_code == 405
    assert "error" in here.get(CHAT).json()


def test_without_the_key_nothing_is_told(site: Start) -> None:
    """Every route but health, readiness and the page needs one of the keys."""
    here = site(keys=(KEY, KEY[::-1]))
    for path in ("/v1/models", "/metrics", "/live"):
        assert here.get(path).status_code == 401
        assert here.get(path, headers={"Authorization": f"Bearer {KEY[:-1]}"}).status_code == 401
        assert here.get(path, headers={"Authorization": f"Basic {KEY}"}).status_code == 401
        assert here.get(path, headers={"Authorization": f"Bearer {KEY[::-1]}"}).status_code == 200
    assert here.post(CHAT, HELLO).json()["error"]["code"] == "invalid_api_key"
    assert [here.get(path).status_code for path in ("/health", "/ready", "/")] == [200, 200, 200]


def test_without_a_key_only_names_of_this_machine_are_served(site: Start) -> None:
    """A web page that points its own name here is refused."""
    here = site()
    assert here.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert here.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    assert here.get("/v1/models", headers={"Host": "[::1]:80"}).status_code == 200


def test_a_budget_above_the_most_is_refused_and_the_default_applies(site: Start) -> None:
    """No request gets more than the server's limit, also one that asks for nothing."""
    here = site(limits=Limits(budget_j=15.0, max_budget_j=20.0))
    assert here.post(CHAT, {**HELLO, "energy_budget_j": 21}).json()["error"]["code"] == "budget_too_large"
    assert here.post(CHAT, {**HELLO, "energy_budget_j": 20}).json()["usage"]["energy"]["budget_j"] == 20.0
    assert here.post(CHAT, HELLO).json()["usage"]["energy"]["budget_j"] == 15.0


def test_an_allowance_admits_downshifts_and_defers(site: Start) -> None:
    """30 J a day: one whole answer, one on a lower tier, then 429 with the time until midnight; no joule too many."""
    here = site(allowances=("30J/day",))
    whole = here.post(CHAT, HELLO)
    assert whole.json()["usage"]["energy"]["downshifted"] is False
    assert whole.json()["usage"]["energy"]["budget_j"] is None
    assert whole.json()["usage"]["energy"]["granted_j"] <= 30.0
    left = 30.0 - whole.json()["usage"]["energy_j"]
    assert float(whole.headers["x-eopc-allowance-remaining-j"]) == pytest.approx(left)
    assert whole.headers["x-eopc-allowance"].startswith("day;limit=30;remaining=")
    lower = here.post(CHAT, HELLO).json()["usage"]
    assert lower["energy"]["downshifted"] is True
    assert lower["energy_j"] <= left
    answers = [here.post(CHAT, HELLO) for _ in range(8)]
    deferred = answers[-1]
    assert deferred.status_code == 429
    assert deferred.json()["error"]["code"] == "allowance_spent"
    assert 0 < int(deferred.headers["retry-after"]) <= 86400
    assert here.metric('eopc_energy_joules_total{phase="prefill",source="calibrated"}') <= 30.0
    spent = sum(a.json()["usage"]["energy_j"] for a in answers if a.status_code == 200)
    assert whole.json()["usage"]["energy_j"] + lower["energy_j"] + spent <= 30.0
    assert here.metric('eopc_allowance_remaining_joules{period="day"}') < 5.0


def test_a_full_queue_is_429_with_retry_after(site: Start) -> None:
    """One runs, one waits, the third is told when to ask again; both others are answered."""
    here = site(gated=True, max_running=1, max_waiting=1)
    assert here.gate is not None
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(here.post(CHAT, HELLO))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: here.service.scheduler.running + here.service.scheduler.waiting == 2)
    refused = here.post(CHAT, HELLO)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert here.metric("eopc_queue_length") == 1.0
    here.gate.open()
    for thread in threads:
        thread.join(PATIENT_S)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert here.metric('eopc_refusals_total{reason="queue_full"}') == 1.0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_sequence(site: Start, stream: bool) -> None:
    """The sequence ends within a step, what it did not use comes back to the allowance, the next is served."""
    here = site(gated=True, max_running=1, allowances=("1000J/day",))
    assert here.gate is not None
    body = {**HELLO, "max_tokens": 40, "stream": stream}
    with httpx.Client(timeout=PATIENT_S) as client:
        if stream:
            here.gate.open(3)
            with client.stream("POST", here.url + CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(here.url + CHAT, json=body, timeout=0.5)
    wait_for(lambda: all(turn.handle.cancelled for turn in here.service.scheduler._running))
    here.gate.open(1)
    wait_for(lambda: here.service.scheduler.running == 0)
    wait_for(lambda: here.metric('eopc_sequences_total{ended_by="cancelled"}') == 1.0)
    assert here.service.policy.left_j > 1000 - 60  # 40 tokens would be 160 J
    here.gate.open()
    assert here.post(CHAT, HELLO).status_code == 200


def test_a_failure_in_mid_stream_is_an_error_event(site: Start) -> None:
    """The stream says what happened instead of [DONE]; the next request works."""
    here = site(gated=True)
    assert here.gate is not None
    here.gate.failure, here.gate.fails_for = RuntimeError("FAIL"), "u"
    here.gate.open(1)
    with httpx.stream("POST", here.url + CHAT, json={**HELLO, "stream": True}, timeout=PATIENT_S) as response:
        text = response.read().decode()
    assert '"error":{"message":"The sequence failed in mid-run (RuntimeError: FAIL)' in text
    assert "[DONE]" not in text
    here.gate.failure = None
    here.gate.open()
    assert here.post(CHAT, HELLO).status_code == 200
    assert here.metric('eopc_sequences_total{ended_by="failed"}') == 1.0


def test_draining_finishes_what_runs_and_refuses_the_rest(site: Start) -> None:
    """/ready and new requests are 503 while the running answer is finished; then the server ends."""
    here = site(gated=True, max_running=1)
    assert here.gate is not None
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(here.post(CHAT, HELLO)))
    thread.start()
    wait_for(lambda: here.service.scheduler.running == 1)
    here.server.servers[0].get_loop().call_soon_threadsafe(here.server.begin_end)
    wait_for(lambda: here.service.scheduler.draining)
    assert here.get("/health").status_code == 200
    assert here.get("/ready").status_code == 503
    refused = here.post(CHAT, HELLO)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert "retry-after" in refused.headers
    here.gate.open()
    thread.join(PATIENT_S)
    assert answers[0].json()["choices"][0]["message"]["content"] == "abcd"
    wait_for(lambda: here.server.should_exit)


def test_metrics_count_what_was_done(site: Start) -> None:
    """Joules by phase and source, tokens, tiers, requests by status."""
    here = site()
    used = [here.post(CHAT, {**HELLO, "energy_budget_j": j}).json()["usage"] for j in (15, 100)]
    here.get("/nowhere")
    for phase in ("prefill", "decode"):
        line = f'eopc_energy_joules_total{{phase="{phase}",source="calibrated"}}'
        assert here.metric(line) == sum(u["energy"][f"{phase}_j"] for u in used)
    assert here.metric('eopc_tokens_total{kind="completion"}') == 8.0
    tiers = [here.metric(f'eopc_tier_tokens_total{{tier="t{i}"}}') for i in range(3)]
    assert sum(tiers) == 8.0
    assert tiers[0] < 8.0
    assert here.metric('eopc_requests_total{route="/v1/chat/completions",status="200"}') == 2.0
    assert here.metric('eopc_requests_total{route="other",status="404"}') == 1.0
    assert here.metric("eopc_drift_ratio") == 1.0


def test_the_page_and_its_data(site: Start) -> None:
    """One file that asks nobody but this server; its data name watts, tier, joules and allowance."""
    here = site(allowances=("1000J/day",))
    here.post(CHAT, HELLO)
    page = here.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    live = here.get("/live").json()
    assert live["watts"] > 0
    assert live["tier"] == "t0"
    assert live["requests"][0]["energy_j"] == live["energy_j"] > 0
    assert live["allowances"][0]["left_j"] == 1000.0 - live["energy_j"]
