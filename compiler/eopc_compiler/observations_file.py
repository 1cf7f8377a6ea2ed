"""What was observed of the dense model, as a file of plain arrays: what the stage cache keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eopc_compiler.config import LayerDims
from eopc_compiler.importance import InputPeaks, LayerCurves, Observations

CURVE_ARRAYS = ("kv_groups", "ffn_channels", "kv_errors", "ffn_errors")


def save_observations(path: Path, seen: Observations, losses: dict[str, float]) -> None:
    """Write observations as plain arrays, no pickle."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i, (curve, peak) in enumerate(zip(seen.curves, seen.peaks, strict=True)):
        arrays |= {f"{i}.{name}": np.array(getattr(curve, name)) for name in CURVE_ARRAYS}
        arrays[f"{i}.dims"] = np.array(
            [curve.dims.source_layer, curve.dims.num_key_value_heads, curve.dims.intermediate_size]
        )
        arrays[f"{i}.scalars"] = np.array([curve.parcel, curve.influence])
        arrays |= {f"{i}.{n}": getattr(peak, n).numpy() for n in ("o", "down")}
    arrays |= {f"loss.{name}": np.array(value) for name, value in losses.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types **kwds as bool


def load_observations(path: Path) -> tuple[Observations, dict[str, float]]:
    """Read what `save_observations` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    curves, peaks = [], []
    for i in range(sum(name.endswith(".scalars") for name in arrays)):
        parcel, influence = arrays[f"{i}.scalars"].tolist()
        lists = {name: tuple(arrays[f"{i}.{name}"].tolist()) for name in CURVE_ARRAYS}
        source, groups, width = arrays[f"{i}.dims"].tolist()
        dims = LayerDims(source, groups, width)
        curves.append(LayerCurves(dims, int(parcel), **lists, influence=influence))
        peaks.append(InputPeaks(*(torch.from_numpy(arrays[f"{i}.{n}"]) for n in ("o", "down"))))
    losses = {n.removeprefix("loss."): float(v) for n, v in arrays.items() if n.startswith("loss.")}
    return Observations(tuple(curves), tuple(peaks)), losses
