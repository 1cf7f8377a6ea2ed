"""What the command line writes, and how it ends when a stream or the user breaks off."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from eopc_runtime.cli.output import Progress, format_bytes
from eopc_runtime.session import Session

Eopc = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[3]


def test_interrupt_is_one_line_and_130(eopc: Eopc, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with one line on stderr and the code shells expect."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "stream", interrupted)
    result = eopc("run", bundle, "--prompt", "a")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    """A closed pipe ends the command quietly."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    command = [sys.executable, "-m", "eopc_runtime.cli", "devices"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert stderr == ""


def test_a_stream_without_utf8_shows_marks_instead_of_a_traceback() -> None:
    """Output that the terminal cannot show is replaced."""
    code = (
        "import click\nfrom eopc_runtime.cli.main import main, cli\n"
        "cli.get_command = lambda ctx, name: click.Command('run', callback=lambda: click.echo('\\u65e5'))\n"
        "main(['run'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (0, "?\n")


def test_progress_is_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal only finished parts are written, one per line, on stderr."""
    progress = Progress()
    progress.update("1 of 2")
    progress.done("both done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "both done\n")


def test_an_error_has_a_line_of_its_own_on_a_terminal() -> None:
    """Where progress stopped stays to be read, and the sentence that follows begins a new line."""
    code = (
        "import click\nfrom eopc_runtime.cli.main import main, cli\n"
        "from eopc_runtime.cli.output import command_progress\nfrom eopc_runtime.errors import UsageError\n"
        "def work():\n    command_progress().update('1 of 2')\n    raise UsageError('Too large.')\n"
        "cli.get_command = lambda ctx, name: click.Command('run', callback=work)\nmain(['run'])"
    )
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
        done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=False)
        seen = terminal.read(4096).decode()
        os.close(theirs)
    assert done.returncode == 1
    assert seen.splitlines() == ["", "1 of 2", "Error: Too large."]


def test_json_output_never_holds_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity and NaN, which JSON does not have, become null."""
    from eopc_runtime.cli.output import print_json

    print_json({"a": [math.inf, {"b": math.nan}], "c": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": 1.5}


def test_sizes_for_people() -> None:
    """Bytes are shown in binary units with one digit."""
    assert [format_bytes(n) for n in (10, 1536, 3 << 20, 5 << 40)] == [
        "10 B",
        "1.5 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]


def test_a_full_disk_behind_stdout_is_one_sentence(bundle: Path) -> None:
    """`eopc inspect > /dev/full` says what failed, without a traceback (the negative twin is every other test)."""
    command = [sys.executable, "-m", "eopc_runtime.cli", "inspect", str(bundle)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    assert done.returncode == 1
    assert "Error: the output cannot be read or written: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr
