"""Prefill-only pruning measured: importance by stage, what its parts are worth, and how much faster prompts run.

    python benchmarks/prefill.py importance --corpora FOLDER    virtual gates of prompt and answer, layer by layer
    python benchmarks/prefill.py ablation   --corpora FOLDER    loss added to continuations, with parts left out
    python benchmarks/prefill.py tokens     --corpora FOLDER    token selectors against skipped layers, the same FLOPs
    python benchmarks/prefill.py speed BUNDLE                   prompts on t0 and on the tier that prunes its prefill

Losses are nats per token of 128-token continuations of 384-token prompts, above the dense model's, fp32, on documents
of FOLDER (benchmarks/corpora.py says how it is laid out) that nothing was calibrated on. Speeds are medians, both
tiers in turn in one process, beside the bound: the ratio of the FLOPs that the two graphs have to do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import click
import torch
from corpora import add_corpora_option, calibration_set, evaluation_windows
from torch import Tensor

from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.model import Llama, build_model
from eopc_compiler.prefill_ablation import PrefillPruning, continuation_losses, first, interleaved, last
from eopc_compiler.stage_importance import stage_importance
from eopc_compiler.stored_model import TOKEN_WINDOWS
from eopc_compiler.token_fit import fit_token_scorers
from eopc_compiler.token_selector import PARTS, kept_tokens
from eopc_runtime.bundle import Bundle
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.tier_info import TierInfo

DOMAINS = ("wiki", "code", "maths")
LENGTH, PROMPT = 512, 384
KINDS: tuple[Literal["score", "attention", "chance"], ...] = ("score", "attention", "chance")


def importance(args: argparse.Namespace) -> None:
    """A row a layer: the mean squared gradient of its gate in either stage."""
    model, windows = load(args, 128)
    prompts = list(windows.tokens[:: max(1, len(windows.tokens) // args.samples)][: args.samples])
    found = stage_importance(model, prompts, 64, report=lambda done, total: click.echo(f"{done}/{total}", err=True))
    click.echo(f"{len(prompts)} prompts of 128 tokens, answers of 64 drawn from the model\nlayer   prefill    decode")
    for index, (prefill, decode) in enumerate(zip(found.prefill.tolist(), found.decode.tolist(), strict=True)):
        click.echo(f"{index:5} {prefill:9.4f} {decode:9.4f}")


def ablation(args: argparse.Namespace) -> None:
    """Rows of added loss by domain: more layers skipped, then each part left out at --skip layers."""
    model, windows = load(args, LENGTH)
    layers, count = len(model.blocks), args.skip
    rows = {f"last {n}": PrefillPruning(last(layers, n)) for n in args.counts} | {
        f"last {count}, no keys and values": PrefillPruning(last(layers, count), independent_kv=False),
        f"last {count}, no boundary token": PrefillPruning(last(layers, count), boundary=False),
        f"{count} interleaved": PrefillPruning(interleaved(layers, count)),
        f"first {count}": PrefillPruning(first(layers, count)),
    }
    show(model, windows, rows)


def tokens(args: argparse.Namespace) -> None:
    """Rows of added loss: prompts through fewer layers, and fewer tokens of prompts through more layers.

    Of each group the first row skips whole layers, and the others spare as many FLOPs, keys and values aside. Scores
    are fitted on the calibration text.
    """
    model, windows = load(args, LENGTH)
    layers, tokenizer = len(model.blocks), open_checkpoint(args.model).tokenizer()
    text = calibration_set(tokenizer, args.corpora, DOMAINS, TOKEN_WINDOWS * LENGTH, LENGTH, args.seed)
    scorers = dict(fit_token_scorers(model, text.batches(1), PROMPT))
    scorers[layers - 1] = scorers[layers - 2]  # what runs in the last layer makes no difference
    rows: dict[str, PrefillPruning] = {}
    for count in args.counts:
        rows[f"{count} layers by all tokens"] = PrefillPruning(last(layers, count))
        for share in args.shares:
            skipping = 1 - kept_tokens(PROMPT - 1, round(share * PARTS)) / (PROMPT - 1)
            over = 1 + round((count - 1) / skipping)
            for kind in KINDS:
                pruning = PrefillPruning(last(layers, over), share=share, chosen_by=kind, scorers=scorers)
                rows[f"{over} layers by {skipping:.0%} of tokens ({share:g}), {kind}"] = pruning
    show(model, windows, rows)


def show(model: Llama, windows: CalibrationSet, rows: Mapping[str, PrefillPruning]) -> None:
    """A line a row: loss added to the dense model's, by domain and in the mean."""
    dense = {d: losses(model, tokens, PrefillPruning(frozenset())) for d, tokens in windows.domains}
    for name, pruning in rows.items():
        added = {d: losses(model, tokens, pruning) - dense[d] for d, tokens in windows.domains}
        by_domain = "  ".join(f"{d} {value:+.3f}" for d, value in added.items())
        click.echo(f"{name:40}{by_domain}  mean {statistics.mean(added.values()):+.3f}")


