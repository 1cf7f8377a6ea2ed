"""KV groups are weighed against FFN channels by tiers that were really repaired, once, and only where it matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopc_compiler import stage_weigh
from eopc_compiler.cache import StageCache
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.pipeline import PASSES, run_passes
from eopc_compiler.stage_weigh import weigh_groups
from eopc_compiler.state import CompileState
from eopc_runtime.profiles import load_profile

BEFORE = PASSES[: PASSES.index(weigh_groups)]
said: list[str] = []


@pytest.fixture
def state(tiny_checkpoint: Path, tmp_path: Path, build_settings: Callable[..., Any]) -> Iterator[CompileState]:
    """A build of the tiny model in front of the pass, with what it says in `said`."""
    cache = StageCache(tmp_path / "work", resume=False)
    args = build_settings(tiny_checkpoint, tmp_path / "out")
    yield run_passes(CompileState(args, cache, load_profile("cpu"), said.append, lambda _: None), BEFORE)
    cache.close()


def curves(state: CompileState) -> tuple[LayerCurves, ...]:
    assert state.observations
    return state.observations.curves


def weighed_by(state: CompileState, monkeypatch: pytest.MonkeyPatch, weight: float) -> CompileState:
    """The pass with a made-up result of its probe."""
    monkeypatch.setattr(stage_weigh, "group_weight", lambda *_: weight)
    return weigh_groups(state)


def test_every_curve_of_groups_is_multiplied_and_nothing_else(
    state: CompileState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the probe found; the build says what that is."""
    got = weighed_by(state, monkeypatch, 3.0)
    for before, after in zip(curves(state), curves(got), strict=True):
        assert after.kv_errors == tuple(3 * e for e in before.kv_errors)
        assert replace(after, kv_errors=before.kv_errors) == before
    assert "3.0 x what their curves say" in said[-1]


def test_the_probe_measures_two_repaired_tiers(state: CompileState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nats added by a tier cut by its curves and by one cut in channels alone, neither of them nothing."""
    seen: list[tuple[tuple[Mask, Mask], tuple[float, float]]] = []

    def spy(_curves: object, masks: tuple[Mask, Mask], lost: tuple[float, float]) -> float:
        seen.append((masks, lost))
        return 2.0

    monkeypatch.setattr(stage_weigh, "group_weight", spy)
    weigh_groups(state)
    ((masks, lost),) = seen
    by_curves, channels, whole = (
        [d.num_key_value_heads for d in mask.layers] for mask in (*masks, full_mask(state.config))
    )
    assert sum(by_curves) < sum(channels) and channels == whole
    assert lost[0] != lost[1] and all(abs(nats) > 1e-6 for nats in lost)


def test_a_resumed_build_does_not_measure_again(state: CompileState, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is a stage's result like any other."""
    first = weigh_groups(state)
    again = weighed_by(state, monkeypatch, 16.0)
    assert curves(again) == curves(first)


def test_nothing_is_measured_where_nothing_is_pruned(state: CompileState) -> None:
    """A budget that the whole model meets, or masks that the user gives."""
    rich = replace(state, args=replace(state.args, budgets_j=(1e9,)))
    given = replace(state, args=replace(state.args, masks=(Path("mask.json"),)))
    assert weigh_groups(rich) is rich and weigh_groups(given) is given
