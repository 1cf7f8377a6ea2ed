"""Chat templates: messages to prompt text, rendered in a sandbox because templates come with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eopc_runtime.errors import BundleError, PromptError

ROLES = ("system", "user", "assistant", "tool")
# A template repeats its messages once and adds headers; far more than that is a runaway loop.
_MIN_OUTPUT_CHARS = 200_000
_OUTPUT_CHARS_PER_CHAR = 4

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template; raises BundleError when the template itself is broken."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._special_tokens = dict(special_tokens or {})
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise BundleError(
                f"the bundle's chat template does not compile (line {error.lineno}: {error.message}). "
                "Use --raw to skip the template."
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt for `messages` ({"role", "content"} each).

        Raises PromptError when the messages are malformed or the template refuses them, BundleError when the
        template fails or its output is out of all proportion.
        """
        checked = check_messages(messages)
        limit = _MIN_OUTPUT_CHARS + _OUTPUT_CHARS_PER_CHAR * sum(len(message["content"]) for message in checked)
        try:
            pieces = self._template.generate(
                messages=checked, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
            return _join(pieces, limit)
        except _RefusedError as error:
            raise PromptError(f"the chat template refuses these messages: {error.message}") from error
        except SecurityError as error:
            raise BundleError(f"the chat template was stopped: {error.message}. Use --raw to skip it.") from error
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"the bundle's chat template failed ({type(error).__name__}: {error}). Use --raw to skip it."
            ) from error


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as plain dicts with text content; PromptError gives the place and the reason."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError('messages must be a list of {"role": ..., "content": ...} objects.')
    if not messages:
        raise PromptError("messages is empty; give at least one user message.")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def _check_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"messages[{index}] is {type(message).__name__}; expected an object with role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"messages[{index}] has the role {role!r}; expected one of {', '.join(ROLES)}.")
    return {**message, "role": role, "content": _text_content(index, message.get("content"))}


def _text_content(index: int, content: object) -> str:
    """Return content as text; a list of {"type": "text"} parts is joined, anything else is refused."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise PromptError(f"messages[{index}] has content that is not text; only text parts are supported.")


def _join(pieces: Any, limit: int) -> str:
    """Join rendered pieces, and stop a template that never ends."""
    out: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise SecurityError(f"it wrote more than {limit} characters")
        out.append(piece)
    return "".join(out)


class _RefusedError(TemplateError):
    """Raised by the template itself through raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, which also refuses to multiply its way to huge texts and numbers."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [x for x in (left, right) if isinstance(x, (str, bytes, list, tuple))]
        times = [x for x in (left, right) if isinstance(x, int)]
        if operator == "*" and sized and times and len(sized[0]) * times[0] > _MIN_OUTPUT_CHARS:
            raise SecurityError(f"it repeats a text {times[0]} times")
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise SecurityError("it raises a number to a huge power")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as transformers writes it in templates (jinja2's own filter escapes HTML)."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
