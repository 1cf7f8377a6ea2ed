"""A whole log: totals, time, energy, what is left out; and the public logs, where they are present."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from eopc_runtime.errors import DeviceError, UsageError
from eopc_runtime.power.boards import board_rails, list_boards
from eopc_runtime.power.integrate import integrate
from eopc_runtime.power.tegrastats_log import PowerLog, line_times, read_log

SHARED = Path(__file__).parents[4] / "shared" / "energy" / "data" / "tegrastats"  # optional data beside a checkout
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the public tegrastats logs are not beside this checkout")

HEAD = "RAM 1/2MB (lfb 1x4MB) CPU [0%@729,off] cpu@42C"
NX = HEAD + " VDD_IN {0}mW/9000mW VDD_CPU_GPU_CV 500mW/500mW VDD_SOC 1400mW/1400mW"
ORIN = (
    HEAD
    + " VDD_GPU_SOC 3000mW/1mW VDD_CPU_CV 0mW/0mW VIN_SYS_5V0 4000mW/1mW NC 0mW/0mW"
    + " VDDQ_VDD2_1V8AO 300mW/1mW NC 0mW/0mW"
)
THOR = HEAD + " VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW"
THOR_EARLY = HEAD + " VDD_GPU 2000mW/2000mW VDD_CPU_SOC_MSS 6000mW/6000mW VIN_SYS_5V0 5000mW/5000mW"
XAVIER = HEAD + " GPU@37C GPU 0/0 CPU 300/300 SOC 900/900 CV 0/0 VDDRQ 600/600 SYS5V 1500/1500"


def read(*lines: str, board: str | None = None, **options: object) -> PowerLog:
    rules = [board_rails(board)] if board else [known.rails for known in list_boards()]
    return read_log(lines, rules, **options)  # type: ignore[arg-type]


def totals(log: PowerLog) -> list[int | None]:
    return [line.total_mw for line in log.lines]


# the public logs

# File, total of its first lines in mW, lines, as SOURCES.md beside the logs gives them.
LOGS = [
    ("agx_orin_64gb_r35_20230424", [6831], 1),
    ("agx_orin_32gb_r35_20231016", [9428, 9428], 2),
    ("agx_orin_64gb_dla_load_20251121", [22430], 1),
    ("agx_orin_32gb_r36", [12377], 1),
    ("agx_orin_64gb_r36_unprivileged", [10370], 1),
    ("agx_orin_32gb_r36_unprivileged_no_gpu_zone_20250901", [4519, 4519], 2),
    ("agx_orin_64gb_jp72_triple_20261001", [9110], 1),
    ("orin_nano_jp72_triple_20261001", [4548], 1),
    ("orin_nano_8gb_r36_root_20241115", [12479], 1),
    ("orin_nano_8gb_r36_unprivileged_20250618", [4824], 1),
    ("orin_nano_8gb_r36_idle_20260427", [4761, 4761, 4761], 3),
    ("orin_nano_8gb_after_load_20260810", [4744], 1),
    ("orin_nano_super_100ms_load_20260419", [5971], 661),
    ("orin_nx_16gb_r35", [5299], 1),
    ("thor_r38_vin_20260421", [19780], 1),
    ("thor_vin_no_gpu_field_20260612", [24830], 1),
    ("legacy_tx2_agxxavier_xaviernx_r32", [3056, 3346, 4067], 3),
]


@needs_shared
def test_every_public_log_is_listed_here() -> None:
    """A log that is added gets its total checked."""
    assert {path.stem for path in SHARED.glob("*.log")} == {name for name, _, _ in LOGS}


@needs_shared
@pytest.mark.parametrize(("name", "first", "lines"), LOGS, ids=[name for name, _, _ in LOGS])
def test_a_public_log_has_the_total_of_its_source(name: str, first: list[int], lines: int) -> None:
    """The total power of every line, no line skipped, no board named."""
    log = read(*(SHARED / f"{name}.log").read_text(encoding="utf-8").splitlines())
    assert totals(log)[: len(first)] == first
    assert (len(log.lines), log.samples, log.skipped) == (lines, lines, 0)


@needs_shared
def test_the_661_line_log_has_its_golden_energy() -> None:
    """8010.7175 J at 1.0 s between lines, in proportion at another interval; mean 12.1282 W, maximum 21.663 W."""
    text = (SHARED / "orin_nano_super_100ms_load_20260419.log").read_text(encoding="utf-8").splitlines()
    log = read(*text, interval_s=1.0)
    assert log.energy_j == pytest.approx(8010.7175, abs=1e-6)  # a sum of 660 doubles
    assert log.mean_w == pytest.approx(12.1282, abs=5e-5)  # printed to four digits
    assert max(t for t in totals(log) if t) == 21663
    assert (log.duration_s, log.covered_s, log.rails) == (660.0, 660.0, ("VDD_IN",))
    assert read(*text, interval_s=0.1).energy_j == pytest.approx(801.07175, abs=1e-6)


@needs_shared
def test_the_printed_clock_gives_the_energy_of_the_run() -> None:
    """72 s by the clock, which is 1 s coarse: about 0.874 kJ, within one second of mean power at either end."""
    log = read(*(SHARED / "orin_nano_super_100ms_load_20260419.log").read_text(encoding="utf-8").splitlines())
    assert log.energy_j == pytest.approx(874, abs=12.2)
    assert log.duration_s == pytest.approx(72, abs=1)
    assert "1 s coarse" in " ".join(log.notes)


# rails and totals


def test_the_second_number_is_never_integrated() -> None:
    """The mean since tegrastats started is far above the power now, and does not matter."""
    log = read(NX.format(5000), NX.format(7000), interval_s=2.0)
    assert (log.energy_j, log.mean_w) == (12.0, 6.0)


def test_sub_rails_are_listed_and_not_added() -> None:
    """VDDQ has its mean beside the three rails that make the total."""
    log = read(ORIN, ORIN, interval_s=1.0)
    assert totals(log) == [7000, 7000]
    assert log.rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert log.rails_w["VDDQ_VDD2_1V8AO"] == 0.3
    assert log.rails_j == {"VDD_GPU_SOC": 3.0, "VDD_CPU_CV": 0.0, "VIN_SYS_5V0": 4.0}
    assert log.boards == ("orin",)


def test_the_four_rail_sum_is_there_when_asked_for() -> None:
    """`rails` sums what it names, and says that no board's total is that."""
    four = ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]
    log = read(ORIN, ORIN, rails=four, interval_s=1.0)
    assert totals(log) == [7300, 7300]
    assert "no board's total" in " ".join(log.notes)
    with pytest.raises(UsageError, match="counted twice"):
        read(ORIN, rails=["VIN_SYS_5V0", "VIN_SYS_5V0"])
    with pytest.raises(DeviceError, match=r'no rail "VIN_SYS_5V"\. Did you mean "VIN_SYS_5V0"'):
        read(ORIN, rails=["VIN_SYS_5V"])


