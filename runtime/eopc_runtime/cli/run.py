"""`eopc run`: one sequence within a joule budget."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.meters import meter_options
from eopc_runtime.cli.output import print_json
from eopc_runtime.cli.runners import THREADS, key_option, runner_option, show_notes

if TYPE_CHECKING:
    from eopc_runtime.generation import Result
    from eopc_runtime.sampling import SamplingParams


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--prompt", required=True, help="What to answer; with --raw, the text to continue.")
@click.option("--system", help="System message, for models with a chat template.")
@click.option(
    "--budget",
    metavar="ENERGY",
    help="Most energy for the sequence, for example 10J or 500mJ. [default: no limit]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Most tokens to generate.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option(
    "--temperature",
    type=float,
    help="0 always takes the most likely token. [default: 0; 1 when --top-k, --top-p or --min-p is given]",
)
@click.option("--top-k", type=int, help="Sample from this many most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the fewest tokens that hold this share of the probability.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the best token's probability.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1 makes repeated tokens rarer.",
)
@click.option("--seed", type=int, help="Makes sampling repeatable. [default: a new one every time]")
@click.option("--stop", multiple=True, help="End at this text, which is not shown; may be given again.")
@click.option(
    "--tier",
    metavar="TIER",
    help="Start on this tier, for example t0. [default: the best one the budget affords]",
)
@click.option("--strict", is_flag=True, help="Refuse a budget that the prices cannot promise, instead of warning.")
@click.option(
    "--safety",
    metavar="FACTOR",
    type=click.FloatRange(min=1.0),
    default=1.0,
    help="Raise every price by this factor, for prices that were not measured. [default: 1]",
)
@meter_options(
    None,
    "none",
    text="What corrects the account while the sequence runs. [default: with a budget the power meter that works here]",
)
@click.option(
    "--log", type=click.Path(path_type=Path), metavar="FILE", help="Append times and joules to it, for `eopc validate`."
)
@runner_option
@key_option
@click.option("--threads", type=THREADS, help="CPU threads. [default: onnxruntime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def run(
    bundle: str,
    prompt: str,
    system: str | None,
    budget: str | None,
    max_new_tokens: int,
    raw: bool,
    stop: tuple[str, ...],
    tier: str | None,
    strict: bool,
    safety: float,
    meter: str | None,
    proxy_w: float | None,
    log: Path | None,
    runner: str,
    key: Path | None,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with BUNDLE, and never spend more energy than --budget.

    The text goes to stdout, a summary with the energy to stderr.
    """
    from eopc_runtime.calibration.identity import fingerprint
    from eopc_runtime.cli.meters import meter_of_run, prices_here
    from eopc_runtime.errors import UsageError
    from eopc_runtime.sequence_record import SequenceRecord, append_record, appending
    from eopc_runtime.session import Session
    from eopc_runtime.units import parse_energy

    if raw and system is not None:
        raise UsageError("--system needs the chat template, which --raw leaves out. Drop one of the two.")
    params = _sampling_params(**sampling)
    budget_j = None if budget is None else parse_energy(budget)
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(bundle, threads=threads, runner=runner, key=key))
        chosen = session.runner
        on_gpu = chosen is not None and chosen.on_gpu
        opened = meter_of_run(session.bundle, meter, budget_j is not None, proxy_w, on_gpu=on_gpu)
        if opened is not None:
            stack.enter_context(opened)
        rails = None if opened is None else opened.sensor.rails
        table, warning = prices_here(session.bundle, threads, rails, strict, chosen)
        session.use(meter=opened, table=table)
        messages = None
        if system is not None:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        generation = session.stream(
            None if messages else prompt,
            messages=messages,
            budget=budget_j,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=params,
            raw=raw,
            tier=tier,
            strict=strict,
            safety=safety,
        )
        if log is not None:
            with appending(log):
                pass
        for event in generation:
            if not as_json:
                click.echo(event.text, nl=False)
        result = generation.result
        if log is not None:
            append_record(log, SequenceRecord.of(generation, table, fingerprint(session.bundle.manifest)))
        notes = session.notes
    show_notes(notes)
    if warning:
        click.echo(f"Warning: {warning}", err=True)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo()
        for warning in result.warnings:
            click.echo(f"Warning: {warning}", err=True)
        click.echo(summary(result), err=True)


def summary(result: Result) -> str:
    """Return the line on stderr: plan, joules of budget and their source, tokens, speed, reason to end."""
    from eopc_runtime.units import format_energy

    tiers = result.plan if len(result.tiers_used) < 3 and not _moved(result) else " then ".join(result.tiers_used)
    of_budget = "" if result.budget_j is None else f" of {format_energy(result.budget_j)}"
    kept = ", kept by the meter" if result.enforced_by == "meter" else ""
    speed = "" if result.decode_tokens_per_s is None else f", {result.decode_tokens_per_s:.1f} tokens/s"
    return (
        f"[{tiers}: {format_energy(result.energy_j)}{of_budget} ({result.energy_source}){kept}, "
        f"{result.prompt_tokens} + {result.completion_tokens} tokens{speed}, ended by {result.finish_reason}]"
    )


def _moved(result: Result) -> bool:
    """True when the sequence left its plan and moved further down."""
    return result.tiers_used[-1] not in result.plan.split(">")


def _sampling_params(temperature: float | None, **rest: Any) -> SamplingParams:
    """Return the parameters; a filter without a temperature asks for sampling, so it gets temperature 1."""
    from eopc_runtime.sampling import SamplingParams

    if temperature is None:
        temperature = 1.0 if any(rest[name] is not None for name in ("top_k", "top_p", "min_p")) else 0.0
    return SamplingParams(temperature=temperature, **rest)
