"""The assistant's allowance: what a day, a crash, a wrong clock, a damaged file and a second process do to it.

What the library promises of allowances is tested in `tests/runtime/test_allowance.py`; here is what the assistant makes
of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eopc_runtime.allowance import BudgetPolicy
from eopc_runtime.errors import AllowanceError, BudgetError, UsageError
from eopc_runtime.windows import Allowance, Moment

from .conftest import EXAMPLES, load_script

assistant: Any = load_script(EXAMPLES / "02-assistant" / "assistant.py")
MAY_1, MAY_2 = datetime(2026, 5, 1, 12), datetime(2026, 5, 2, 12)


@dataclass
class Talk:
    """A session whose answers cost what they are told to, the least token 1 J."""

    costs: list[float]
    asked: list[tuple[list[dict[str, str]], float]] = field(default_factory=list)

    def stream(self, *, messages: list[dict[str, str]], budget: float) -> Any:
        if budget < 1.0:
            raise BudgetError("No token fits.")
        self.asked.append((messages, budget))
        return Running(min(self.costs.pop(0), budget), budget)


@dataclass
class Running:
    """An answer of two words; a cost that is negative breaks it off after the first."""

    cost_j: float
    budget_j: float

    def __iter__(self) -> Iterator[Any]:
        yield SimpleNamespace(text="Well, ")
        if self.cost_j < 0:
            raise KeyboardInterrupt
        yield SimpleNamespace(text="yes.")

    @property
    def result(self) -> Any:
        return SimpleNamespace(
            text="Well, yes.", energy_j=self.cost_j, energy_source="prior", plan="t0", finish_reason="stop", warnings=()
        )


def allowance(folder: Path, per_day_j: float = 20.0, day: datetime = MAY_1) -> BudgetPolicy:
    """An account on a day, of a machine that was started anew."""
    return BudgetPolicy(
        [Allowance(per_day_j, "day")], folder / "allowance.json", lambda: Moment(wall_s=day.timestamp())
    )


def state(folder: Path) -> tuple[str, float]:
    """The day that the file names, and the joules spent on it."""
    window = json.loads((folder / "allowance.json").read_text(encoding="utf-8"))["windows"]["day"]
    return window["since"][:10], window["spent_j"]


def test_an_answer_costs_the_day_what_it_spent(tmp_path: Path) -> None:
    """Set aside 10 J, spent 4 J: 4 J are booked; the last answer of a day gets what is left, then there is none."""
    talk, day = Talk([4.0, 10.0, 10.0]), allowance(tmp_path)
    assistant.converse(talk, day, ["a\n", "\n", "b\n", "c\n", "d\n"], 10.0)
    assert [budget for _, budget in talk.asked] == [10.0, 10.0, 6.0]
    assert state(tmp_path) == ("2026-05-01", 20.0)


def test_a_refusal_is_told_and_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a joule is left, and no token fits: the reason is the answer, the half joule stays."""
    day = allowance(tmp_path)
    day.settle(day.request(19.5), 19.5)
    assistant.converse(Talk([]), day, ["a"], 10.0)
    assert capsys.readouterr().out == "(no answer: No token fits.)\n"
    assert day.left_j == 0.5
    day.settle(day.request(0.5), 0.5)
    assistant.converse(Talk([]), day, ["a"], 10.0)
    assert "(no answer: Of 20 J per day 0 J are left. Ask again in 43200 s.)" in capsys.readouterr().out


def test_an_answer_that_breaks_off_costs_its_whole_budget(tmp_path: Path) -> None:
    """Killed in mid-answer: what it spent is not known, so what was set aside counts."""
    with pytest.raises(KeyboardInterrupt):
        assistant.converse(Talk([-1.0]), allowance(tmp_path), ["a"], 10.0)
    assert state(tmp_path) == ("2026-05-01", 10.0)


def test_the_next_day_has_its_own_joules_and_a_clock_set_back_has_none(tmp_path: Path) -> None:
    """On 2 May all is there again; back on 1 May the second day still counts."""
    for day, left_j in ((MAY_1, 20.0), (MAY_2, 20.0), (MAY_1, 5.0)):
        with allowance(tmp_path, day=day) as held:
            assert held.left_j == left_j
            held.request(15.0)
    assert state(tmp_path) == ("2026-05-02", 20.0)


def test_the_state_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut before the rename leaves the old file, whole."""
    day = allowance(tmp_path)
    day.request(3.0)

    def cut(self: Path, target: Path) -> Path:
        raise OSError("the power is gone")

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(AllowanceError, match="the power is gone"):
        day.request(4.0)
    assert state(tmp_path) == ("2026-05-01", 3.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"day": "today", "spent_j": 1}', '{"day": "2026-05-01"}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    """It is not taken for a full allowance."""
    (tmp_path / "allowance.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="delete it"):
        allowance(tmp_path)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """Two could spend the same joules; once the first has ended, the next may."""
    first = allowance(tmp_path)
    with pytest.raises(UsageError, match="in use"):
        allowance(tmp_path)
    first.close()
    allowance(tmp_path)


def test_the_last_three_questions_are_remembered(tmp_path: Path) -> None:
    """Two with their answers before the one that is asked."""
    talk = Talk([1.0] * 5)
    assistant.converse(talk, allowance(tmp_path), list("abcde"), 10.0)
    asked = [[message["content"] for message in messages if message["role"] == "user"] for messages, _ in talk.asked]
    assert asked == [["a"], ["a", "b"], ["a", "b", "c"], ["b", "c", "d"], ["c", "d", "e"]]
    assert [message["role"] for message in talk.asked[-1][0]] == ["user", "assistant"] * 2 + ["user"]