def test_thor_is_read_by_its_input_and_early_ones_by_the_sum() -> None:
    """A negative sub-rail is unreadable and harmless beside VIN; without VIN the three rails stand in for it."""
    assert totals(read(THOR)) == [15004]
    assert totals(read(THOR_EARLY)) == [13000]
    assert totals(read(THOR_EARLY.replace("2000mW/", "-392mW/"))) == [None]


def test_a_log_that_shows_the_input_never_falls_back() -> None:
    """One line that lost VIN is missing, not a reading 30 % too low."""
    log = read(THOR, THOR_EARLY, THOR, interval_s=1.0)
    assert totals(log) == [15004, None, 15004]
    assert log.energy_j == pytest.approx(30.008)
    assert "other lines have more" in (log.lines[1].reason or "")


def test_a_named_board_is_read_by_its_own_rule_only() -> None:
    """Orin's rule finds nothing complete in a Thor log; Xavier NX and Orin NX share one."""
    assert totals(read(THOR, board="orin")) == [None]
    assert totals(read(NX.format(5000), board="xavier-nx")) == [5000]
    assert totals(read(XAVIER, board="agx-xavier")) == [3300]


def test_missing_is_null_with_the_reason() -> None:
    """An incomplete set has no total; the note counts such lines."""
    log = read(ORIN, ORIN.replace("VIN_SYS_5V0", "SOMETHING"), ORIN.replace("NC", "VDD_CPU_CV"), interval_s=1.0)
    assert totals(log) == [7000, None, None]
    assert [line.reason for line in log.lines[1:]] == [
        "incomplete rail set: VIN_SYS_5V0 missing",
        "VDD_CPU_CV stands there twice",
    ]
    assert log.samples == 1
    assert log.energy_j is None


def test_a_total_of_nothing_is_missing() -> None:
    """One rail may read 0 mW, a whole module does not: a dead sensor, not free energy."""
    assert totals(read(NX.format(0), XAVIER.replace("300", "0"))) == [None, 3000]


def test_a_log_of_several_boards_has_totals_but_no_energy() -> None:
    """Every line by its own rule; a sum over different rails would mean nothing."""
    log = read(ORIN, NX.format(5000), XAVIER, interval_s=1.0)
    assert totals(log) == [7000, 5000, 3300]
    assert (log.energy_j, log.mean_w, log.rails) == (None, None, ())
    assert "different rail sets" in " ".join(log.notes)


