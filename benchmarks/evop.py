"""Layer pattern search measured: exhaustive table, replay of searchers on it, speed of sharing, held-out quality.

    python benchmarks/evop.py table --text prose=FILE --out table.json [--tokens 128] [--remove 3] [--journal FILE]
    python benchmarks/evop.py replay table.json [--seeds 20] [--evaluations 406]
    python benchmarks/evop.py speed --text prose=FILE [--remove 6] [--evaluations 64] [--rounds 3]
    python benchmarks/evop.py heldout --text prose=FILE --text code=FILE [--remove 6] [--evaluations 400] [--seeds 3]

Texts are given as for `eopc build --calib`, NAME=FILE or NAME=FILE:FIELD; without any, the built-in ones are used.
Patterns are chosen on the calibration split of a text and judged on its held-out split. Losses are nats per token,
evaluations are unique patterns. Every subcommand takes --json; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eopc_compiler.calibration import Domain, build_calibration, default_domains, load_calib
from eopc_compiler.checkpoint import CheckpointTokenizer, open_checkpoint
from eopc_compiler.evop.baselines import block_influence, least_influential
from eopc_compiler.evop.fitness import Fitness, Losses, ModelLosses, cast_model, plain_losses
from eopc_compiler.evop.journal import Journal
from eopc_compiler.evop.pattern import Pattern, Space
from eopc_compiler.evop.search import SEARCHERS, search_pattern
from eopc_compiler.model import Llama, build_model
from eopc_runtime.errors import EopcError, UsageError

Result = dict[str, Any]
BEST = 4  # a search succeeds with one of the best four patterns


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer and the texts to use."""

    name: str
    model: Llama
    key: str
    tokenizer: CheckpointTokenizer
    domains: tuple[Domain, ...]

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers


def table(args: argparse.Namespace) -> Result:
    """Losses of every pattern of 1..K layers, and block influence, into a file that `replay` reads."""
    loaded = load(args)
    domain = loaded.domains[0]
    tokens = build_calibration(loaded.tokenizer, [domain], 1, args.tokens, args.seed).tokens
    patterns = [p for count in range(1, args.remove + 1) for p in Space(loaded.layers, count)][: args.limit]
    source = ModelLosses(loaded.model, [tokens], model_key=loaded.key)
    fitness = Fitness(Watched(source))
    start = time.perf_counter()
    if args.journal:
        with Journal(args.journal, fitness):
            losses = fitness.losses(patterns)
    else:
        losses = fitness.losses(patterns)
    elapsed_s = time.perf_counter() - start
    result = {
        "model": loaded.name,
        "domain": domain.name,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "layers": loaded.layers,
        "remove": args.remove,
        "influence": block_influence(loaded.model, [tokens]),
        "losses": {p.bits: loss for p, loss in zip(patterns, losses, strict=True)},
    }
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    summary: Result = {"out": str(args.out), "patterns": len(patterns), "computed": fitness.computed}
    share = source.work.run / source.work.asked if source.work.asked else None  # none: all was in the journal
    summary |= {"elapsed_s": elapsed_s, "layers_run_share": share}
    full = sorted((loss, p) for loss, p in zip(losses, patterns, strict=True) if len(p.removed) == args.remove)
    show(["rank", "removed", "loss"], [[i + 1, names(p), f"{loss:.4f}"] for i, (loss, p) in enumerate(full[:10])], args)
    return summary


