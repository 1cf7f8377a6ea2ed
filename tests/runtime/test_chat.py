"""Chat templates: values, refusals, and templates that misbehave."""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
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


RUNAWAY = (
    "{% if messages[-1].content == 'run' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}{{ messages[-1].content }}"
)


def test_after_a_runaway_the_same_template_renders_on() -> None:
    """The child that was ended is replaced, and what was asked before does not matter."""
    template = ChatTemplate(RUNAWAY)
    for _ in range(2):
        with pytest.raises(BundleError, match="more time or memory"):
            template.render([{"role": "user", "content": "run"}])
        assert template.render(USER) == "hi"


def test_a_runaway_is_stopped_within_a_second_of_cpu_time() -> None:
    """The bound is on the CPU time of the child, so that other load does not stop honest templates."""
    template = ChatTemplate(RUNAWAY)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(BundleError):
        template.render([{"role": "user", "content": "run"}])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0.2 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_child_can_open_nothing_and_ends_with_its_template() -> None:
    """Limits are those of the process, whatever the sandbox lets through; nothing outlives the template."""
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(USER) == "hi"
    process = template._worker._process
    assert process is not None
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for name in ("Max open files", "Max file size", "Max core file size"):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line[len(name) :].split()[:2] == ["0", "0"], line
    assert "Max address space" in limits and str(384 << 20) in limits
    del template
    gc.collect()
    assert process.poll() is not None


def test_a_closed_template_starts_again() -> None:
    """Closing frees the child; the next prompt starts another."""
    template = ChatTemplate("{{ messages[0].content }}")
    template.close()
    assert template.render(USER) == "hi"


def test_threads_share_a_template() -> None:
    """Prompts of many threads do not mix."""
    template = ChatTemplate("{{ messages[0].content }}")

    def render(i: int) -> bool:
        return template.render([{"role": "user", "content": str(i) * 50}]) == str(i) * 50

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(render, range(200)))


def test_a_child_that_was_killed_is_replaced() -> None:
    """Whoever ends it, the next prompt works after one that was lost at most."""
    template = ChatTemplate("{{ messages[0].content }}")
    assert template._worker._process is not None
    template._worker._process.kill()
    template._worker._process.wait()
    assert template.render(USER) == "hi"


def test_messages_hold_what_json_can() -> None:
    """Further keys of a message reach the template, if they are plain values."""
    template = ChatTemplate("{{ messages[0].tool.name }}")
    assert template.render([{"role": "user", "content": "hi", "tool": {"name": "clock"}}]) == "clock"
    with pytest.raises(PromptError, match="only what JSON can"):
        template.render([{"role": "user", "content": "hi", "tool": object()}])
