"""Prices and manifest together: the bundle verifies after every step, whoever dies in between."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.bundle_files import NEXT_ENERGY_NAME
from eopc_runtime.calibration.publish import publish, publish_steps
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BundleError

NEW = EnergyTable(
    "orin",
    "calibrated",
    0.25,
    tuple(TierEnergy(f"t{i}", 0.5, 0.25, 0.0, 2.0, 0.0, 0.0, "calibrated") for i in range(3)),
)


def test_published_prices_are_in_both_files(lab: Any) -> None:
    """energy.json has the table, the manifest its hash and the tiers' joules at the reference workload."""
    old = lab.bundle
    publish(old, NEW)
    now = lab.bundle  # opened with verification
    assert now.energy == NEW
    want_j = (0.5 + 64 * 0.25 + 99 * 2.0) * 1.25
    assert [(t.energy_j, t.energy_source) for t in now.manifest.tiers] == [(want_j, "calibrated")] * 3
    same = [entry for entry in now.manifest.files if entry.path != "energy.json"]
    assert same == [entry for entry in old.manifest.files if entry.path != "energy.json"]
    assert not list(lab.bundle_path.glob("*next*"))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_bundle_verifies_after_every_step_of_the_publication(lab: Any, steps: int) -> None:
    """Killed after any step it opens with the old prices or with the new ones, whole; and the same call finishes."""
    before = lab.bundle.energy
    publication = publish_steps(lab.bundle, NEW)
    for _ in range(steps):
        next(publication)
    publication.close()  # the process dies here
    now = lab.bundle
    assert now.energy == (before if steps < 3 else NEW)
    assert json.loads((lab.bundle_path / "energy.json").read_text())["source"] == now.energy.source
    publish(now, NEW)
    assert lab.bundle.energy == NEW
    assert not list(lab.bundle_path.glob("*next*"))


def test_prices_that_are_torn_or_foreign_are_not_taken_over(lab: Any) -> None:
    """Only a file with the very hash of the manifest takes the place of energy.json; damage stays an error."""
    good = (lab.bundle_path / "energy.json").read_text()
    (lab.bundle_path / NEXT_ENERGY_NAME).write_text('{"schema": 2, "device"')
    assert lab.bundle.energy.source == "prior"
    (lab.bundle_path / "energy.json").write_text(good.replace("prior", "pri0r"))
    with pytest.raises(BundleError, match=r"energy\.json does not match"):
        Bundle.open(lab.bundle_path)


def test_an_interrupted_publication_is_finished_without_verification_too(lab: Any) -> None:
    """verify=False checks sizes only, and must not miss that the prices of the manifest are still waiting."""
    publication = publish_steps(lab.bundle, NEW)
    for _ in range(3):
        next(publication)
    publication.close()
    assert Bundle.open(lab.bundle_path, verify=False).energy == NEW
