"""`eopc build`: parse the command line into BuildArgs, run, and print a table a person wants to read."""

from __future__ import annotations

import gc
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from eopc_compiler.cli.options import calib_select_option
from eopc_runtime.cli.main import INTERRUPTED
from eopc_runtime.cli.output import command_progress, format_bytes, print_json, print_table
from eopc_runtime.errors import UsageError
from eopc_runtime.profiles import load_profile
from eopc_runtime.units import format_energy, parse_budgets

if TYPE_CHECKING:
    from eopc_compiler.calibration import CalibSelect

PRECISIONS = ("auto", "fp32", "fp16", "fp8", "int8", "int4")


@click.command(name="build")
@click.argument("model", required=False)
@click.option("--device", default="orin", show_default=True, help="Device profile; see eopc devices.")
@click.option("--budgets", default="5,10,20J", show_default=True, help="Joules per sequence, one tier each: 5,10,20J.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle. [default: NAME.eopc]")
@click.option("--workload", default="128:140", show_default=True, help="IN:OUT tokens the budgets refer to.")
@click.option(
    "--calib",
    multiple=True,
    metavar="NAME=FILE",
    help="More calibration text, repeatable: NAME=FILE[:FIELD][@WEIGHT], a .txt or .jsonl, or NAME=hf:DATASET[:FIELD]"
    "[@WEIGHT] from the Hugging Face Hub. Text, code, arithmetic and dialogue are built in, each with weight 1; a NAME "
    "of theirs replaces them.",
)
@click.option(
    "--own-text",
    is_flag=True,
    help="Let the model write a part of the calibration text itself, where tiers are pruned.",
)
@calib_select_option
@click.option(
    "--mask", "masks", multiple=True, type=click.Path(path_type=Path), help="Given masks, largest first; repeatable."
)
@click.option("--precision", default="auto", show_default=True, help="auto, or a list of int4, int8, fp8, fp16, fp32.")
@click.option("--max-added-loss", default=0.02, show_default=True, help="Nats per token a precision may add.")
@click.option("--dialect", type=click.Choice(["primitive", "native"]), help="ONNX dialect. [default: the device's]")
@click.option("--context", default=2048, show_default=True, help="Largest prompt plus answer, tokens.")
@click.option(
    "--search-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds to search for better tiers than the heuristic's, all tiers together.",
)
@click.option(
    "--recover",
    "recover_minutes",
    default=0.0,
    metavar="MINUTES",
    type=click.FloatRange(min=0),
    help="Distil the weights that all tiers share from the dense model for that long.",
)
@click.option(
    "--proxy",
    type=click.Choice(["ends", "all", "none"]),
    default="ends",
    show_default=True,
    help="Tiers that TensorRT-RTX, where installed, compiles to prove that their graphs build: the largest and the "
    "smallest, all, or none.",
)
@click.option(
    "--prefill-depth",
    default="auto",
    show_default=True,
    metavar="auto|all|LAYERS",
    help="Layers that prompts run through on one tier of the ladder, the rest only in the answer: where that wins, "
    "never, or so many.",
)
@click.option(
    "--prefill-tokens",
    default="auto",
    show_default=True,
    metavar="auto|none|SHARE",
    help="Share of a prompt's tokens, chosen anew in every layer, that runs through the layers that others skip: where "
    "that wins (and no LAYERS are given), none, or so many, in sixteenths.",
)
@click.option(
    "--selectors",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Tiers that choose a part of the FFN channels by the prompt: where that wins (in fp32 and fp16), at every "
    "budget below the whole model's price, or never.",
)
@click.option(
    "--train-selectors",
    "train_selectors_minutes",
    default=0.0,
    metavar="MINUTES",
    type=click.FloatRange(min=0),
    help="Train what ranks the channels of every such tier for that long.",
)
@click.option(
    "--independent", is_flag=True, help="Repaired matrices of every tier's own, without the limit on shared bytes."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the calibration draw and of the search.")
@click.option("--dry-run", is_flag=True, help="Decide only: write plan.json to the output folder.")
@click.option("--no-resume", is_flag=True, help="Start over instead of reusing finished stages.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    model: str | None,
    device: str,
    budgets: str,
    output: Path | None,
    workload: str,
    calib: tuple[str, ...],
    own_text: bool,
    calib_select: CalibSelect,
    masks: tuple[Path, ...],
    precision: str,
    max_added_loss: float,
    dialect: str | None,
    context: int,
    search_seconds: float,
    recover_minutes: float,
    proxy: str,
    prefill_depth: str,
    prefill_tokens: str,
    selectors: Literal["auto", "on", "off"],
    train_selectors_minutes: float,
    independent: bool,
    seed: int,
    dry_run: bool,
    no_resume: bool,
    as_json: bool,
) -> None:
    """Compile MODEL into a ladder of tiers for a device, one per joule budget.

    MODEL is a Hugging Face folder, a hub id, or a .gguf file; left out, it is SmolLM2-135M-Instruct.
    """
    budgets_j = parse_budgets(budgets)
    work, precisions = parse_workload(workload), parse_precision(precision)
    from eopc_compiler.build import build as run_build
    from eopc_compiler.state import BuildArgs, Workload

    args = BuildArgs(
        model=model,
        device=device,
        budgets_j=budgets_j,
        output=output or Path(f"{default_name(model)}-{device}.eopc"),
        workload=Workload(*work),
        calib=calib,
        own_text=own_text,
        calib_select=calib_select,
        masks=masks,
        precision=precisions,
        dialect=dialect,
        context=context,
        search_seconds=search_seconds,
        recover_minutes=recover_minutes,
        proxy=proxy,
        prefill_depth=parse_prefill_depth(prefill_depth),
        prefill_tokens=parse_prefill_tokens(prefill_tokens),
        selectors=selectors,
        train_selectors_minutes=train_selectors_minutes,
        independent=independent,
        seed=seed,
        dry_run=dry_run,
        resume=not no_resume,
        max_added_loss=max_added_loss,
    )
    progress = command_progress()
    progress.done(
        f"eopc build: {model or 'SmolLM2-135M-Instruct (default model)'} for {device}, budgets "
        f"{', '.join(format_energy(b) for b in budgets_j)} at {args.workload} tokens, precision {precision} "
        f"-> {args.output}"
    )
    gc.freeze()  # the libraries are loaded and stay: collections between passes need not look at their many objects
    try:
        started = time.monotonic()
        result = run_build(
            args, lambda text: progress.done(f"[{time.monotonic() - started:5.1f} s] {text}"), progress.update
        )
    except KeyboardInterrupt:
        progress.done("Interrupted; run the same command to resume.")
        raise click.exceptions.Exit(INTERRUPTED) from None
    content = result.to_json()
    if as_json:
        print_json(content)
        return
    rows = [
        (
            tier["tier"],
            "-" if tier["budget_j"] is None else format_energy(tier["budget_j"]),
            f"{format_energy(tier['energy_j'])} {tier['energy_source']}",
            "-" if tier["perplexity"] is None else f"{tier['perplexity']:.2f}",
            f"{tier['params'] / 1e6:.1f} M" if "params" in tier else "-",
            tier["note"],
        )
        for tier in content["tiers"]
    ]
    progress.done("")
    print_table(("tier", "budget", f"energy at {args.workload}", "perplexity", "params", "note"), rows)
    dense = next((t["perplexity_dense"] for t in content["tiers"] if t["perplexity_dense"]), None)
    if dense:
        click.echo(f"perplexity of the model in PyTorch fp32, same held-out text: {dense:.2f}")
    click.echo(
        f"{content['precision']}, {content['dialect']} dialect; {content['elapsed_s']:.0f} s, "
        f"peak memory {format_bytes(content['peak_rss_bytes'])}"
    )
    for line in next_steps(args.output, device, dry_run):
        click.echo(line)


def next_steps(output: Path, device: str, dry_run: bool) -> list[str]:
    """What to type next."""
    if dry_run:
        return [f"plan written to {output / 'plan.json'}; without --dry-run the same command builds it"]
    lines = [f'try it here: eopc run {output} --prompt "What is the capital of France?" --budget 10J']
    if engine := load_profile(device).engine:
        where = "" if engine.compiler == "tensorrt_rtx" else "on the device, "
        lines.append(f"engines: {where}eopc engine {output}")
    if device != "cpu":
        lines.append("joules are prior estimates for the device; the CPU runs the same graphs, slower")
    return lines


def default_name(model: str | None) -> str:
    """A folder name from the model's."""
    if model is None:
        return "SmolLM2-135M-Instruct"
    path = Path(model).expanduser()
    return (path.resolve() if path.is_dir() else path).name.removesuffix(".gguf")  # `.` has a name, too


def parse_workload(text: str) -> tuple[int, int]:
    """IN:OUT, both at least 1.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match or not all(int(g) for g in match.groups()):
        raise UsageError(f"workload {text!r} is not IN:OUT tokens. Write for example --workload 128:140.")
    return int(match[1]), int(match[2])


def parse_prefill_depth(text: str) -> int | Literal["auto", "all"]:
    """auto, all, or a number of layers.

    Raises:
        UsageError: it is none of them.
    """
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise UsageError(f'--prefill-depth "{text}" is not auto, all or a number of layers, for example 20.')
    return int(text)


def parse_prefill_tokens(text: str) -> float | Literal["auto", "none"]:
    """auto, none, or a share.

    Raises:
        UsageError: it is none of them.
    """
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f'--prefill-tokens "{text}" is not auto, none or a share, for example 0.5.') from error


def parse_precision(text: str) -> tuple[str, ...]:
    """A comma-separated list of known precisions.

    Raises:
        UsageError: an unknown name, or none.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        raise UsageError(f"precision {text!r} is not known. Choose from {', '.join(PRECISIONS)}.")
    return names
