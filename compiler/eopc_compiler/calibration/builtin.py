"""Built-in calibration text from what every Python installation ships, and generated text; nothing is downloaded."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from functools import cache
from pathlib import Path

from eopc_compiler.calibration.arithmetic import worked_sums
from eopc_compiler.calibration.dialogue import task_dialogues
from eopc_compiler.calibration.domains import Domain, document_id
from eopc_runtime.errors import UsageError

_CODE_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zoneinfo",
)  # fmt: skip
_MAX_DOCUMENT_CHARS = 40_000  # of one source file, so that no file dominates its split
_MIN_DOCUMENT_CHARS = 400
_ARITHMETIC_DOCUMENTS = 600
_DIALOGUES = 600


@cache
def default_domains() -> tuple[Domain, ...]:
    """Text, code, arithmetic and dialogue without a download; the same for one Python version, read once.

    Text: the language reference and docstrings. Code: library sources. No file gives both. Arithmetic:
    generated worked sums. Dialogue: generated task dialogues. Raises UsageError where Python was installed
    without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = _reference_topics()
    code = []
    for path in _library_sources(root):
        source = path.read_text(encoding="utf-8", errors="ignore")
        # Every third file gives its documentation only, so that text and code stay disjoint.
        if int(document_id(path.relative_to(root).as_posix()), 16) % 3 == 0:
            text.append(_docstrings(source))
        else:
            code.append(source[:_MAX_DOCUMENT_CHARS])
    if not code:
        raise UsageError(
            f"This Python has no library sources in {root}, so there is no built-in calibration text. Give "
            "your own with --calib NAME=FILE."
        )
    return (
        Domain("text", tuple(doc for doc in text if len(doc) >= _MIN_DOCUMENT_CHARS)),
        Domain("code", tuple(doc for doc in code if len(doc) >= _MIN_DOCUMENT_CHARS)),
        Domain("arithmetic", worked_sums(_ARITHMETIC_DOCUMENTS, random.Random(20240229))),
        Domain("dialogue", task_dialogues(_DIALOGUES, random.Random(20240301))),
    )


def _reference_topics() -> list[str]:
    """The language reference that `help()` shows; empty where a distribution packages it apart."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [_plain_rest(topic) for _, topic in sorted(topics.items())]


def _library_sources(root: Path) -> list[Path]:
    """Top-level modules and a few packages of the standard library, sorted by name."""
    files = [path for path in root.glob("*.py") if not path.name.startswith("_sysconfigdata")]
    for package in _CODE_PACKAGES:
        files += [path for path in (root / package).rglob("*.py") if "test" not in path.parts]
    return sorted(files)


def _docstrings(source: str) -> str:
    """The longer docstrings of a module, joined; empty where the source does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 120)


def _plain_rest(text: str) -> str:
    """A reference topic without heading rules, so that the text is mostly prose."""
    return re.sub(r"(?m)^[*=~\-^]{3,}\n", "", text).strip()
