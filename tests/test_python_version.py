"""JetPack 6 ships Python 3.10: no file uses the syntax, or names of the standard library, that came later.

mypy checks the same against the library's stubs (`python_version` in pyproject.toml); this is the check that runs
wherever the tests run, on what needs no types.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLDEST = (3, 10)
# What has to run on a board, and what its users copy from.
BOARD_SIDE = ("runtime/eopc_runtime", "compiler/eopc_compiler/board", "compiler/eopc_compiler/cli", "examples")
NEWER_MODULES = {"tomllib", "wsgiref.types", "asyncio.taskgroups", "compression", "annotationlib"}
NEWER_NAMES = {
    "typing": {
        "Self", "Never", "LiteralString", "NotRequired", "Required", "TypeVarTuple", "Unpack", "assert_never",
        "assert_type", "reveal_type", "dataclass_transform", "override", "TypeAliasType", "ReadOnly", "TypeIs",
    },
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "verify", "member", "nonmember", "global_enum"},
    "datetime": {"UTC"},
    "asyncio": {"TaskGroup", "Runner", "timeout", "Barrier"},
    "contextlib": {"chdir"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
    "warnings": {"deprecated"},
    "collections.abc": {"Buffer"},
    "importlib.resources.abc": {"Traversable"},
}  # fmt: skip
NEWER_BUILTINS = {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"}
NEWER_METHODS = {"add_note"}


def sources() -> list[Path]:
    """Python files of the half of eopc that runs on a board."""
    return sorted(path for top in BOARD_SIDE for path in (ROOT / top).rglob("*.py"))


def too_new(text: str) -> list[str]:
    """What in a file Python 3.10 does not have."""
    try:
        tree = ast.parse(text, feature_version=OLDEST)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    return [f"line {node.lineno}: {what}" for node in ast.walk(tree) for what in _newer(node)]  # type: ignore[attr-defined]


def _newer(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name in NEWER_MODULES]
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{a.name}" for a in node.names if a.name in NEWER_NAMES.get(node.module or "", ())}
        return sorted(names | ({node.module or ""} & NEWER_MODULES))
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        is_newer = node.attr in NEWER_METHODS or node.attr in NEWER_NAMES.get(owner, ())
        return [f"{owner}.{node.attr}"] if is_newer else []
    if isinstance(node, ast.Name) and node.id in NEWER_BUILTINS:
        return [node.id]
    return []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_board_side_runs_on_python_3_10(path: Path) -> None:
    """Every file parses as 3.10 and asks its library for nothing newer."""
    assert too_new(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "import tomllib",
        "from tomllib import loads",
        "from typing import Any, Self",
        "import enum\nclass A(enum.StrEnum):\n    pass",
        "from datetime import UTC",
        "raise ExceptionGroup('two', [])",
        "error = ValueError()\nerror.add_note('more')",
    ],
)
def test_the_check_sees_what_is_newer(line: str) -> None:
    """The negative twins."""
    assert len(too_new(line)) == 1


def test_the_check_lets_3_10_pass() -> None:
    """match, parenthesised with, union types and zip(strict) are all there."""
    text = (
        "from typing import Any, TypeAlias\nmatch 1:\n    case int() | None:\n        list(zip([], [], strict=True))\n"
    )
    assert too_new(text) == []
    assert len(sources()) > 40
