"""How a build survives being stopped: nothing half-written, and the same command goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the compiler extra is not installed")

from eopc_compiler import tier_graphs
from eopc_compiler.build import build, restore_old
from eopc_compiler.cache import StageCache
from eopc_compiler.weights import WeightWriter
from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import EopcError, ParityError

Settings = Callable[..., Any]


def test_an_interrupted_build_leaves_nothing_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during export: no bundle; the same command reuses the finished stages and finishes."""
    args = build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0, 0.53))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tier_graphs, "export_tier", interrupt)
        build(args)
    assert not args.output.exists()
    said: list[str] = []
    result = build(args, said.append)
    assert set(result.resumed) >= {"observe", "plan", "weights"}
    assert any(line.startswith("reused from an earlier run: observe") for line in said)
    assert Bundle.open(args.output).manifest.tiers
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_says_once_that_it_was_interrupted_and_how_to_go_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends `eopc build` with one last line and the code that shells expect."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eopc_compiler.build.build", interrupt)
    command = ["build", str(tiny_checkpoint), "--device", "cpu", "--budgets", "2J", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 130
    _, last = result.stderr.splitlines()
    assert last == "Interrupted; run the same command to resume."


def test_a_wrong_graph_stops_the_build_and_keeps_the_old_bundle(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose norm epsilon is off fails the parity gate; the bundle that was there stays as it was."""
    args = build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,))
    build(args)
    before = (args.output / "manifest.json").read_bytes()
    real = tier_graphs.export_tier

    def broken(config: Any, *rest: Any) -> None:
        real(replace(config, rms_norm_eps=1.0), *rest)

    monkeypatch.setattr(tier_graphs, "export_tier", broken)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        build(args)
    assert (args.output / "manifest.json").read_bytes() == before
    assert Bundle.open(args.output).manifest.tiers


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while weights are written: a clear error, no bundle, no leftovers."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightWriter, "tensor", full)
    with pytest.raises(EopcError, match="disk is full"):
        build(build_settings(tiny_checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_recognised_through_a_library_s_own_error(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter that wraps ENOSPC in its own type gives the same sentence; other exceptions stay what they are."""

    def wrapped(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save the model") from error

    def other(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    args = build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,))
    for function, kind, said in ((other, RuntimeError, "a bug"), (wrapped, EopcError, "disk is full")):
        monkeypatch.setattr(tier_graphs, "export_tier", function)
        with pytest.raises(kind, match=said):
            build(args)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_does_not_stop_the_next(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """Half-written outputs and staging folders of a dead process are removed, and the build finishes."""
    (tmp_path / ".out.work/partial-weights-0").mkdir(parents=True)
    (tmp_path / ".out.work/partial-weights-0/weights.bin").write_bytes(b"half")
    (tmp_path / ".out.staged-1/tiers").mkdir(parents=True)
    build(build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_stage_replaces_its_half_written_output(tmp_path: Path) -> None:
    """A stage whose output is a folder runs again after it failed half-way."""
    cache = StageCache(tmp_path / "work")

    def produce(path: Path, fail: bool) -> None:
        path.mkdir()
        if fail:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        cache.get("stage", {}, "", lambda path: produce(path, True))
    assert cache.get("stage", {}, "", lambda path: produce(path, False)).is_dir()
    assert cache.reused == []


def test_a_second_build_of_the_same_output_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """While one build holds the work folder another stops at once and touches nothing; afterwards it may run."""
    (tmp_path / ".out.staged-1").mkdir()  # what the first build is writing
    first = StageCache(tmp_path / ".out.work")
    args = build_settings(tiny_checkpoint, tmp_path / "out", dry_run=True)
    with pytest.raises(EopcError, match="another eopc command"):
        build(args)
    assert (tmp_path / ".out.staged-1").is_dir()
    first.close()
    assert build(args).resumed == ()


def test_a_build_killed_while_replacing_gives_the_old_bundle_back(tmp_path: Path) -> None:
    """The bundle put aside is renamed back when there is no new one, and removed when there is."""
    old, output = tmp_path / ".out.old-1", tmp_path / "out"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    restore_old(output)
    assert (output / "manifest.json").read_text() == "old"
    old.mkdir()
    restore_old(output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
