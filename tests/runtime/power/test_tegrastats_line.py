"""One tegrastats line, by token: every release, and every way in which a rail can be damaged."""

from __future__ import annotations

import random

import pytest

from eopc_runtime.power.tegrastats_line import Line, guess_release, parse_line

KNOWN = {"VIN", "VDD_IN", "VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO", "GPU", "CPU", "SOC", "VDD_SOC"}

R35 = (
    "05-06-2023 07:08:09 RAM 1000/60000MB (lfb 100x4MB) SWAP 1/30000MB (cached 0MB) CPU [1%@729,off] EMC_FREQ 0%@204 "
    "GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.5C GPU@-256C VDD_GPU_SOC 2400mW/2300mW "
    "VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4000mW/4100mW NC 0mW/0mW VDDQ_VDD2_1V8AO 300mW/300mW NC 0mW/0mW"
)
R36 = (
    "RAM 2000/60000MB (lfb 2x4MB)   SWAP 0/30000MB (cached 0MB) CPU [0%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 0%@[305,305] "
    "NVENC     off NVENC1 79%@166 NVDLA0_FREQ @1600 cpu@42C gpu@37.75C VDD_GPU_SOC 4940mW/4940mW VDD_CPU_CV 0mW/0mW "
    "VIN_SYS_5V0 4442mW/4442mW "
)
R39 = (
    "10-01-2026 20:36:32 RAM 974/7546MB (lfb 6x4MB) CPU [0%@729] GR3D_FREQ 12% cpu@49.8C/50.1C tj@50.8C/51C "
    "VDD_IN 4500mW/4400mW/4600mW VDD_SOC 1480mW/1480mW/1490mW"
)
XAVIER = (
    "RAM 700/31000MB (lfb 7x4MB) SWAP 0/15000MB (cached 0MB) CPU [2%@1190] EMC_FREQ 0%@665 GR3D_FREQ 0%@318 APE 150 "
    "MTS fg 0% bg 0% GPU@37.5C CPU@37.5C GPU 0/16 CPU 311/300 SOC 932/900"
)
NANO = "RAM 600/3900MB (lfb 6x4MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102] EMC_FREQ 0% GR3D_FREQ 0% PLL@39C VDD_IN 900/943"


def line(text: str) -> Line:
    found = parse_line(text, KNOWN, {"NC"})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "rails", "release"),
    [
        (R35, {"VDD_GPU_SOC": 2400, "VDD_CPU_CV": 400, "VIN_SYS_5V0": 4000, "VDDQ_VDD2_1V8AO": 300}, "r35 (JetPack 5)"),
        (R36, {"VDD_GPU_SOC": 4940, "VDD_CPU_CV": 0, "VIN_SYS_5V0": 4442}, "r36 (JetPack 6)"),
        (R39, {"VDD_IN": 4500, "VDD_SOC": 1480}, "r39 (JetPack 7.2)"),
        (XAVIER, {"GPU": 0, "CPU": 311, "SOC": 932}, "r32 (JetPack 4)"),
        (NANO, {"VDD_IN": 900}, "r32 (JetPack 4)"),
        ("VDD_CPU_SOC_MSS 5mW/5mW VIN 9mW/9mW", {"VDD_CPU_SOC_MSS": 5, "VIN": 9}, "r38 (JetPack 7)"),
    ],
)
def test_every_release_gives_its_first_numbers(text: str, rails: dict[str, int], release: str) -> None:
    """Power is the first number; memory, clocks, zones, NC and the list of cores are no rails."""
    found = line(text)
    assert found.rails_mw == rails
    assert (found.unreadable, found.repeated, found.stray) == (frozenset(), frozenset(), False)
    assert guess_release(text) == release


def test_the_clock_is_month_day_year() -> None:
    """05-06-2023 is the sixth of May; a line without a clock, or with an impossible one, has none."""
    assert line(R35).clock_s == 1683356889  # 2023-05-06 07:08:09 taken as UTC
    assert line(R36).clock_s is None
    assert line(R35.replace("05-06", "05-46")).clock_s is None


def test_order_spaces_and_unknown_tokens_do_not_matter() -> None:
    """Fields shuffled, spaces doubled, unknown tokens added: the same rails."""
    rng = random.Random(7)
    fields = ["VDD_GPU_SOC 2400mW/2300mW", "NC 0mW/0mW", "VIN_SYS_5V0 4000mW/4100mW", "RAM 1/2MB", "CPU [1%@729,off]"]
    fields += ["VDD_CPU_CV 400mW/400mW", "cpu@45C/46C", "NEW_FREQ @314", "MTS fg 0% bg 0%", "NC 0mW/0mW", "FOO 12/13"]
    for _ in range(200):
        rng.shuffle(fields)
        found = line("  ".join(fields) + " ")
        wanted = {"VDD_GPU_SOC": 2400, "VIN_SYS_5V0": 4000, "VDD_CPU_CV": 400}
        assert {name: found.rails_mw[name] for name in wanted} == wanted
        assert not found.unreadable


