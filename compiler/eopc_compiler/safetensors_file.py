"""Finds the .safetensors files of a model folder and reads them tensor by tensor, header first."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eopc_runtime.errors import ModelError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor in a .safetensors file; `offset` counts from the start of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> torch.Tensor:
        """The tensor in its stored dtype; plain reads, so resident memory does not grow with the file."""
        dtype = DTYPES[self.dtype]
        if 0 in self.shape:  # of a sub-block that is left out
            return torch.empty(self.shape, dtype=dtype)
        data = bytearray(math.prod(self.shape) * dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(data) != len(data):
                raise ModelError(f"{self.path} ended inside tensor {self.name}; get the file again.")
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder: the shards of the index, or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map; get the file again.")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names shards outside the model folder; get the file again.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"Shard {missing[0]} of {folder} is missing ({len(missing)} of {len(names)}). Complete the download."
            )
        return [folder / name for name in names]
    files = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    if len(files) > 1 and folder / "model.safetensors" not in files:
        raise ModelError(f"{folder} has {len(files)} .safetensors files but no model.safetensors.index.json; add it.")
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        do = "Convert them: load with transformers, then save_pretrained" if pickled else "Complete the download"
        found = "only pickled weights (.bin, .pt)" if pickled else "no weights"
        raise ModelError(f"{folder} has {found}; .safetensors were expected. {do}.")
    return [folder / "model.safetensors"] if len(files) > 1 else files


def read_header(path: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of one file, after proving that each lies inside it; no weights are read."""
    size = path.stat().st_size
    damaged = f"{path} is truncated or damaged: its header could not be read ({size} bytes). Get the file again."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ModelError(damaged)
        try:
            header = json.loads(file.read(length))
            entries, end = {}, 0
            for name, info in header.items():
                if name != "__metadata__":
                    first, last = info["data_offsets"]
                    shape, dtype = tuple(info["shape"]), info["dtype"]
                    item = DTYPES[dtype].itemsize if dtype in DTYPES else None
                    if item is not None and last - first != math.prod(shape) * item:
                        raise ValueError(f"{name} has {last - first} bytes")
                    entries[name] = SafetensorsEntry(name, path, dtype, shape, 8 + length + first)
                    end = max(end, 8 + length + last)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(damaged) from error
    if end > size:
        raise ModelError(
            f"{path} is truncated: its header lists {end} bytes, but the file has {size}. Get the file again."
        )
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); get the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; get the file again.")
    return value
