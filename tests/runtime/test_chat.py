"""Chat templates: values, refusals, and templates that misbehave."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from eopc_runtime.chat import ChatTemplate
from eopc_runtime.errors import BundleError, PromptError

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "{{ '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def test_chatml_template_renders_exactly() -> None:
    """Block trimming matches transformers, so no stray newline gets in."""
    messages = [{"role": "system", "content": "be brief"}, *USER]
    assert ChatTemplate(CHATML).render(messages) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not ChatTemplate(CHATML).render(USER, add_generation_prompt=False).endswith("assistant\n")


def test_special_tokens_date_tojson_and_generation_tag_are_available() -> None:
    """Helpers that templates in the wild rely on work as in transformers."""
    source = (
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}"
        "{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% break %}{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, now=lambda: datetime(2024, 7, 26))
    assert template.render([{"role": "user", "content": "<é>"}]) == (
        '<s>26 Jul 2024[{"role": "user", "content": "<é>"}]'
    )


def test_text_parts_are_joined() -> None:
    """Content given as a list of text parts is one text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": parts}])
    assert got == "ab"


def test_a_template_that_refuses_is_a_prompt_error() -> None:
    """raise_exception carries the template's own words to the user."""
    with pytest.raises(PromptError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 +", "{% endif %}"])
def test_a_template_that_does_not_compile_is_a_bundle_error(source: str) -> None:
    """Syntax errors name the line and the way around."""
    with pytest.raises(BundleError, match=r"does not compile .*--raw"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 100000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_runs_away_is_a_bundle_error(source: str) -> None:
    """Failures, sandbox escapes and endless output stop with one clear error."""
    with pytest.raises(BundleError, match="chat template"):
        ChatTemplate(source).render(USER)


def test_long_messages_stay_within_the_bound() -> None:
    """The bound grows with the messages, so a long honest prompt passes."""
    text = "x" * 1_000_000
    assert text in ChatTemplate(CHATML).render([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_malformed_messages_say_what_is_wrong(messages: Any) -> None:
    """Every malformed list of messages is a PromptError about messages."""
    with pytest.raises(PromptError, match="messages"):
        ChatTemplate(CHATML).render(messages)