@pytest.mark.parametrize(
    "value",
    [
        "N/A", "off", "-40mW/3mW", "40mW", "40mW/", "/40mW", "4x0mW/40mW", "40.5mW/40mW", "1W/2W", "100uW/200uW",
        "40mW/40", "40/40mW", "40mW/40mW/40mW/40mW", "999999999mW/1mW", "NaN/0", "", "4 0mW/40mW", "[40mW/40mW",
        "\u0664\u0660mW/40mW",
    ],
)  # fmt: skip
def test_a_damaged_value_makes_its_rail_unreadable_not_zero(value: str) -> None:
    """What is no whole reading in mW is a rail that stands there and cannot be read."""
    found = line(f"RAM 1/2MB VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 7mW/7mW VDD_IN {value}")
    assert "VDD_IN" not in found.rails_mw
    assert found.unreadable == {"VDD_IN"}


@pytest.mark.parametrize("again", ["VDD_IN 500mW/500mW", "VDD_IN NaN/500mW"])
def test_a_rail_twice_is_ambiguous(again: str) -> None:
    """Two readings of one rail, one of them damaged or not: neither is taken."""
    for text in (f"VDD_IN 400mW/400mW {again}", f"{again} VDD_IN 400mW/400mW"):
        found = line(text)
        assert "VDD_IN" not in found.rails_mw
        assert found.repeated == {"VDD_IN"}


def test_nc_may_stand_twice_with_any_value() -> None:
    """Not connected is dropped before anything is checked."""
    found = line("VDD_IN 4mW/4mW NC 0mW/0mW NC 17mW/0mW")
    assert (found.rails_mw, found.stray) == ({"VDD_IN": 4}, False)
    assert line("VDD_IN 4mW/4mW NC VIN 0mW/0mW").stray  # its reading now looks like VIN's


def test_names_are_whole_tokens() -> None:
    """A name inside another, glued to its value, or cut at the end of the line is not that rail."""
    assert line("NOT_VDD_IN 5mW/5mW VDD_INX 6mW/6mW").rails_mw.keys() == {"NOT_VDD_IN", "VDD_INX"}
    glued = line("VIN_SYS_5V0 7mW/7mW VIN19780mW/19780mW")
    assert (glued.rails_mw, glued.stray) == ({"VIN_SYS_5V0": 7}, True)
    cut = line("VIN_SYS_5V0 7mW/7mW VDDQ_VD")
    assert (cut.unreadable, cut.stray) == ({"VDDQ_VDD2_1V8AO"}, True)


def test_a_reading_of_another_shape_was_damaged() -> None:
    """All readings of a line have two numbers or three, and a unit or none: one that differs is not believed."""
    found = line("VDD_GPU_SOC 4mW/4mW VDD_CPU_CV 5mW/5mW VIN_SYS_5V0 7mW/70mW/9mW")
    assert found.unreadable == {"VIN_SYS_5V0"}
    assert line("VDD_IN 4mW/4mW VDD_SOC 5/5").unreadable == {"VDD_IN", "VDD_SOC"}  # which of them cannot be told
    assert line("VDD_IN 4mW/4mW FOO 5/5").rails_mw["VDD_IN"] == 4  # a stranger has no say


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Sun Apr 19 01:31:10 UTC 2026",
        "Tue 04/19/2026 started",
        "04-19-2026 01:31:10",
        "GPU and CPU 1",
        "x\x00mW\x01 y/mW",
    ],
)
def test_what_is_not_from_tegrastats_is_none(text: str) -> None:
    """Blank lines, date headers and prose are told apart from lines without rails."""
    assert parse_line(text, KNOWN, {"NC"}) is None


def test_a_line_without_rails_is_still_a_line() -> None:
    """Without privilege some releases print no rail: the line counts, and has none."""
    found = line("RAM 1/2MB (lfb 2x4MB) CPU [0%@2201] GR3D_FREQ 0% cpu@42C tj@42C")
    assert (found.rails_mw, found.unreadable) == ({}, frozenset())
    assert guess_release("RAM 1/2MB cpu@42C") is None
