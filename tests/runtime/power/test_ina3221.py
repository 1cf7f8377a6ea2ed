"""INA monitors in a temporary sysfs tree: layouts, labels, what is no rail, and readings that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from eopc_runtime.errors import DeviceError
from eopc_runtime.power.boards import list_boards
from eopc_runtime.power.ina3221 import find_channels, open_ina3221
from eopc_runtime.power.sampling import PolledMeter

RULES = [board.rails for board in list_boards()]


class Chip:
    """One chip's folder in a tree of its own."""

    def __init__(self, root: Path, folder: str, kind: str | None = "ina3221") -> None:
        self.folder = root / folder
        self.folder.mkdir(parents=True)
        if kind:
            self.write(name=kind)

    def write(self, **files: object) -> Chip:
        for name, value in files.items():
            (self.folder / name).write_text(f"{value}\n")
        return self

    def rail(self, i: int, label: str, millivolts: int, milliamps: int) -> Chip:
        return self.write(**{f"in{i}_label": label, f"in{i}_input": millivolts, f"curr{i}_input": milliamps})


def orin(root: Path, hwmon: int = 3) -> Chip:
    """AGX Orin's chips as its tree shows them, shunt sums and an unlabelled channel included."""
    chip = Chip(root, f"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon{hwmon}")
    chip.rail(1, "VDD_GPU_SOC", 19864, 180).rail(2, "VDD_CPU_CV", 19864, 0).rail(3, "VIN_SYS_5V0", 5000, 800)
    chip.write(in4_input=360, in5_input=0, in6_input=1600, in7_input=1960, in7_label="sum of shunt voltages")
    chip.write(curr4_input=980, shunt1_resistor=2000, shunt3_resistor=2000, samples=512, update_interval=35)
    second = Chip(root, f"sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon{hwmon + 1}")
    second.rail(1, "NC", 0, 0).rail(2, "VDDQ_VDD2_1V8AO", 5000, 60).rail(3, "", 0, 0)
    return chip


def opened(root: Path, **options: object) -> PolledMeter:
    return open_ina3221(root, RULES, threaded=False, **options)  # type: ignore[arg-type]


def test_orin_is_summed_over_three_rails(tmp_path: Path) -> None:
    """mV x mA: 3.57552 + 0 + 4 W; VDDQ is listed, NC, empty labels and shunt sums are no rails."""
    orin(tmp_path)
    now = [0.0]
    with opened(tmp_path, clock=lambda: now[0]) as meter:
        assert meter.sensor.rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
        assert meter.sensor.sub_rails == ("VDDQ_VDD2_1V8AO",)
        assert meter.sensor.details == {"1-0040 samples": "512", "1-0040 update_interval": "35"}
        meter.begin("w")
        for i in range(1, 81):
            now[0] = 0.05 * i
            meter.poll()
        window = meter.end("w")
    assert window.mean_w == pytest.approx(7.57552)
    assert window.energy_j == pytest.approx(4 * 7.57552)
    assert window.rails_j["VDDQ_VDD2_1V8AO"] == pytest.approx(4 * 0.3)
    # one step is 40 uV / 2 mOhm = 20 mA: 397 mW at 19.864 V, 100 mW at 5 V
    assert window.steps_w == {"VDD_GPU_SOC": pytest.approx(0.39728), "VIN_SYS_5V0": pytest.approx(0.1)}


