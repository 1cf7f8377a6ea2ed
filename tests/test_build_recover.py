"""`eopc build --recover`: the shared weights are distilled, and the ladder stays a ladder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eopc_compiler.build import build
from eopc_runtime.bundle import Bundle


def test_recovery_changes_the_shared_weights_and_leaves_the_whole_model_within_its_bound(
    tiny_checkpoint: Path, tiny_bundle: Path, build_settings: Callable[..., Any], tmp_path: Path
) -> None:
    """A recovered bundle passes the parity gate, has other weights, and keeps t0 within 0.005 nats."""
    said: list[str] = []
    args = build_settings(tiny_checkpoint, tmp_path / "recovered.eopc", recover_minutes=0.1)
    result = build(args, said.append)
    plain, recovered = Bundle.open(tiny_bundle), Bundle.open(result.bundle)
    assert len(recovered.manifest.tiers) == len(plain.manifest.tiers)
    assert (result.bundle / "weights.bin").read_bytes() != (tiny_bundle / "weights.bin").read_bytes()
    gains = {
        line[:2]: [float(x) for x in line.split() if x[0].isdigit()] for line in said if " nats on selection" in line
    }
    before, after = gains["t0"]
    assert after <= before + 0.005 + 1e-3  # printed to three digits
    assert sum(row[1] for row in gains.values()) <= sum(row[0] for row in gains.values()) + 1e-3
