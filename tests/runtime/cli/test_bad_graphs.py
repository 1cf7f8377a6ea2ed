"""Hostile ONNX graphs: refused within a second, before anything is allocated, and no file outside is opened."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result

from eopc_runtime.errors import BundleError
from eopc_runtime.graph_check import check_graph

from .bad_input import assert_refused, replace_file

Eopc = Callable[..., Result]
SIZES = {"weights.bin": 64, "tiers/t0/extras.bin": 8}
FLOAT, STRING = 1, 8


def varint(value: int) -> bytes:
    """A number as protobuf writes it; negative ones in two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(*dims: int, kind: int = FLOAT, raw: bytes | None = None, **external: str | int) -> bytes:
    """A TensorProto, its data in it or elsewhere."""
    out = b"".join(field(1, dim) for dim in dims) + field(2, kind) + field(8, "w")
    if external:
        out += b"".join(field(13, field(1, key) + field(2, str(value))) for key, value in external.items())
        return out + field(14, 1)
    return out + (b"" if raw is None else field(9, raw))


def node(operator: str, domain: str = "", attribute: bytes = b"") -> bytes:
    """A NodeProto."""
    return field(4, operator) + field(7, domain) + (field(5, attribute) if attribute else b"")


def model(*tensors: bytes, nodes: tuple[bytes, ...] = (), more: bytes = b"", domain: str = "") -> bytes:
    """A ModelProto with these initializers and nodes."""
    graph = b"".join(field(1, n) for n in nodes) + b"".join(field(5, t) for t in tensors)
    return field(1, 10) + field(8, field(1, domain) + field(2, 24)) + field(7, graph) + more


OUTSIDE = "../../secret/key"
SOUND = {
    "nothing": model(),
    "inline": model(tensor(2, raw=bytes(8))),
    "outside": model(tensor(16, location="weights.bin", offset=0, length=64)),
    "two parts": model(
        tensor(8, location="weights.bin", offset=0, length=32), tensor(8, location="weights.bin", offset=32, length=32)
    ),
    "operators": model(nodes=(node("MatMul"), node("Add", "ai.onnx"))),
    "int4 rounded up": model(tensor(3, kind=22, location="weights.bin", offset=0, length=2)),
    "packed dims": model(field(1, varint(2) + varint(2)) + field(2, FLOAT) + field(9, bytes(16))),
}
HOSTILE = {
    "a file outside": model(tensor(16, location=OUTSIDE, offset=0, length=64)),
    "an absolute path": model(tensor(16, location="/etc/passwd", offset=0, length=64)),
    "a file that is not listed": model(tensor(16, location="manifest.json", offset=0, length=64)),
    "the same file by another name": model(tensor(16, location="./weights.bin", offset=0, length=64)),
    "no file": model(tensor(16, offset=0, length=64)),
    "an outside file in an attribute": model(nodes=(node("Constant", "", field(5, tensor(16, location=OUTSIDE))),)),
    "an outside file in a list of an attribute": model(
        nodes=(node("Constant", "", field(10, tensor(16, location=OUTSIDE))),)
    ),
    "10 GB": model(tensor(2_500_000_000, location="weights.bin", offset=0, length=10_000_000_000)),
    "10 GB with the length of the file": model(tensor(2_500_000_000, location="weights.bin", offset=0, length=64)),
    "10 GB inline": model(tensor(2_500_000_000)),
    "10 GB inline in 4 bytes": model(tensor(2_500_000_000, raw=bytes(4))),
    "10 GB in an attribute": model(nodes=(node("Constant", "", field(5, tensor(2_500_000_000))),)),
    "2^126 elements": model(tensor(2**62, 2**62, 4)),
    "a negative dimension": model(tensor(-1, raw=b"")),
    "many dimensions": model(tensor(*[1] * 100, raw=bytes(4))),
    "an offset beyond the end": model(tensor(16, location="weights.bin", offset=64, length=64)),
    "a negative offset": model(tensor(16, location="weights.bin", offset="-64", length=64)),
    "an offset of 2^63": model(tensor(16, location="weights.bin", offset=2**63, length=64)),
    "an offset in words": model(tensor(16, location="weights.bin", offset="zero", length=64)),
    "a length of digits elsewhere": model(tensor(16, location="weights.bin", offset="\u0660", length=64)),
    "an offset of a million digits": model(tensor(16, location="weights.bin", offset="9" * 1_000_000, length=64)),
    "a location twice": model(
        field(1, 16)
        + field(2, FLOAT)
        + field(14, 1)
        + field(13, field(1, "location") + field(2, "weights.bin"))
        + field(13, field(1, "location") + field(2, OUTSIDE))
    ),
    "data here and elsewhere": model(tensor(16, location="weights.bin") + field(9, bytes(64))),
    "another key": model(tensor(16, location="weights.bin", offset=0, length=64, basepath="/etc")),
    "the same bytes a thousand times": model(
        *[tensor(16, location="weights.bin", offset=0, length=64) for _ in range(1000)]
    ),
    "texts": model(tensor(1, kind=STRING)),
    "an unknown type": model(tensor(1, kind=99, raw=bytes(4))),
    "a custom operator": model(nodes=(node("Evil", "com.evil"),)),
    "a custom domain": model(domain="com.evil"),
    "a contributed operator": model(nodes=(node("EPContext", "com.microsoft"),)),
    "a loop": model(nodes=(node("Loop", "", field(6, b"")),)),
    "a branch": model(nodes=(node("If"),)),
    "a graph in an attribute": model(nodes=(node("Add", "", field(6, b"")),)),
    "graphs in an attribute": model(nodes=(node("Add", "", field(11, b"")),)),
    "a sparse tensor": model(nodes=(node("Add", "", field(22, b"")),)),
    "functions": model(more=field(25, b"")),
    "training": model(more=field(20, b"")),
    "two graphs, which would be merged": model() + field(7, field(5, tensor(16, location=OUTSIDE))),
    "a shape filler": model(nodes=(node("ConstantOfShape"),)),
    "no graph": field(1, 10),
    "nothing at all": b"",
    "a text": b"not a graph",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94",
    "cut off": model(tensor(2, raw=bytes(8)))[:-3],
    "a length of 2^60": varint(7 << 3 | 2) + varint(2**60) + b"abc",
    "an endless number": varint(7 << 3 | 2) + b"\xff" * 20,
    "groups": b"\x3b" * 1000,
    "field 0": b"\x00\x01",
    "a name that is no text": model(nodes=(field(4, b"\xff\xfe"),)),
    "an operator with control characters": model(nodes=(node("\x1b[2J\n"),)),
    "floats in place of a graph": varint(7 << 3 | 5) + struct.pack("<f", 1.0),
}


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_what_eopc_writes_passes(content: bytes) -> None:
    """The positive twin: tensors inside and outside, packed or not, and the operators of a bundle."""
    check_graph(content, "model.onnx", SIZES)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_graph_is_refused_at_once(content: bytes) -> None:
    """The check itself refuses it, within a second and a few megabytes."""
    start = time.monotonic()
    with pytest.raises(BundleError, match=r"^tiers/t0/model\.onnx is refused: "):
        check_graph(content, "tiers/t0/model.onnx", SIZES)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_bundle_with_a_hostile_graph_is_one_sentence(eopc: Eopc, bare_bundle: Path, content: bytes) -> None:
    """`eopc run` with ONNX Runtime refuses it, and opens nothing outside the bundle on its way."""
    pytest.importorskip("onnxruntime")
    secret = bare_bundle.parent / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(bytes(64))
    replace_file(bare_bundle, "weights.bin", bytes(64))
    replace_file(bare_bundle, "tiers/t0/model.onnx", content)
    with watched(secret) as touched:
        message = assert_refused(lambda: eopc("run", bare_bundle, "--prompt", "hi", "--raw", "--runner", "ort"))
        assert touched() == 0
    assert "tiers/t0/model.onnx is refused" in message