def test_rails_are_found_by_label_wherever_hwmon_put_them(tmp_path: Path) -> None:
    """hwmonN moves between boots; the class folder and the driver's folder show the same chip once."""
    orin(tmp_path, hwmon=7)
    links = tmp_path / "sys/class/hwmon"
    links.mkdir(parents=True)
    (links / "hwmon7").symlink_to(tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon7")
    Chip(tmp_path, "sys/class/hwmon/hwmon0", "coretemp").rail(1, "VDD_IN", 5000, 900)
    rails = [channel.rail for channel in find_channels(tmp_path)]
    assert sorted(rails) == ["NC", "VDDQ_VDD2_1V8AO", "VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"]


def test_thor_is_read_by_its_ina238_in_microwatts(tmp_path: Path) -> None:
    """VIN alone is the total, whatever the three rails of the INA3221 say."""
    chip = Chip(tmp_path, "sys/class/hwmon/hwmon2")
    chip.rail(1, "VDD_GPU", 12000, 100).rail(2, "VDD_CPU_SOC_MSS", 12000, 400).rail(3, "VIN_SYS_5V0", 5000, 1000)
    Chip(tmp_path, "sys/class/hwmon/hwmon5", "ina238").write(
        label="VIN", power1_input=19780000, in1_input=19900, curr1_input=994
    )
    with opened(tmp_path) as meter:
        assert meter.sensor.rails == ("VIN",)
        assert meter._read() == {
            "VIN": pytest.approx(19.78),
            "VDD_GPU": pytest.approx(1.2),
            "VDD_CPU_SOC_MSS": pytest.approx(4.8),
            "VIN_SYS_5V0": pytest.approx(5.0),
        }


def test_jetpack_4_is_read_through_iio_in_milliwatts(tmp_path: Path) -> None:
    """ina3221x/*/iio:device*: rail_name_0..2 and in_power0..2_input; no name file is needed there."""
    chip = Chip(tmp_path, "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0", None)
    chip.write(rail_name_0="VDD_IN", in_power0_input=4067, rail_name_1="VDD_CPU_GPU_CV", in_power1_input=738)
    chip.write(rail_name_2="VDD_SOC", in_power2_input=1353)
    again = Chip(tmp_path, "sys/bus/i2c/drivers/ina3221x/7-0040/iio_device", None)
    again.write(rail_name_0="VDD_IN", in_power0_input=4067)  # the same chip, shown twice
    with opened(tmp_path) as meter:
        assert meter.sensor.rails == ("VDD_IN",)
        assert meter._read()["VDD_IN"] == pytest.approx(4.067)


def test_rails_can_be_asked_for(tmp_path: Path) -> None:
    """The four-rail sum of AGX Orin."""
    orin(tmp_path)
    four = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    with open_ina3221(tmp_path, RULES, four, threaded=False) as meter:
        assert meter.sensor.rails == four


def test_slow_averaging_on_the_chip_is_remarked(tmp_path: Path) -> None:
    """A new value every second explains a lag: every window says so."""
    orin(tmp_path).write(update_interval=1000)
    with opened(tmp_path) as meter:
        meter.begin("w")
        notes = meter.end("w").notes
    assert [note for note in notes if "1000 ms" in note] == ["ina3221 1-0040 gives a new value every 1000 ms only"]


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("curr1_input", "-20", "curr1_input is negative (-20)"),
        ("curr1_input", "", 'holds "", no number'),
        ("in3_input", "5v", 'holds "5v", no number'),
    ],
)
def test_a_reading_that_cannot_be_is_refused(tmp_path: Path, file: str, value: str, says: str) -> None:
    """A negative current or no number fails the sweep: the window is a gap with its reason, never a smaller sum."""
    chip, now = orin(tmp_path), [0.0]
    with opened(tmp_path, clock=lambda: now[0]) as meter:
        meter.begin("w")
        for i in range(1, 81):
            now[0] = 0.05 * i
            if i == 40:
                (chip.folder / file).write_text(value)
            meter.poll()
        window = meter.end("w")
    assert (window.verified, window.energy_j) == (False, None)
    assert {"gaps", "refused"} <= set(window.faults)
    assert says in " ".join(window.notes)


def test_a_negative_sub_rail_spoils_nothing(tmp_path: Path) -> None:
    """Thor's GPU rail reads below zero when idle; VIN is the total and stays one."""
    Chip(tmp_path, "sys/class/hwmon/hwmon2").rail(1, "VDD_GPU", 12000, -32)
    Chip(tmp_path, "sys/class/hwmon/hwmon5", "ina238").write(label="VIN", power1_input=15004000)
    with opened(tmp_path) as meter:
        assert meter._read() == {"VIN": pytest.approx(15.004)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in3_label": "SOMETHING"}, "incomplete rail set: VIN_SYS_5V0 missing"),
        ({"in3_label": "VDD_CPU_CV"}, "two channels are labelled VDD_CPU_CV"),
        ({"curr3_input": "broken"}, "VIN_SYS_5V0 has no readable value"),
    ],
)
def test_an_incomplete_set_is_refused_at_the_start(tmp_path: Path, change: dict[str, str], says: str) -> None:
    """A meter that would miss a rail is not opened."""
    orin(tmp_path).write(**change)
    with pytest.raises(DeviceError) as caught:
        opened(tmp_path)
    assert says in str(caught.value)


def test_no_monitor_is_said(tmp_path: Path) -> None:
    """An empty tree, and one whose only channels are not connected."""
    with pytest.raises(DeviceError, match="no labelled INA3221"):
        opened(tmp_path)
    Chip(tmp_path, "sys/class/hwmon/hwmon1").rail(1, "NC", 0, 0)
    with pytest.raises(DeviceError, match="no labelled INA3221"):
        opened(tmp_path)


def test_permission_denied_has_its_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fix names the files; a locked VIN is not replaced by the sum of the others."""
    chip = Chip(tmp_path, "sys/class/hwmon/hwmon2")
    chip.rail(1, "VDD_GPU", 12000, 100).rail(2, "VDD_CPU_SOC_MSS", 12000, 400).rail(3, "VIN_SYS_5V0", 5000, 1000)
    vin = Chip(tmp_path, "sys/class/hwmon/hwmon5", "ina238").write(label="VIN", power1_input=19780000).folder
    read_text = Path.read_text

    def denied(path: Path, *args: object, **options: object) -> str:
        if path == vin / "power1_input":  # mode 000, also for a test that runs as root
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(DeviceError, match="permission denied") as caught:
        opened(tmp_path)
    assert f"sudo chmod a+r {vin / 'power1_input'}" in str(caught.value)
