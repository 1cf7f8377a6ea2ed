"""What a build and a bundle refuse: one clear sentence, exit 1, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the compiler extra is not installed")

from eopc_compiler.build import build, check_output
from eopc_compiler.state import Workload
from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import BundleError, EopcError
from eopc_runtime.runners.ort import OrtTier

Settings = Callable[..., Any]


def run_cli(*args: str) -> Any:
    """Run `eopc` in this process."""
    return CliRunner().invoke(cli, list(args))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budgets", "0J"), "0J"),
        (("--budgets", "-1"), "-1"),
        (("--budgets", "5 parsecs"), "parsecs"),
        (("--budgets", ""), "budget"),
        (("--device", "orinn"), "orin"),
        (("--workload", "12"), "IN:OUT"),
        (("--precision", "int3"), "int3"),
        (("--workload", "3000:1"), "--context"),
        (("--train-selectors", "1", "--selectors", "off"), "--selectors"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_1(
    tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Budgets, devices, workloads and precisions that make no sense are refused before anything is written."""
    result = run_cli("build", str(tiny_checkpoint), "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_budget_names_the_smallest_reachable(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A budget below the smallest mask is an error with the figure that would do, before any work; nothing is left."""
    result = run_cli("build", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--budgets", "1mJ,20J")
    assert result.exit_code == 1
    assert "the smallest needs" in result.stderr
    assert "check budgets" in result.stderr and "read calibration" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_a_bundle_is_not_overwritten(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """An output folder with other content is refused, and the content stays."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EopcError, match="not empty and not a bundle"):
        build(build_settings(tiny_checkpoint, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_bundle_with_a_stranger_in_it_is_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle may be replaced; not so a file in its folder, a web page's manifest.json, or a bundle by a plan."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    check_output(copy, dry_run=False)
    with pytest.raises(EopcError, match="a plan would spoil"):
        check_output(copy, dry_run=True)
    (copy / "tiers/notes.txt").write_text("years of work")
    with pytest.raises(EopcError, match=r"holds tiers/notes\.txt"):
        check_output(copy, dry_run=False)
    (copy / "manifest.json").write_text(json.dumps({"name": "web page", "files": []}))
    with pytest.raises(EopcError, match="not empty and not a bundle"):
        check_output(copy, dry_run=False)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("/dev/null", "is a file"),
        (".", "no name of its own"),
        ("file/out", "cannot be"),
        ("/proc/none/out", "cannot be"),
    ],
)
def test_an_output_that_cannot_be_is_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    """Devices, the current folder, and parents that are files or cannot be made are refused."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    result = run_cli("build", str(tiny_checkpoint), "-o", output)
    assert result.exit_code == 1
    assert said in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_as_output_is_followed(tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings) -> None:
    """-o LINK writes the folder the link leads to, and the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    build(build_settings(tiny_checkpoint, tmp_path / "out", dry_run=True))
    assert (tmp_path / "disk/out/plan.json").is_file()
    assert (tmp_path / "out").is_symlink()


def test_masks_and_workloads_are_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """A mask that cannot be read, and a workload beyond the model's positions, stop before the model is observed."""
    output = tmp_path / "new/out"
    with pytest.raises(EopcError, match="cannot be read: No such file"):
        build(build_settings(tiny_checkpoint, output, masks=(tmp_path / "none.json",)))
    with pytest.raises(EopcError, match="does not fit the 512 positions"):
        build(build_settings(tiny_checkpoint, output, workload=Workload(500, 100), context=1024))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"].update(vocab_size=100),
        lambda m: m["model"].update(head_dim=8),
        lambda m: m.update(compute_dtype="float16"),
        lambda m: [t["layers"][0].update(kv_heads=1) for t in m["tiers"]],
    ],
)
def test_a_manifest_that_does_not_describe_its_graphs_is_refused(
    tiny_bundle: Path, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    """Vocabulary, head size, type or heads edited in the manifest: one sentence, not a wrong buffer."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    content = json.loads((copy / "manifest.json").read_text())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    result = run_cli("run", str(copy), "--prompt", "x", "--tier", "t0")
    assert result.exit_code == 1
    assert "is not the graph that manifest.json describes" in result.stderr


@pytest.mark.parametrize("command", ["run", "inspect", "eval", "bench"])
def test_a_flipped_byte_is_found_by_commands_that_verify(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    """One changed bit in weights.bin is refused with the file's name (bench of one tier checks sizes only)."""
    if command == "bench":
        pytest.skip("bench does not hash: it measures")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[1000] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    extra = {"run": ["--prompt", "x"], "eval": ["--text", __file__]}.get(command, [])
    result = run_cli(command, str(copy), *extra)
    assert result.exit_code == 1
    assert "weights.bin" in result.stderr


def test_a_graph_that_points_outside_the_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """External data with a path that leaves the bundle does not load, even with a consistent manifest."""
    onnx = pytest.importorskip("onnx")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    shutil.copy(tiny_bundle / "weights.bin", tmp_path / "outside.bin")
    path = copy / "tiers/t0/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    onnx.save(model, path)
    bundle = (
        Bundle.open(copy, verify=False)
        if path.stat().st_size == (tiny_bundle / "tiers/t0/model.onnx").stat().st_size
        else None
    )
    if bundle is None:
        with pytest.raises(BundleError):
            Bundle.open(copy)
    else:
        with pytest.raises(BundleError):
            OrtTier(bundle, bundle.tier("t0"))
