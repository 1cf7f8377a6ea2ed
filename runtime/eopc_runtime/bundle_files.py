"""Files of a bundle: each is listed with its size and sha256, lies inside the bundle, and has no name outside it.

A bundle may come from anywhere. So a path of its manifest is followed only if it stays inside, a link that leads out is
refused, symbolic or hard, and what is no regular file (a pipe, a device) counts as missing.
"""

from __future__ import annotations

import hashlib
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields, shown

MANIFEST_NAME = "manifest.json"
NEXT_ENERGY_NAME = "energy.next.json"  # prices on their way into the bundle, see calibration/publish.py
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle, by path relative to it, with its sha256 and size."""

    path: str
    sha256: str
    bytes: int

    @classmethod
    def from_fields(cls, fields: Fields) -> FileEntry:
        """Read a file record strictly."""
        entry = cls(fields.text("path"), fields.text("sha256"), fields.integer("bytes", minimum=0))
        fields.done()
        return entry


def inside(root: Path, relative: str) -> Path:
    """Return root / relative; BundleError if the path is absolute, climbs out, or links out of root."""
    pure = PurePosixPath(relative)
    foreign = "\\" in relative or PureWindowsPath(relative).drive or not relative.isprintable()
    if not relative or pure.is_absolute() or ".." in pure.parts or foreign or pure == PurePosixPath("."):
        raise BundleError(
            f'The manifest names the path "{shown(relative)}", which is not inside the bundle. Paths are '
            f"relative and use forward slashes; build the bundle again."
        )
    path = root / pure
    try:
        leads_out = not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself, or a name too long for any file
        leads_out = True
    if leads_out:
        raise BundleError(
            f"{shown(relative)} is a link that leads out of the bundle {root}. Copy the bundle with its files, not "
            "links."
        )
    return path


def check_files(root: Path, entries: Sequence[FileEntry], verify: bool) -> None:
    """Raise BundleError unless every file is there with its recorded size.

    With `verify` also unless each has its sha256 and no hard link outside the bundle, through which others could
    change it after it was verified.
    """
    for entry in entries:
        check_file(root, entry, verify)
    if verify:
        check_links(root, [entry.path for entry in entries])


def check_file(root: Path, entry: FileEntry, verify: bool) -> None:
    """Raise BundleError unless the file is there with its recorded size and, with `verify`, its sha256."""
    path = inside(root, entry.path)
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{entry.path} is missing from the bundle {root}. Copy the bundle again, or rebuild it.")
    if status.st_size != entry.bytes:
        raise BundleError(
            f"{entry.path} has {status.st_size} bytes, but the manifest says {entry.bytes}: the bundle {root} is "
            f"incomplete or was changed. Copy it again, or rebuild it."
        )
    if verify and sha256_file(path) != entry.sha256:
        raise BundleError(
            f"{entry.path} does not match its sha256 in the manifest: the bundle {root} is damaged or was "
            f"changed. Copy it again, or rebuild it."
        )


def check_links(root: Path, paths: Sequence[str]) -> None:
    """Raise BundleError if a file of the bundle has a hard link that is none of these paths."""
    seen = {path: (root / path).stat() for path in paths}
    names = Counter((status.st_dev, status.st_ino) for status in seen.values())
    for path, status in seen.items():
        if status.st_nlink > names[status.st_dev, status.st_ino]:
            raise BundleError(
                f"{path} has a hard link outside the bundle {root}, by which it can be changed. Copy the bundle with "
                "`cp -r` and use the copy."
            )


def check_only(root: Path, folder: str, paths: Sequence[str]) -> None:
    """Raise BundleError if a folder of the bundle holds anything but these paths: readers open what they find."""
    listed = {PurePosixPath(path).as_posix() for path in paths}
    try:
        found = sorted(path.relative_to(root).as_posix() for path in (root / folder).iterdir())
    except OSError as e:
        raise BundleError(f"{root / folder} cannot be read ({e.strerror}). Check its permissions.") from None
    for path in found:
        if path not in listed:
            raise BundleError(
                f"{shown(path)} is not listed in the manifest of the bundle {root}. Remove it, or rebuild the bundle."
            )


def finish_publication(root: Path, entry: FileEntry) -> None:
    """Put new prices in their place if the manifest has their hash already: a kill came between the two renames."""
    with suppress(OSError, BundleError):  # not there, or another process was faster
        waiting = inside(root, NEXT_ENERGY_NAME)
        if waiting.stat().st_size == entry.bytes and sha256_file(waiting) == entry.sha256:
            waiting.replace(inside(root, entry.path))


def file_entry(root: Path, relative: str) -> FileEntry:
    """Return the manifest entry of a file under root."""
    path = inside(root, relative)
    return FileEntry(PurePosixPath(relative).as_posix(), sha256_file(path), path.stat().st_size)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as hex, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}). Check its permissions.") from None
    return digest.hexdigest()