def losses(model: Llama, tokens: Tensor, pruning: PrefillPruning) -> float:
    """Mean loss of continuations."""
    return float(continuation_losses(model, tokens, PROMPT, pruning).mean())


def speed(args: argparse.Namespace) -> None:
    """Median prefill times of t0 and of the tier that prunes its prefill."""
    bundle = Bundle.open(args.bundle)
    pruned = next((t for t in bundle.manifest.tiers if t.prefill), None)
    if pruned is None:
        raise SystemExit(f"{args.bundle} has no tier that prunes its prefill. Build with --prefill-depth LAYERS.")
    dense, fast = (OrtTier(bundle, info, args.threads) for info in (bundle.manifest.tiers[0], pruned))
    vocab = bundle.manifest.model.vocab_size
    for length in args.lengths:
        ids = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        times: dict[str, list[float]] = {"dense": [], "pruned": []}
        for repeat in range(args.repeats + 1):
            for name, runner in (("dense", dense), ("pruned", fast)):
                start = time.perf_counter()
                runner.prefill(runner.new_cache(), ids)
                if repeat:  # the first one allocates
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        gain, bound = medians["dense"] / medians["pruned"], flops_ratio(bundle, pruned, length)
        click.echo(
            f"{length:5} tokens: t0 {1000 * medians['dense']:.1f} ms, {pruned.tier} {1000 * medians['pruned']:.1f} ms, "
            f"{gain:.3f}x; bound {bound:.3f}x ({gain / bound:.1%} of it)"
        )


def flops_ratio(bundle: Bundle, pruned: TierInfo, length: int) -> float:
    """FLOPs of a prompt on t0 over those on the pruned tier, attention counted under the causal mask.

    Of positions but the last, t0's last layer computes queries, keys and values, and no attention and no FFN. The
    pruned tier runs all but the last token through its prefill graph, and that one through everything.
    """
    info, prompt = bundle.manifest.tiers[0], pruned.cost.prefill
    assert prompt is not None
    cost, layers, model = info.cost, len(info.layers), bundle.manifest.model
    heads = cost.attn_flops_per_context / 4 / model.head_dim / layers + 2 * info.layers[-1].kv_heads
    qkv = 2 * model.hidden_size * heads * model.head_dim  # of the last layer; all layers are alike in t0
    pairs, fewer = length * (length + 1) / 2, length - 1
    whole = length * cost.flops_per_token + pairs * cost.attn_flops_per_context
    spared = fewer * (cost.flops_per_token / layers - qkv) + (pairs - length) * cost.attn_flops_per_context / layers
    step = cost.flops_per_token + length * cost.attn_flops_per_context
    filled = fewer * prompt.flops_per_token + fewer * length / 2 * prompt.attn_flops_per_context
    return (whole - spared + cost.head_flops) / (filled + step + cost.head_flops)


def load(args: argparse.Namespace, length: int) -> tuple[Llama, CalibrationSet]:
    """The model in fp32 and windows of every domain."""
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(args.model)
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names}, LENGTH)
    return model, evaluation_windows(checkpoint.tokenizer(), args.corpora, DOMAINS, args.windows, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (importance, ablation, tokens):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        add_corpora_option(command)
        command.add_argument("--model", help="folder, hub id or .gguf [default: SmolLM2-135M-Instruct]")
        command.add_argument("--windows", type=int, default=34, help="per domain [34]")
    commands.choices["importance"].add_argument("--samples", type=int, default=50)
    commands.choices["ablation"].add_argument("--skip", type=int, default=10)
    commands.choices["ablation"].add_argument("--counts", type=int, nargs="+", default=[6, 8, 10, 12])
    commands.choices["tokens"].add_argument("--counts", type=int, nargs="+", default=[8, 12])
    commands.choices["tokens"].add_argument("--shares", type=float, nargs="+", default=[5 / 16, 1 / 2])
    commands.choices["tokens"].add_argument("--seed", type=int, default=0, help="of the calibration draw")
    command = commands.add_parser("speed", help=speed.__doc__)
    command.set_defaults(function=speed)
    command.add_argument("bundle", type=Path)
    command.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    command.add_argument("--repeats", type=int, default=20)
    command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
