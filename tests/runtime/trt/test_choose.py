"""Which runner a bundle gets: engines that fit, else the CPU with a note, and an error when it was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import BundleError, DeviceError, EngineMismatchError, MissingExtraError, UsageError
from eopc_runtime.runners.choose import open_pool, open_tensorrt
from eopc_runtime.runners.ort_gpu import OrtGpuTier, check_providers
from eopc_runtime.runners.ort_pool import OrtPool
from eopc_runtime.session import Session

NO_GPU = json.dumps({"init": 100, "driver": "0.0", "devices": []})


def test_auto_takes_engines_that_fit(make_engines: Any, gpu: Any) -> None:
    """No note, and the work runs on the GPU."""
    chosen = open_pool(make_engines())
    assert (chosen.runner, chosen.version) == ("tensorrt", "TensorRT 10.3.0, Orin")
    assert (chosen.notes, chosen.on_gpu) == ((), True)


def test_without_engines_no_gpu_is_looked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle for the CPU costs no probe."""
    monkeypatch.setattr("eopc_runtime.gpu_probe.run_probe", lambda: pytest.fail("probed"))
    chosen = open_pool(Bundle.open(tiny_bundle))
    assert (chosen.runner, chosen.notes, chosen.on_gpu) == ("ort", (), False)
    with pytest.raises(BundleError, match=r"has no engines\. Build them: eopc engine"):
        open_pool(Bundle.open(tiny_bundle), "tensorrt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "10.16.1"}, "version: built for 10.16.1, found 10.3.0"),
        ({"compute_capability": 90}, "architecture: built for SM90, found SM87"),
        ({"graph_sha256": "0" * 64}, "graph or weights"),
    ],
)
def test_engines_that_do_not_fit(make_engines: Any, gpu: Any, changes: dict[str, Any], words: str) -> None:
    """Left alone, the CPU takes over with a note; asked for, they are refused with the command that builds them."""
    bundle = make_engines(**changes)
    chosen = open_pool(bundle)
    assert chosen.runner == "ort"
    (note,) = chosen.notes
    assert words in note
    with pytest.raises(EngineMismatchError, match=f"{words}.*eopc engine"):
        open_pool(bundle, "tensorrt")
    assert gpu.trt.imported_runtime == 0, "nothing was loaded"


def test_the_set_that_fits_is_found_among_others(make_engines: Any, gpu: Any) -> None:
    """A bundle may travel with engines of several devices; the first that fits is taken."""
    make_engines(key="h100-sm90", compute_capability=90)
    bundle = make_engines()
    with open_session(bundle.root) as session:
        assert session.runner is not None and session.runner.runner == "tensorrt"


