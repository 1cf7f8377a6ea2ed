"""Rails are data: which set is the total, what is refused, and what a profile inherits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eopc_runtime.errors import DeviceError
from eopc_runtime.jsonfields import Fields
from eopc_runtime.power.boards import board_rails, list_boards, parse_boards
from eopc_runtime.power.rails import RailRule, asked_for, candidates, choose, inherited, read_rails

ORIN = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}
THOR = {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}


def every_board() -> list[RailRule]:
    return [board.rails for board in list_boards()]


def picked(read: set[str], unreadable: set[str] = frozenset(), clean: bool = True) -> set[str] | str:  # type: ignore[assignment]
    """The rails of the total, or the reason for none, with no board named."""
    option, reason = choose(candidates(every_board()), read, unreadable, clean)
    return set(option.names) if option else reason


@pytest.mark.parametrize(
    ("read", "total"),
    [
        (THOR | {"VIN"}, {"VIN"}),
        (THOR, THOR),
        ({"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}, {"VDD_IN"}),
        ({"VDD_IN"}, {"VDD_IN"}),
        ({"POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"}, {"POM_5V_IN"}),
        (ORIN, ORIN),
        (ORIN | {"VDDQ_VDD2_1V8AO"}, ORIN),
        ({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}, {"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),
        (ORIN | {"VIN"}, {"VIN"}),  # a carrier with an input sensor: the input comes first
    ],
)
def test_the_total_follows_the_rails_that_are_there(read: set[str], total: set[str]) -> None:
    """An input rail alone, else the whole sum; sub-rails are not added."""
    assert picked(read) == total


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (set(), "no power rail"),
        (ORIN - {"VIN_SYS_5V0"}, "incomplete rail set: VIN_SYS_5V0 missing"),
        ({"GPU", "CPU", "SOC"}, "incomplete rail set: CV, VDDRQ, SYS5V missing"),
        ({"VDD_FUTURE"}, "no rail of a known total among VDD_FUTURE"),
        ({"VIN", "VDD_GPU_SOC", "VDD_CPU_CV"}, "VIN stands beside VDD_GPU_SOC, VDD_CPU_CV"),  # VIN_SYS_5V0, cut
    ],
)
def test_an_incomplete_set_has_no_total(read: set[str], says: str) -> None:
    """What is missing is missing, not 0 W, and the reason names it."""
    assert says in str(picked(read))


def test_a_damaged_preferred_rail_is_not_replaced_by_the_fallback() -> None:
    """Thor's three rails are 0.7 of VIN: they stand in for it only where nothing suggests that VIN was there."""
    assert "VIN has no readable value" in str(picked(THOR, {"VIN"}))
    assert "VXN is unknown" in str(picked(THOR | {"VXN"}))
    assert "something is unreadable" in str(picked(THOR, clean=False))
    assert "something is unreadable" in str(picked({"VDD_IN", "VIN"}, {"VDD_SOC"}))
    assert picked(THOR | {"VIN"}, {"VDD_GPU"}) == {"VIN"}  # a negative sub-rail does not spoil the input


def test_rails_asked_for_are_summed_as_they_are() -> None:
    """The four-rail sum of AGX Orin is there for those who ask."""
    four = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    option, _ = choose(asked_for(four), set(four))
    assert option is not None
    assert option.names == four
    assert choose(asked_for(four), ORIN)[1] == "incomplete rail set: VDDQ_VDD2_1V8AO missing"


GOOD: dict[str, Any] = {
    "total": [["VIN"], ["A", "B"]],
    "sub_rails": ["C"],
    "ignored": ["NC"],
    "mark": "m",
    "source": "a log",
}


def rule(**changes: Any) -> RailRule:
    return read_rails(Fields({**GOOD, **changes}, "board.json: rails", DeviceError), "board")


def test_a_rule_is_read_in_order() -> None:
    """The preferred set comes first, and every name is known."""
    assert rule().total == (("VIN",), ("A", "B"))
    assert rule().names == {"VIN", "A", "B", "C"}
    assert [c.fallback for c in candidates([rule()])] == [False, True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"total": []}, "list of lists"),
        ({"total": [[]]}, "list of lists"),
        ({"total": ["VIN"]}, "list of lists"),
        ({"total": [["VIN", "VIN"]]}, "names a rail twice"),
        ({"total": [["A", "B"], ["B", "A"]]}, "the same set twice"),
        ({"total": [[1]]}, "no rail name"),
        ({"total": [["VDD IN"]]}, "no rail name"),
        ({"sub_rails": ["A"]}, "a sub-rail is not added"),
        ({"ignored": ["C"]}, 'is both a rail and "ignored"'),
        ({"mark": "x"}, "must be one of s, m, u"),
        ({"source": " "}, '"source" is empty'),
        ({"totals": []}, 'unknown key "totals". Did you mean "total"'),
    ],
)
def test_a_rule_that_could_give_a_wrong_total_is_refused(changes: dict[str, Any], says: str) -> None:
    """A rail twice, or on both sides, would be counted wrongly without a word."""
    with pytest.raises(DeviceError) as caught:
        rule(**changes)
    assert says in str(caught.value)


def test_inherited_rails_are_unconfirmed() -> None:
    """Another board's rails are a guess for this one, and say so."""
    child = inherited(rule(), "child")
    assert (child.board, child.mark, child.total) == ("child", "u", rule().total)
    assert child.source == "taken from board, unconfirmed here: a log"


def test_boards_without_a_profile_are_found_by_alias() -> None:
    """Older boards have rails but no device profile; a device without rails says so, a slip names the nearest."""
    assert board_rails("Jetson_Nano").total == (("POM_5V_IN",),)
    assert board_rails("agx-orin").board == "orin"
    with pytest.raises(DeviceError, match="no power rails of its own"):
        board_rails("h100")
    with pytest.raises(DeviceError, match='Did you mean "agx-xavier"'):
        board_rails("agx-xavir")


def test_no_two_boards_share_a_name() -> None:
    """A name leads to one board."""
    names = [name for board in list_boards() for name in (board.name, *board.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("boards", "says"),
    [
        ([{"profile": "cpu"}], "cpu has no rails"),
        ([{"profile": "orin", "rails": GOOD}], "unknown key"),
        ([{"board": "x", "rails": GOOD}], '"aliases" is missing'),
    ],
)
def test_a_malformed_board_table_is_refused(boards: list[Any], says: str) -> None:
    """The table is read as strictly as a profile."""
    with pytest.raises(DeviceError, match=says):
        parse_boards(json.dumps({"schema": 1, "source": "a test", "boards": boards}))
