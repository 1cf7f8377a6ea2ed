"""The bundle on disk: staged beside its final place, checked there, then renamed.

Nothing is moved into place before every graph has computed what PyTorch computes: prefill, then 16 cached decode steps,
teacher-forced. The check runs the staged bundle through the runtime that will ship it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from eopc_compiler.config import LlamaConfig
from eopc_compiler.importance import Report
from eopc_compiler.ladder import keep_shares, mask_to_json, parameter_count, tier_config
from eopc_compiler.load_tiers import load_prompt_pass, load_selector, load_tier
from eopc_compiler.parity import PROMPT, STEPS, Reference, check_parity
from eopc_compiler.planner import TierPlan
from eopc_compiler.pricing import plan_energy
from eopc_compiler.removals import removals
from eopc_compiler.shrink import dual
from eopc_compiler.state import CompileState
from eopc_compiler.tier_graphs import ANSWER, DECODE, GATHER, STEP, tier_path
from eopc_compiler.tier_graphs import PROMPT as PROMPT_GRAPH
from eopc_compiler.token_selector import PromptPath
from eopc_compiler.weights import WEIGHTS_FILE, WeightReader
from eopc_runtime import __version__
from eopc_runtime.bundle import Bundle, Manifest, ModelInfo, Workload
from eopc_runtime.bundle_files import file_entry
from eopc_runtime.energy import EnergyTable
from eopc_runtime.memory import release_memory
from eopc_runtime.policy import plan_label
from eopc_runtime.prior import prior_table
from eopc_runtime.report.write import refresh_report
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.tier_info import LayerInfo, PrefillInfo, SelectorInfo, TierInfo


def write_plan(state: CompileState) -> Path:
    """Write plan.json: what was decided and why. Beside the output for --dry-run, in the work folder otherwise."""
    assert state.storage and state.dialect and state.checkpoint
    dense = state.plan[0]
    unmeasured = bool(state.args.masks) or len(state.plan) == 1  # losses are measured where a search compares them
    content = {
        "schema": 1,
        "model": state.checkpoint.name,
        "device": state.profile.name,
        "dialect": state.dialect.name,
        "workload": asdict(state.args.workload),
        "energy_source": state.profile.energy_source,
        "precision": {
            "chosen": state.storage.precision,
            "max_added_loss": state.args.max_added_loss,
            "trials": [asdict(t) for t in state.trials],
        },
        "tiers": [
            {
                "tier": f"t{i}",
                "budget_j": t.budget_j,
                "energy_j": t.energy_j,
                "energy_saved_j": dense.energy_j - t.energy_j,
                "selection_loss": None if unmeasured else t.loss,
                "loss_added": None if unmeasured else t.loss - dense.loss,
                "nats_per_joule": _dual(state, t),
                "note": t.note,
                "plan": plan_label(t.prefill, i),
                "prefill_depth": t.prompt.depth if t.prompt else None,
                "prefill_share": t.prompt.share if t.prompt else None,
                "selector": asdict(t.selector) if t.selector else None,
                "keep": keep_shares(state.config, t.run),
                "layers_removed": sorted(
                    {d.source_layer for d in dense.mask.layers} - {d.source_layer for d in t.mask.layers}
                ),
                "removed": _removed(state, i),
                "considered": list(t.considered),
            }
            for i, t in enumerate(state.plan)
        ],
    }
    path = state.args.output / "plan.json" if state.args.dry_run else state.cache.folder / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = state.cache.folder / "partial-plan.json"
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(path)
    return path


def _dual(state: CompileState, tier: TierPlan) -> float | None:
    """λ of a tier whose widths follow the curves; None where masks are given."""
    assert state.observations and state.storage
    storage = state.storage
    if state.args.masks or not all(c.ffn_errors for c in state.observations.curves):
        return None
    return dual(tier.run, state.observations.curves, lambda mask: plan_energy(state, mask, storage), state.align)


def _removed(state: CompileState, index: int) -> list[dict[str, Any]]:
    """What a static tier keeps less than the static tier above it; empty for tiers that remove by the prompt."""
    assert state.observations and state.storage
    storage, tier = state.storage, state.plan[index]
    if tier.fills or not index:
        return []
    above = next(t for t in reversed(state.plan[:index]) if not t.fills)
    price = partial(plan_energy, state, storage=storage)
    return [asdict(r) for r in removals(above.mask, tier.mask, state.observations.curves, price)]


def stage_bundle(state: CompileState) -> CompileState:
    """Lay the bundle out in a temporary sibling of its final place."""
    assert state.checkpoint and state.weights and state.storage
    root = state.args.output.with_name(f".{state.args.output.name}.staged-{os.getpid()}")
    shutil.rmtree(root, ignore_errors=True)
    (root / "tiers").mkdir(parents=True)
    place(state.weights, root / WEIGHTS_FILE)
    shutil.copy(state.cache.folder / "plan.json", root / "plan.json")
    for i, (tier, graphs) in enumerate(zip(state.plan, state.graphs, strict=True)):
        folder = root / "tiers" / f"t{i}"
        folder.mkdir()
        for name, graph in graphs.in_bundle(i).items():
            shutil.copy(graph, root / name)
        for name, path in state.extras[i].files.items():
            place(path, root / name)
        mask = mask_to_json(f"t{i}", tier.reach, state.orders)
        (folder / "mask.json").write_text(json.dumps(mask), encoding="utf-8")
    table = energy_table(state)
    (root / "energy.json").write_text(json.dumps(table.to_json(), indent=1), encoding="utf-8")
    state.checkpoint.save_tokenizer(root / "tokenizer")
    write_manifest(root, manifest(state, root, table))
    return replace(state, staged=root)


def check_and_measure(state: CompileState) -> CompileState:
    """The parity gate and the perplexities, then the final manifest.

    Raises:
        ParityError: a graph does not compute what the PyTorch model computes.
    """
    assert state.staged and state.table and state.weights and state.storage and state.heldout
    bundle = Bundle.open(state.staged, verify=False)
    reader = WeightReader(state.weights, {name: path for e in state.extras for name, path in e.files.items()})
    infos, losses = list[TierInfo](), dict[str, float]()
    dense_losses = [state.dense_loss[f"heldout.{name}"] for name in state.heldout.names]
    dense = math.exp(sum(dense_losses) / len(dense_losses))
    for tier, extras, info in zip(state.plan, state.extras, bundle.manifest.tiers, strict=True):
        state.say(f"checking {info.tier} against PyTorch, {STEPS} cached steps")
        config = extras.config(tier_config(state.config, tier.mask))
        table, context = state.table.with_extras(extras.table), state.args.context
        reference = Reference(load_tier(config, table, reader, context), steps_round=info.step is None)
        if tier.prompt is not None:
            reference.prompt = load_prompt_pass(config, tier.prompt, table, reader, context)
        elif tier.selector is not None:
            whole, pools = state.config, tier.selector.recorded
            every = PromptPath(len(whole.layers))
            reference.prompt = load_prompt_pass(whole, every, state.table, reader, context, pools)
            reference.selector = load_selector(config, tier.selector, table, reader)
        tokens = state.heldout.tokens[0, : PROMPT + STEPS].tolist()
        parity = check_parity(bundle, info, reference, tokens, state.storage.dtype)
        del reference
        release_memory()
        if tier.prompt is None:  # else the graph is t0's, and so is its perplexity
            state.say(f"measuring the perplexity of {info.tier}")
            runner = OrtTier(bundle, info)
            losses = {
                name: runtime_loss(runner, windows, state.counter(f"{info.tier} on {name}", "windows"))
                for name, windows in state.heldout.domains
            }
            del runner
            release_memory()  # before the next tier's reference is loaded
        infos.append(
            replace(
                info,
                parity=parity,
                perplexity=math.exp(sum(losses.values()) / len(losses)),
                perplexity_dense=dense,
                perplexity_by_domain={name: math.exp(value) for name, value in losses.items()},
            )
        )
    final = replace(bundle.manifest, tiers=tuple(infos))
    write_manifest(state.staged, final)
    return replace(state, tiers=tuple(manifest_tiers(final)))


def write_page(state: CompileState) -> CompileState:
    """Write report.html into the staged bundle; a bundle is as good without it, so a failure is only told."""
    assert state.staged is not None
    if reason := refresh_report(Bundle.open(state.staged, verify=False)):
        state.say(reason)
    return state


def runtime_loss(runner: OrtTier, windows: torch.Tensor, report: Report) -> float:
    """Mean next-token loss of windows [n, S] through the runtime, nats."""
    total, count = 0.0, 0
    for done, window in enumerate(windows, start=1):
        logits = torch.from_numpy(runner.forward(runner.new_cache(), window.tolist(), logits="all"))
        total += float(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum"))
        count += len(window) - 1
        report(done, len(windows))
    return total / count


def energy_table(state: CompileState) -> EnergyTable:
    """Prior prices of every tier on the device."""
    assert state.storage is not None
    costs = {f"t{i}": state.storage.cost(state.config, t.mask, t.prompt, t.selector) for i, t in enumerate(state.plan)}
    return prior_table(state.profile, costs, state.storage.precision, 0.0)


def manifest(state: CompileState, root: Path, table: EnergyTable) -> Manifest:
    """The manifest of a staged bundle, before anything is measured."""
    assert state.checkpoint and state.storage and state.dialect and state.calibration
    config, work = state.config, state.args.workload
    tiers = tuple(
        TierInfo(
            tier=f"t{i}",
            budget_j=t.budget_j,
            energy_j=table.plan_price_j(t.prefill, i, work.prompt_tokens, work.new_tokens),
            energy_source=table.source,
            perplexity=None,
            perplexity_dense=None,
            perplexity_by_domain={},
            params=parameter_count(config, t.run),
            keep=keep_shares(config, t.run),
            layers=tuple(LayerInfo(d.source_layer, d.num_key_value_heads, d.intermediate_size) for d in t.reach.layers),
            cost=state.storage.cost(config, t.mask, t.prompt, t.selector),
            graph=tier_path(i, DECODE if t.fills else ANSWER),
            mask=f"tiers/t{i}/mask.json",
            note=t.note,
            parity={},
            prefill=_prefill_info(config, t, i),
            selector=SelectorInfo(tier_path(i, GATHER), *astuple(t.selector)) if t.selector else None,
            step=tier_path(i, STEP) if state.storage.single_tokens else None,
        )
        for i, t in enumerate(state.plan)
    )
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    return Manifest(
        eopc_version=__version__,
        model=ModelInfo(
            name=state.checkpoint.name,
            source=state.checkpoint.name if Path(state.checkpoint.source).exists() else state.checkpoint.source,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            num_hidden_layers=len(config.layers),
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        ),
        device=state.profile.name,
        dialect=state.dialect.name,
        opset=state.dialect.opset,
        precision=state.storage.precision,
        compute_dtype=state.storage.dtype,
        workload=Workload(work.prompt_tokens, work.new_tokens),
        context=min(state.args.context, config.max_position_embeddings),
        tiers=tiers,
        files=tuple(file_entry(root, name) for name in files),
        tools={n: importlib.metadata.version(n) for n in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")},
        seed=state.args.seed,
        calibration={
            "domains": list(state.calibration.names),
            "weights": list(state.calibration.weights),
            "select": state.args.calib_select,
            "windows_per_domain": round(len(state.calibration.tokens) / len(state.calibration.names)),
            "window_tokens": state.args.calibration_length,
            "sha256": state.calibration.fingerprint,
            "weight_bytes": state.bytes_by_type,
        },
        exact_products=state.storage.exact_products,
    )


def _prefill_info(config: LlamaConfig, tier: TierPlan, index: int) -> PrefillInfo | None:
    if not tier.fills:
        return None
    path = tier.prompt or PromptPath(len(config.layers))
    return PrefillInfo(path.depth, tier_path(index, PROMPT_GRAPH), path.share)


def write_manifest(root: Path, content: Manifest) -> None:
    """Write manifest.json."""
    (root / "manifest.json").write_text(json.dumps(content.to_json(), indent=1), encoding="utf-8")


def manifest_tiers(content: Manifest) -> list[dict[str, Any]]:
    """The tiers as the manifest writes them."""
    return cast("list[dict[str, Any]]", content.to_json()["tiers"])


def place(source: Path, target: Path) -> None:
    """Hard-link a large file, or copy it where links are not to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def move_into_place(staged: Path, output: Path) -> None:
    """Rename the staged bundle to its name; a bundle that was there is replaced, and lost only after that worked."""
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        output.rename(old)
    try:
        staged.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
