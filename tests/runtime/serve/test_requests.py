"""Whatever a body holds, it is a checked request or one error that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.errors import UsageError
from eopc_runtime.serve.api_error import ApiError
from eopc_runtime.serve.gate import KEY_VARIABLE, check_host, read_keys
from eopc_runtime.serve.requests import CHAT, COMPLETION, NEUTRAL, parse_ask, parse_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(CHAT | COMPLETION | set(NEUTRAL))
BASE: dict[bool, dict[str, Any]] = {True: {"model": "m", "messages": []}, False: {"model": "m", "prompt": "x"}}


@settings(max_examples=600, deadline=None)
@given(
    chat=st.booleans(),
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=4),
)
def test_any_object_is_a_request_or_one_error(chat: bool, fields: dict[str, Any]) -> None:
    """No other exception, and an error that is a 400 with a sentence and JSON."""
    try:
        ask = parse_ask({**BASE[chat], **{k: v for k, v in fields.items() if v is not None}}, chat=chat)
    except ApiError as error:
        assert error.status == 400
        assert error.param is not None
        assert str(error)[-1] in ".?"
        json.dumps(error.to_json())
    else:
        assert ask.budget_j is None or ask.budget_j > 0
        assert ask.max_tokens is None or ask.max_tokens >= 0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_one_error(body: bytes) -> None:
    """Also those that are no UTF-8, or nested."""
    try:
        assert isinstance(parse_body(body), dict)
    except ApiError as error:
        assert error.status == 400


def test_null_counts_as_left_out() -> None:
    """As OpenAI's clients send it for what is not given."""
    body = parse_body(b'{"model": "m", "prompt": "x", "stop": null, "energy_budget_j": null, "seed": 3.0}')
    ask = parse_ask(body, chat=False)
    assert (ask.stop, ask.budget_j, ask.sampling.seed, ask.max_tokens) == ((), None, 3, 16)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_fields_that_change_nothing_are_accepted(name: str) -> None:
    """With their neutral values; clients send some of them always."""
    for value in NEUTRAL[name]:
        parse_ask({**BASE[False], name: "anybody" if type(value) is object else value}, chat=False)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a line, blank lines aside; short ones, and files without any, are refused."""
    path = tmp_path / "keys"
    monkeypatch.setenv(KEY_VARIABLE, "c" * 16)
    path.write_text(f"{'a' * 16}\n\n{'b' * 32}\n")
    assert read_keys(path) == ("c" * 16, "a" * 16, "b" * 32)
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_keys(None) == ()
    path.write_text("too short\n")
    with pytest.raises(UsageError, match="16 or more"):
        read_keys(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="holds no API key"):
        read_keys(path)


def test_other_machines_need_a_key() -> None:
    """Loopback by any of its names does not."""
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(host, ())
    check_host("0.0.0.0", ("k" * 16,))
    with pytest.raises(UsageError, match="lets other machines ask"):
        check_host("0.0.0.0", ())
