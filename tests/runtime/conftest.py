"""A device of exact energies: runners that cost what a polynomial says, a meter that reads it, a bundle on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from eopc_runtime.bundle import Bundle
from eopc_runtime.bundle_files import file_entry
from eopc_runtime.calibration.calibrate import Rig
from eopc_runtime.calibration.conditions import Place
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.power.base import MEASURED, Meter, Sensor, Window, finish

VOCAB = 258  # one token per byte, <s> and </s>
# joules of a small board; t1 costs about two thirds of t0, t2 about a third
THETAS = (
    Theta(0.4, 0.004, 2e-6, 0.35, 6e-6, 5e-6),
    Theta(0.3, 0.003, 1e-6, 0.23, 4e-6, 4e-6),
    Theta(0.2, 0.001, 1e-6, 0.11, 2e-6, 3e-6),
)


@dataclass
class Device:
    """Time and joules go on together, at 20 W while a runner works and at 5 W while it sleeps.

    Both are kept as whole numbers (pJ, ps), so that a sequence costs the same whatever ran before it.
    """

    time_ps: int = 0
    energy_pj: int = 0
    forwards: int = 0
    factor: float = 1.0  # on every joule, for a device that slows down
    on_forward: Callable[[Device], None] | None = None

    def work(self, joules: float) -> None:
        self.forwards += 1
        self.energy_pj += round(joules * self.factor * 1e12)
        self.time_ps += round(joules * self.factor / 20.0 * 1e12)
        if self.on_forward is not None:
            self.on_forward(self)

    def sleep(self, seconds: float) -> None:
        self.energy_pj += round(5.0 * seconds * 1e12)
        self.time_ps += round(seconds * 1e12)

    def clock(self) -> float:
        return self.time_ps / 1e12


@dataclass
class FakeCache:
    """The tokens it holds, and how many of them came first: the prompt."""

    tier: str
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    nbytes: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int]) -> None:
        self.prompt = self.prompt or len(tokens)
        self.tokens += tokens

    def handed_to(self, tier: str) -> FakeCache:
        return FakeCache(tier, list(self.tokens), self.prompt)


@dataclass
class FakeTier:
    """Costs exactly what the prices of its tier say."""

    tier: str
    energy: TierEnergy
    device: Device

    def new_cache(self) -> FakeCache:
        return FakeCache(self.tier)

    def forward(self, cache: FakeCache, tokens: Sequence[int], *, logits: str = "last") -> Any:
        assert cache.tier == self.tier, "a cache must be adopted before another tier uses it"
        if cache.length == 0:
            self.device.work(self.energy.prefill_j(len(tokens)))
        else:
            self.device.work(self.energy.step_j(cache.prompt, cache.length - cache.prompt + 1))
        cache.append(tokens)
        return np.zeros((1, VOCAB), dtype=np.float32)

    def prefill(self, cache: FakeCache, tokens: Sequence[int]) -> Any:
        return self.forward(cache, tokens)

    def adopt(self, cache: FakeCache) -> FakeCache:
        return cache.handed_to(self.tier)


@dataclass
class FakePool:
    """A runner for every tier."""

    device: Device
    thetas: Sequence[Theta] = THETAS
    closed: bool = False

    def get(self, tier: str) -> FakeTier:
        return FakeTier(tier, self.thetas[int(tier[1:])].to_tier(tier, "calibrated"), self.device)

    def close(self) -> None:
        self.closed = True


class FakeMeter(Meter):
    """Reads the device's joules exactly; `faults` gives the faults of the n-th window."""

    def __init__(
        self, device: Device, source: str = MEASURED, faults: Callable[[int], dict[str, str]] = lambda i: {}
    ) -> None:
        self.sensor = Sensor("fake", ("VDD_A", "VDD_B"), steps_w={"VDD_A": 0.1, "VDD_B": 0.3}, source=source)
        self.idle_w: float | None = None
        self.period_s = 0.05
        self.windows = 0
        self._device, self._faults = device, faults
        self._open: dict[str, tuple[int, int]] = {}

    def begin(self, name: str) -> None:
        assert name not in self._open
        self._open[name] = (self._device.time_ps, self._device.energy_pj)

    def end(self, name: str) -> Window:
        start_ps, start_pj = self._open.pop(name)
        seconds = (self._device.time_ps - start_ps) / 1e12
        half = (self._device.energy_pj - start_pj) / 2e12
        self.windows += 1
        return finish(
            self,
            name,
            {"VDD_A": half, "VDD_B": half},
            duration_s=seconds,
            covered_s=seconds,
            samples=int(seconds / self.period_s),
            faults=self._faults(self.windows),
        )

    def energy_so_far_j(self, name: str) -> float:
        return (self._device.energy_pj - self._open[name][1]) / 1e12

    def close(self) -> None:
        self._open.clear()


