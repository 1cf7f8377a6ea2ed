"""Channels chosen by the prompt, measured: loss at the same bytes as fixed ones, and speed.

    python benchmarks/channels.py loss  --corpora FOLDER     nats added to continuations, 75 % of the FFN in decode
    python benchmarks/channels.py speed BUNDLE               decode steps and gathering of a choosing tier against t0

Losses are of 128-token continuations behind the whole model's cache of 384-token prompts, above the dense model's, in
fp32, on documents of FOLDER (benchmarks/corpora.py says how it is laid out) that nothing was calibrated on. Calibration
is text of the same domains, drawn anew with every seed. At the same number of channels per layer:

    fixed       by mean energy over the calibration text, maps as they are
    fixed fit   the same, down_proj fitted to what is left
    chosen      four fifths fixed, the rest chosen by the prompt, maps as they are
    chosen fit  the same, down_proj fitted to the choices
    random fit  four fifths fixed, the rest drawn once, fitted
    trained     (with --steps, beside the two fits only) chosen fit, what ranks its channels and their counts trained

Speeds are medians, both tiers in turn in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from corpora import add_corpora_option, calibration_set, evaluation_windows
from torch import Tensor, nn

from eopc_compiler.calibration import Batch, CalibrationSet, Tokenizer
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.model import Llama, build_model
from eopc_compiler.recover import TrainingText
from eopc_compiler.selector import Selector
from eopc_compiler.selector_fit import FittedChannels, fit_selector, selected_losses, unfitted, with_scorers
from eopc_compiler.selector_train import ScorerText, scorer_settings, train_scorers
from eopc_compiler.sequences import next_token_losses, run_blocks
from eopc_runtime.bundle import Bundle
from eopc_runtime.runners.ort import OrtTier

DOMAINS = ("wiki", "code", "maths")
LENGTH, PROMPT = 512, 384
RESAMPLES = 2000
TRAINING_TOKENS = 1 << 17  # per domain, at most


def loss(args: argparse.Namespace) -> None:
    """A row a method and seed, then paired differences over all sequences."""
    checkpoint = open_checkpoint(args.model)
    tokenizer = checkpoint.tokenizer()
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names}, LENGTH).fuse()
    windows = evaluation_windows(tokenizer, args.corpora, DOMAINS, args.windows, LENGTH)
    text = [Batch(i, 1.0, tokens) for i, (_, tokens) in enumerate(windows.domains)]
    dense = [continuation(model, batch.tokens) for batch in text]
    added: dict[str, list[Tensor]] = {}  # per method: per seed, [domain, sequence]
    for seed in range(args.seeds):
        calibration = calibration_set(tokenizer, args.corpora, DOMAINS, args.tokens, LENGTH, seed)
        batches = calibration.batches(4)
        training = training_text(tokenizer, args, seed) if args.steps else None
        for name, ordered, fitted, selector in methods(by_energy(model, batches), batches, args, seed, training):
            rows = added_losses(ordered, selector, fitted, text, dense)
            added.setdefault(name, []).append(rows)
            click.echo(f"seed {seed}  {name:12}{shown(rows)}")
    for name in (n for n in added if n != "chosen fit"):
        pairs = torch.stack(added[name]) - torch.stack(added["chosen fit"])  # [seed, domain, sequence]
        low, high = interval(pairs.flatten(0, 1))
        click.echo(f"{name} - chosen fit: {float(pairs.mean()):+.3f} nats, 95 % of resamples {low:+.3f} to {high:+.3f}")


Row = tuple[str, Llama, tuple[FittedChannels, ...], Selector]


def training_text(tokenizer: Tokenizer, args: argparse.Namespace, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
    """All that there is to train on, and four windows a domain of the selection split."""
    text = calibration_set(tokenizer, args.corpora, DOMAINS, TRAINING_TOKENS, LENGTH, seed, allow_fewer=True)
    return text, calibration_set(tokenizer, args.corpora, DOMAINS, 4 * LENGTH, LENGTH, seed, "selection")


def trained(
    start: Row, batches: Sequence[Batch], text: tuple[CalibrationSet, CalibrationSet], steps: int, seed: int
) -> Row:
    """The tier that trained scorers and counts make of one that chooses by utility."""
    _, model, fitted, selector = start
    training, selection = text
    windows = TrainingText(training.domains, (1.0,) * len(training.domains))
    texts = ScorerText(windows, batches, selection.domains, LENGTH // 2)
    settings, report = scorer_settings(None, steps, seed), partial(click.echo, err=True)
    found = train_scorers(model, selector, fitted, texts, settings, report=report)
    return "trained", model, with_scorers(fitted, found.scorers), found.selector


def methods(
    model: Llama,
    batches: Sequence[Batch],
    args: argparse.Namespace,
    seed: int,
    text: tuple[CalibrationSet, CalibrationSet] | None,
) -> Iterator[Row]:
    """Every method's name, model, channels and selector; with text to train on, the fitted ones and the trained."""
    width, layers, prompt = model.config.layers[0].intermediate_size, len(model.blocks), LENGTH // 2
    kept = round(args.keep * width)
    core = round(0.8 * kept)
    fixed = Selector((kept,) * layers, (0,) * layers, (0,) * layers)
    chosen = Selector((core,) * layers, (width - core,) * layers, (kept - core,) * layers)
    for name, selector in (("fixed", fixed), ("chosen", chosen)):
        if text is None:
            yield name, model, unfitted(model, selector, batches, prompt), selector
        yield (start := (f"{name} fit", model, fit_selector(model, selector, batches, prompt), selector))
    if text is not None:
        yield trained(start, batches, text, args.steps, seed)
        return
    generator = torch.Generator().manual_seed(seed)
    rest = [torch.cat([torch.arange(core), core + torch.randperm(width - core, generator=generator)])] * layers
    drawn = reordered(model, rest)
    yield "random fit", drawn, fit_selector(drawn, fixed, batches, prompt), fixed


