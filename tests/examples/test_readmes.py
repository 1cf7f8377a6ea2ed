"""The commands of the Jetson READMEs, executed in order up to the point that needs the board."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from eopc_runtime.cli import cli

from ..conftest import write_tiny_checkpoint
from .conftest import EXAMPLES, NEEDS_GPU, ROOT, Block, Place, blocks, make_place

STEPS = [folder.name for folder in sorted(EXAMPLES.iterdir()) if folder.is_dir() and folder.name[:2].isdecimal()]
# calibrate_modes.py at short lengths, with the fewest cells, one visit each, without waiting for a quiet machine
SHORT = (
    "--settle 0 --sequences 2 --meter tegrastats -- --prompt-range 8:32 --new-range 4:16 "
    "--fit-cells 6 --conformal-cells 1 --rounds 1 --patience 0"
)


@dataclass
class World:
    """One sandbox for all READMEs; a step runs once, after those before it."""

    place: Place
    checkpoint: Path
    output: dict[str, str] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    def upto(self, step: str) -> str:
        """Run the READMEs up to one; return what its commands printed, stdout and stderr of one block after another."""
        for name in STEPS[: STEPS.index(step) + 1]:
            if name not in self.output:
                assert name not in self.begun, f"{name} has failed before"
                self.begun.add(name)
                todo = [block for block in blocks(EXAMPLES / name / "README.md") if block.tag != "jetpack7"]
                self.output[name] = "".join(self._run(block) for block in todo)
        return self.output[step]

    def _run(self, block: Block) -> str:
        done = self.place.run(block, EOPC_TEST_CHECKPOINT=str(self.checkpoint), EOPC_TEST_CALIBRATE=SHORT)
        assert done.returncode == 0, f"{block.text}\n--\n{done.stdout}\n--\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The sandbox of this file, and a checkpoint of two layers."""
    folder = tmp_path_factory.mktemp("jetson")
    checkpoint = write_tiny_checkpoint(folder / "tiny-llama", num_hidden_layers=2)
    return World(make_place(folder / "home"), checkpoint)


def eopc_lines() -> list[list[str]]:
    """Every eopc command line of the READMEs, those for JetPack 7 included."""
    text = "\n".join(block.text for step in STEPS for block in blocks(EXAMPLES / step / "README.md"))
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in words if line and line[0] == "eopc"]


@pytest.mark.parametrize("words", eopc_lines(), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    """Command, options and arguments are known to click, also where a stand-in would not notice."""
    pytest.importorskip("torch", reason="`eopc build` needs the compiler extra")
    context = click.Context(cli, info_name="eopc")
    name, command, rest = cli.resolve_command(context, words[1:])
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=context)
        name, command, rest = command.resolve_command(context, rest)
    assert command is not None
    command.make_context(name or "", rest, resilient_parsing=False)


