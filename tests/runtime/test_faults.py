"""Full disks and runtimes that fail: each ends in one sentence, with nothing half-written and nothing lost."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.calibration import publish as publishing
from eopc_runtime.errors import DeviceError, DeviceMemoryError, UsageError
from eopc_runtime.files import write_new, write_output, write_whole
from eopc_runtime.runners.ort_session import execute
from eopc_runtime.sequence_record import SequenceRecord, append_record, read_records

from .conftest import write_bundle

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def record(tokens: int) -> SequenceRecord:
    """A record of a sequence."""
    return SequenceRecord(
        engine="e", start_wall_s=0.0, end_wall_s=1.0, utc_offset_s=0.0, start_s=0.0, end_s=1.0, plan="t0",
        tiers_used=("t0",), prompt_tokens=tokens, completion_tokens=1, predicted_j=1.0, price_j=1.0, budget_j=None,
        energy_j=1.0, energy_source="prior", power_mode=None, finish_reason="stop", enforced_by=None,
    )  # fmt: skip


def test_a_full_disk_takes_a_record_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is removed again, so that later records can still be read."""
    log, write = tmp_path / "log.jsonl", os.write
    append_record(log, record(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
        with pytest.raises(UsageError, match=r"log\.jsonl cannot be written \(No space left"):
            append_record(log, record(2))
    append_record(log, record(3))
    with log.open() as lines:
        assert [r.prompt_tokens for r in read_records(lines, "log")] == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_device_is_one_sentence() -> None:
    """The system's own full device, not a fake."""
    with pytest.raises(UsageError, match=r"/dev/full cannot be written \(No space left"):
        append_record(Path("/dev/full"), record(1))


@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_while_prices_are_published_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Whichever of the two files does not fit, the bundle verifies with its old prices, and no piece is left."""
    root = tmp_path / "small.eopc"
    write_bundle(root)
    bundle, write, calls = Bundle.open(root), publishing.write_synced, [0]

    def full(path: Path, content: bytes) -> None:
        calls[0] += 1
        write(path, content[: len(content) // 2] if calls[0] == nth else content)
        if calls[0] == nth:
            raise FULL

    monkeypatch.setattr(publishing, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        publishing.publish(bundle, replace(bundle.energy, margin=0.5))
    assert Bundle.open(root).energy == bundle.energy
    assert not (root / publishing.NEXT_MANIFEST_NAME).exists()
    monkeypatch.undo()
    assert publishing.publish(bundle, replace(bundle.energy, margin=0.5)).energy.margin == 0.5


@pytest.mark.parametrize("writer", [write_whole, write_output, lambda path, content: write_new(path, content, 0o600)])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any) -> None:
    """A fit, a plot, a signature or a key is there whole or not at all."""

    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer(tmp_path / "fit.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_no_link_in_a_bundle_is_written_through(tmp_path: Path) -> None:
    """Links that a bundle came with, under the names that calibration writes, lead to nothing that is overwritten."""
    root, precious = tmp_path / "small.eopc", tmp_path / "precious"
    write_bundle(root)
    precious.write_text("mine")
    names = ("energy.next.json", "manifest.next.json", "signature.json", f".signature.json.{os.getpid()}")
    for name in names:
        (root / name).symlink_to(precious)
    bundle = Bundle.open(root)
    publishing.publish(bundle, replace(bundle.energy, margin=0.5))
    write_whole(root / "signature.json", b"{}")
    assert precious.read_text() == "mine"
    assert Bundle.open(root).energy.margin == 0.5
    assert (root / "signature.json").read_bytes() == b"{}"


def test_an_output_goes_through_a_users_link_and_into_a_device(tmp_path: Path) -> None:
    """What a user names is theirs: a link stays a link, and a device stays a device."""
    (tmp_path / "link.json").symlink_to(tmp_path / "fit.json")
    write_output(tmp_path / "link.json", b"{}")
    assert (tmp_path / "fit.json").read_bytes() == b"{}" and (tmp_path / "link.json").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_output(tmp_path / "pipe", b"{}")
        assert os.read(reader, 10) == b"{}"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


class Failing:
    """A session that fails as onnxruntime does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run_with_iobinding(self, binding: object) -> None:
        """Fail."""
        raise self.error


def test_errors_of_onnxruntime_are_one_sentence() -> None:
    """The reason is kept on one line; what is a lack of memory says so."""
    with pytest.raises(DeviceError, match=r"failed while it ran t1 \(Non-zero status\?code\)"):
        execute(Failing(RuntimeError("Non-zero status\ncode")), None, "t1")
    for error in (MemoryError(), RuntimeError("Failed to allocate memory for requested buffer of size 1099511627776")):
        with pytest.raises(DeviceMemoryError, match="no memory was left to run t1"):
            execute(Failing(error), None, "t1")
