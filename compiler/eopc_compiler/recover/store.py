"""The state of a training run in one .safetensors file: tensors, and the rest as JSON in its header; no pickle.

One file, written beside and renamed, so that a killed run leaves the last whole state or none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from eopc_compiler.cache import PARTIAL

STATE_FILE = "training-state.safetensors"


def save_state(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the folder's state by this one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{PARTIAL}{STATE_FILE}"
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {"record": json.dumps(record)})
    partial.replace(folder / STATE_FILE)


def load_state(folder: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, record) of a run with this fingerprint; None where there is none, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            record: dict[str, Any] = json.loads((file.metadata() or {})["record"])
            if record.get("fingerprint") != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def remove_state(folder: Path) -> None:
    """Forget a run that is complete, and what a kill in the middle of writing left."""
    for name in (STATE_FILE, f"{PARTIAL}{STATE_FILE}"):
        (folder / name).unlink(missing_ok=True)