def test_nothing_but_listed_files_is_opened(eopc: Eopc, bare_bundle: Path) -> None:
    """All files Python opens below the bundle's parent, up to a refused graph, are files of the manifest."""
    pytest.importorskip("onnxruntime")
    replace_file(bare_bundle, "tiers/t0/model.onnx", HOSTILE["a file outside"])
    (bare_bundle / "stranger.json").write_text("{}")
    opened: set[str] = set()
    home, active = str(bare_bundle.parent.resolve()), True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)  # there is no way to remove one; this one falls silent
    try:
        assert_refused(lambda: eopc("run", bare_bundle, "--prompt", "hi", "--raw"))
    finally:
        active = False
    below = {os.path.relpath(path, bare_bundle.resolve()) for path in opened if path.startswith(home)}
    assert "tiers/t0/model.onnx" in below
    assert not [path for path in below if path.startswith("..") or path == "stranger.json"]


def test_the_watcher_sees_a_file_that_is_opened(tmp_path: Path) -> None:
    """The negative twin of the watch: an open from native code counts as well."""
    (tmp_path / "key").write_bytes(bytes(8))
    libc = ctypes.CDLL(None, use_errno=True)
    with watched(tmp_path) as touched:
        os.close(libc.open(os.fsencode(tmp_path / "key"), os.O_RDONLY))
        assert touched() > 0


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], int]]:
    """Count, with inotify, every open and read of files in a folder, whoever does it and in whatever language."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("this system has no inotify")
    opened, accessed = 0x20, 0x1
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(folder), opened | accessed) > 0

    def count() -> int:
        try:
            return len(os.read(descriptor, 1 << 16))
        except BlockingIOError:
            return 0

    try:
        yield count
    finally:
        os.close(descriptor)
