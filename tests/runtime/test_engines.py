"""Records of engines: read strictly, written in one step, and compared with the machine before a plan is read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from eopc_runtime.engines import (
    EngineCheck,
    EngineRecord,
    Fingerprint,
    Machine,
    check_engine,
    check_plan_file,
    engine_key,
    list_engine_sets,
    plan_name,
    proxy_key,
    read_engines,
    write_checks,
    write_engines,
)
from eopc_runtime.errors import BundleError, DeviceError, EngineMismatchError
from eopc_runtime.gpu_probe import NO_GPU, probe_gpu, require_gpu

KEY = "orin-sm87"
GRAPH = "a" * 64
FINGERPRINT = Fingerprint("tensorrt", "10.3.0", 87, "Orin", "12.6", GRAPH, "b" * 64)
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of b"test"
RECORD = EngineRecord("t0", "both", "t0.plan", 4, SHA256, 47, 4, False, 22.5, 2048, 512, False, FINGERPRINT)
PROXY = replace(RECORD, file=None, sha256=None, proxy=True)
HERE = Machine("tensorrt", "10.3.0", 87, "Orin", "12.6")


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """One set per folder; a second write replaces the first, and nothing else is left in the folder."""
    write_engines(tmp_path, KEY, [RECORD])
    write_engines(tmp_path, KEY, [RECORD, replace(RECORD, tier="t1")])
    write_engines(tmp_path, proxy_key(86), [PROXY])
    assert list_engine_sets(tmp_path) == (KEY, "proxy-sm86")
    assert [r.tier for r in read_engines(tmp_path, KEY)] == ["t0", "t1"]
    assert read_engines(tmp_path, "proxy-sm86") == (PROXY,)
    assert [p.name for p in (tmp_path / "engines" / KEY).iterdir()] == ["engines.json"]


def test_what_a_check_found_is_kept_with_the_record(tmp_path: Path) -> None:
    """Of all plans of a tier; those of other tiers stay as they are."""
    apart = [replace(RECORD, tier="t1", phase=phase) for phase in ("prefill", "decode")]
    write_engines(tmp_path, KEY, [RECORD, *apart])
    found, worse = EngineCheck(132, 0.9991, 1.0), EngineCheck(132, -1.0, 0.0)
    write_checks(tmp_path, KEY, {"t0": worse})
    assert write_checks(tmp_path, KEY, {"t1": found}) == read_engines(tmp_path, KEY)
    assert [r.check for r in read_engines(tmp_path, KEY)] == [worse, found, found]


def test_a_missing_set_names_those_there_are(tmp_path: Path) -> None:
    """Reading what was never built says what was, and the command that builds."""
    write_engines(tmp_path, KEY, [RECORD])
    with pytest.raises(BundleError, match=r"no engines for rtx-4090-sm89 \(it has orin-sm87\).*eopc engine"):
        read_engines(tmp_path, engine_key("rtx-4090", 89))


def test_a_key_may_not_leave_the_bundle(tmp_path: Path) -> None:
    """Keys are folder names, not paths."""
    with pytest.raises(BundleError, match="not inside the bundle"):
        read_engines(tmp_path, "../../elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "both of them"}, "must be one of both, prefill, gather, decode"),
        ({"file": None}, "a proxy has neither"),
        ({"proxy": True}, "a proxy has neither"),
        ({"layer": 3}, 'unknown key "layer"'),
        ({"bytes": 0}, "at least 1"),
        ({"check": {"tokens": 4, "cosine_min": 1.0}}, '"top1_agreement" is missing'),
    ],
)
def test_a_record_that_is_not_sound_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """Unknown keys and values, and a plan without a file."""
    path = write_engines(tmp_path, KEY, [RECORD])
    content = {"schema": 1, "engines": [{**asdict(RECORD), **change}]}
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        read_engines(tmp_path, KEY)


def test_a_newer_schema_and_a_double_record_are_refused(tmp_path: Path) -> None:
    """Both would be misread."""
    write_engines(tmp_path, KEY, [RECORD, RECORD])
    with pytest.raises(BundleError, match="lists a plan twice"):
        read_engines(tmp_path, KEY)
    (tmp_path / "engines" / KEY / "engines.json").write_text(json.dumps({"schema": 2, "engines": []}))
    with pytest.raises(BundleError, match="written by a newer eopc"):
        read_engines(tmp_path, KEY)


def test_the_machine_an_engine_was_built_on_may_load_it() -> None:
    """Also where GPU and driver are not known on one side, as after a build ahead of time."""
    check_engine(RECORD, HERE, GRAPH)
    ahead = replace(RECORD, fingerprint=replace(FINGERPRINT, gpu=None, driver=None))
    check_engine(ahead, HERE, GRAPH)


@pytest.mark.parametrize(
    ("machine", "graph", "message"),
    [
        (replace(HERE, version="10.16.1"), GRAPH, r"version: built for 10\.3\.0, found 10\.16\.1"),
        (replace(HERE, compute_capability=90), GRAPH, "architecture: built for SM87, found SM90"),
        (replace(HERE, compiler="tensorrt_rtx"), GRAPH, "compiler: built for TensorRT, found TensorRT-RTX"),
        (replace(HERE, gpu="Orin Nano"), GRAPH, "GPU: built for Orin, found Orin Nano"),
        (replace(HERE, driver="13.0"), GRAPH, r"driver \(CUDA\): built for 12\.6, found 13\.0"),
        (HERE, "c" * 64, "graph or weights"),
    ],
)
def test_a_mismatch_names_the_difference_and_the_command(machine: Machine, graph: str, message: str) -> None:
    """Each part of the fingerprint alone is enough to refuse."""
    with pytest.raises(EngineMismatchError, match=message) as caught:
        check_engine(RECORD, machine, graph, "my.eopc")
    assert "eopc engine my.eopc" in str(caught.value)


def test_a_proxy_is_no_engine() -> None:
    """It says what it is, whatever the machine."""
    with pytest.raises(EngineMismatchError, match=r"as a proxy, which leaves no plan to run.*eopc engine"):
        check_engine(PROXY, HERE, GRAPH)


def test_a_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    """Size and hash are compared; a proxy has no file to compare."""
    write_engines(tmp_path, KEY, [RECORD])
    plan = tmp_path / "engines" / KEY / plan_name("t0", "both")
    plan.write_bytes(b"test")
    check_plan_file(tmp_path, KEY, RECORD)
    plan.write_bytes(b"TEST")
    check_plan_file(tmp_path, KEY, RECORD, verify=False)
    with pytest.raises(BundleError, match=r"does not match its sha256.*eopc engine"):
        check_plan_file(tmp_path, KEY, RECORD)
    plan.unlink()
    with pytest.raises(BundleError, match=r"t0\.plan is missing"):
        check_plan_file(tmp_path, KEY, RECORD, verify=False)
    check_plan_file(tmp_path, KEY, PROXY)


def test_the_probe_reads_what_the_driver_says() -> None:
    """Name, architecture as a number, memory; the driver's CUDA version."""
    found = {"init": 0, "driver": "12.6", "devices": [{"name": "Orin", "sm": "8.7", "memory_bytes": 8 << 30}]}
    gpu, driver = require_gpu("this", lambda: json.dumps(found))
    assert (gpu.name, gpu.compute_capability, driver) == ("Orin", 87, "12.6")


@pytest.mark.parametrize("answer", ['{"init": 100, "driver": "0.0", "devices": []}', "", "[]", "null"])
def test_no_gpu_is_a_sentence(answer: str) -> None:
    """A driver without a device, or a child that printed nothing of use."""
    assert NO_GPU in (probe_gpu(lambda: answer).missing or "")
    with pytest.raises(DeviceError, match=r"^`eopc engine` needs an NVIDIA GPU\. No CUDA driver answers"):
        require_gpu("`eopc engine`", lambda: answer)
