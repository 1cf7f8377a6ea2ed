"""Device profiles: what ships, that every number has a unit and a source, and that bad files are refused."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from eopc_runtime.errors import DeviceError
from eopc_runtime.profiles import CONSTANT_UNITS, list_profiles, load_profile, parse_profile

SHIPPED = ("cpu", "h100", "orin", "orin-nano", "orin-nx", "rtx-3060", "rtx-4090", "rtx-5090", "thor")


def shipped_texts():
    """The JSON texts of the shipped profiles by name."""
    folder = files("eopc_runtime").joinpath("_profiles")
    return {name: folder.joinpath(f"{name}.json").read_text(encoding="utf-8") for name in SHIPPED}


def changed(**changes):
    """The cpu profile with keys replaced, or removed where the value is None, as JSON text."""
    obj = json.loads(shipped_texts()["cpu"])
    for key, value in changes.items():
        if value is None:
            del obj[key]
        else:
            obj[key] = value
    return json.dumps(obj)


def test_the_shipped_devices_are_these():
    """`eopc devices` lists exactly the devices the README names."""
    assert tuple(p.name for p in list_profiles()) == SHIPPED


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("orin", "orin"),
        ("ORIN", "orin"),
        ("agx-orin", "orin"),
        ("jetson_orin", "orin"),
        ("orin-nx", "orin-nx"),
        ("orin-nano", "orin-nano"),
        ("jetson-orin-nano", "orin-nano"),
        ("thor", "thor"),
        ("4090", "rtx-4090"),
        ("h100", "h100"),
        (" cpu ", "cpu"),
    ],
)
def test_a_device_is_found_by_name_or_alias(name, device):
    """Case, underscores and spaces around the name do not matter."""
    assert load_profile(name).name == device


@pytest.mark.parametrize(("name", "near"), [("orn", "orin"), ("rtx-4080", "rtx-4090"), ("jetson-thr", "jetson-thor")])
def test_an_unknown_device_names_the_nearest_and_the_known_ones(name, near):
    """A typing slip is answered with the name that was meant."""
    with pytest.raises(DeviceError, match=f'Did you mean "{near}"') as caught:
        load_profile(name)
    assert "orin-nano" in str(caught.value)


def test_no_two_devices_share_a_name_or_alias():
    """A name leads to one device."""
    names = [name for p in list_profiles() for name in (p.name, *p.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and "_" not in name for name in names)  # as load_profile spells them


def test_every_constant_has_its_unit_a_mark_and_a_source():
    """All constants of the prior are there in the one unit the prior computes in."""
    for profile in list_profiles():
        assert {name: c.unit for name, c in profile.constants.items()} == CONSTANT_UNITS
        shares = [p.decode_efficiency for p in profile.precisions.values()]
        for constant in (*profile.constants.values(), *shares):
            assert constant.mark in ("s", "m", "u")
            assert len(constant.source) > 5


def test_orin_prefers_native_and_carries_int4_only_there():
    """JetPack 7.2 comes first; block-wise int4 does not fit the opset of JetPack 6.2's TensorRT 10.3."""
    orin = load_profile("orin")
    assert orin.dialects == ("native", "primitive")
    assert (orin.compute_dtype, orin.energy_source) == ("float16", "prior")
    assert orin.precisions_for("primitive") == ("fp16", "int8", "fp32")
    assert orin.precisions_for("native") == ("fp16", "int8", "int4", "fp32")
    assert orin.precision("int4", "native").dialects == ("native",)
    with pytest.raises(DeviceError, match="only in the native dialect, not in primitive"):
        orin.precision("int4", "primitive")


def test_cpu_is_a_proxy_without_fp16():
    """The CPU's joules are time x an assumed power, and its kernels do not run fp16."""
    cpu = load_profile("cpu")
    assert (cpu.energy_source, cpu.compute_dtype, cpu.dialects) == ("proxy", "float32", ("native",))
    assert cpu.constant("j_per_byte") == cpu.constant("j_per_flop") == 0
    with pytest.raises(DeviceError, match="Choose fp32, int8, int4"):
        cpu.precision("fp16")
    assert any("assumed" in note for note in cpu.notes)


def test_only_the_cpu_and_products_of_8_bit_floats_round_normed_inputs():
    """Static int8 inputs are asked for where they were measured to pay; fp8 is for GPUs that multiply it, with them."""
    rounding = {(p.name, name) for p in list_profiles() for name, entry in p.precisions.items() if entry.static_inputs}
    floats = {(p.name, "fp8") for p in list_profiles() if "fp8" in p.precisions}
    assert rounding == {("cpu", "int8"), ("cpu", "int4")} | floats
    assert {name for name, _ in floats} == {"h100", "rtx-4090", "rtx-5090", "thor"}
    wrong = json.loads(shipped_texts()["cpu"])
    wrong["precisions"]["int8"]["static_inputs"] = "yes"
    with pytest.raises(DeviceError, match='"static_inputs" must be true or false, not a string'):
        parse_profile(json.dumps(wrong), "cpu", {})


def test_what_a_profile_inherits_is_marked_unconfirmed():
    """orin-nano states its own idle power and bandwidth; joules per byte are orin's and only a guess."""
    nano, orin = load_profile("orin-nano"), load_profile("orin")
    assert nano.based_on == "orin"
    assert (nano.constant("idle_w"), nano.constants["idle_w"].mark) == (6.0, "m")
    assert nano.constant("j_per_byte") == orin.constant("j_per_byte")
    assert nano.constants["j_per_byte"].mark == nano.precisions["int8"].decode_efficiency.mark == "u"
    assert orin.constants["j_per_byte"].mark == "m"
    assert nano.constants["j_per_byte"].source.startswith("taken from orin")


