"""A bundle whose tiers are fakes that count bytes, and `eopc` run in this process or in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eopc_runtime.bundle import Bundle, Manifest, ModelInfo, Workload
from eopc_runtime.bundle_files import FileEntry, sha256_file
from eopc_runtime.cli import cli
from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.runners.base import Logits, Wanted
from eopc_runtime.tier_info import LayerInfo, TierInfo

from ..conftest import FakeCache, byte_backend

ROOT = Path(__file__).resolve().parents[3]
VOCAB = 258
CONTEXT = 64
CERTAIN = 5.0  # logit of the byte a fake tier expects; all others are 0


@dataclass
class FakeTier:
    """Expects every byte to be followed by the next one: a, b, c, ..."""

    tier: str
    vocab: int = VOCAB
    certain: float = CERTAIN

    def new_cache(self) -> FakeCache:
        return FakeCache(self.tier)

    def forward(self, cache: FakeCache, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        assert cache.tier == self.tier
        cache.append(tokens)
        out = np.zeros((len(tokens), VOCAB), dtype=np.float32)
        out[np.arange(len(tokens)), (np.asarray(tokens) + 1) % VOCAB] = CERTAIN
        return out if logits == "all" else out[-1:]

    def prefill(self, cache: FakeCache, tokens: Sequence[int]) -> Logits:
        return self.forward(cache, tokens)

    def adopt(self, cache: FakeCache) -> FakeCache:
        return cache.handed_to(self.tier)


class FakePool:
    """Stands where the ONNX Runtime pool stands."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.threads = threads

    def get(self, tier: str) -> FakeTier:
        return FakeTier(tier)

    def close(self) -> None:
        pass


@pytest.fixture
def fake_tier() -> FakeTier:
    """One tier of the bundle, with its `vocab` and the logit `certain` of the byte it expects."""
    return FakeTier("t0")


@pytest.fixture
def bare_bundle(tmp_path: Path) -> Path:
    """A valid bundle of two tiers; t0 costs 4 J a step, t1 1 J."""
    return write_bundle(tmp_path / "box")


@pytest.fixture
def bundle(bare_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, its graphs run by fake tiers."""
    monkeypatch.setattr("eopc_runtime.runners.ort_pool.OrtPool", FakePool)
    monkeypatch.setattr("eopc_runtime.runners.ort.import_onnxruntime", lambda: None)
    return bare_bundle


@pytest.fixture(scope="session")
def eopc() -> Callable[..., Result]:
    """Runs a command in this process."""
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def child() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a child process that sees the two packages."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'compiler'}"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)

    return run


def write_bundle(root: Path) -> Path:
    """Write a bundle whose files are all there; the graphs are not ONNX."""
    for name in ("tokenizer", "tiers/t0", "tiers/t1"):
        (root / name).mkdir(parents=True)
    byte_backend().save(str(root / "tokenizer/tokenizer.json"))
    (root / "tokenizer/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    steps = (4.0, 1.0)
    prices = tuple(TierEnergy(f"t{i}", 0.0, s / 8, 0.0, s, 0.0, 0.0, "prior") for i, s in enumerate(steps))
    (root / "energy.json").write_text(json.dumps(EnergyTable("fake", "prior", 0.0, prices).to_json()))
    for i in range(2):
        (root / f"tiers/t{i}/model.onnx").write_bytes(b"not a graph")
        layers = [{"source_layer": n, "kv_groups": [0], "ffn_channels": list(range(8 - 4 * i))} for n in range(2)]
        (root / f"tiers/t{i}/mask.json").write_text(json.dumps({"schema": 1, "tier": f"t{i}", "layers": layers}))
    (root / "weights.bin").write_bytes(b"weights")
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    manifest = Manifest(
        eopc_version="0.1.0",
        model=ModelInfo("tiny", "tiny", "llama", VOCAB, 8, 8, 2, CONTEXT, 256, (257,)),
        device="fake",
        dialect="primitive",
        opset=21,
        precision="fp32",
        compute_dtype="float32",
        workload=Workload(8, 8),
        context=CONTEXT,
        tiers=tuple(tier_info(i) for i in range(2)),
        files=tuple(FileEntry(p.relative_to(root).as_posix(), sha256_file(p), p.stat().st_size) for p in paths),
        tools={"torch": "2.9"},
        seed=0,
        calibration={},
    )
    (root / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return root


def tier_info(i: int) -> TierInfo:
    """The manifest record of one tier."""
    return TierInfo(
        tier=f"t{i}",
        budget_j=None if i == 0 else 8.0,
        energy_j=8.0,
        energy_source="prior",
        perplexity=9.5 + i,
        perplexity_dense=9.5,
        perplexity_by_domain={"text": 9.5 + i},
        params=1_000_000,
        keep={"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0 - i / 2},
        layers=(LayerInfo(0, 1, 8 - 4 * i), LayerInfo(1, 1, 8 - 4 * i)),
        cost=TierCost(2, 100, 10, 100.0, 10.0, 1.0),
        graph=f"tiers/t{i}/model.onnx",
        mask=f"tiers/t{i}/mask.json",
        note="lower half of the FFN" if i else "",
        parity={},
    )