@dataclass
class Lab:
    """The device with its bundle, and a rig for it; `root` is where its state is read."""

    bundle_path: Path
    root: Path
    device: Device = field(default_factory=Device)
    said: list[str] = field(default_factory=list)

    @property
    def bundle(self) -> Bundle:
        """The bundle as it is now, verified."""
        return Bundle.open(self.bundle_path)

    def rig(self, **changes: Any) -> Rig:
        """A rig of fakes."""
        parts: dict[str, Any] = {
            "pool": FakePool(self.device),
            "runner": "fake 1, 2 threads",
            "meter": FakeMeter(self.device),
            "place": Place(self.root, run=lambda command: None),
            "module": "a fake board",
            "cpu": lambda: None,
            "clock": self.device.clock,
            "sleep": self.device.sleep,
            "tell": self.said.append,
        }
        return Rig(**{**parts, **changes})

    def meter(self, **options: Any) -> FakeMeter:
        """A meter of the device."""
        return FakeMeter(self.device, **options)

    def set_mode(self, ident: int) -> None:
        """Switch the power mode, on a board that has two."""
        (self.root / "etc").mkdir(exist_ok=True)
        (self.root / "etc/nvpmodel.conf").write_text(
            "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=MODE_15W >\n"
        )
        (self.root / "var/lib/nvpmodel").mkdir(parents=True, exist_ok=True)
        (self.root / "var/lib/nvpmodel/status").write_text(f"pmode:{ident:04d}")

    def set_temperature(self, celsius: float) -> None:
        """Heat or cool the one thermal zone, which throttles at 99 C."""
        zone = self.root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "type").write_text("tj-thermal\n")
        (zone / "temp").write_text(f"{round(celsius * 1000)}\n")
        (zone / "trip_point_0_type").write_text("passive\n")
        (zone / "trip_point_0_temp").write_text("99000\n")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A device with a bundle of three tiers and prior prices."""
    return make_lab(tmp_path)


def make_lab(folder: Path) -> Lab:
    """Make a device with its bundle in a folder, or find those that are there."""
    root = folder / "root"
    root.mkdir(exist_ok=True)
    path = folder / "small.eopc"
    if not path.exists():
        write_bundle(path)
    return Lab(path, root)


def write_bundle(path: Path) -> None:
    """Write a well-formed bundle of three tiers, with stand-ins for graphs and weights."""
    names = ["weights.bin", "energy.json", "tokenizer/tokenizer.json"]
    names += [f"tiers/t{i}/{file}" for i in range(3) for file in ("model.onnx", "mask.json")]
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    for i in range(3):
        kept = [{"source_layer": n, "kv_groups": [0, 1], "ffn_channels": list(range(64 >> i))} for n in range(3)]
        mask = {"schema": 1, "tier": f"t{i}", "layers": kept}
        (path / f"tiers/t{i}/mask.json").write_text(json.dumps(mask))
    tiers = tuple(TierEnergy(f"t{i}", 0.1, 0.01, 0.0, 0.5 - i / 10, 0.001, 0.001, "prior") for i in range(3))
    byte_backend().save(str(path / "tokenizer/tokenizer.json"))
    (path / "energy.json").write_text(json.dumps(EnergyTable("orin", "prior", 0.0, tiers).to_json()))
    manifest = {
        "schema": 1,
        "eopc_version": "0.1.0",
        "model": {
            "name": "tiny", "source": "tests", "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16,
            "head_dim": 8, "num_hidden_layers": 3, "max_position_embeddings": 2048, "bos_token_id": None,
            "eos_token_ids": [257],
        },
        "device": "orin",
        "dialect": "native",
        "opset": 24,
        "precision": "int8",
        "compute_dtype": "float32",
        "workload": {"prompt_tokens": 64, "new_tokens": 100},
        "context": 1024,
        "tiers": [tier_json(i) for i in range(3)],
        "files": [],
        "tools": {},
        "seed": 0,
        "calibration": {},
    }  # fmt: skip
    manifest["files"] = [vars_of(file_entry(path, name)) for name in names]
    (path / "manifest.json").write_text(json.dumps(manifest))


def byte_backend() -> Tokenizer:
    """A tokenizer of one token per byte; 256 = <s>, 257 = </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def vars_of(entry: Any) -> dict[str, Any]:
    """The JSON of a file entry."""
    return {"path": entry.path, "sha256": entry.sha256, "bytes": entry.bytes}


def tier_json(i: int) -> dict[str, Any]:
    """The manifest's record of tier i."""
    cost = {
        "layers": 3, "weight_bytes": 4000, "kv_bytes_per_token": 128, "flops_per_token": 2e3, "head_flops": 1e3,
        "attn_flops_per_context": 512,
    }  # fmt: skip
    return {
        "tier": f"t{i}",
        "budget_j": None,
        "energy_j": 1.0,
        "energy_source": "prior",
        "perplexity": None,
        "perplexity_dense": None,
        "perplexity_by_domain": {},
        "params": 1000,
        "keep": {"layers": 1, "kv_groups": 1, "ffn": 1},
        "layers": [{"source_layer": layer, "kv_heads": 2, "ffn": 64 >> i} for layer in range(3)],
        "cost": cost,
        "graph": f"tiers/t{i}/model.onnx",
        "mask": f"tiers/t{i}/mask.json",
        "note": "",
        "parity": {},
    }