def test_build_and_copy(world: World) -> None:
    """The build is in the dialect of TensorRT 10.3; the copy on the board is whole, has a meter, and answers."""
    output = world.upto("01-build-and-copy")
    manifest = json.loads((world.place.board / "home/smollm2.eopc/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["device"], manifest["dialect"], manifest["precision"]) == ("orin", "primitive", "int8")
    assert manifest["opset"] <= 20
    assert output.count("all verified") == 2  # before and after the copy
    assert "R36 (release)" in output
    assert "ina3221, VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0" in output  # doctor: the meter that keeps the budget
    assert re.search(r"\[t0: \S+ m?J of 10 J \(prior\), ", output)


def test_the_engine_line_names_what_is_missing(world: World) -> None:
    """Without a GPU: exit code 1 and one sentence, no traceback, nothing written."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA GPU here")
    output = world.upto("01-build-and-copy")
    stopped = (world.place.board / "home/stopped.txt").read_text(encoding="utf-8")
    assert "stopped with 1" in output
    assert stopped.startswith("Error: ")
    assert "no NVIDIA GPU here" in stopped
    assert not (world.place.board / "home/smollm2.eopc/engines").exists()


def test_assistant(world: World) -> None:
    """Both questions are answered within their budget, and the day's joules are written down."""
    output = world.upto("02-assistant")
    spent = re.findall(
        r"\[t\d.*: (\S+ m?J) of 10 J \(prior\), ended by (?:stop|length|budget); .* left today\]", output
    )
    assert len(spent) == 2, output
    state = json.loads((world.place.board / "home/jetson/02-assistant/allowance.json").read_text(encoding="utf-8"))
    assert 0 < state["windows"]["day"]["spent_j"] < 20


def test_calibrate_and_validate(world: World) -> None:
    """Two modes are calibrated side by side with tegrastats, the one that asks for a reboot is named, MAXN is back."""
    output = world.upto("03-calibrate-and-validate")
    board = world.place.board
    table = json.loads((board / "home/smollm2.eopc/energy.json").read_text(encoding="utf-8"))
    assert (table["schema"], table["source"]) == (2, "calibrated")
    assert {table["mode"], *(other["mode"] for other in table["other_modes"])} == {"MAXN", "MODE_30W"}
    for mode in ("MAXN", "MODE_30W"):
        calibrated = json.loads((board / f"home/calibration/{mode}.calibrate.json").read_text(encoding="utf-8"))
        validated = json.loads((board / f"home/calibration/{mode}.validate.json").read_text(encoding="utf-8"))
        assert (calibrated["power_mode"], calibrated["meter"]) == (mode, "tegrastats")
        assert calibrated["identity"]["module"] == "p3701-0005"
        assert validated["verified"] == 2
    assert re.search("MODE_15W +left out: .*[Rr]eboot required", output)
    assert "Power mode MAXN is restored." in output
    assert (board / "var/lib/nvpmodel/status").read_text() == "pmode:0000"
    assert "calibrated in power mode MODE_30W" in output  # what inspect shows: the table written last
    assert "sequence  plan" in re.sub(" +", "  ", output)  # validation against the log


def test_service(world: World) -> None:
    """The service answers over a socket from calibrated prices, and counts its joules in its own folder."""
    output = world.upto("04-systemd")
    assert re.search(r"\[t\d.*: .* of 10 J \(calibrated\), ended by ", output)
    state = json.loads((world.place.board / "var/lib/eopc-assistant/allowance.json").read_text(encoding="utf-8"))
    assert state["windows"]["day"]["spent_j"] > 0
    assert (world.place.home / "systemctl.log").read_text().splitlines()[:2] == [
        "daemon-reload",
        "enable --now eopc-assistant.socket",
    ]


def test_pip_is_asked_for_what_exists(world: World) -> None:
    """The extras are the distribution's, the board gets neither torch nor a TensorRT from PyPI."""
    world.upto("04-systemd")
    log = (world.place.home / "pip.log").read_text(encoding="utf-8").splitlines()
    extras = {extra for line in log for group in re.findall(r"\[([\w,-]+)\]", line) for extra in group.split(",")}
    table = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert table is not None
    assert extras <= set(re.findall(r"^([\w-]+) = ", table[1], re.M))
    on_board = [line for line in log if "eopc-0.0.0-py3-none-any.whl[ort]" in line]
    assert len(on_board) == 2
    assert not [line for line in on_board if "torch" in line or "tensorrt" in line]


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    """The negative twin: a wrong option, a missing file, and a line that should stop but does not."""
    place = make_place(tmp_path / "home")
    for text in ("eopc inspect nothing.eopc\ntrue\n", "eopc doctor --no-such-option\n", "sudo cp no-such-file /opt/\n"):
        assert place.run(Block("board", text)).returncode != 0
    done = place.run(Block("board", f"true   {NEEDS_GPU}\n"))
    assert "stopped with 0" in done.stdout


def test_readmes_say_what_was_executed() -> None:
    """Every step says what has run and what goes wrong, and the links between them lead somewhere."""
    for readme in [EXAMPLES / "README.md", *(EXAMPLES / step / "README.md" for step in STEPS)]:
        text = readme.read_text(encoding="utf-8")
        if readme.parent != EXAMPLES:
            assert "## What goes wrong" in text
            assert "## What was executed" in text
            assert "JetPack 6.2" in text
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert link.startswith("http") or (readme.parent / link).exists(), f"{readme}: {link}"


def test_examples_are_python_3_10() -> None:
    """JetPack 6 has Python 3.10: the scripts parse by its grammar."""
    import ast

    scripts = sorted(EXAMPLES.rglob("*.py"))
    assert {script.name for script in scripts} >= {"assistant.py", "calibrate_modes.py"}
    for script in scripts:
        ast.parse(script.read_text(encoding="utf-8"), str(script), feature_version=(3, 10))