def by_energy(model: Llama, batches: Sequence[Batch]) -> Llama:
    """A copy with the channels of every layer sorted by mean energy times squared norm, largest first."""
    layers, width = len(model.blocks), model.config.layers[0].intermediate_size
    everything = Selector((0,) * layers, (width,) * layers, (0,) * layers)
    seen = unfitted(model, everything, batches, LENGTH // 2)
    return reordered(model, [(layer.prior * layer.weight).argsort(descending=True) for layer in seen])


def reordered(model: Llama, orders: Sequence[Tensor]) -> Llama:
    """A deployment-form copy with the channels of every layer in another order."""
    with torch.device("meta"):
        copy = Llama(model.config, context=1).fuse()
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(parameter.data, requires_grad=False))
    copy.cos, copy.sin = model.get_buffer("cos"), model.get_buffer("sin")
    for layer, order in zip(copy.blocks, orders, strict=True):
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight = nn.Parameter(projection.weight.data[:, order], requires_grad=False)
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.data[order], requires_grad=False)
    return copy


def added_losses(
    model: Llama,
    selector: Selector,
    fitted: Sequence[FittedChannels],
    text: Sequence[Batch],
    dense: Sequence[Tensor],
) -> Tensor:
    """Nats per token above the dense losses of every sequence [domain, sequence], a batch a domain."""
    found = selected_losses(model, selector, fitted, text, PROMPT)
    return torch.stack([(a - b).mean(1) for a, b in zip(found, dense, strict=True)])


def shown(rows: Tensor) -> str:
    """The means of [domain, sequence] by domain and of all, as text."""
    by_domain = "  ".join(f"{d} {value:+.3f}" for d, value in zip(DOMAINS, rows.mean(1).tolist(), strict=True))
    return f"{by_domain}  mean {float(rows.mean()):+.3f}"


