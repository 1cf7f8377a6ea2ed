"""`eopc devices` and `eopc devices NAME`: priors with their error, public measurements with their source."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eopc_runtime.cli import cli
from eopc_runtime.measured import load_measured


def eopc(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def device(*arguments: object) -> dict[str, Any]:
    """Run `eopc devices ARGUMENTS --json` and return the one device in it."""
    result = eopc("devices", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["devices"]
    assert isinstance(found, dict)
    return found


def test_a_named_device_shows_every_fit_with_its_price_error_and_source() -> None:
    """J per token at 512 + 256, n_out*, error and source of each fit are those of the file; an alias will do."""
    found = device("agx-orin")
    measured = load_measured("orin")
    assert measured is not None
    assert found["name"] == "orin"
    for shown, item in zip(found["measured"]["fits"], measured.fits, strict=True):
        reference = shown["reference"]
        assert (shown["key"], shown["mape_cv"], shown["energy_source"]) == (item.key, item.mape_cv, "calibrated")
        assert (reference["n_in"], reference["n_out"]) == (512, 256)
        assert reference["j_per_token"] == pytest.approx(item.tier().expected_j(512, 256) / 256)
        assert reference["charged_j"] >= reference["energy_j"]
        assert item.hull.n_out[0] <= reference["n_out_star"] <= item.hull.n_out[1]
        assert found["measured"]["sources"][shown["source"]]["licence"]
    text = eopc("devices", "orin").stdout
    for words in ("Llama-3.2-1B", "trtllm", "0.7324", "0.33% left out", "VDDQ_VDD2_1V8AO", "zenodo.21848837", "MIT"):
        assert words in text


def test_sums_of_different_rails_stand_in_different_tables() -> None:
    """The GPU rail of one source is never in a column with the four-rail sums of the other."""
    text = eopc("devices", "orin").stdout
    first, second = text.index("one sequence at a time; VDD_GPU_SOC"), text.index("one sequence at a time; GPU rail")
    assert first < text.index("trtllm       int4") < second < text.index("edgereasoning\n")
    assert "sampled at about 1 Hz" in text


def test_h100_figures_are_labelled_throughput_mode() -> None:
    """They are never shown as the price of a sequence alone, and their error is said to be in sample."""
    text = eopc("devices", "h100").stdout
    assert "throughput mode, up to 1024 sequences at once" in text
    assert "1.56% in sample" in text
    assert "Never the price of a single sequence" in text
    assert "CC BY 4.0" in text
    assert {(item["serving"], item["batch"]) for item in device("h100")["measured"]["fits"]} == {("throughput", 1024)}


def test_lengths_that_were_not_measured_have_no_price() -> None:
    """Beyond the hull J per token is null and a dash; the sweet spot, which depends on the prompt alone, stays."""
    reference = device("orin", "--new-tokens", 5000)["measured"]["fits"][0]["reference"]
    assert (reference["j_per_token"], reference["energy_j"], reference["charged_j"]) == (None, None, None)
    assert reference["n_out_star"] == 624
    reference = device("orin", "--prompt-tokens", 64)["measured"]["fits"][0]["reference"]
    assert (reference["j_per_token"], reference["n_out_star"]) == (None, None)
    assert reference["reason"] == "measured for 128 to 4096 prompt and 128 to 4096 new tokens"
    line = next(
        x for x in eopc("devices", "orin", "--new-tokens", 5000).stdout.splitlines() if "fp16" in x and "0.33" in x
    )
    assert line.split()[3:6] == ["-", "-", "624"]


def test_the_error_of_the_prior_is_shown_where_it_is_known() -> None:
    """orin names it, for the engine it belongs to; a board it was never tried on says so."""
    assert "error for trtllm: 4.0% off in the mean" in eopc("devices", "orin").stdout
    assert "never compared with measurements on this device" in eopc("devices", "orin-nx").stdout
    assert "No public measurements of this device are shipped" in eopc("devices", "orin-nx").stdout
    assert device("orin")["prior_error"]["mape"] == 0.04
    assert (device("orin-nx")["prior_error"], device("orin-nx")["measured"]) == (None, None)


def test_all_devices_are_listed_without_a_name() -> None:
    """The JSON is the same as for one device, for each of them."""
    content = json.loads(eopc("devices", "--json").stdout)
    assert device("h100") in content["devices"]
    assert len(content["devices"]) == 9
    assert "eopc devices NAME" in eopc("devices").stdout


def test_an_unknown_device_is_an_error_with_the_nearest_name() -> None:
    """Exit 1, one sentence, no traceback."""
    result = eopc("devices", "orinn")
    assert result.exit_code == 1
    assert 'Did you mean "orin"' in result.stderr