def replay(args: argparse.Namespace) -> Result:
    """Every searcher on a table: median regret, and how often one of the best four is found, by evaluations."""
    if not args.table.is_file():
        raise UsageError(f"There is no table {args.table}; make one with the subcommand table.")
    content = json.loads(args.table.read_text(encoding="utf-8"))
    layers, remove, losses = content["layers"], content["remove"], content["losses"]
    ranked = sorted(loss for bits, loss in losses.items() if bits.count("1") == remove)
    if len(ranked) != math.comb(layers, remove):
        raise UsageError(
            f"{args.table} holds {len(ranked)} patterns of {remove} layers, not all; make it without --limit."
        )
    marks = sorted({min(mark, args.evaluations) for mark in (50, 100, 200, 300, args.evaluations)})
    methods: Result = {}
    for method in SEARCHERS:
        runs = [
            search_pattern(Fitness(losses), layers, remove, method, args.evaluations, seed)
            for seed in range(1 if method == "sleb" else args.seeds)
        ]
        methods[method] = {
            "seeds": len(runs),
            "evaluations": statistics.median(run.evaluations for run in runs),
            "regret": [finite(statistics.median(reached(run.history, m) for run in runs) - ranked[0]) for m in marks],
            "success": [sum(reached(run.history, m) <= ranked[BEST - 1] for run in runs) / len(runs) for m in marks],
        }
    influence = losses[least_influential(Space(layers, remove), content["influence"]).bits]
    methods["shortgpt"] = {"seeds": 1, "evaluations": 0, "regret": [influence - ranked[0]] * len(marks)}
    methods["shortgpt"]["success"] = [float(influence <= ranked[BEST - 1])] * len(marks)
    rows = [
        [name, m["seeds"], f"{m['evaluations']:g}"]
        + ["" if r is None else f"{r:.4f} {s:4.0%}" for r, s in zip(m["regret"], m["success"], strict=True)]
        for name, m in methods.items()
    ]
    show(["method", "seeds", "used", *(f"regret, P(best {BEST}) at {m}" for m in marks)], rows, args)
    return {"patterns": len(ranked), "best": ranked[0], "fourth": ranked[BEST - 1], "marks": marks, "methods": methods}


def speed(args: argparse.Namespace) -> Result:
    """Shared prefixes and the cache against the plain loop, in alternating rounds, on what a search really asks for."""
    loaded = load(args)
    tokens = build_calibration(loaded.tokenizer, loaded.domains[:1], 1, args.tokens, args.seed).tokens
    recorder = Recorder(ModelLosses(loaded.model, [tokens], model_key=loaded.key))
    search_pattern(recorder, loaded.layers, args.remove, args.method, args.evaluations, args.seed)
    batches = first_patterns(recorder.batches, args.asked)
    asked = sum(map(len, batches))
    shared_s: list[float] = []
    plain_s: list[float] = []
    for number in range(args.rounds):
        source = ModelLosses(loaded.model, [tokens], model_key=loaded.key)
        fitness = Fitness(source)
        arms: list[tuple[list[float], Callable[[list[Pattern]], list[float]]]] = [
            (shared_s, fitness.losses),
            (plain_s, lambda batch: plain_losses(loaded.model, tokens, batch)),
        ]
        found = [timed(arm, batches) for arm in (arms if number % 2 else arms[::-1])]  # who is first changes
        if found[0] != found[1]:
            raise EopcError("Shared and plain losses differ; that is a bug.")
        progress(f"round {number + 1} of {args.rounds}: {asked / shared_s[-1]:.2f} against {asked / plain_s[-1]:.2f}")
    ratios = [plain / shared for shared, plain in zip(shared_s, plain_s, strict=True)]
    result: Result = {"model": loaded.name, "method": args.method, "asked": asked, "unique": fitness.computed}
    result |= {"tokens": args.tokens, "dtype": args.dtype, "threads": torch.get_num_threads()}
    result |= {"shared_per_s": asked / statistics.median(shared_s), "plain_per_s": asked / statistics.median(plain_s)}
    result |= {"layers_run_share": source.work.run / source.work.asked, "ratios": ratios}
    result["ratio"] = statistics.median(ratios)
    show(
        ["", "evaluations/s"],
        [
            ["shared and cached", f"{result['shared_per_s']:.2f}"],
            ["plain loop", f"{result['plain_per_s']:.2f}"],
            ["ratio, median of rounds", f"{result['ratio']:.2f}"],
        ],
        args,
    )
    return result