def test_a_few_lines_of_other_rails_are_left_out_of_the_energy() -> None:
    """One odd line in twenty is named and bridged, not integrated."""
    log = read(*[NX.format(5000)] * 19, ORIN, interval_s=1.0)
    assert (log.samples, log.energy_j, log.mean_w) == (19, 90.0, 5.0)
    assert "other rails" in " ".join(log.notes)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([HEAD, HEAD], "run tegrastats with sudo"),
        (["Sun Apr 19 2026", ""], "no line of this log is from tegrastats"),
        ([], "no line of this log is from tegrastats"),
    ],
)
def test_a_log_without_power_is_explained(lines: list[str], says: str) -> None:
    """No rail at all is an error with its likely cause, not 0 J."""
    with pytest.raises(DeviceError, match=says):
        read(*lines)


def test_headers_are_skipped_and_counted() -> None:
    """A date line and noise take no place in time; blank lines are nothing."""
    log = read("Sun Apr 19 01:31:10 UTC 2026", NX.format(5000), "", "noise", NX.format(5000), interval_s=1.0)
    assert (totals(log), log.skipped, log.duration_s) == ([5000, 5000], 2, 1.0)
    assert [line.number for line in log.lines] == [2, 5]


# time


def at(second: int, mw: int = 5000) -> str:
    return f"04-19-2026 01:{second // 60:02}:{second % 60:02} " + NX.format(mw)


def test_missing_lines_are_bridged_for_three_intervals_and_no_longer() -> None:
    """Two damaged lines lie inside an interval of three periods; three make a gap that is not covered."""
    bad = NX.format("x")
    good = NX.format(5000)
    bridged = read(good, good, good, bad, bad, good, interval_s=1.0)
    assert (bridged.energy_j, bridged.covered_s) == (25.0, 5.0)
    gap = read(good, good, good, bad, bad, bad, good, interval_s=1.0)
    assert (gap.energy_j, gap.covered_s, gap.duration_s) == (10.0, 2.0, 6.0)
    assert "4.0 s together are not covered" in " ".join(gap.notes)


def test_without_clock_or_interval_there_is_power_but_no_energy() -> None:
    """JetPack 4 prints no clock: the missing interval is asked for, not guessed."""
    log = read(XAVIER, XAVIER)
    assert (log.mean_w, log.energy_j, log.duration_s) == (3.3, None, None)
    assert "give --interval" in " ".join(log.notes)


def test_one_line_has_power_but_no_energy() -> None:
    """Never 0 J for what could not be measured."""
    for interval_s in (None, 1.0):
        log = read(at(0), interval_s=interval_s)
        assert (log.mean_w, log.energy_j, log.duration_s) == (5.0, None, 0.0)


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_is_a_positive_number(interval_s: float) -> None:
    """Zero seconds between lines would be zero joules."""
    with pytest.raises(UsageError, match="seconds between two lines"):
        read(at(0), at(1), interval_s=interval_s)


def test_lines_of_one_second_are_spread_over_it() -> None:
    """Ten lines a second by a clock of whole seconds; parts of a second at either end keep the rate."""
    seconds = [0] * 3 + [1] * 10 + [2] * 10 + [3] * 4
    times, source, _ = line_times([float(s) for s in seconds], None)
    assert source == "clock"
    assert times == pytest.approx([i * 0.1 for i in range(27)], abs=1e-9)


def test_a_hole_in_the_printed_clock_is_a_gap() -> None:
    """A minute in which tegrastats did not run is not integrated over."""
    log = read(*(at(s) for s in (0, 1, 2, 3, 63, 64)))
    assert (log.energy_j, log.covered_s, log.duration_s) == (20.0, 4.0, 64.0)


def test_a_wall_clock_that_steps_back_loses_only_the_step() -> None:
    """The clock is set back by an hour in the middle: nothing is counted there, and it is said."""
    log = read(*(at(s) for s in (3600 - 3, 3600 - 2, 3600 - 1, 0, 1, 2)))
    assert (log.energy_j, log.covered_s) == (20.0, 4.0)
    assert "went backwards 1 time(s)" in " ".join(log.notes)


def test_a_clock_that_contradicts_the_interval_is_noted() -> None:
    """An interval of 1 s over lines that the clock puts 10 s apart."""
    log = read(*(at(10 * i) for i in range(5)), interval_s=1.0)
    assert "the printed clock says 40 s" in " ".join(log.notes)


def test_a_part_of_the_log_can_be_integrated() -> None:
    """The samples of a log feed the same integral as a live meter's, for one sequence within it."""
    log = read(*(NX.format(1000 * i) for i in range(1, 11)), interval_s=1.0)
    part = integrate(log.series(), 3.0, start_s=2.0, end_s=4.0)
    assert part.joules == (8.0,)  # 3, 4, 5 W at 2, 3, 4 s


