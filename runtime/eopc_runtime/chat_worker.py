"""The child process that renders a chat template: `python -m eopc_runtime.chat_worker`, JSON lines in and out.

A template is a program that comes with the model. jinja2's sandbox keeps it from the interpreter, but in one process
nothing bounds what it costs: a single call can double a text until memory ends. So it runs here, where the system ends
it: on CPU time, counted per request so that other load on the machine does not matter; on memory; and no file or
socket can be opened once the first template is read. Its parent ends it too (see chat.py).

A request is {"source": ...} once, then {"messages": ..., "names": ..., "now": ..., "limit": ...} each; an answer is
{"ok": text} or {"refused": text} (the template's own words) or {"stopped": text} or {"failed": text}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What the library imports only when it is used, and could not any more when no file can be opened.
WARM_UP = "{{ 'a b' | wordwrap }}{{ 1 | pprint }}{{ strftime_now('%d %b %Y') }}{{ 1 | tojson }}{{ missing.x }}"
CPU_S = 0.3  # of one request; honest templates take milliseconds
MEMORY_BYTES = 384 << 20  # of address space; the interpreter itself takes 30 to 60 MB of it


class _RefusedError(TemplateError):
    """Raised by the template itself through raise_exception."""


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def serve() -> None:
    """Answer requests until stdin ends; one that costs too much ends the process."""
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    warm, _ = _compile(WARM_UP, datetime(2000, 1, 1).strftime)
    assert warm is not None and "failed" in _render(warm, {"messages": [], "names": {}, "limit": 1000})
    _confine()
    template: Template | None = None
    now = datetime.now()

    def strftime_now(pattern: str) -> str:
        return now.strftime(pattern)

    while line := lines.readline():
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        if "source" in request:
            template, answer = _compile(request["source"], strftime_now)
        else:
            assert template is not None
            now = datetime.fromisoformat(request["now"])
            answer = _render(template, request)
        content = json.dumps(answer).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(content)
        out.flush()


def _confine() -> None:
    """Give up memory, files, cores and children; what the template needs is imported by now."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also within one call into C
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _compile(source: str, strftime_now: Any) -> tuple[Template | None, dict[str, str]]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    del environment.globals["lipsum"]  # no prompt needs filler text
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source), {"ok": ""}
    except TemplateSyntaxError as error:
        return None, {"failed": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # constant expressions are evaluated here
        return None, _why(error)


def _render(template: Template, request: dict[str, Any]) -> dict[str, str]:
    try:
        pieces = template.generate(messages=request["messages"], **request["names"])
        return {"ok": _join(pieces, request["limit"])}
    except Exception as error:
        return _why(error)


def _join(pieces: Iterable[str], limit: int) -> str:
    """Join rendered pieces, and stop a template that never ends."""
    out: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise SecurityError(f"it wrote more than {limit} characters")
        out.append(piece)
    return "".join(out)


def _why(error: Exception) -> dict[str, str]:
    if isinstance(error, _RefusedError):
        return {"refused": error.message or ""}
    if isinstance(error, SecurityError):
        return {"stopped": (error.message or "").rstrip(".")}
    if isinstance(error, MemoryError):
        return {"stopped": "it needs more memory than any prompt"}
    return {"failed": f"{type(error).__name__}: {error}"}


def _raise_exception(message: object) -> None:
    raise _RefusedError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as transformers writes it in templates (jinja2's own filter escapes HTML)."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


if __name__ == "__main__":
    serve()