def test_without_a_gpu_nothing_of_nvidias_is_imported(
    make_engines: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's runtime would crash: a probe in a child process comes first."""
    bundle = make_engines()
    gpu.probe = NO_GPU
    for name in ("tensorrt", "tensorrt_rtx_bindings", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match="TensorRT needs an NVIDIA GPU"):
        open_tensorrt(bundle)
    assert "needs an NVIDIA GPU" in open_pool(bundle).notes[0]


def test_with_a_gpu_and_no_tensorrt_the_extra_is_named(
    make_engines: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two packages in its turn."""
    bundle = make_engines()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingExtraError, match=r"eopc\[tensorrt\]"):
            open_tensorrt(bundle)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match="cuda-bindings is not installed"):
        open_tensorrt(bundle)


def test_a_runtime_that_does_not_start_says_why(make_engines: Any, gpu: Any) -> None:
    """TensorRT's Python gives a TypeError about a null pointer; the reason is in its log."""
    bundle = make_engines()
    gpu.trt.fault = "CUDA initialization failure with error: 35"
    with pytest.raises(DeviceError, match=r"10\.3\.0 does not start on this GPU: CUDA initialization failure"):
        open_tensorrt(bundle)


def test_a_tier_without_an_engine_or_of_another_length_is_refused(make_engines: Any, gpu: Any) -> None:
    """A set is whole, and its caches are interchangeable."""
    bundle = make_engines()
    path = bundle.root / "engines/orin-sm87/engines.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "engines": content["engines"][:-1]}))
    with pytest.raises(BundleError, match="have none for t2"):
        open_tensorrt(bundle)
    content["engines"][1]["cache_len"] = 128
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="caches of 128 and 256 tokens"):
        open_tensorrt(bundle)


def test_a_damaged_plan_is_not_read(make_engines: Any, gpu: Any) -> None:
    """Its size or hash differs from the record's."""
    bundle = make_engines()
    plan = bundle.root / "engines/orin-sm87/t0.plan"
    plan.write_bytes(plan.read_bytes().replace(b"10.3.0", b"10.3.1"))
    with pytest.raises(BundleError, match=r"t0.plan does not match its sha256.*eopc engine"):
        open_tensorrt(bundle).pool.get("t0")


def test_eopc_run_takes_the_runner_and_says_what_it_could_not_do(make_engines: Any, gpu: Any) -> None:
    """The same text from both; a note on stderr where engines were passed over; an error where they were asked for."""
    root = str(make_engines(version="10.16.1", plan={"version": "10.16.1"}).root)
    command = ["run", root, "--prompt", "Once", "--max-new-tokens", "8", "--json"]
    auto = CliRunner().invoke(cli, command)
    assert auto.exit_code == 0, auto.stderr
    assert "Note: the CPU runs this bundle, not its engines" in auto.stderr
    asked = CliRunner().invoke(cli, [*command, "--runner", "tensorrt"])
    assert (asked.exit_code, asked.stdout) == (1, "")
    assert "built for 10.16.1, found 10.3.0" in asked.stderr
    gpu.trt.__version__ = "10.16.1"
    runs = CliRunner().invoke(cli, [*command, "--runner", "tensorrt"])
    assert json.loads(runs.stdout)["text"] == json.loads(auto.stdout)["text"]
    gpu.cuda.memory_bytes = 0
    full = CliRunner().invoke(cli, [*command, "--runner", "tensorrt"])
    assert full.exit_code == 1
    assert "no memory left" in full.stderr


def test_an_unknown_runner_is_named(tiny_bundle: Path) -> None:
    """With the ones there are."""
    with pytest.raises(UsageError, match="auto, ort, tensorrt"):
        Session.open(tiny_bundle, runner="cuda")


# onnxruntime-gpu


def test_a_provider_that_onnxruntime_does_not_have_is_an_error(tiny_bundle: Path) -> None:
    """onnxruntime itself would fall back to the CPU without a word."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(DeviceError, match=r"was asked for CUDAExecutionProvider and loaded CPUExecution.*eopc\[gpu\]"):
        open_pool(bundle, "ort-cuda")
    with pytest.raises(DeviceError, match="was asked for TensorrtExecutionProvider"):
        open_pool(bundle, "ort-tensorrt")


@pytest.mark.filterwarnings("ignore:Specified provider")  # onnxruntime warns, and goes on
def test_what_a_session_really_got_is_read_back(tiny_bundle: Path) -> None:
    """A build may offer a provider that then does not load: the session says so, and it is believed."""
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(DeviceError, match="was asked for CUDAExecutionProvider and loaded CPUExecutionProvider"):
        OrtGpuTier(bundle, bundle.tier("t0"), 1, ("CUDAExecutionProvider",))
    check_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], ("CUDAExecutionProvider",), None)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_caches_in_ortvalues_compute_the_same(tiny_bundle: Path) -> None:
    """The path for a device's memory, here on the CPU: prefill over a growth, steps, and a move down the ladder."""
    bundle = Bundle.open(tiny_bundle)
    upper, lower = (OrtGpuTier(bundle, bundle.tier(t), 1, ("CPUExecutionProvider",), "cpu") for t in ("t0", "t1"))
    reference = OrtPool(bundle, 1)
    cache, twin = upper.new_cache(), reference.get("t0").new_cache()
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 256, 140)]
    for part in (tokens[:120], tokens[120:121], tokens[121:140]):  # 128 slots, then 256
        got, want = upper.forward(cache, part), reference.get("t0").forward(twin, part)
        np.testing.assert_allclose(got, want, atol=1e-5)
    moved, other = lower.adopt(cache), reference.get("t1").adopt(twin)
    for token in (1, 2):
        got, want = lower.forward(moved, [token]), reference.get("t1").forward(other, [token])
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert moved.nbytes == sum(2 * 256 * 16 * 4 * layer.kv_heads for layer in bundle.tier("t1").layers)


def open_session(root: Path) -> Session:
    """A session with whatever runner fits."""
    return Session.open(root)