# damage

MUTANTS = 100_000
UNKNOWN = ("NEW_FREQ @314", "XYZ off", "foo@12C/13C", "BAR 7%@12", "QUX 12/13", "12MB")


def originals() -> list[str]:
    """Lines of every board and release; five of each public log where they are present."""
    lines = [NX.format(5123), ORIN, THOR, XAVIER, at(5), HEAD + " POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"]
    for path in sorted(SHARED.glob("*.log")) if SHARED.is_dir() else []:
        lines += path.read_text(encoding="utf-8").splitlines()[:5]
    return lines


def now_digits(line: str, log: PowerLog) -> set[int]:
    """Positions of the digits that make the total: whoever changes one writes another valid number."""
    found: set[int] = set()
    for name in log.lines[0].rails:
        start = (" " + line).index(f" {name} {round(log.lines[0].watts[name] * 1000)}") + len(name) + 1
        found.update(range(start, line.index("/", start)))
    return found


def mutate(line: str, rng: random.Random) -> tuple[str, range]:
    """Damage a line in one place; return it and the positions of the original that were touched."""
    i = rng.randrange(len(line))
    j = min(len(line), i + rng.randrange(1, 60))
    noise = chr(rng.choice((*range(32, 127), 0, 9, 233, 0xFFFD)))
    kind = rng.randrange(9)
    if kind == 0:
        return line[:i] + line[i + 1 :], range(i, i + 1)
    if kind == 1:  # between two digits it makes another number
        return line[:i] + noise + line[i:], range(i - 1, i + 1)
    if kind == 2:
        return line[:i] + noise + line[i + 1 :], range(i, i + 1)
    if kind == 3:
        return line[:i], range(i, len(line))
    if kind == 4:
        return line[:i] + line[j:], range(i, j)
    if kind == 5:
        return line[:i] + line[i:j] + line[i:], range(i, j)
    tokens = line.split()
    if kind == 6:
        tokens.insert(rng.randrange(len(tokens) + 1), rng.choice(("NC 0mW/0mW", "?", "VDD_IN", "VIN", "x/y")))
    elif kind == 7:
        del tokens[rng.randrange(len(tokens))]
    else:  # two rails change places, name and value together
        ends = [k for k, token in enumerate(tokens) if "/" in token and tokens[k - 1].isupper() and "B" not in token]
        a, b = rng.choice(ends), rng.choice(ends)
        tokens[a - 1 : a + 1], tokens[b - 1 : b + 1] = tokens[b - 1 : b + 1], tokens[a - 1 : a + 1]
    return " ".join(tokens), range(0)


def test_a_hundred_thousand_damaged_lines_give_no_wrong_total() -> None:
    """Cut, doubled, garbled, shuffled lines: the total is the right one or missing, and nothing crashes.

    Damage to the very digits of a summed number can make another valid number, which nobody can tell; such
    lines are read too, but their value is not judged.
    """
    rng = random.Random(20260419)
    lines = originals()
    alone = [read(line) for line in lines]
    mutants, wanted = [], []
    for _ in range(MUTANTS):
        k = rng.randrange(len(lines))
        text, touched = mutate(lines[k], rng)
        mutants.append(text)
        judged = not now_digits(lines[k], alone[k]) & set(touched)
        wanted.append(alone[k].lines[0].total_mw if judged else None)
    start = time.perf_counter()
    log = read(*mutants, interval_s=0.1)
    assert time.perf_counter() - start < 60  # seconds on one slow core; about 5 where it was written
    found = {line.number: line.total_mw for line in log.lines}
    judged_lines = [(n, want) for n, want in enumerate(wanted, start=1) if want is not None]
    wrong = [(mutants[n - 1], found[n], want) for n, want in judged_lines if found.get(n) not in (None, want)]
    assert not wrong, wrong[:3]
    intact = sum(found.get(n) == want for n, want in judged_lines)
    assert intact > 0.7 * MUTANTS  # most damage lies elsewhere in the line, and must not cost the total
    assert log.skipped + len(log.lines) + sum(not text.strip() for text in mutants) == MUTANTS


def test_unknown_fields_leave_every_total_unchanged() -> None:
    """Fields shuffled, spaces doubled, unknown tokens added, seeded: all totals stay."""
    rng = random.Random(5)
    for line in originals():
        want = read(line).lines[0].total_mw
        tokens = line.split()
        for _ in range(20):
            text = list(tokens)
            at_end = rng.choice(UNKNOWN)
            text.insert(0, rng.choice(UNKNOWN))
            assert read("  ".join([*text, at_end])).lines[0].total_mw == want
