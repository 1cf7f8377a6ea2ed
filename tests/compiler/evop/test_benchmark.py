"""The benchmark script runs end to end on a tiny checkpoint, and its figures are what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "evop.py"
Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script's main with arguments; gives its JSON, or its table as text."""
    if not SCRIPT.is_file():
        pytest.skip("the benchmark scripts are not beside these tests")
    spec = importlib.util.spec_from_file_location("benchmark_evop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_evop", module)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def main(*arguments: object, status: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["evop.py", *map(str, arguments)])
        assert module.main() == status
        said = capsys.readouterr()
        if status:
            return said.err
        return json.loads(said.out) if "--json" in arguments else said.out

    return main


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--text arguments of two small texts of many paragraphs."""
    folder, arguments = tmp_path_factory.mktemp("texts"), []
    for name, words in (("prose", "the sea and the light and a long road"), ("sums", "1 + 2 = 3, 4 + 5 = 9")):
        paragraphs = [f"{words} {i} {words[: 5 + i % 20]}\n" * 4 for i in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(paragraphs))
        arguments += ["--text", f"{name}={folder / name}.txt"]
    return arguments


def test_a_table_is_made_once_and_replayed(run: Run, texts: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """All 4 + 6 patterns are in it, a second run computes none, and on so small a space every search finds the best."""
    path = tmp_path / "table.json"
    make = ["table", "--model", tiny_checkpoint, *texts, "--remove", 2, "--tokens", 40, "--out", path, "--json"]
    make += ["--journal", tmp_path / "journal.jsonl"]
    assert (run(*make)["computed"], run(*make)["computed"]) == (10, 0)
    losses = json.loads(path.read_text())["losses"]
    assert sorted(bits.count("1") for bits in losses) == [1] * 4 + [2] * 6
    best = min(loss for bits, loss in losses.items() if bits.count("1") == 2)
    replayed = run("replay", path, "--seeds", 2, "--evaluations", 12, "--json")
    assert (replayed["patterns"], replayed["best"]) == (6, best)
    assert replayed["methods"]["evolve"]["regret"][-1] == replayed["methods"]["random"]["regret"][-1] == 0
    assert "evolve" in run("replay", path, "--seeds", 1)


def test_speed_compares_equal_losses(run: Run, texts: list[str], tiny_checkpoint: Path) -> None:
    """Each round gives a ratio, fewer layers are run than asked for, and the genetic search asks for repeats."""
    arguments = ["--model", tiny_checkpoint, *texts, "--remove", 2, "--tokens", 40, "--rounds", 3]
    result = run("speed", *arguments, "--method", "epps", "--asked", 70, "--json")
    assert len(result["ratios"]) == 3 and result["ratio"] == sorted(result["ratios"])[1]
    assert result["unique"] <= math.comb(4, 2) < result["asked"] == 70 and result["layers_run_share"] < 1


def test_heldout_judges_every_method_on_both_texts(run: Run, texts: list[str], tiny_checkpoint: Path) -> None:
    """Dense once and each method per seed, with a loss per text; best-of-N gets as many evaluations as the search."""
    arguments = ["--model", tiny_checkpoint, *texts, "--remove", 1, "--windows", 2, "--window", 24]
    rows = run("heldout", *arguments, "--seeds", 2, "--evaluations", 3, "--also", "epps", "--json")["rows"]
    per_seed = ["evolve", "epps", "random", "one random", "shortgpt"]
    # of four layers, greedy removal may try the two in the middle
    assert sorted(row["method"] for row in rows) == sorted(["dense", *(2 * [*per_seed, "sleb"])])
    assert all(set(row["heldout"]) == {"prose", "sums"} for row in rows)
    assert {row["evaluations"] for row in rows if row["method"] in ("evolve", "random")} == {3}
    assert len(run("heldout", *arguments, "--seeds", 1, "--evaluations", 3).splitlines()) == 1 + 1 + 5


def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path) -> None:
    """A table that is not there, or not whole."""
    assert "subcommand table" in run("replay", tmp_path / "no.json", status=1)
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"layers": 4, "remove": 2, "influence": [], "losses": {"1100": 1.0}}))
    assert "not all" in run("replay", part, status=1)
