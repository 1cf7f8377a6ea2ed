"""Public measurements: what ships, that it prices its own model alone, and that bad files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.sweetspot import optimum
from eopc_runtime.errors import DeviceError, EopcError
from eopc_runtime.measured import MeasuredEnergy, load_measured, parse_measured
from eopc_runtime.profiles import list_profiles

PAPER = json.loads((Path(__file__).parent / "energy_model" / "sweetspot_published.json").read_text(encoding="utf-8"))
FOUR_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")


@pytest.fixture
def orin() -> MeasuredEnergy:
    """What ships for AGX Orin."""
    found = load_measured("orin")
    assert found is not None
    return found


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    """The shipped Orin file after a change, as JSON text."""
    text = files("eopc_runtime").joinpath("_profiles", "measured", "orin.json").read_text(encoding="utf-8")
    content = json.loads(text)
    change(content)
    return json.dumps(content)


def test_measurements_ship_for_devices_that_exist_and_for_no_others() -> None:
    """Orin and H100 have public fits; a device without them gives None."""
    assert {p.name for p in list_profiles() if load_measured(p.name)} == {"orin", "h100"}
    assert load_measured("no-such-device") is None


def test_orin_has_the_eight_engine_sets_and_one_apart(orin: MeasuredEnergy) -> None:
    """Every batch-1 set of the first source, with 36 cells and a margin at 95 %; the 1 Hz set is marked and says so."""
    keys = [item.key.removeprefix("Llama-3.2-1B/") for item in orin.fits]
    assert keys[:8] == [
        *("trtllm/fp16", "trtllm/int4", "trtllm/int8", "llamacpp/Q4_0", "llamacpp/Q4_K_M", "llamacpp/Q8_0"),
        *("pytorch/bf16", "vllm/fp16"),
    ]
    for item in orin.fits[:8]:
        assert (item.source, item.size_class, item.cells, item.coarse) == ("iiswc2026", "1B", 36, False)
        assert (item.hull.n_in, item.hull.n_out) == ((128, 4096), (128, 4096))
        assert item.mape_cv is not None
        assert item.mape_cv < 0.01
        assert item.conformal is not None
        assert (item.conformal.k, item.conformal.level) == (19, pytest.approx(0.95))
    (apart,) = orin.fits[8:]
    assert (apart.source, apart.size_class, apart.coarse) == ("edgereasoning", "1.5B", True)
    assert apart.hull.n_out[0] == 256
    assert "1 Hz" in apart.notes[0]


def test_orin_fits_say_whose_joules_they_are(orin: MeasuredEnergy) -> None:
    """Board, power mode, clocks, four rails, engine and batch are known; of the other source, what it states."""
    identity = orin.identity(orin.find("Llama-3.2-1B", "trtllm", "int4"))
    assert (identity.module, identity.power_mode, identity.clocks) == ("p3701-0000", "MAXN", "jetson_clocks")
    assert (identity.rails, identity.runner, identity.batch) == (FOUR_RAILS, "trtllm", 1)
    other = orin.identity(orin.fits[-1])
    assert (other.module, other.power_mode, other.rails) == (None, None, ("GPU rail",))
    assert identity.differences(other)


def test_every_source_names_licence_and_place() -> None:
    """Title, authors, licence and what was changed are there, and a doi or a repository with its commit."""
    for device in ("orin", "h100"):
        found = load_measured(device)
        assert found is not None
        assert {item.source for item in found.fits} == set(found.sources)
        for source in found.sources.values():
            assert all((source.title, source.authors, source.licence, source.changes))
            assert source.doi or (source.repository and source.commit)
            assert any(word in source.licence for word in ("MIT", "BSD-3-Clause", "CC BY 4.0"))


def test_prices_of_a_fit_are_calibrated_and_those_of_the_published_table(orin: MeasuredEnergy) -> None:
    """Llama-3.2-1B int4 at 512 + 512: 182.4 J were measured (median of 15 runs); the fit gives them within 1 %."""
    tier = orin.find("Llama-3.2-1B", "trtllm", "int4").tier()
    assert tier.source == "calibrated"
    assert tier.expected_j(512, 512) == pytest.approx(182.2, rel=0.01)
    assert tier.sequence_j(512, 512) == pytest.approx(182.2 + 10.47, rel=0.01)  # no credit for the negative constant


def test_h100_holds_the_thirteen_published_fits_in_another_order() -> None:
    """θ is the paper's t0..t5 reordered, its printed optimum comes out, and all of it is marked as throughput."""
    found = load_measured("h100")
    assert found is not None
    assert [item.model for item in found.fits] == list(PAPER["llms"])
    for item in found.fits:
        published = PAPER["llms"][item.model]
        assert item.theta == Theta.from_paper(published["theta"])
        best, _ = optimum(item.theta, 64)
        assert best is not None
        assert round(best) == published["n_out_star_at_64"]
        assert item.mape_in_sample == pytest.approx(published["mape_pct"]["Mem+FLOPs"] / 100)
        assert (item.serving, item.batch, item.mape_cv, item.margin) == ("throughput", 1024, None, None)
    assert found.notes[0].startswith("Throughput mode: up to 1024 sequences")
    assert found.fits[0].size_class == "1B"


