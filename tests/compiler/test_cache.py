"""The stage cache: reused where it is what was written, made again where it is not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from eopc_compiler.cache import StageCache


def file_of(text: str) -> Callable[[Path], None]:
    """A stage that writes a file."""
    return lambda path: path.write_text(text) and None


def folder_of(text: str) -> Callable[[Path], None]:
    """A stage that writes a folder."""

    def produce(path: Path) -> None:
        path.mkdir()
        (path / "a.bin").write_text(text)

    return produce


@pytest.mark.parametrize("stage", [file_of, folder_of], ids=["file", "folder"])
def test_a_finished_output_is_reused(tmp_path: Path, stage: Callable[[str], Callable[[Path], None]]) -> None:
    """The same inputs give the same output, and nothing is made twice."""
    first = StageCache(tmp_path / "cache")
    path = first.get("weights", {"n": 1}, "", stage("one"))
    first.close()
    again = StageCache(tmp_path / "cache")
    for _ in range(2):
        assert again.get("weights", {"n": 1}, "", stage("two")) == path
    assert again.reused == ["weights"]
    assert (path if path.is_file() else path / "a.bin").read_text() == "one"


@pytest.mark.parametrize("damage", ["changed", "longer", "missing sum", "changed sum"])
@pytest.mark.parametrize("stage", [file_of, folder_of], ids=["file", "folder"])
def test_a_damaged_output_is_made_again(
    tmp_path: Path, stage: Callable[[str], Callable[[Path], None]], damage: str
) -> None:
    """A bit that a disk lost costs time, not a wrong bundle or a traceback."""
    cache = StageCache(tmp_path / "cache")
    path = cache.get("weights", {"n": 1}, "", stage("one"))
    inner, known = (path if path.is_file() else path / "a.bin"), path.with_name(f"{path.name}.sha256")
    if damage == "changed":
        inner.write_text("onf")
    elif damage == "longer":
        inner.write_text("one and more")
    elif damage == "missing sum":
        known.unlink()
    else:
        known.write_text("0" * 64)
    cache.get("weights", {"n": 1}, "", stage("one"))
    assert inner.read_text() == "one" and cache.reused == []
    cache.get("weights", {"n": 1}, "", stage("two"))
    assert inner.read_text() == "one" and cache.reused == []  # by this run, not by an earlier one


def test_an_additional_file_in_a_folder_is_damage(tmp_path: Path) -> None:
    """What a stage did not write is not used either."""
    cache = StageCache(tmp_path / "cache")
    path = cache.get("weights", {"n": 1}, "", folder_of("one"))
    (path / "b.bin").write_text("stranger")
    cache.get("weights", {"n": 1}, "", folder_of("one"))
    assert [p.name for p in path.iterdir()] == ["a.bin"]


def test_a_full_disk_leaves_no_output(tmp_path: Path) -> None:
    """A stage that fails leaves nothing that the next build could take for finished."""

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = StageCache(tmp_path / "cache")
    with pytest.raises(OSError, match="No space left"):
        cache.get("weights", {"n": 1}, "", full)
    cache.close()
    assert not (tmp_path / "cache").exists()
