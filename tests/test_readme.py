"""What the README tells people to type exists."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

import click
import pytest

from eopc_runtime.cli import cli

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SEPARATORS = {"&&", "||", ";", "|", "&"}


def shell_commands(markdown: str) -> list[list[str]]:
    """Every simple command in the shell blocks, `a && b` taken apart."""
    found = []
    for line in "\n".join(BLOCK.findall(markdown)).splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in SEPARATORS:
                command.append(word)
            elif command:
                found.append(command[: command.index(">")] if ">" in command else command)
                command = []
    return found


def check_eopc(words: list[str]) -> None:
    """Parse a command line as click would, without touching files; raises UsageError for what does not exist."""
    pytest.importorskip("torch", reason="`eopc build` needs the compiler extra")
    context = click.Context(cli, info_name="eopc")
    name, command, rest = cli.resolve_command(context, words[1:])
    while isinstance(command, click.Group):  # `eopc energy read`
        context = click.Context(command, info_name=name, parent=context)
        name, command, rest = command.resolve_command(context, rest)
    assert command is not None
    options, left_over, _ = command.make_parser(click.Context(command, info_name=name)).parse_args(rest)
    assert not left_over, f"{' '.join(words)}: too many arguments"
    for parameter in command.params:
        given = options.get(parameter.name or "")
        assert given is not None or not parameter.required, f"{' '.join(words)} lacks {parameter.name}"


README = (ROOT / "README.md").read_text(encoding="utf-8")
EOPC_LINES = [words for words in shell_commands(README) if words[0] == "eopc"]


@pytest.mark.parametrize("words", EOPC_LINES, ids=" ".join)
def test_commands_of_the_readme_exist(words: list[str]) -> None:
    """Command, options and number of arguments are known to the CLI."""
    check_eopc(words)


def test_readme_shows_every_command_and_the_main_job_first() -> None:
    """A new command gets a line here too, and the first thing shown is the build."""
    assert EOPC_LINES[0][1] == "build"
    assert {words[1] for words in EOPC_LINES} == set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("line", ["eopc build --watts 5", "eopc biuld", "eopc inspect a b", "eopc prune a -o b"])
def test_a_command_that_does_not_exist_is_found_out(line: str) -> None:
    """The check above fails for an unknown option, an unknown command, one argument too many, one option missing."""
    with pytest.raises((click.UsageError, AssertionError)):
        check_eopc(line.split())


def test_both_one_liners_are_there() -> None:
    """One line installs and runs the main job, one line installs and runs the tests, CPU users get torch first."""
    blocks = [block.strip() for block in BLOCK.findall(README)]
    assert "bash .ci/run" in blocks
    main = next(block for block in blocks if "eopc build" in block)
    assert "\n" not in main
    assert main.index('pip install "torch==2.13.0"') < main.index(".[compiler,ort,demo]") < main.index("eopc build")


def test_ci_script_is_what_the_readme_says() -> None:
    """The script is executable, stops at the first failure, and runs the four checks after the same installation."""
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in text
    steps = ["torch==2.13.0", ".[compiler,ort,demo,test]", "ruff check", "ruff format --check", "mypy", "pytest"]
    positions = [re.search(rf"^(pip install .*)?\"?{re.escape(step)}", text, re.MULTILINE) for step in steps]
    assert all(positions), "a step is missing"
    starts = [match.start() for match in positions if match]
    assert starts == sorted(starts)


def test_named_files_exist() -> None:
    """Links into the repository and the files of the tree lead somewhere."""
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    tree = ["runtime/eopc_runtime", "compiler/eopc_compiler/board", "profiles", "tests", ".ci/run", "CHANGELOG.md"]
    for name in (*links, *tree):
        assert (ROOT / name).exists(), name
