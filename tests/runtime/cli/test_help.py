"""The group of commands: help without heavy imports, near misses, and extras that are missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from eopc_runtime.cli import cli
from eopc_runtime.cli.energy import ENERGY_COMMANDS
from eopc_runtime.cli.main import COMMANDS, EXTRAS, Entry

Eopc = Callable[..., Result]
Child = Callable[..., subprocess.CompletedProcess[str]]
RUNTIME_COMMANDS = [
    *([name] for name, entry in COMMANDS.items() if "runtime" in entry.module and name != "energy"),
    *(["energy", name] for name in ENERGY_COMMANDS),
]


def test_help_and_every_commands_module_load_no_heavy_package(child: Child) -> None:
    """Building the help, and importing the runtime's commands, leaves numpy, onnxruntime and torch alone."""
    code = (
        "import importlib, sys\n"
        "from eopc_runtime.cli import cli\n"
        "from eopc_runtime.cli.main import COMMANDS\n"
        "import click\n"
        "cli.get_help(click.Context(cli, info_name='eopc'))\n"
        "print(*(m for m in sys.modules if m.startswith('eopc_runtime.cli.')))\n"
        "[importlib.import_module(e.module) for e in COMMANDS.values() if 'runtime' in e.module]\n"
        "from eopc_runtime.cli.energy import ENERGY_COMMANDS\n"
        "[importlib.import_module(e.module) for e in ENERGY_COMMANDS.values()]\n"
        "print(*(m for m in ('numpy', 'onnxruntime', 'torch', 'tokenizers', 'jinja2') if m in sys.modules))\n"
    )
    done = child("-c", code)
    assert done.returncode == 0, done.stderr
    loaded_by_help, heavy = done.stdout.split("\n")[:2]
    assert loaded_by_help == "eopc_runtime.cli.main"
    assert heavy == ""


def test_help_lists_every_command_with_its_line(eopc: Eopc) -> None:
    """`eopc --help` names all commands of the table, and --version the version."""
    text = " ".join(eopc("--help").output.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.help}" in text
    assert "eopc, version" in eopc("--version").output


@pytest.mark.parametrize("words", RUNTIME_COMMANDS, ids=" ".join)
def test_every_runtime_command_has_help(eopc: Eopc, words: list[str]) -> None:
    """Every command explains itself and knows --json."""
    result = eopc(*words, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_unknown_command_names_the_nearest_or_all(eopc: Eopc) -> None:
    """A typo gets its near miss, nonsense gets the list; both are wrong usage (2)."""
    assert "Did you mean 'inspect'?" in eopc("inspct").output
    result = eopc("zzzz")
    assert result.exit_code == 2
    assert "Commands: build, run" in result.output
    assert "Did you mean 'predict'?" in eopc("energy", "predct").output
    assert eopc("energy", "zzzz").exit_code == 2


@pytest.mark.parametrize("package", ["torch", "eopc_compiler"])
def test_a_command_whose_extra_is_missing_says_how_to_install_it(
    eopc: Eopc, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch, `eopc build` names the compiler extra; `eopc --help` still works."""
    (tmp_path / "needs_it.py").write_text(f"import {package}_that_is_missing_here.part")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "build", Entry("needs_it", "build", "Compile."))
    monkeypatch.setitem(sys.modules["eopc_runtime.cli.main"].EXTRAS, f"{package}_that_is_missing_here", "compiler")
    result = eopc("build", "--help")
    assert result.exit_code == 1
    assert "`eopc build` needs the compiler extra" in result.output
    assert 'pip install "eopc[compiler]"' in result.output
    assert eopc("--help").exit_code == 0


def test_a_missing_module_of_our_own_is_not_hidden(eopc: Eopc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: a broken import that no extra explains stays a visible bug."""
    (tmp_path / "broken_one.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "build", Entry("broken_one", "build", "Compile."))
    assert isinstance(eopc("build").exception, ModuleNotFoundError)


def test_a_command_of_a_group_is_named_with_its_group(
    eopc: Eopc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra of `eopc energy read` is told by the words that were typed."""
    (tmp_path / "needs_nvml.py").write_text("import pynvml_that_is_missing_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(EXTRAS, "pynvml_that_is_missing_here", "nvml")
    monkeypatch.setitem(ENERGY_COMMANDS, "read", Entry("needs_nvml", "read", "Read."))
    result = eopc("energy", "read")
    assert result.exit_code == 1
    assert "`eopc energy read` needs the nvml extra" in result.stderr


def test_the_group_is_a_click_group() -> None:
    """The entry point stays usable by tools that walk click commands."""
    assert isinstance(cli, click.Group)
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)
