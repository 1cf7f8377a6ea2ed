"""`eopc bench`: speed and memory of the tiers, through the runtime that ships."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.machine import machine_info, peak_rss_bytes, usable_cores, versions
from eopc_runtime.cli.meters import runner_name
from eopc_runtime.cli.output import Progress, format_bytes, print_json, print_table
from eopc_runtime.cli.runners import THREADS, runner_option, show_notes

if TYPE_CHECKING:
    from eopc_runtime.session import Session


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--tier", metavar="TIER", help="Only this tier. [default: all]")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens to prefill.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to generate.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed runs after one to warm up.",
)
@runner_option
@click.option("--threads", type=THREADS, help="CPU threads. [default: onnxruntime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    bundle: str,
    tier: str | None,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    runner: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed of BUNDLE's tiers at batch 1, medians over the runs.

    Every tier runs in a process of its own, so that its peak memory is its own.
    """
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.errors import UsageError

    opened = Bundle.open(bundle, verify=tier is None)  # once is enough: the children are given a tier
    manifest = opened.manifest
    if prompt_tokens + new_tokens > manifest.context:
        raise UsageError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit this bundle's context of {manifest.context}; "
            "lower --prompt-tokens or --new-tokens."
        )
    names = [info.tier for info in manifest.tiers] if tier is None else [opened.tier(tier).tier]
    shared = (bundle, prompt_tokens, new_tokens, runs, threads, runner)
    rows = [_bench_here(names[0], *shared)] if len(names) == 1 else [_bench_child(n, *shared) for n in names]
    if not as_json:
        click.echo(
            f"{manifest.model.name} {manifest.precision} for {manifest.device}: "
            f"{prompt_tokens} + {new_tokens} tokens, median of {runs}"
        )
        click.echo(f"{machine_info()['cpu']}; {rows[0]['runner']}; {_shown_versions()}")
        print_table(
            ("tier", "prefill tokens/s", "decode tokens/s", "first token", "peak memory"),
            [_shown(r) for r in rows],
        )
        return
    print_json(
        {
            "bundle": bundle,
            "model": manifest.model.name,
            "precision": manifest.precision,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "runs": runs,
            "tiers": rows,
            "machine": {**machine_info(), "threads": threads or usable_cores()},
            "versions": versions(),
        }
    )


def bench_tier(
    session: Session,
    name: str,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Return {tier, prefill_tokens_per_s, decode_tokens_per_s, ttft_s, peak_rss_bytes}, speeds as medians."""
    import numpy as np

    vocab = session.bundle.manifest.model.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocab, size=prompt_tokens).tolist()
    first, rest = [], []
    with Progress() as progress:
        for turn in range(runs + 1):
            progress.update(f"bench {name}: run {turn} of {runs}")
            start = clock()
            cache, logits = session.prefill(prompt, name)
            token = int(logits.argmax())
            middle = clock()
            for _ in range(new_tokens - 1):
                cache, logits = session.decode(cache, token)
                token = int(logits.argmax())
            end = clock()
            if turn > 0:  # the first run loads the tier and fills caches
                first.append(middle - start)
                rest.append(end - middle)
        row = {
            "tier": name,
            "prefill_tokens_per_s": prompt_tokens / statistics.median(first),
            "decode_tokens_per_s": (new_tokens - 1) / statistics.median(rest),
            "ttft_s": statistics.median(first),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        progress.done(f"bench {name}: decode {row['decode_tokens_per_s']:.1f} tokens/s")
    return row


def _bench_here(
    name: str, bundle: str, prompt_tokens: int, new_tokens: int, runs: int, threads: int | None, runner: str
) -> dict[str, Any]:
    from eopc_runtime.session import Session

    with Session.open(bundle, threads=threads, runner=runner, verify=False) as session:
        row = bench_tier(session, name, prompt_tokens, new_tokens, runs)
        row["runner"] = runner_name(threads, session.runner)
        show_notes(session.notes)
    return row


def _bench_child(
    name: str, bundle: str, prompt_tokens: int, new_tokens: int, runs: int, threads: int | None, runner: str
) -> dict[str, Any]:
    """Run `eopc bench` for one tier in a fresh process; its messages appear on our stderr."""
    command = [sys.executable, "-m", "eopc_runtime.cli", "bench", bundle, "--json", "--tier", name]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens), "--runs", str(runs)]
    command += ["--runner", runner]
    command += ["--threads", str(threads)] if threads else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode < 0:
        from eopc_runtime.errors import DeviceError

        raise DeviceError(
            f"measuring {name} was ended by signal {-done.returncode}; if memory ran out, try a lower tier "
            "with --tier or fewer --prompt-tokens."
        )
    if done.returncode:
        sys.exit(done.returncode)  # the child has said why
    row: dict[str, Any] = json.loads(done.stdout)["tiers"][0]
    return row


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["tier"],
        f"{row['prefill_tokens_per_s']:.1f}",
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['ttft_s'] * 1e3:.1f} ms",
        format_bytes(row["peak_rss_bytes"]),
    )


def _shown_versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items() if version)
