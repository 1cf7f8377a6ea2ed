"""The error of a prior: what ships with orin, that other boards do not inherit it, and that bad records are refused."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.energy_model.sources import load_priced
from eopc_runtime.errors import DeviceError
from eopc_runtime.jsonfields import Fields
from eopc_runtime.prior_error import PriorError
from eopc_runtime.profiles import list_profiles, load_profile


@pytest.fixture
def record() -> dict[str, Any]:
    """The record as it stands in profiles/orin.json."""
    text = files("eopc_runtime").joinpath("_profiles", "orin.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)["prior_error"]
    return content


def read(record: object) -> PriorError:
    """Read a record as a profile does."""
    return PriorError.from_fields(Fields(record, "orin.json: prior_error", DeviceError))


def test_orin_states_the_held_out_error_of_its_prior() -> None:
    """Engine, error on sets left out and how it was found are there; engines it was not made for are worse."""
    error = load_profile("orin").prior_error
    assert error is not None
    assert (error.engine, error.held_out.n_sets) == ("trtllm", 4)
    assert error.held_out.mape < 0.05
    assert error.held_out.worst_under < 1.1
    assert error.other_engines["llamacpp"].worst_under > 2
    assert "left out" in error.method
    assert str(error).startswith("trtllm: 4.0% off in the mean, at most 1.07 times too low, on 4 public engine sets")
    assert str(error).endswith("other engines: up to 2.4 times too low")


def test_no_other_device_claims_an_error() -> None:
    """What orin's prior was worth on orin says nothing of orin-nano, whose profile is based on it."""
    assert load_profile("orin-nano").based_on == "orin"
    assert [p.name for p in list_profiles() if p.prior_error] == ["orin"]


def test_a_record_comes_back_as_it_was_read(record: dict[str, Any]) -> None:
    """`eopc devices --json` shows what the profile says."""
    assert read(record).to_json() == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mape": -0.1}, '"mape" is -0.1'),
        ({"mape": None}, '"mape" must be a number'),
        ({"worst_under": 0}, '"worst_under" is 0'),
        ({"n_sets": 0}, '"n_sets" is 0'),
        ({"method": " "}, '"method" is empty'),
        ({"as_metered": {"mape": 0.1, "worst_under": 1.0}}, '"n_sets" is missing'),
        ({"other_engines": {"vllm": {"mape": 0.1, "worst_under": 1.0, "n_sets": 1, "bias": 0}}}, 'unknown key "bias"'),
        ({"mean": 0.1}, 'unknown key "mean"'),
    ],
)
def test_a_malformed_record_is_refused(record: dict[str, Any], change: dict[str, object], says: str) -> None:
    """Negative errors, missing counts, unknown keys."""
    assert read(record)
    with pytest.raises(DeviceError) as caught:
        read(record | change)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("device", "source", "says"),
    [
        ("orin", "prior", "not measured; trtllm: 4.0% off in the mean"),
        ("orin-nano", "prior", "computed from the device profile, not measured"),
        ("a-newer-board", "prior", "computed from the device profile, not measured"),
        ("orin", "calibrated", None),
    ],
)
def test_prices_from_a_prior_say_how_far_off_priors_were(tmp_path: Any, device: str, source: str, says: str) -> None:
    """`eopc energy predict` warns with the known error, without one for other boards, and not of calibrated joules."""
    tier = TierEnergy("t0", 1.0, 0.1, 0.0, 1.0, 0.0, 0.0, source)
    path = tmp_path / "energy.json"
    path.write_text(json.dumps(EnergyTable(device, source, 0.0, (tier,)).to_json()))
    (priced,) = load_priced(path)
    assert (priced.warnings == ()) == (says is None)
    assert all(says in warning for warning in priced.warnings)
