"""The constants of orin's prior are what the public data gives, and their error is the one that was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from eopc_runtime.profiles import load_profile

ORIN = Path(__file__).parents[3] / "shared" / "energy" / "data" / "orin_public.csv.gz"  # optional, beside a checkout
needs_orin = pytest.mark.skipif(
    not ORIN.is_file(), reason="the public Orin measurements beside the checkout are absent"
)


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    """tools/orin_prior.py."""
    return load_tool("orin_prior")


@pytest.fixture(scope="module")
def found(tool: ModuleType) -> Any:
    """What the script finds in the data."""
    return tool.find(ORIN)


@needs_orin
def test_the_shipped_constants_are_what_the_data_gives(found: Any) -> None:
    """J per byte, per FLOP and per unpacked weight of profiles/orin.json, to the digits that are shipped."""
    orin = load_profile("orin")
    for name in ("j_per_byte", "j_per_flop"):
        assert orin.constant(name) == pytest.approx(found.constants[name], rel=1e-3)  # four digits are shipped
    for precision in ("int8", "int4"):
        unpack = orin.precision(precision).unpack_j
        assert unpack is not None
        assert unpack.value == pytest.approx(found.constants["unpack_j"], rel=1e-3)
    assert orin.precision("fp16").unpack_j is None


@needs_orin
def test_the_shipped_error_is_what_the_data_gives(found: Any) -> None:
    """Held out, as metered, and of the other engines: all figures, and the words about how they were found."""
    shipped = load_profile("orin").prior_error
    assert shipped is not None
    assert shipped.engine == found.error.engine
    assert shipped.method == found.error.method
    pairs = [(shipped.held_out, found.error.held_out), (shipped.as_metered, found.error.as_metered)]
    assert shipped.other_engines.keys() == found.error.other_engines.keys()
    pairs += [(shipped.other_engines[name], found.error.other_engines[name]) for name in shipped.other_engines]
    for one, other in pairs:
        # 1 %: rounding to three digits, and the last bits of another linear algebra library
        assert (one.mape, one.worst_under) == pytest.approx((other.mape, other.worst_under), rel=0.01)
        assert one.n_sets == other.n_sets


@needs_orin
def test_sets_left_out_are_priced_better_than_the_earlier_constants_price_them_in_sample(found: Any) -> None:
    """4.0 % against 6.4 % with the sensor's lag put back, and never more than 1.07 times too low instead of 1.37.

    Against joules as metered the earlier constants are closer in the mean (5.6 against 7.3 %), because they are too
    low by about as much as the sensor is; they are up to 1.18 times too low even there, these 1.04 times.
    """
    now, earlier = found.report["left out"], found.report["earlier constants, in sample"]
    assert now["lag put back"]["mape"] < 0.045 < 0.06 < earlier["lag put back"]["mape"]
    for measure in now:
        assert now[measure]["worst_under"] < earlier[measure]["worst_under"]
    assert now["as metered"]["mape"] == pytest.approx(0.073, abs=0.001)
    assert earlier["as metered"]["mape"] == pytest.approx(0.056, abs=0.001)


@needs_orin
def test_what_the_record_says_of_launches_is_what_was_found(found: Any) -> None:
    """A power of their own is 1.95 x idle, errs by 1.8 % left out, and makes a 135M model 1.4 times as dear."""
    report = found.report
    assert report["with launches at a power of their own"]["launches"] == pytest.approx(1.95, abs=0.005)
    assert report["with launches at a power of their own, left out"]["lag put back"]["mape"] == pytest.approx(
        0.018, abs=0.0005
    )
    prices = report["SmolLM2-135M int8, 128 + 140 tokens, J"]
    assert prices["with launches at a power of their own"] / prices["now"] == pytest.approx(1.4, abs=0.05)
    for words in ("1.95 x idle", "left out is 1.8 %", "may be 1.4 times too low"):
        assert words in found.error.method


@needs_orin
def test_left_out_means_left_out(tool: ModuleType) -> None:
    """Doubling the energies of a set changes nothing in the profile that prices it, and something in the others."""
    profile = load_profile("orin")
    sets = [group for group in tool.read_sets(ORIN, 11.1) if group.engine == "trtllm"]
    changed = [replace(sets[0], energy_j=2 * sets[0].energy_j, step_s=2 * sets[0].step_s), *sets[1:]]
    before, after = tool.leave_one_out(profile, sets), tool.leave_one_out(profile, changed)
    assert before[0][0] == after[0][0]
    assert all(
        a[0].constant("j_per_byte") != b[0].constant("j_per_byte")
        for a, b in zip(before, after, strict=True)
        if a[1] is b[1]
    )


def test_constants_behind_exact_energies_are_found_again(tool: ModuleType) -> None:
    """Energies computed from known constants for two models and three precisions give these constants back."""
    wanted = {"j_per_byte": 3e-10, "j_per_flop": 1e-12, "unpack_j": 4e-11}
    profile = tool.with_constants(load_profile("orin"), wanted)
    n, m = (np.array(x, dtype=float) for x in zip(*[(a, b) for a in (64, 2048) for b in (64, 512)], strict=True))
    sets = []
    for model, quant in (("Llama-3.2-1B", "fp16"), ("Llama-3.2-1B", "int8"), ("Llama-3.1-8B", "int4")):
        cost, precision = tool.llama_cost(tool.MODELS[model], quant), tool.QUANTS[quant][2]
        group = tool.EngineSet(quant, "trtllm", cost, precision, n, m, n, m, 0.0)
        sets.append(replace(group, energy_j=tool.priced_j(profile, group)))
    found = tool.fit_energies(load_profile("orin"), sets)
    # 1e-6: differences of prices are taken to get the columns, which costs some digits
    assert found == pytest.approx(wanted, rel=1e-6)


def test_model_costs_are_those_of_the_public_configs(tool: ModuleType) -> None:
    """Llama-3.2-1B has 1.236 and Llama-3.1-8B 7.5 billion weights beside its input embedding; KV is 32 and 128 KiB."""
    one, eight = (tool.llama_cost(tool.MODELS[name], "fp16") for name in ("Llama-3.2-1B", "Llama-3.1-8B"))
    assert one.weight_bytes / 2 == pytest.approx(1.2358e9, rel=1e-3)
    assert eight.weight_bytes / 2 == pytest.approx(7.505e9, rel=1e-3)
    assert (one.kv_bytes_per_token, eight.kv_bytes_per_token) == (32 * 1024, 128 * 1024)
    assert tool.llama_cost(tool.MODELS["Llama-3.2-1B"], "Q4_0").weight_bytes == pytest.approx(0.763e9, rel=2e-3)