def test_an_unchanged_profile_parses():
    """The positive twin of the refusals below."""
    assert parse_profile(changed(), "cpu", {}).name == "cpu"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dialect": ["native"]}, 'unknown key "dialect". Did you mean "dialects"'),
        ({"dialects": ["plain"]}, '"dialects" must name some of primitive, native'),
        ({"threads": None}, '"threads" is missing'),
        ({"threads": "2"}, '"threads" must be an integer, not a string'),
        ({"schema": 2}, "Upgrade eopc"),
        ({"name": "gpu"}, '"name" must be "cpu"'),
        ({"compute_dtype": "float8"}, "float16"),
        ({"energy_source": "measured"}, "prior, proxy"),
        ({"based_on": "orin"}, 'names "orin", which is not there'),
        ({"constants": {}}, "is missing"),
        ({"precisions": {}}, '"precisions" is empty'),
        ({"precisions": {"int9": {}}}, 'Did you mean "int'),
    ],
)
def test_a_malformed_profile_is_refused_with_the_reason(changes, says):
    """Unknown, missing and wrong entries are named."""
    with pytest.raises(DeviceError) as caught:
        parse_profile(changed(**changes), "cpu", {})
    assert says in str(caught.value)


def test_a_key_that_stands_twice_is_refused():
    """The second would win without a word, at any depth; the same key in two objects is fine."""
    text = changed().replace('"idle_w": {', '"idle_w": {}, "idle_w": {')
    with pytest.raises(DeviceError, match=r'cpu\.json has the key "idle_w" twice in one object'):
        parse_profile(text, "cpu", {})


@pytest.mark.parametrize(
    ("constant", "says"),
    [
        ({"value": 30, "unit": "mW", "mark": "s", "source": "sheet"}, "must be one of W"),
        ({"value": 30, "unit": "W", "mark": "x", "source": "sheet"}, "must be one of s, m, u"),
        ({"value": 30, "unit": "W", "mark": "s", "source": " "}, '"source" is empty'),
        ({"value": 0, "unit": "W", "mark": "s", "source": "sheet"}, "more than 0"),
        ({"value": -1, "unit": "W", "mark": "s", "source": "sheet"}, "at least 0"),
        ({"value": True, "unit": "W", "mark": "s", "source": "sheet"}, "not a boolean"),
        ({"value": 30, "unit": "W", "mark": "s"}, '"source" is missing'),
        (30, "must be a JSON object, not an integer"),
    ],
)
def test_a_constant_without_unit_mark_or_source_is_refused(constant, says):
    """A bare number says nothing about where it comes from."""
    constants = json.loads(changed())["constants"] | {"idle_w": constant}
    with pytest.raises(DeviceError, match="idle_w") as caught:
        parse_profile(changed(constants=constants), "cpu", {})
    assert says in str(caught.value)


def test_profiles_based_on_each_other_are_refused():
    """A circle has no constants to start from."""
    texts = {name: changed(name=name, based_on=other) for name, other in (("a", "b"), ("b", "a"))}
    with pytest.raises(DeviceError, match="which is not there"):
        parse_profile(texts["a"], "a", texts)


def test_jetson_profiles_carry_their_rails_and_others_have_none():
    """A module's input, or the sum of its rails where it has none; VDDQ lies inside VIN_SYS_5V0 and is not added."""
    assert load_profile("orin").rails.total == (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),)
    assert load_profile("orin").rails.sub_rails == ("VDDQ_VDD2_1V8AO",)
    assert load_profile("orin-nano").rails.total == load_profile("orin-nx").rails.total == (("VDD_IN",),)
    assert load_profile("thor").rails.total[0] == ("VIN",)
    assert all(p.rails is None for p in list_profiles() if p.name in ("cpu", "h100", "rtx-4090"))


def test_rails_are_inherited_unconfirmed_replaced_whole_or_denied():
    """A profile that says nothing of rails takes its parent's as a guess; its own replace them; null means none."""
    texts = shipped_texts()
    nano = json.loads(texts["orin-nano"])
    own = parse_profile(json.dumps(nano), "orin-nano", texts).rails
    assert (own.board, own.mark, own.total) == ("orin-nano", "s", (("VDD_IN",),))
    none = parse_profile(json.dumps(nano | {"rails": None}), "orin-nano", texts).rails
    del nano["rails"]
    taken = parse_profile(json.dumps(nano), "orin-nano", texts).rails
    assert none is None
    assert (taken.board, taken.mark) == ("orin-nano", "u")
    assert taken.total == load_profile("orin").rails.total
    assert taken.source.startswith("taken from orin, unconfirmed here: ")


@pytest.mark.parametrize(
    ("rails", "says"),
    [
        ([], "must be a JSON object"),
        ({"total": [["VIN"]]}, '"sub_rails" is missing'),
        (
            {"total": [["VIN"]], "sub_rails": ["VIN"], "ignored": [], "mark": "s", "source": "x"},
            "a sub-rail is not added",
        ),
    ],
)
def test_malformed_rails_are_refused(rails, says):
    """Rails are read as strictly as constants: a slip there would be a wrong total."""
    with pytest.raises(DeviceError, match=r"cpu\.json: rails") as caught:
        parse_profile(changed(rails=rails), "cpu", {})
    assert says in str(caught.value)
