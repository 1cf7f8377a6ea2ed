"""Write profiles/measured/*.json: coefficients of the energy model from public measurements.

    python tools/public_energy.py ../shared/energy/data/orin_public.csv.gz ../shared/methods/sweetspot_golden.json

For `orin` eopc's own fit runs on the public rows (the same as `eopc energy fit --by source,model,engine,quant`); for
`h100` the published coefficients are turned from the paper's t-order into θ. Only figures are written, no rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eopc_runtime.energy_model.forms import QUADRATIC, Theta
from eopc_runtime.energy_model.groups import GroupFit, fit_group
from eopc_runtime.energy_model.rows import read_measurements
from eopc_runtime.measured import KIND, MEASURED_SCHEMA
from eopc_runtime.provenance import Hull, Identity, MeterRecord

FOLDER = Path(__file__).parents[1] / "profiles" / "measured"
BY = ("source", "model", "engine", "quant")
FOUR_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
COARSE_FROM = 256  # at 1 Hz shorter answers are quantised by tens of per cent
VERSIONS = {  # manifests/framework_versions.csv of the artifact
    "trtllm": "TensorRT-LLM 0.12.0",
    "llamacpp": "llama.cpp b5283 (llama-cpp-python 0.3.8)",
    "pytorch": "PyTorch 2.6.0, transformers 4.57.3, eager",
    "vllm": "vLLM 0.8.6, eager, prefix caching off",
}
SOURCES: dict[str, dict[str, Any]] = {
    "iiswc2026": {
        "title": "Artifact: From Chat to Agents on the Edge - A Cross-Framework Characterization of LLM Inference on "
        "Edge GPUs (IISWC 2026)",
        "authors": "Kevin He, Haebin Do and the other authors of the artifact",
        "doi": "10.5281/zenodo.21848837",
        "repository": "https://github.com/kevinhe5/IISWC2026-Artifact-Paper-177-Jetson-Orin-Thor-Profiling",
        "commit": "1db7395c11fba65930de72dff3b4d062b396e3ec",
        "file": "data/chat/sweep_locked.csv",
        "licence": 'MIT, Copyright (c) 2026 The IISWC 2026 "From Chat to Agents on the Edge" authors',
        "changes": "energy = prefill + decode energy in J; coefficients fitted by eopc, no rows included",
        "meter": MeterRecord("tegrastats, VDDQ from INA3221 sysfs, about 10 Hz", FOUR_RAILS, None, None),
        "identity": Identity("p3701-0000", "r36.4", "MAXN", "jetson_clocks", 3199.0, FOUR_RAILS),
    },
    "edgereasoning": {
        "title": "EdgeReasoning: Characterizing Reasoning LLM Deployment on Edge GPUs",
        "authors": "the authors of edge-inference/edgereasoning",
        "doi": None,
        "repository": "https://github.com/edge-inference/edgereasoning",
        "commit": "e74ca1ed6728961c07ecea3a531796110d7d2b38",
        "file": "validation/decode_parameters.json",
        "licence": "BSD-3-Clause, Copyright (c) 2025, NVIDIA CORPORATION",
        "changes": f"rows of {COARSE_FROM} new tokens or more; coefficients fitted by eopc, no rows included",
        "meter": MeterRecord("tegrastats, about 1 Hz", ("GPU rail",), 5.517, None),
        "identity": Identity(rails=("GPU rail",)),
    },
    "sweetspot": {
        "title": "SweetSpot: An Analytical Model for Predicting Energy Efficiency of LLM Inference",
        "authors": "Hiari Pizzini Cavagna, Andrea Proia, Giacomo Madella, Giovanni B. Esposito, Francesco Antici, "
        "Daniele Cesarini, Zeynep Kiziltan, Andrea Bartolini",
        "doi": "10.1145/3777884.3797011",
        "repository": None,
        "commit": None,
        "file": "arXiv 2602.05695v1, table of coefficients",
        "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "changes": "coefficients in another order (t0..t5 per output token to θ0..θ5 per sequence), no value altered",
        "meter": MeterRecord("power every 500 ms, trapezoid rule", (), None, None),
        "identity": Identity(),
    },
}


def orin(csv: Path) -> dict[str, Any]:
    """Return the content of measured/orin.json."""
    fits = []
    for least, source in ((1, "iiswc2026"), (COARSE_FROM, "edgereasoning")):
        groups = [g for g in read_measurements(csv, BY, least).groups if g.by["source"] == source]
        for group in sorted(groups, key=lambda g: (g.by["engine"] != "trtllm", g.key)):
            found = fit_group(group)
            if not isinstance(found, GroupFit):
                raise SystemExit(f"{group.key}: {found.reason}")
            fits.append(_orin_fit(found))
    notes = [
        "Fits of one source read other rails than those of another: the sums are not to be compared. The four-rail sum "
        "of iiswc2026 reads 8 to 15 % above eopc's module total of three rails.",
        "Calibrated for the model, engine and board of each fit. Other models are priced by the prior.",
    ]
    return _content("orin", notes, ("iiswc2026", "edgereasoning"), fits)


def _orin_fit(found: GroupFit) -> dict[str, Any]:
    model, engine, quant = (found.by[column] for column in BY[1:])
    coarse = found.by["source"] == "edgereasoning"
    notes = [VERSIONS[engine]]
    if coarse:
        notes = [
            f"sampled at about 1 Hz: answers shorter than {COARSE_FROM} tokens were left out, as they read the same "
            "energy whatever their length",
            "the source names neither power mode nor clocks, and the rail only as the GPU's",
        ]
    return {
        "source": found.by["source"],
        "model": model,
        "size_class": size_class(model),
        "engine": engine,
        "precision": quant.removesuffix("_nocache"),
        "serving": "single",
        "batch": 1,
        "form": found.form,
        "theta": asdict(found.theta),
        "hull": asdict(found.hull),
        "cells": found.cells,
        "rows": found.rows,
        "mape_cv": found.mape_cv,
        "worst_cv": found.worst_cv,
        "mape_in_sample": found.mape_in_sample,
        "conformal": None if found.conformal is None else asdict(found.conformal),
        "coarse": coarse,
        "notes": [*notes, *found.warnings],
    }


def h100(golden: Path) -> dict[str, Any]:
    """Return the content of measured/h100.json."""
    published = json.loads(golden.read_text(encoding="utf-8"))
    lengths = (min(published["grid"]), max(published["grid"]))
    fits = [
        {
            "source": "sweetspot",
            "model": name,
            "size_class": size_class(name),
            "engine": "trtllm",
            "precision": "unstated",
            "serving": "throughput",
            "batch": 1024,
            "form": QUADRATIC,
            "theta": asdict(Theta.from_paper(llm["theta"])),
            "hull": asdict(Hull(lengths, lengths)),
            "cells": len(published["grid"]) ** 2,
            "rows": None,
            "mape_cv": None,
            "worst_cv": None,
            "mape_in_sample": llm["mape_pct"]["Mem+FLOPs"] / 100,
            "conformal": None,
            "coarse": False,
            "notes": [],
        }
        for name, llm in published["llms"].items()
    ]
    notes = [
        "Throughput mode: up to 1024 sequences at once share the energy of the weights, so a sequence costs a small "
        "part of what it costs alone. Never the price of a single sequence; that is what the prior is for.",
        "1000 requests of equal length per cell; one H100, which variant is not stated. The error was published in "
        "sample, fitted and scored on the same 49 cells; there is no margin.",
    ]
    return _content("h100", notes, ("sweetspot",), fits)


def size_class(model: str) -> str:
    """The size at the end of names such as Llama-3.2-1B."""
    return model.rsplit("-", 1)[-1]


def _content(device: str, notes: list[str], sources: tuple[str, ...], fits: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": MEASURED_SCHEMA,
        "kind": KIND,
        "device": device,
        "notes": notes,
        "sources": {name: _plain(SOURCES[name]) for name in sources},
        "fits": [_rounded(item) for item in fits],
    }


def _plain(source: dict[str, Any]) -> dict[str, Any]:
    return source | {key: asdict(source[key]) for key in ("meter", "identity")}


def _rounded(value: Any) -> Any:
    """Seven digits are more than the data give."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def to_text(value: Any, indent: int = 0) -> str:
    """Return JSON text: what fits into a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list, tuple)) or indent + len(line) <= 112:
        return line
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(key)}: {to_text(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
    parts = [pad + to_text(item, indent + 2) for item in value]
    return "[\n" + ",\n".join(parts) + "\n" + " " * indent + "]"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", type=Path, help="orin_public.csv.gz")
    parser.add_argument("golden", type=Path, help="sweetspot_golden.json")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    for content in (orin(args.csv), h100(args.golden)):
        (args.output / f"{content['device']}.json").write_text(to_text(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
