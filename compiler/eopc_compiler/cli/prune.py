"""`eopc prune`: parse the command line into PruneArgs, run, and say what was written and who can read it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from eopc_compiler.cli.options import calib_select_option
from eopc_runtime.cli.output import command_progress, print_json, print_table


@click.command(name="prune")
@click.argument("model", required=False)
@click.option("--ratio", type=float, required=True, help="Share of the units' parameters to remove, 0 <= ratio < 1.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write, new or empty.")
@click.option(
    "--method",
    default="iterative",
    show_default=True,
    metavar="NAME",
    help="iterative, obs, wifv, flap, wanda-sp, magnitude, random; whole layers: evop, shortgpt, sleb.",
)
@click.option(
    "--units",
    type=click.Choice(["ffn", "all"]),
    default="all",
    show_default=True,
    help="FFN channels only, or KV groups as well.",
)
@click.option(
    "--sub-blocks",
    is_flag=True,
    help="evop and sleb: leave out attentions and as many FFNs, of any layers, in place of whole layers.",
)
@click.option("--uniform", is_flag=True, help="The same widths in every layer, for stock from_pretrained.")
@click.option("--align", type=click.IntRange(min=1), help="FFN widths are multiples of it. [default: 32, or 64]")
@click.option("--calib", multiple=True, metavar="NAME=FILE", help="More calibration text, .txt or .jsonl; repeatable.")
@click.option("--only-calib", is_flag=True, help="Leave the built-in calibration text out.")
@calib_select_option
@click.option(
    "--calibration-tokens", type=click.IntRange(min=2), default=16384, show_default=True, help="Tokens per domain."
)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of iterative methods.")
@click.option(
    "--recover",
    "recover_minutes",
    type=float,
    default=0.0,
    metavar="MINUTES",
    help="Then distil from the dense model for that long.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the calibration draw, and of random choices.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the tensors in the file.",
)
@click.option("--text", multiple=True, metavar="NAME=FILE", help="Measure perplexity on this text; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune(model: str | None, as_json: bool, **options: Any) -> None:
    """Prune MODEL to a smaller checkpoint for any tool that reads Hugging Face folders.

    MODEL is a Hugging Face folder, a hub id, or a .gguf file; left out, it is SmolLM2-135M-Instruct. Perplexity is
    measured on the first 24 windows of 512 tokens, before and after.
    """
    from eopc_compiler.prune import PruneArgs
    from eopc_compiler.prune import prune as run_prune

    args = PruneArgs(model=model, **options)
    progress, started = command_progress(), time.monotonic()
    progress.done(
        f"eopc prune: {model or 'SmolLM2-135M-Instruct (default model)'}, {args.method}, ratio {args.ratio:g} of "
        f"{'the FFN' if args.units == 'ffn' else 'KV groups and FFN'} -> {args.output}"
    )
    result = run_prune(
        args, lambda text: progress.done(f"[{time.monotonic() - started:5.1f} s] {text}"), progress.update
    )
    content = result.to_json()
    if as_json:
        print_json(content)
        return
    progress.done("")
    print_report(content)


def print_report(content: dict[str, Any]) -> None:
    """Sizes, perplexities, and which loaders read the folder."""
    rows: list[tuple[str, ...]] = [
        ("parameters", f"{content['params_dense'] / 1e6:.2f} M", f"{content['params'] / 1e6:.2f} M")
    ]
    for name, values in content["perplexity"].items():
        cells = ["-" if values[key] is None else f"{values[key]:.2f}" for key in ("dense", "pruned")]
        rows.append((f"perplexity, {name}", *cells))
    print_table(("", "dense", "pruned"), rows)
    click.echo(
        f"removed: {content['ratio_units']:.1%} of the units' parameters ({content['ratio']:.1%} asked for), "
        f"{content['ratio_blocks']:.1%} of the layers', {content['ratio_params']:.1%} of all"
    )
    click.echo(f"{content['method']} wrote {content['output']}, {content['dtype']}; {content['elapsed_s']:.0f} s")
    if content["stock"]:
        click.echo("stock transformers loads it with from_pretrained, eopc as MODEL")
    else:
        click.echo(
            "layers differ in width: eopc reads it, stock transformers does not; --uniform writes one that it loads"
        )
