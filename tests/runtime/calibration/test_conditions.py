"""Power mode, clocks and temperature from a tree of files or a command, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.calibration.conditions import (
    Conditions,
    Place,
    check_same,
    read_clocks,
    read_conditions,
    read_power_mode,
    run_command,
    wait_until_cool,
)
from eopc_runtime.errors import DeviceError


def write(root: Path, files: dict[str, str]) -> None:
    """Write files below a root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def place(root: Path, answer: str | None = None) -> Place:
    """A place whose commands all print `answer`."""
    return Place(root, run=lambda command: answer)


CONF = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"


def test_the_power_mode_is_named_by_the_boards_own_table(tmp_path: Path) -> None:
    """Mode 2 is MAXN_SUPER here because nvpmodel.conf says so."""
    write(tmp_path, {"etc/nvpmodel.conf": CONF, "var/lib/nvpmodel/status": "pmode:0002 fmode:cool"})
    assert read_power_mode(place(tmp_path)) == "MAXN_SUPER"


def test_without_a_status_file_the_command_is_asked(tmp_path: Path) -> None:
    """`nvpmodel -q` gives the name."""
    write(tmp_path, {"etc/nvpmodel.conf": CONF})
    assert read_power_mode(place(tmp_path, "NV Power Mode: MAXN_SUPER\n2\n")) == "MAXN_SUPER"
    assert read_power_mode(place(tmp_path, None)) is None


def test_a_machine_without_power_modes_has_none(tmp_path: Path) -> None:
    """No command is run on a machine that is no Jetson."""

    def run(command: Any) -> str:
        raise AssertionError(f"{command} was run")

    assert read_power_mode(Place(tmp_path, run=run)) is None


def test_clocks_are_pinned_where_every_minimum_is_its_maximum(tmp_path: Path) -> None:
    """jetson_clocks on a Jetson, pinned elsewhere, dvfs as soon as one clock may move, None where nothing is known."""
    assert read_clocks(tmp_path) is None
    gpu, core = "sys/class/devfreq/17000000.gpu", "sys/devices/system/cpu/cpu0/cpufreq"
    pinned = {
        f"{gpu}/min_freq": "1300500000\n",
        f"{gpu}/max_freq": "1300500000\n",
        f"{core}/scaling_min_freq": "2201600\n",
        f"{core}/scaling_max_freq": "2201600\n",
    }
    write(tmp_path, pinned)
    assert read_clocks(tmp_path) == "pinned"
    write(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3"})
    assert read_clocks(tmp_path) == "jetson_clocks"
    write(tmp_path, {f"{gpu}/min_freq": "306000000\n"})
    assert read_clocks(tmp_path) == "dvfs"


def zone(number: int, name: str, milli: str, **trips: int) -> dict[str, str]:
    """The files of a thermal zone."""
    folder = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/type": name, f"{folder}/temp": milli}
    for i, (kind, celsius) in enumerate(trips.items()):
        files |= {f"{folder}/trip_point_{i}_type": kind, f"{folder}/trip_point_{i}_temp": str(celsius * 1000)}
    return files


def test_the_zone_nearest_to_its_limit_counts(tmp_path: Path) -> None:
    """Limits are 5 C below the trip that throttles; a fan's trip is none, and a zone that is off reads nothing."""
    write(tmp_path, zone(0, "cpu-thermal", "70000", active=50, passive=99))
    write(tmp_path, zone(1, "gpu-thermal", "-256000", passive=20))
    write(tmp_path, zone(2, "tj-thermal", "71000", passive=96))
    found = read_conditions(place(tmp_path))
    assert (found.zone, found.temperature_c, found.limit_c, found.too_hot) == ("tj-thermal", 71.0, 91.0, False)
    assert read_conditions(place(tmp_path), limit_c=70.5).too_hot


def test_without_zones_nothing_is_too_hot(tmp_path: Path) -> None:
    """What cannot be read is None, not 0 C."""
    assert read_conditions(place(tmp_path)) == Conditions()
    assert not Conditions().too_hot


def cooling(*temperatures: float) -> Any:
    """A reader that gives one temperature after the other, of a zone with a limit of 90 C."""
    values = iter(temperatures)
    return lambda: Conditions(zone="tj", temperature_c=next(values), limit_c=90.0)


def test_a_hot_zone_makes_a_pause_until_it_is_well_below_the_limit() -> None:
    """93 C pauses; 88 C is below the limit, but only 84 C ends the pause."""
    said: list[str] = []
    slept: list[float] = []
    now = wait_until_cool(cooling(93.0, 88.0, 84.0), said.append, slept.append)
    assert (now.temperature_c, len(slept)) == (84.0, 2)
    assert said[0] == "pausing: tj is at 93 C, the limit is 90 C"


def test_a_cool_zone_makes_no_pause() -> None:
    """88 C alone is no reason to wait: only the way down from above the limit is long."""
    assert wait_until_cool(cooling(88.0), print, lambda s: pytest.fail("it slept")).temperature_c == 88.0


def test_a_zone_that_stays_hot_ends_with_what_to_do() -> None:
    """After the longest pause there is a clear refusal."""
    with pytest.raises(DeviceError, match=r"tj is at 95 C after a pause of 1 minutes.*Cool it.*same command"):
        wait_until_cool(
            lambda: Conditions(zone="tj", temperature_c=95.0, limit_c=90.0), lambda t: None, lambda s: None, 60
        )


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Conditions(power_mode="15W", clocks="dvfs"), "power mode changed from MAXN to 15W"),
        (Conditions(power_mode="MAXN", clocks="jetson_clocks"), "clock setting changed from dvfs to jetson_clocks"),
        (Conditions(power_mode=None, clocks="dvfs"), "power mode changed from MAXN to unknown"),
    ],
)
def test_a_change_of_mode_or_clocks_stops_with_what_to_do(now: Conditions, message: str) -> None:
    """The sentence names both states, says that nothing is lost, and how to go on."""
    start = Conditions(power_mode="MAXN", clocks="dvfs")
    check_same(start, start)
    with pytest.raises(DeviceError, match=f"{message}.*is kept: set .* again and run the same command"):
        check_same(start, now)


def test_a_command_that_fails_or_is_missing_gives_none() -> None:
    """Output only where there is some to rely on."""
    assert run_command(("true",)) == ""
    assert run_command(("false",)) is None
    assert run_command(("no-such-command-anywhere",)) is None