def continuation(model: Llama, tokens: Tensor) -> Tensor:
    """The dense model's losses [n, LENGTH - PROMPT - 1] of continuations."""
    parts = [next_token_losses(model, run_blocks(model, t)[:, PROMPT:], t[:, PROMPT:]) for t in torch.split(tokens, 4)]
    return torch.cat(parts)


def interval(pairs: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of [rows, sequences], sequences drawn anew within every row."""
    generator = torch.Generator().manual_seed(0)
    rows, n = pairs.shape
    drawn = torch.randint(n, (RESAMPLES, rows, n), generator=generator)
    means = pairs.expand(RESAMPLES, -1, -1).gather(2, drawn).mean((1, 2)).sort().values
    return float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES)])


def speed(args: argparse.Namespace) -> None:
    """Median decode steps of t0 and of the tier that chooses channels, and of gathering."""
    bundle = Bundle.open(args.bundle)
    chosen = next((t for t in bundle.manifest.tiers if t.selector), None)
    if chosen is None:
        raise SystemExit(f"{args.bundle} has no tier that chooses channels. Build with --selectors on.")
    t0 = bundle.manifest.tiers[0]
    runners = {info.tier: OrtTier(bundle, info, args.threads) for info in (t0, chosen)}
    ids = torch.randint(0, bundle.manifest.model.vocab_size, (args.prompt,)).tolist()
    steps: dict[str, list[float]] = {name: [] for name in runners}
    prompts: dict[str, list[float]] = {name: [] for name in runners}
    gathers = []
    for repeat in range(args.repeats + 1):
        for name, runner in runners.items():
            cache = runner.new_cache()
            start = time.perf_counter()
            runner.prefill(cache, ids)
            taken = time.perf_counter() - start
            times = []
            for token in ids[:64]:
                start = time.perf_counter()
                runner.forward(cache, [token])
                times.append(time.perf_counter() - start)
            if repeat:
                prompts[name].append(taken)
                steps[name].append(statistics.median(times))
            if name == chosen.tier and cache.chosen is not None and runner._selector is not None:
                start = time.perf_counter()
                runner._selector.choose(cache.chosen, runner._shared)
                gathers.append(time.perf_counter() - start)
    step0, step1 = (statistics.median(steps[name]) for name in runners)
    bound = t0.cost.weight_bytes / chosen.cost.weight_bytes
    saved, gather = 64 * (step0 - step1), statistics.median(gathers[1:])
    click.echo(f"decode: t0 {step0 * 1e3:.2f} ms, {chosen.tier} {step1 * 1e3:.2f} ms: {step0 / step1:.3f}x")
    click.echo(f"bytes: {bound:.3f}x; share of the bytes saved: {(step0 / step1 - 1) / (bound - 1):.2f}")
    click.echo(f"gathering: {gather * 1e3:.1f} ms, {gather / saved:.1%} of what 64 steps save")
    first0, first1 = (statistics.median(prompts[name]) for name in runners)
    click.echo(
        f"prompt of {args.prompt}: t0 {first0 * 1e3:.0f} ms, {chosen.tier} {first1 * 1e3:.0f} ms, gathering included"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("loss", loss), ("speed", speed)):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        if name == "loss":
            add_corpora_option(command)
            command.add_argument("--model")
            command.add_argument("--keep", type=float, default=0.75, help="share of channels that run [0.75]")
            command.add_argument("--tokens", type=int, default=8192, help="calibration tokens per domain [8192]")
            command.add_argument("--windows", type=int, default=12, help="evaluation windows per domain [12]")
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--steps", type=int, default=0, help="of training [0: none]")
        else:
            command.add_argument("bundle", type=Path)
            command.add_argument("--threads", type=int, default=2)
            command.add_argument("--prompt", type=int, default=512)
            command.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.run(args)


if __name__ == "__main__":
    main()
