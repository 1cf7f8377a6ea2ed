"""A machine with a GPU that is not there: fake CUDA and TensorRT modules, and engines of the tiny bundle for them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.bundle_files import sha256_file
from eopc_runtime.engines import (
    EngineRecord,
    Fingerprint,
    graph_sha256,
    phase_graphs,
    plan_name,
    set_folder,
    write_engines,
)

KEY = "orin-sm87"
GPU = {"name": "Orin", "sm": "8.7", "memory_bytes": 8 << 30}


def load(name: str) -> Any:
    """A module that lies beside this file."""
    spec = importlib.util.spec_from_file_location(f"trt_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_cuda() -> Any:
    """The module with FakeCuda."""
    return load("fake_cuda")


@pytest.fixture(scope="session")
def fake_tensorrt() -> Any:
    """The module with FakeTensorRt."""
    return load("fake_tensorrt")


@dataclass
class Gpu:
    """The fakes of one test, installed as the modules that the runner imports."""

    cuda: Any
    trt: Any
    probe: str


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any, fake_tensorrt: Any) -> Gpu:
    """An Orin with TensorRT 10.3.0."""
    cuda = fake_cuda.FakeCuda()
    found = Gpu(cuda, fake_tensorrt.FakeTensorRt(cuda), json.dumps({"init": 0, "driver": "12.6", "devices": [GPU]}))
    package = types.ModuleType("cuda.bindings")
    package.runtime = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "tensorrt", found.trt)
    monkeypatch.setattr("eopc_runtime.gpu_probe.run_probe", lambda: found.probe)
    return found


MakeEngines = Callable[..., Bundle]


@pytest.fixture
def make_engines(tiny_bundle: Path, tmp_path: Path, fake_tensorrt: Any) -> MakeEngines:
    """A copy of the tiny bundle with fake engines for every tier."""

    def make(
        *,
        slots: int = 256,
        tokens: int = 24,
        logits: int = 1,
        apart: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        key: str = KEY,
        plan: dict[str, Any] | None = None,
        source: Path = tiny_bundle,
        **changes: Any,
    ) -> Bundle:
        """Write engines.

        Args:
            tokens, logits: most of one prefill step.
            apart: tiers with an engine for each phase.
            without: phases whose engines are left out.
            plan: changes to the plans, `changes` to the fingerprints.
            source: the bundle that is copied.
        """
        root = tmp_path / "with.eopc"
        if not root.exists():
            shutil.copytree(source, root)
        bundle = Bundle.open(root)
        folder = set_folder(root, key)
        folder.mkdir(parents=True)
        records = []
        profiles = {"prefill": {"tokens": tokens, "logits": logits}, "decode": {"tokens": 1, "logits": 1}, "gather": {}}
        for info in bundle.manifest.tiers:
            graphs = phase_graphs(info)
            if info.tier in apart:
                graphs = dict.fromkeys(("prefill", "decode"), info.graph)
            for phase, graph in graphs.items():
                if phase in without:
                    continue
                chosen = [profiles[name] for name in (("prefill", "decode") if phase == "both" else (phase,))]
                file = plan_name(info.tier, phase)
                made = {"graph": graph, "slots": slots, "profiles": chosen, **(plan or {})}
                content = fake_tensorrt.make_plan(root.resolve(), **made)
                (folder / file).write_bytes(content)
                print_ = Fingerprint("tensorrt", "10.3.0", 87, "Orin", "12.6", graph_sha256(bundle, info), "settings")
                records.append(
                    EngineRecord(
                        info.tier, phase, file, len(content), sha256_file(folder / file), 40, 4, False, 1.0, slots,
                        tokens, False, replace_fields(print_, changes),
                    )
                )  # fmt: skip
        write_engines(root, key, records)
        return bundle

    return make


def replace_fields(fingerprint: Fingerprint, changes: dict[str, Any]) -> Fingerprint:
    """A fingerprint with some fields changed."""
    from dataclasses import replace

    return replace(fingerprint, **changes)
