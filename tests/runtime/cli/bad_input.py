"""What a bad input may do, a bundle to spoil, and the ways to spoil a JSON record."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import Result

from eopc_runtime.bundle_files import sha256_file

Record = dict[str, Any]
Place = tuple[str | int, ...]
LONGEST_S = 5.0  # nothing hangs; on a loaded machine a second is soon gone
LONGEST_CHARS = 700


def assert_refused(run: Callable[[], Result]) -> str:
    """Run a command that must be refused: one sentence on stderr, nothing on stdout, exit code 1 or 2, in time."""
    start = time.monotonic()
    result = run()
    elapsed_s = time.monotonic() - start
    assert result.exit_code in (1, 2), (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], result.stderr
    assert len(lines) == 1 or lines[0].startswith("Usage: "), result.stderr  # click shows usage before its errors
    message = lines[-1]
    assert "Traceback" not in message and len(message) < LONGEST_CHARS, message
    assert message[-1] in ".?)'" or ": eopc " in message, message  # a sentence, or one that ends in what to type
    assert elapsed_s < LONGEST_S
    return message


def read_record(root: Path, name: str) -> Record:
    """The content of a JSON file of a bundle."""
    record: Record = json.loads((root / name).read_text())
    return record


def relist(root: Path, manifest: Record) -> None:
    """Write a manifest with the sizes and hashes that its files have now."""
    for entry in manifest["files"]:
        path = root / entry["path"]
        entry["bytes"], entry["sha256"] = path.stat().st_size, sha256_file(path)
    (root / "manifest.json").write_text(json.dumps(manifest))


def replace_file(root: Path, name: str, content: str | bytes) -> None:
    """Put other content into a file of a bundle, listed as if it had always been there."""
    manifest = read_record(root, "manifest.json")
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if name not in [entry["path"] for entry in manifest["files"]]:
        manifest["files"].append({"path": name, "sha256": "", "bytes": 0})
    relist(root, manifest)


def places(record: object, free: frozenset[str] = frozenset(), at: Place = ()) -> Iterator[Place]:
    """Every key in a record, the first two items of every list included, but nothing inside keys of free content."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield (*at, key)
            if key not in free:
                yield from places(value, free, (*at, key))
    elif isinstance(record, list):
        for i, value in enumerate(record[:2]):
            yield from places(value, free, (*at, i))


def spoiled(record: Record, place: Place, how: str) -> Record:
    """A copy of a record whose value at a place is missing, of another type, or out of all proportion."""
    copied = copy.deepcopy(record)
    holder: Any = copied
    for step in place[:-1]:
        holder = holder[step]
    old = holder[place[-1]]
    if how == "missing":
        del holder[place[-1]]
    elif how == "type":
        holder[place[-1]] = [] if old is None else 7 if isinstance(old, str) else "seven"
    elif how == "huge":
        holder[place[-1]] = 10**400
    elif how == "misspelled":
        holder[f"{place[-1]}x"] = holder.pop(place[-1])
    else:
        raise ValueError(how)
    return copied


def label(place: Place) -> str:
    """A place as a name for a test."""
    return ".".join(map(str, place))
