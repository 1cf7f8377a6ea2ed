"""A bundle of three tiers with a plan, whose manifest and plan a test may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAN: dict[str, Any] = {
    "schema": 1,
    "energy_source": "prior",
    "tiers": [
        {"tier": "t0", "plan": "t0", "energy_saved_j": 0.0, "loss_added": 0.0, "nats_per_joule": 0.0, "removed": []},
        {
            "tier": "t1", "plan": "t0>t1", "energy_saved_j": 9.9, "loss_added": 0.0625, "nats_per_joule": 0.0123,
            "removed": [
                {"source_layer": 2, "kind": "layer", "units": 1, "energy_saved_j": 7.5, "loss_added": None},
                {"source_layer": 1, "kind": "ffn", "units": 32, "energy_saved_j": 2.375, "loss_added": 0.01171},
            ],
        },
        {"tier": "t2", "plan": "t0>t2", "energy_saved_j": 19.8, "loss_added": 0.3125, "nats_per_joule": None},
    ],
}  # fmt: skip


@pytest.fixture
def planned(lab: Any) -> Path:
    """The lab's bundle with a plan.json."""
    path: Path = lab.bundle_path
    (path / "plan.json").write_text(json.dumps(PLAN))
    return path


@pytest.fixture
def edit(planned: Path) -> Callable[..., Path]:
    """Changes the manifest of the bundle by a function, and returns the bundle."""

    def change(by: Callable[[dict[str, Any]], Any]) -> Path:
        manifest = json.loads((planned / "manifest.json").read_text())
        by(manifest)
        (planned / "manifest.json").write_text(json.dumps(manifest))
        return planned

    return change
