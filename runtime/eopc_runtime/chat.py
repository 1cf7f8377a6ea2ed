"""Chat templates: messages to prompt text, rendered in a child process because templates come with the model.

The child (chat_worker.py) has jinja2's immutable sandbox and bounds on CPU time, memory and output; a template that
breaks them is an error, and the process goes on. One child serves all prompts of a template and ends with it.

Not covered: a hole in the sandbox itself. Whoever gets through it finds a process that can open no file and no socket.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from eopc_runtime.errors import BundleError, PromptError
from eopc_runtime.jsonfields import shown

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1_000_000
# A template repeats its messages once and adds headers; far more than that is a runaway loop.
_MIN_OUTPUT_CHARS = 200_000
_OUTPUT_CHARS_PER_CHAR = 4
_ANSWER_S = 20.0  # wall clock, for a child that is stuck without using the CPU; the child bounds its own CPU time

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template; raises BundleError when the template itself is broken. Thread-safe."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BundleError(
                f"the bundle's chat template has {len(source)} characters; the most is {MAX_TEMPLATE_CHARS}. "
                "Use --raw to skip it."
            )
        self._special_tokens = dict(special_tokens or {})
        self._now = now
        self._worker = _Worker(source)
        self._worker.start()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt for `messages` ({"role", "content"} each).

        Raises PromptError when the messages are malformed or the template refuses them, BundleError when the
        template fails, takes too long, or its output is out of all proportion.
        """
        checked = check_messages(messages)
        size = sum(len(message["content"]) for message in checked)
        request = {
            "messages": checked,
            "names": {**self._special_tokens, "add_generation_prompt": add_generation_prompt},
            "now": self._now().isoformat(),
            "limit": _MIN_OUTPUT_CHARS + _OUTPUT_CHARS_PER_CHAR * size,
        }
        try:
            line = json.dumps(request, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise PromptError("messages must hold only what JSON can: texts, numbers, lists and objects.") from None
        return self._worker.ask(line)

    def close(self) -> None:
        """End the child process; the next prompt starts another."""
        self._worker.stop()


class _Worker:
    """The child process of one template, started when it is needed and again after it was ended."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._release: Callable[[], object] = lambda: None  # ends the process; so do the end of this object and ours

    def start(self) -> None:
        """Start the child and let it compile the template."""
        with self._lock:
            self._started()

    def ask(self, line: str) -> str:
        """Return the rendered text for one request."""
        with self._lock:
            return _text_of(_exchange(self._started(), line))

    def stop(self) -> None:
        """End the child."""
        with self._lock:
            self._release()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._release()
            process = _spawn()
            self._release = weakref.finalize(self, _end, process)
            try:
                _text_of(_exchange(process, json.dumps({"source": self._source})), "does not compile")
            except BundleError:
                self._release()
                raise
            self._process = process
        return self._process


def _spawn() -> subprocess.Popen[bytes]:
    """Start a child that finds the modules this process finds, and knows nothing else of it."""
    environment = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "eopc_runtime.chat_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the parent
        )
    except OSError as error:
        raise PromptError(
            f"the chat template cannot be rendered: no process could be started ({error.strerror}). Free memory, or "
            "use --raw."
        ) from None


def _exchange(process: subprocess.Popen[bytes], line: str) -> dict[str, str] | None:
    """Send a line and return the answer; None, and no process any more, when there is none in time."""
    assert process.stdin is not None and process.stdout is not None
    watchdog = threading.Timer(_ANSWER_S, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        answer: dict[str, str] = json.loads(process.stdout.readline())
    except (OSError, ValueError):  # it was ended while it read or wrote
        _end(process)
        return None
    finally:
        watchdog.cancel()
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # bytes that the child has not read
                continue


def _text_of(answer: dict[str, str] | None, failed: str = "failed") -> str:
    """The text of an answer, or its error."""
    if answer is None:
        raise BundleError(
            "the chat template was stopped: it takes more time or memory than any prompt needs. Use --raw to skip it."
        )
    if "ok" in answer:
        return answer["ok"]
    if "refused" in answer:
        words = shown(answer["refused"]).rstrip(".")
        raise PromptError(f"the chat template refuses these messages: {words}. Change them, or use --raw.")
    if "stopped" in answer:
        raise BundleError(f"the chat template was stopped: {shown(answer['stopped'])}. Use --raw to skip it.")
    raise BundleError(f"the bundle's chat template {failed} ({shown(answer['failed'])}). Use --raw to skip it.")


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
        raise PromptError(f"messages[{index}] has the role {shown(repr(role))}; expected one of {', '.join(ROLES)}.")
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
