"""Static pruning measured: methods, iteration, mixture, handover and ladders, on perplexity of held-out text.

    python benchmarks/pruning.py methods   --corpora FOLDER      every method of eopc prune on the same text
    python benchmarks/pruning.py iteration --corpora FOLDER      S = 10 against S = 1, on a step's text and on all of it
    python benchmarks/pruning.py mixture   --corpora FOLDER      calibrated on text, code, maths, or their mixture
    python benchmarks/pruning.py recover   --corpora FOLDER      the default method, then --minutes of distillation

FOLDER is laid out as benchmarks/corpora.py says. Perplexity is measured in fp32 on windows of 512 tokens of documents
that calibration never saw; a ratio is to the dense model on the same windows. Rows are appended to --log as they come,
and rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from corpora import add_corpora_option, calibration_set, evaluation_windows, read_domains

from eopc_compiler.calibration import CalibrationSet
from eopc_compiler.checkpoint import Checkpoint, open_checkpoint
from eopc_compiler.model import Llama, build_model
from eopc_compiler.prune import LAYER_METHODS, METHODS, apply_choice
from eopc_compiler.prune_request import PruneRequest
from eopc_compiler.pruned import PrunedModel
from eopc_compiler.recover import RECOVERY_TOKENS, RecoverSettings, recover, training_windows
from eopc_compiler.sequences import mean_loss

Row = dict[str, Any]  # key, losses by domain in nats per token, seconds
DOMAINS = ("wiki", "code", "maths")
LENGTH = 512
RECOVERY_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Run:
    """One row: a method, what it was calibrated on, and how."""

    label: str
    method: str
    domains: tuple[str, ...]
    tokens: int  # per domain
    request: PruneRequest
    minutes: float = 0.0  # of recovery

    @property
    def key(self) -> str:
        r = self.request
        how = f"{self.tokens}|{r.ratio}|{r.units}|{r.steps}|{r.seed}"
        return f"{self.label}|{self.method}|{','.join(self.domains)}|{how}|{self.minutes:g}"


def methods(args: argparse.Namespace) -> list[Run]:
    """Every method that removes FFN channels, at the same calibration tokens."""
    request = PruneRequest(args.ratio, "ffn", 32, seed=args.seed, steps=args.steps)
    names = args.method or [n for n in METHODS if n not in LAYER_METHODS]
    return [Run(n, n, DOMAINS, args.tokens, request) for n in names]


def iteration(args: argparse.Namespace) -> list[Run]:
    """S = 1 and S = 10 at --tokens per step, and S = 1 with all the text of S = 10."""
    one = PruneRequest(args.ratio, "ffn", 32, seed=args.seed, steps=1)
    return [
        Run("S=1", "iterative", DOMAINS, args.tokens, one),
        Run("S=1, 10x text", "iterative", DOMAINS, 10 * args.tokens, one),
        Run("S=10", "iterative", DOMAINS, 10 * args.tokens, replace(one, steps=10)),
    ]


def mixture(args: argparse.Namespace) -> list[Run]:
    """One domain or all three, the same number of tokens in all."""
    runs = []
    for seed in range(args.seeds):
        request = PruneRequest(args.ratio, "ffn", 32, seed=seed, steps=args.steps)
        runs += [Run(f"{d} only", "iterative", (d,), 3 * args.tokens, request) for d in DOMAINS]
        runs.append(Run("mix", "iterative", DOMAINS, args.tokens, request))
    return runs


def recovery(args: argparse.Namespace) -> list[Run]:
    """The default method, and with minutes of distillation after it."""
    request = PruneRequest(args.ratio, "ffn", 32, seed=args.seed, steps=args.steps)
    rows = [("training-free", 0.0), (f"{args.minutes:g} min recovery", args.minutes)]
    return [Run(label, "iterative", DOMAINS, args.tokens, request, minutes) for label, minutes in rows]


TABLES: dict[str, Callable[[argparse.Namespace], list[Run]]] = {
    "methods": methods,
    "iteration": iteration,
    "mixture": mixture,
    "recover": recovery,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    add_corpora_option(parser)
    parser.add_argument("--model", help="folder, hub id or .gguf [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the FFN [0.2]")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens per domain [8192]")
    parser.add_argument("--steps", type=int, default=5, help="of methods that iterate [5]")
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows per domain [24]")
    parser.add_argument("--method", action="append", choices=METHODS, help="of methods [all that remove channels]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of mixture [3]")
    parser.add_argument("--minutes", type=float, default=20.0, help="of recover [20]")
    parser.add_argument("--log", type=Path, default=Path("pruning.jsonl"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(args.model)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}
    model = build_model(checkpoint.config, tensors, LENGTH)
    windows = evaluation_windows(checkpoint.tokenizer(), args.corpora, DOMAINS, args.windows, LENGTH)
    rows = read_log(args.log)
    dense_key = f"dense|{args.windows}"
    if dense_key not in rows:
        note(args.log, rows, dense_key, {"losses": losses(model, windows), "seconds": 0.0})
    dense = rows[dense_key]["losses"]
    click.echo(f"dense perplexity: {', '.join(f'{n} {math.exp(v):.2f}' for n, v in dense.items())}")
    for run in TABLES[args.table](args):
        key = f"{run.key}|{args.windows}"
        if key not in rows:
            note(args.log, rows, key, measure(run, model, checkpoint, args.corpora, windows))
        click.echo(line(run, rows[key], dense))


def measure(run: Run, model: Llama, checkpoint: Checkpoint, folder: Path, windows: CalibrationSet) -> Row:
    """Prune and measure."""
    text = calibration_set(checkpoint.tokenizer(), folder, run.domains, run.tokens, LENGTH, run.request.seed)
    started = time.monotonic()
    choice = METHODS[run.method](model, text, run.request)
    pruned = apply_choice(model, choice)
    if run.minutes:
        pruned = recovered(run, pruned, model, checkpoint, folder)
    seconds = time.monotonic() - started
    return {"losses": losses(pruned.build(LENGTH), windows), "seconds": seconds}


def recovered(run: Run, pruned: PrunedModel, model: Llama, checkpoint: Checkpoint, folder: Path) -> PrunedModel:
    """Distilled from the dense model on the calibration split, checked on the selection split."""
    tokenizer, domains, seed = checkpoint.tokenizer(), read_domains(folder, run.domains), run.request.seed
    text = training_windows(tokenizer, domains, RECOVERY_TOKENS, RECOVERY_LENGTH, seed)
    selection = calibration_set(tokenizer, folder, run.domains, 8 * RECOVERY_LENGTH, RECOVERY_LENGTH, seed, "selection")
    settings = RecoverSettings(minutes=run.minutes, seed=seed)
    sources = [layer.source_layer for layer in pruned.kept]
    with torch.enable_grad():
        report = recover(
            pruned.build(LENGTH), model, text, selection.domains, settings, sources=sources, report=click.echo
        )
    return replace(pruned, tensors={**pruned.tensors, **report.tensors})


def losses(model: Llama, windows: CalibrationSet) -> dict[str, float]:
    """Nats per token by domain, fp32."""
    return {name: mean_loss(model, rows) for name, rows in windows.domains}


def line(run: Run, row: Row, dense: dict[str, float]) -> str:
    """One row as text: perplexities, ratios to dense, worst and geometric mean."""
    found = row["losses"]
    added = {name: found[name] - dense[name] for name in dense}
    cells = "  ".join(f"{math.exp(found[n]):8.2f} ({math.exp(a):6.3f})" for n, a in added.items())
    mean = math.exp(sum(added.values()) / len(added))
    label = f"{run.label} seed {run.request.seed}"
    return f"{label:24} {cells}  worst {math.exp(max(added.values())):.3f}  mean {mean:.4f}  {row['seconds']:.0f} s"


def read_log(path: Path) -> dict[str, Row]:
    """Rows by key."""
    if not path.exists():
        return {}
    records: Sequence[Row] = [json.loads(text) for text in path.read_text().splitlines()]
    return {str(r["key"]): r for r in records}


def note(path: Path, rows: dict[str, Row], key: str, row: Row) -> None:
    """Append a row to the log."""
    rows[key] = {"key": key, **row}
    with path.open("a") as file:
        file.write(json.dumps(rows[key]) + "\n")


if __name__ == "__main__":
    main()
