"""Memory: what is left is read from the system, and what cannot fit is refused with the estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.errors import DeviceMemoryError
from eopc_runtime.memory import left_bytes, memory_bytes
from eopc_runtime.runners import ort_pool
from eopc_runtime.runners.fit import cache_bytes, require_fit, require_room, step_bytes, tier_bytes, weight_bytes
from eopc_runtime.tier_info import PrefillInfo

from .conftest import write_bundle

MEMINFO = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 3000 kB\nSwapFree: 500 kB\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of three tiers with 4000 bytes of weights each, 3 layers of 2 KV heads x 8, fp32, 258 tokens."""
    write_bundle(tmp_path / "small.eopc")
    return Bundle.open(tmp_path / "small.eopc")


def machine(root: Path, **files: str) -> Path:
    """A root with files of the system."""
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_is_left_counts_swap(tmp_path: Path) -> None:
    """Available memory and free swap together can be taken."""
    assert memory_bytes(machine(tmp_path))["MemTotal"] == 8000 << 10
    assert left_bytes(machine(tmp_path)) == 3500 << 10


def test_the_tightest_control_group_limits_it(tmp_path: Path) -> None:
    """A limit of the process's group, or of one above it, holds; pages of files in it can be had back."""
    group = {
        "proc/self/cgroup": "0::/system.slice/eopc.service\n",
        "sys/fs/cgroup/system.slice/eopc.service/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/eopc.service/memory.current": "1000\n",
        "sys/fs/cgroup/system.slice/memory.max": "100000\n",
        "sys/fs/cgroup/system.slice/memory.current": "90000\n",
        "sys/fs/cgroup/system.slice/memory.stat": "anon 60000\nactive_file 20000\ninactive_file 10000\n",
    }
    assert left_bytes(machine(tmp_path, **group)) == 100_000 - 90_000 + 30_000


def test_where_the_system_does_not_tell_nothing_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    """Without /proc the amount is not known, and a tier loads."""
    assert left_bytes(tmp_path / "nowhere") is None
    require_fit(bundle.manifest, bundle.manifest.tiers[0], 128, None)


def test_the_estimate_is_weights_cache_and_logits(bundle: Bundle) -> None:
    """4000 bytes of weights, 2 x 3 x 2 x 8 x 4 bytes a token, 4 bytes for each of 258 logits."""
    tier = bundle.manifest.tiers[0]
    assert cache_bytes(bundle.manifest, tier, 10) == 3840
    assert tier_bytes(bundle.manifest, tier, 10) == 4000 + 3840 + 1032


def test_single_tokens_hold_weights_anew_unless_prompts_have_a_graph(bundle: Bundle) -> None:
    """Then the graph of single tokens serves all but prompts, and those are counted with the rest."""
    tier = bundle.manifest.tiers[0]
    both = replace(tier, step="tiers/t0/step.onnx")
    behind = replace(both, prefill=PrefillInfo(1, "tiers/t0/prefill.onnx"), cost=replace(tier.cost, prefill=tier.cost))
    assert [step_bytes(t) for t in (tier, both, behind)] == [0, 4000, 0]
    assert [weight_bytes(t) for t in (tier, both, behind)] == [4000, 4000, 8000]


def test_a_tier_that_cannot_fit_is_refused_with_numbers_and_a_way_out(bundle: Bundle) -> None:
    """The message has what is needed, what is left, and a tier that would fit, if there is one."""
    manifest, tier = bundle.manifest, bundle.manifest.tiers[0]
    needed = tier_bytes(manifest, tier, 128)
    require_fit(manifest, tier, 128, needed)
    with pytest.raises(
        DeviceMemoryError, match=r"t0 needs at least 52\.9 KiB .* 52\.9 KiB are left\. Build for smaller"
    ):
        require_fit(manifest, tier, 128, needed - 1)


def test_a_bundle_that_cannot_fit_is_refused_before_a_graph_is_read(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool says so when it is opened; with room for it, it opens."""
    monkeypatch.setattr(ort_pool, "left_bytes", lambda: 10_000)
    with pytest.raises(DeviceMemoryError, match="needs at least"):
        ort_pool.OrtPool(bundle)
    monkeypatch.setattr(ort_pool, "left_bytes", lambda: 1 << 30)
    ort_pool.OrtPool(bundle)


def test_a_cache_that_outgrows_memory_is_refused(bundle: Bundle) -> None:
    """A sequence ends with the estimate, not with the process."""
    tier = bundle.manifest.tiers[0]
    require_room(bundle.manifest, tier, 100, 38_400)
    with pytest.raises(DeviceMemoryError, match=r"cache of 100 tokens on t0 needs 37\.5 KiB .*--max-new-tokens"):
        require_room(bundle.manifest, tier, 100, 38_399)
