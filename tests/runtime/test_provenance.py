"""Provenance of calibrated prices: hull, margin, meter and identity, each read strictly."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields, plain
from eopc_runtime.provenance import Calibration, Conformal, Hull, Identity, MeterRecord

HULL = Hull((32, 512), (16, 256))
FULL = Calibration(
    hull=HULL,
    conformal=Conformal(alpha=0.05, k=19, q=0.021, level=0.95),
    cells=35,
    mape_cv={"t0": 0.0064},
    meter=MeterRecord("ina3221", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), idle_w=6.8, quantum_j=0.04),
    identity=Identity(module="p3701-0005", l4t="36.4", power_mode="MAXN", clocks="jetson_clocks", batch=1),
)


@pytest.mark.parametrize(
    ("n_in", "n_out", "factor"),
    [
        (32, 16, 1.0),
        (512, 256, 1.0),
        (513, 100, 1.2),
        (2048, 100, 1.2),
        (2049, 100, 1.44),
        (100, 257, 1.2),
        (100, 4097, 1.2**3),
        (16, 100, 1.2),
        (100, 1, 1.2**2),
    ],
)
def test_prices_rise_with_the_distance_from_the_hull(n_in: int, n_out: int, factor: float) -> None:
    """Nothing inside, bounds included; a fifth for every factor of 4 outside, on any side."""
    assert HULL.inflation(n_in, n_out) == pytest.approx(factor)
    assert HULL.holds(n_in, n_out) == (factor == 1.0)


@pytest.mark.parametrize("bounds", [((0, 5), (1, 5)), ((5, 4), (1, 5)), ((1, 5), (9, 3))])
def test_a_hull_is_a_rectangle_of_tokens(bounds: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Bounds start at 1 and rise."""
    with pytest.raises(BundleError, match="no range of tokens"):
        Hull(*bounds)


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"k": 0}, {"level": 1.0}, {"q": -1.0}, {"alpha": 1.5}])
def test_an_impossible_margin_record_is_refused(change: dict[str, float]) -> None:
    """Levels are shares, and at least one cell was kept out."""
    with pytest.raises(BundleError, match="impossible"):
        replace(FULL.conformal, **change)  # type: ignore[type-var]


def test_a_margin_says_when_its_level_is_short() -> None:
    """10 of 11 is less than 95 %; 19 of 20 is not."""
    assert Conformal(0.05, 10, 0.02, 10 / 11).short
    assert not Conformal(0.05, 19, 0.02, 19 / 20).short


def test_identities_differ_only_where_both_are_recorded() -> None:
    """Another mode, engine or rail set is named; what was not recorded matches; the order of rails does not matter."""
    mine = Identity(module="p3701-0005", power_mode="MAXN", rails=("A", "B"), engine="e1")
    assert mine.differences(Identity()) == ()
    assert mine.differences(replace(mine, rails=("B", "A"), l4t="36.4")) == ()
    other = replace(mine, power_mode="15W", rails=("A", "B", "C"), engine="e2")
    assert mine.differences(other) == ("power_mode: MAXN, not 15W", "rails: A+B, not A+B+C", "engine: e1, not e2")


@pytest.mark.parametrize(
    "calibration",
    [FULL, replace(FULL, hull=None, conformal=None, mape_cv={}, meter=None, identity=None)],
)
def test_provenance_survives_its_json(calibration: Calibration) -> None:
    """Writing and reading gives the same records; every part may be null."""
    record = Fields(plain(asdict(calibration)), "here", BundleError)
    assert Calibration.from_fields(record) == calibration


@pytest.mark.parametrize("part", ["hull", "conformal", "meter", "identity"])
def test_an_unknown_or_missing_key_is_refused_in_every_record(part: str) -> None:
    """No record reads past what it does not know, and null is not the same as absent."""
    content = plain(asdict(FULL))
    record = content[part]
    assert isinstance(record, dict)
    with pytest.raises(BundleError, match=f'{part}: unknown key "extra"'):
        Calibration.from_fields(Fields({**content, part: {**record, "extra": 1}}, "here", BundleError))
    del content[part]
    with pytest.raises(BundleError, match=f'"{part}" is missing'):
        Calibration.from_fields(Fields(content, "here", BundleError))
