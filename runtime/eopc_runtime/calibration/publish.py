"""New prices into a bundle, so that it verifies at every moment, also after a kill between any two steps.

`manifest.json` holds the hash of `energy.json`, and two files cannot be renamed at once. So the new prices are first
written beside the old ones; renaming the new manifest is the moment from which they hold; then they take the place of
the old ones. A bundle that was left between the last two steps is finished by whoever opens it next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from eopc_runtime.bundle import ENERGY_NAME, Bundle, Manifest
from eopc_runtime.bundle_files import MANIFEST_NAME, NEXT_ENERGY_NAME, FileEntry, finish_publication
from eopc_runtime.energy import EnergyTable
from eopc_runtime.files import write_synced

NEXT_MANIFEST_NAME = "manifest.next.json"


def publish(bundle: Bundle, table: EnergyTable) -> Bundle:
    """Write a table and the manifest that belongs to it; return the bundle as it is now."""
    for _ in publish_steps(bundle, table):
        pass
    return Bundle.open(bundle.root, verify=False)


def publish_steps(bundle: Bundle, table: EnergyTable) -> Iterator[str]:
    """Publish step by step, naming what was done last; the bundle verifies after every one."""
    root = bundle.root
    prices = (json.dumps(table.to_json(), indent=1) + "\n").encode()
    manifest = priced_manifest(bundle.manifest, table, prices)
    _write_beside(root / NEXT_ENERGY_NAME, prices)
    yield "wrote the new prices beside the old ones"
    _write_beside(root / NEXT_MANIFEST_NAME, (json.dumps(manifest.to_json(), indent=1) + "\n").encode())
    yield "wrote the new manifest beside the old one"
    (root / NEXT_MANIFEST_NAME).replace(root / MANIFEST_NAME)
    sync_folder(root)
    yield "the new manifest took the old one's place"
    finish_publication(root, next(entry for entry in manifest.files if entry.path == ENERGY_NAME))
    sync_folder(root)
    yield "the new prices took the old ones' place"


def priced_manifest(manifest: Manifest, table: EnergyTable, energy_json: bytes) -> Manifest:
    """Return the manifest with the hash of the new prices, and the tiers' energies at the reference workload."""
    entry = FileEntry(ENERGY_NAME, hashlib.sha256(energy_json).hexdigest(), len(energy_json))
    work = manifest.workload
    tiers = tuple(
        replace(
            tier,
            energy_j=table.plan_price_j(i, i, work.prompt_tokens, work.new_tokens),
            energy_source=table.source,
        )
        for i, tier in enumerate(manifest.tiers)
    )
    files = tuple(entry if old.path == ENERGY_NAME else old for old in manifest.files)
    return replace(manifest, tiers=tiers, files=files)


def _write_beside(path: Path, content: bytes) -> None:
    """Write a file that will take another's place, or none: a full disk is not filled further by half of it."""
    try:
        write_synced(path, content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """See that renames in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
