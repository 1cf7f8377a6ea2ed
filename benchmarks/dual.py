"""One dual variable against other ways to share out the same joules, measured on tiers that choose their channels.

    python benchmarks/dual.py --corpora FOLDER

An FFN channel costs the same joules in every layer, so allocations of the same number of channels cost the same. At
every budget (share of the FFN that runs in decode), with the last fifth of every layer's channels chosen by the prompt
and down_proj fitted:

    dual         every layer runs the channels whose loss, by the curves, is above one λ
    uniform      every layer runs the same number
    random       layers give up channels in random proportions

and, with dual widths, all channels fixed in advance and fitted. Losses are nats per token added to 128-token
continuations of 384-token prompts, fp32, on documents of FOLDER (benchmarks/corpora.py says how it is laid out) that
nothing was calibrated on; calibration text is drawn anew with every seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import click
import torch
from channels import DOMAINS, LENGTH, added_losses, continuation, interval, reordered, shown
from corpora import add_corpora_option, calibration_set, evaluation_windows
from torch import Tensor

from eopc_compiler.allocate import Curve, Key, allocate
from eopc_compiler.calibration import Batch
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.importance import LayerCurves, observe
from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.model import build_model
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import fit_selector
from eopc_compiler.selector_planner import split

PARCEL = 32  # channels


def main() -> None:
    """A row a seed, budget and allocation; then the means, and paired differences over all sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpora_option(parser)
    parser.add_argument("--model", help="folder, hub id or .gguf [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.625, 0.5], help="shares of channels that run")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens per domain [4096]")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows per domain [8]")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(args.model)
    tensors, tokenizer = {n: checkpoint.tensor(n) for n in checkpoint.tensor_names}, checkpoint.tokenizer()
    whole = build_model(checkpoint.config, tensors, LENGTH)
    full = full_mask(checkpoint.config)
    fused = build_model(checkpoint.config, tensors, LENGTH).fuse()
    windows = evaluation_windows(tokenizer, args.corpora, DOMAINS, args.windows, LENGTH)
    text = [Batch(i, 1.0, tokens) for i, (_, tokens) in enumerate(windows.domains)]
    dense = [continuation(fused, batch.tokens) for batch in text]
    added: dict[tuple[float, str], list[Tensor]] = {}  # per seed, [domain, sequence]
    for seed in range(args.seeds):
        batches = calibration_set(tokenizer, args.corpora, DOMAINS, args.tokens, LENGTH, seed).batches(4)
        curves = observe(whole, batches, PARCEL, seed).curves
        model = reordered(fused, [torch.tensor(c.ffn_channels) for c in curves])
        for keep in args.keep:
            parcels = round((1 - keep) * sum(d.intermediate_size for d in full.layers) / PARCEL)
            for name, mask in allocations(full, curves, parcels, seed).items():
                for kind, selector in selectors(name, mask, full).items():
                    fitted = fit_selector(model, selector, batches, LENGTH // 2)
                    rows = added_losses(model, selector, fitted, text, dense)
                    added.setdefault((keep, kind), []).append(rows)
                    click.echo(f"seed {seed}  {keep:.1%}  {kind:12}{shown(rows)}")
    for (keep, kind), rows_by_seed in added.items():
        rows = torch.stack(rows_by_seed)
        pairs = (rows - torch.stack(added[keep, "dual"])).flatten(0, 1)
        low, high = interval(pairs)
        click.echo(f"{keep:.1%}  {kind:12}{float(rows.mean()):+.3f}  above dual {low:+.3f} to {high:+.3f} (95 %)")


def allocations(full: Mask, curves: Sequence[LayerCurves], parcels: int, seed: int) -> dict[str, Mask]:
    """Masks that give up so many parcels of channels."""
    ahead: dict[Key, Curve] = {(d.source_layer, "ffn"): curves[d.source_layer].ffn_ahead(d) for d in full.layers}
    dual = allocate(ahead, {"ffn": PARCEL}, lambda _kind: 1.0, parcels * PARCEL, at_least=True)
    layers = len(full.layers)
    generator = torch.Generator().manual_seed(seed)
    gone = {
        "dual": [dual[d.source_layer, "ffn"] // PARCEL for d in full.layers],
        "uniform": [(i + 1) * parcels // layers - i * parcels // layers for i in range(layers)],
        "random": shares(torch.rand(layers, generator=generator), parcels, full.layers[0].intermediate_size // PARCEL),
    }
    assert all(sum(counts) == parcels for counts in gone.values())
    return {name: _without(full, counts) for name, counts in gone.items()}


def shares(weights: Tensor, parcels: int, most: int) -> list[int]:
    """So many parcels in proportion to the weights, at most `most - 1` each, one after the other."""
    counts = [0] * len(weights)
    for _ in range(parcels):
        behind = [w / (c + 1) if c < most - 1 else -1.0 for w, c in zip(weights.tolist(), counts, strict=True)]
        counts[behind.index(max(behind))] += 1
    return counts


def selectors(name: str, mask: Mask, full: Mask) -> dict[str, Selector]:
    """What runs, by kind: the last fifth chosen, and for the dual widths also all of it fixed."""
    chosen = {name: split(mask, full, PARCEL)}
    if name == "dual":
        nothing = (0,) * len(mask.layers)
        chosen["dual, fixed"] = Selector(tuple(d.intermediate_size for d in mask.layers), nothing, nothing)
    return chosen


def _without(full: Mask, parcels: Sequence[int]) -> Mask:
    pairs = zip(full.layers, parcels, strict=True)
    return Mask(tuple(replace(d, intermediate_size=d.intermediate_size - n * PARCEL) for d, n in pairs))


if __name__ == "__main__":
    main()
