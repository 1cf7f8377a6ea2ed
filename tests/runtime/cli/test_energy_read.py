"""`eopc energy read`: its JSON, its text, and its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eopc_runtime.cli import cli
from eopc_runtime.cli.energy_read import sparkline

SHARED = Path(__file__).parents[4] / "shared" / "energy" / "data" / "tegrastats"  # optional data beside a checkout

LINE = "RAM 1/2MB CPU [0%@729] VDD_IN {0}mW/9mW VDD_CPU_GPU_CV 500mW/500mW VDD_SOC 1000mW/1mW\n"
ORIN = (
    "RAM 1/2MB VDD_GPU_SOC 3000mW/1mW VDD_CPU_CV 0mW/0mW VIN_SYS_5V0 4000mW/1mW NC 0mW/0mW VDDQ_VDD2_1V8AO 300mW/1mW\n"
)


def read(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["energy", "read", *map(str, args)], input=stdin)


def as_json(*args: object, stdin: str | bytes | None = None) -> dict[str, Any]:
    result = read(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)  # exactly one object, or this fails
    return value


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Eleven lines from 5 to 6 W under a date header."""
    path = tmp_path / "power.log"
    path.write_text("Sun Apr 19 2026\n" + "".join(LINE.format(5000 + 100 * i) for i in range(11)))
    return path


def test_json_has_the_promised_keys(log: Path) -> None:
    """10 s from 5 to 6 W are 55 J; every line has its total."""
    value = as_json("--tegrastats", log, "--interval", 1)
    assert value["samples"] == 11
    assert value["energy_j"] == pytest.approx(55.0)
    assert value["mean_w"] == pytest.approx(5.5)
    assert (value["rails"], value["duration_s"], value["skipped"]) == (["VDD_IN"], 10.0, 1)
    assert [line["total_mw"] for line in value["lines"]] == [5000 + 100 * i for i in range(11)]
    assert value["lines"][0] == {"line": 2, "t_s": 0.0, "total_mw": 5000, "reason": None}
    assert value["boards"] == ["orin-nx", "orin-nano", "xavier-nx"]
    assert value["rails_w"]["VDD_SOC"] == 1.0
    assert value["notes"] == ["1 line(s) skipped: not from tegrastats"]


def test_what_is_not_known_is_null(log: Path) -> None:
    """No clock and no interval: no joules, no seconds. A damaged line: no total."""
    log.write_text(log.read_text() + LINE.format("x"))
    value = as_json("--tegrastats", log)
    assert (value["energy_j"], value["duration_s"], value["time_source"]) == (None, None, None)
    assert value["lines"][-1]["total_mw"] is None
    assert "VDD_IN has no readable value" in value["lines"][-1]["reason"]


def test_stdin_and_other_bytes_are_read() -> None:
    """- is stdin; a byte order mark, carriage returns and bytes that are no text do no harm."""
    raw = b"\xef\xbb\xbf" + LINE.format(5000).replace("\n", "\r\n").encode() + b"\xff\xfe\x00\n" + ORIN.encode()
    value = as_json("--tegrastats", "-", stdin=raw)
    assert [line["total_mw"] for line in value["lines"]] == [5000, 7000]


def test_board_and_rails_decide_the_sum(log: Path) -> None:
    """A named board's rule, or exactly the rails that were named."""
    log.write_text(ORIN * 3)
    four = "VDD_GPU_SOC,VDD_CPU_CV, VIN_SYS_5V0,VDDQ_VDD2_1V8AO"
    assert as_json("--tegrastats", log, "--board", "agx-orin", "--interval", 1)["energy_j"] == 14.0
    assert as_json("--tegrastats", log, "--rails", four, "--interval", 1)["energy_j"] == pytest.approx(14.6)
    value = as_json("--tegrastats", log, "--board", "thor", "--interval", 1)
    assert (value["samples"], value["energy_j"], value["rails"]) == (0, None, [])