def heldout(args: argparse.Namespace) -> Result:
    """Patterns of search and baselines, chosen on the same windows with the same evaluations, on text not seen."""
    loaded = load(args)
    unseen = build_calibration(loaded.tokenizer, loaded.domains, args.judges, args.window, 0, "heldout").domains
    judges = {name: Fitness(ModelLosses(loaded.model, [w], model_key=loaded.key)) for name, w in unseen}
    dense = Pattern(loaded.layers, False, ())
    rows: list[Result] = [judged("dense", 0, dense, 0, math.nan, judges)]
    for seed in range(args.seeds):
        windows = build_calibration(loaded.tokenizer, loaded.domains, args.windows, args.window, seed)
        fitness = Fitness(ModelLosses(loaded.model, race_stages(windows.domains), model_key=loaded.key))
        evaluations = args.evaluations
        for method in ("evolve", *args.also, "random", "sleb"):
            progress(f"seed {seed}: {method}")
            allowed = loaded.layers * args.remove if method == "sleb" else evaluations
            found = search_pattern(fitness, loaded.layers, args.remove, method, allowed, seed, args.journal)
            evaluations = found.evaluations if method == "evolve" else evaluations  # N of best-of-N
            rows.append(judged(method, seed, found.pattern, found.evaluations, found.loss, judges))
        single = search_pattern(fitness, loaded.layers, args.remove, "random", 1, seed + 1000, args.journal)
        rows.append(judged("one random", seed, single.pattern, 1, single.loss, judges))
        influence = block_influence(loaded.model, [windows.tokens])
        pattern = least_influential(Space(loaded.layers, args.remove), influence)
        rows.append(judged("shortgpt", seed, pattern, 0, fitness.losses([pattern])[0], judges))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    show(
        ["method", "evaluations", "searched", *judges, "mean"],
        [summary_row(m, rows, list(judges)) for m in methods],
        args,
    )
    setting = {"remove": args.remove, "dtype": args.dtype, "windows": args.windows, "judges": args.judges}
    return {"model": loaded.name, **setting, "rows": rows}


def judged(
    method: str, seed: int, pattern: Pattern, evaluations: int, searched: float, judges: dict[str, Fitness]
) -> Result:
    """One line of the held-out result; `searched` is the loss on the windows the pattern was chosen on."""
    losses = {name: judge.losses([pattern])[0] for name, judge in judges.items()}
    known = None if math.isnan(searched) else searched
    return {"method": method, "seed": seed, "removed": pattern.removed, "evaluations": evaluations} | {
        "searched": known,
        "heldout": losses,
    }


def summary_row(method: str, rows: Sequence[Result], domains: Sequence[str]) -> list[str]:
    """Mean over seeds, and half the range, per domain and over domains."""
    own = [row for row in rows if row["method"] == method]
    searched = [row["searched"] for row in own if row["searched"] is not None]
    columns = [[row["heldout"][name] for row in own] for name in domains]
    columns.append([statistics.mean(row["heldout"].values()) for row in own])
    evaluations = statistics.mean(row["evaluations"] for row in own)
    return [method, f"{evaluations:.0f}", spread(searched) if searched else "", *(spread(column) for column in columns)]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def race_stages(domains: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """The first window of every domain, then the others: few tokens sort children out."""
    first, rest = [torch.cat([w[i] for _, w in domains]) for i in (slice(0, 1), slice(1, None))]
    return [first, rest] if len(rest) else [first]


def reached(history: Sequence[tuple[int, float]], evaluations: int) -> float:
    """The best loss after so many evaluations; infinite before the first pattern of the right count."""
    return min((loss for count, loss in history if count <= evaluations), default=math.inf)


def first_patterns(batches: Sequence[list[Pattern]], count: int) -> list[list[Pattern]]:
    """The batches up to so many patterns, repeats included; the last one may be cut."""
    kept: list[list[Pattern]] = []
    for batch in batches:
        left = count - sum(map(len, kept))
        if left > 0:
            kept.append(batch[:left])
    return kept


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


class Recorder(Fitness):
    """Notes every batch of patterns that a search asks for."""

    def __init__(self, source: Losses) -> None:
        super().__init__(source)
        self.batches: list[list[Pattern]] = []

    def losses(self, patterns: Sequence[Pattern], stage: int = -1) -> list[float]:
        self.batches.append(list(patterns))
        return super().losses(patterns, stage)


class Watched:
    """A source that says on stderr how far it is."""

    def __init__(self, source: Losses) -> None:
        self.source, self.work = source, source.work
        self.keys, self.weights = source.keys, source.weights

    def score(self, patterns: Sequence[Pattern], stage: int) -> Iterator[tuple[int, float]]:
        start = time.perf_counter()
        for done, entry in enumerate(self.source.score(patterns, stage), start=1):
            if done % 50 == 0:
                rate = done / (time.perf_counter() - start)
                progress(
                    f"{done} of {len(patterns)}, {rate:.2f} per second, {(len(patterns) - done) / rate:.0f} s to go"
                )
            yield entry


def timed(arm: tuple[list[float], Callable[[list[Pattern]], list[float]]], batches: list[list[Pattern]]) -> list[float]:
    """Run all batches, note the seconds, return the losses."""
    seconds, evaluate = arm
    start = time.perf_counter()
    losses = [loss for batch in batches for loss in evaluate(batch)]
    seconds.append(time.perf_counter() - start)
    return losses


def load(args: argparse.Namespace) -> Loaded:
    """The model in the wanted dtype, its tokenizer, and the texts."""
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    dense = build_model(checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint.tensor_names})
    model = cast_model(dense, {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype])
    domains = load_calib(args.text) if args.text else default_domains()
    return Loaded(checkpoint.name, model, checkpoint.fingerprint, checkpoint.tokenizer(), domains)