@pytest.mark.parametrize(
    "wanted",
    [
        ("Llama-3.1-8B", "trtllm", "int4"),
        ("Llama-3.2-1B", "trtllm", "fp8"),
        ("Llama-3.2-1B", "tensorrt", "int4"),
        ("llama-3.2-1b", "trtllm", "int4"),
    ],
)
def test_there_is_no_nearest_model(orin: MeasuredEnergy, wanted: tuple[str, str, str]) -> None:
    """Another size, precision, engine or spelling is refused, never priced by what is near."""
    with pytest.raises(DeviceError, match="do not carry over") as caught:
        orin.find(*wanted)
    assert "Llama-3.2-1B/trtllm/int4" in str(caught.value)


def test_the_shipped_file_parses_as_it_is() -> None:
    """The positive twin of the refusals below."""
    assert len(parse_measured(changed(lambda content: None), "orin").fits) == 9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(schema=2), "schema 2 is not known"),
        (lambda c: c.update(kind="fits"), '"kind" is "fits"'),
        (lambda c: c.update(device="thor"), '"device" must be "orin"'),
        (lambda c: c.update(fit=[]), 'unknown key "fit"'),
        (lambda c: c.update(fits=[]), "there is no fit"),
        (lambda c: c["fits"].append(c["fits"][0]), "Llama-3.2-1B/trtllm/fp16 twice"),
        (lambda c: c["fits"][0].update(mape=0.1), 'unknown key "mape"'),
        (lambda c: c["fits"][0].pop("rows"), '"rows" is missing'),
        (lambda c: c["fits"][0].update(source="iiswc"), 'Did you mean "iiswc2026"'),
        (lambda c: c["fits"][0].update(coarse=0), '"coarse" must be true or false'),
        (lambda c: c["fits"][0].update(batch=32), '"serving" is single, but "batch" is 32'),
        (lambda c: c["fits"][0].update(serving="throughput"), '"serving" is throughput, but "batch" is 1'),
        (lambda c: c["fits"][0].update(mape_cv=None, mape_in_sample=None), "it states no error"),
        (lambda c: c["fits"][0]["theta"].update(theta3=-0.1), '"theta3" is -0.1'),
        (lambda c: c["fits"][0]["theta"].update(theta6=0.0), 'unknown key "theta6"'),
        (lambda c: c["fits"][0]["theta"].update(dict.fromkeys(c["fits"][0]["theta"], 0)), "every price in it is 0"),
        (lambda c: c["fits"][0]["hull"].update(n_in=[512, 128]), "no range of tokens"),
        (lambda c: c["sources"]["iiswc2026"].update(licence=" "), '"licence" is empty'),
        (lambda c: c["sources"]["iiswc2026"].update(doi=None, repository=None), "needs a doi or a repository"),
        (lambda c: c["sources"]["iiswc2026"].update(url="x"), 'unknown key "url"'),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(change: Callable[[dict[str, Any]], object], says: str) -> None:
    """Unknown, missing, doubled and impossible entries are named."""
    with pytest.raises(EopcError) as caught:
        parse_measured(changed(change), "orin")
    assert says in str(caught.value)