def test_the_text_has_units_and_a_picture(log: Path) -> None:
    """Rails with watts and joules, what is not added, and power over time; notes go to stderr."""
    result = read("--tegrastats", log, "--interval", 1)
    assert result.exit_code == 0
    for words in ("VDD_IN (orin-nx", "55.0000 J", "5.5000 W mean", "not added", "5.000 W to 6.000 W"):
        assert words in result.stdout
    assert "▁▂▂▃▄▅▅▆▇▇█" in result.stdout
    assert "note: 1 line(s) skipped" in result.stderr


def test_text_of_a_mixed_log_lists_its_lines(log: Path) -> None:
    """No energy to show, so the totals are shown, runs of equal lines as one row."""
    log.write_text(LINE.format(5000) * 3 + ORIN + LINE.format("x"))
    lines = read("--tegrastats", log).stdout.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["1-3", "5.000"], ["4", "7.000"], ["5", "-"]]
    log.write_text((LINE.format(5000) + ORIN) * 50)
    assert read("--tegrastats", log).stdout.endswith("... and 60 more rows; --json has every line\n")


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("RAM 1/2MB CPU [0%@729] cpu@42C\n", [], "run tegrastats with sudo"),
        ("hello\n", [], "no line of this log is from tegrastats (1 skipped)"),
        ("", [], "no line of this log is from tegrastats"),
        (ORIN, ["--board", "oirn"], 'Did you mean "orin"'),
        (ORIN, ["--board", "cpu"], "no power rails of its own"),
        (ORIN, ["--rails", "VIN_SYS_5V0,,"], "empty name"),
        (ORIN, ["--rails", "VIN"], 'no rail "VIN"'),
        (ORIN, ["--interval", "0"], "seconds between two lines"),
        (ORIN, ["--interval", "nan"], "seconds between two lines"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_mistakes_are_one_message(log: Path, text: str, options: list[str], says: str, extra: list[str]) -> None:
    """Exit code 1, the message on stderr, nothing on stdout."""
    log.write_text(text)
    result = read("--tegrastats", log, *options, *extra)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr


def test_a_log_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A missing file, and a folder."""
    for path in (tmp_path / "no.log", tmp_path):
        result = read("--tegrastats", path)
        assert (result.exit_code, str(path) in result.stderr) == (1, True)
    assert read().exit_code == 2  # the option is required


def test_the_group_is_as_lazy_as_the_program() -> None:
    """`eopc --help` and `eopc energy --help` import no meter, no numpy; a slip names the nearest command."""
    code = (
        "import sys; from click.testing import CliRunner; from eopc_runtime.cli import cli\n"
        "for args in (['--help'], ['energy', '--help']): assert CliRunner().invoke(cli, args).exit_code == 0\n"
        "parts = ('eopc_runtime.power', 'eopc_runtime.cli.energy_', 'numpy')\n"
        "heavy = [name for name in sys.modules if name.startswith(parts)]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = CliRunner().invoke(cli, ["energy", "raed"])
    assert (result.exit_code, "Did you mean 'read'?" in result.stderr) == (2, True)


def test_a_sparkline_keeps_gaps_and_extremes() -> None:
    """The lowest value is the lowest bar, the highest the highest; what is missing is blank."""
    assert sparkline([1.0, None, 8.0]) == "▁ █"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([None]) == sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(661)])) <= 72


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public tegrastats logs are not beside this checkout")
def test_the_golden_log_through_the_command() -> None:
    """8010.7175 J at 1.0 s between lines, as a user types it."""
    log = SHARED / "orin_nano_super_100ms_load_20260419.log"
    value = as_json("--tegrastats", log, "--interval", 1.0, "--board", "orin-nano")
    assert (value["samples"], len(value["lines"]), value["duration_s"]) == (661, 661, 660.0)
    assert value["energy_j"] == pytest.approx(8010.7175, abs=1e-6)
    assert value["release"] == "r36 (JetPack 6)"