def names(pattern: Pattern) -> str:
    return " ".join(str(unit) for unit in pattern.removed)


def progress(line: str) -> None:
    sys.stderr.write(line + "\n")


def show(head: Sequence[str], rows: Sequence[Sequence[object]], args: argparse.Namespace) -> None:
    """A table with aligned columns, unless JSON was asked for."""
    if args.json:
        return
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (table, replay, speed, heldout):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
        if function is not replay:
            command.add_argument("--model", help="folder, .gguf or hub id (default: the small default model)")
            command.add_argument("--text", action="append", default=[], metavar="NAME=FILE[:FIELD]")
            command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
            command.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
            command.add_argument("--remove", type=int, default=3 if function is table else 6, help="layers")
        if function in (table, speed):
            command.add_argument("--tokens", type=int, default=128, help="one window of so many, of the first text")
            command.add_argument("--seed", type=int, default=0)
        if function in (table, heldout):
            command.add_argument(
                "--journal", type=Path, help="losses are kept here, and a run that was stopped goes on"
            )
    known = commands.choices
    known["table"].add_argument("--out", type=Path, required=True)
    known["table"].add_argument("--limit", type=int, help="only the first patterns, to see how long it would take")
    known["replay"].add_argument("table", type=Path)
    known["replay"].add_argument("--seeds", type=int, default=20)
    known["replay"].add_argument("--evaluations", type=int, default=406)
    known["speed"].add_argument("--method", choices=list(SEARCHERS), default="evolve")
    known["speed"].add_argument("--evaluations", type=int, default=96)
    known["speed"].add_argument("--asked", type=int, default=400, help="time the first so many, repeats included")
    known["speed"].add_argument("--rounds", type=int, default=3)
    known["heldout"].add_argument("--evaluations", type=int, default=400)
    known["heldout"].add_argument("--seeds", type=int, default=3)
    known["heldout"].add_argument("--windows", type=int, default=2, help="per text")
    known["heldout"].add_argument("--window", type=int, default=256, help="tokens")
    known["heldout"].add_argument("--judges", type=int, default=8, help="windows per text that patterns are judged on")
    known["heldout"].add_argument("--also", action="append", choices=["epps"], default=[], help="searched as well")
    return parser.parse_args()


def main() -> int:
    """Run a subcommand; a mistake of the user is one sentence."""
    args = parse()
    try:
        result = args.function(args)
    except EopcError as error:
        progress(f"Error: {error}")
        return 1
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
