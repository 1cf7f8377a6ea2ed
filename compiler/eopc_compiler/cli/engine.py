"""`eopc engine`: parse the command line into EngineArgs, build, and say what was built, and what it is good for.

It runs on the board, where there is no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import command_progress, format_bytes, print_json, print_table

if TYPE_CHECKING:
    from eopc_compiler.board.engine_set import EngineSet
    from eopc_runtime.engines import EngineRecord


@click.command(name="engine")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", help="Device profile; see eopc devices. [default: the bundle's]")
@click.option(
    "--proxy",
    is_flag=True,
    help="Compile for the nearest architecture that TensorRT-RTX knows, without a GPU; the plans are not kept.",
)
@click.option("--tier", "tiers", multiple=True, help="Only this tier; repeatable. [default: all]")
@click.option(
    "--cache-len", type=click.IntRange(min=2), help="Slots of every KV cache. [default: the bundle's context]"
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    help="Tokens of one prefill step; longer prompts run in several. [default: 512, or the workload's prompt]",
)
@click.option(
    "--workspace-mib", type=click.IntRange(min=1), help="Limit of a layer's scratch memory. [default: TensorRT's]"
)
@click.option("--rebuild", is_flag=True, help="Build engines again that are there already.")
@click.option("--no-memory-check", is_flag=True, help="Build although the memory does not seem to suffice.")
@click.option(
    "--check", is_flag=True, help="Then compare the engines with ONNX Runtime on this machine's CPU, token by token."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def engine(
    bundle: Path,
    device: str | None,
    proxy: bool,
    tiers: tuple[str, ...],
    cache_len: int | None,
    max_prompt_tokens: int | None,
    workspace_mib: int | None,
    rebuild: bool,
    no_memory_check: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Compile the tiers of BUNDLE into TensorRT engines, in BUNDLE/engines.

    Engines for rtx-* are built ahead of time, on any machine; those for orin, thor and h100 on the device itself. A
    plan serves prefill and decode. No torch is needed.
    """
    from eopc_compiler.board.engine_set import EngineArgs, build_engines
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.engine_check import check_engines, require_passed
    from eopc_runtime.errors import UsageError

    if check and proxy:
        raise UsageError("--check runs the engines, and --proxy keeps none. Drop one of the two.")
    args = EngineArgs(
        bundle=bundle,
        device=device,
        proxy=proxy,
        tiers=tiers,
        cache_len=cache_len,
        max_prompt_tokens=max_prompt_tokens,
        workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
        rebuild=rebuild,
        check_memory=not no_memory_check,
    )
    progress, started = command_progress(), time.monotonic()
    result = build_engines(
        args, lambda text: progress.done(f"[{time.monotonic() - started:5.1f} s] {text}"), progress.update
    )
    if not as_json:
        progress.done("")
        print_engines(result)
    if check:
        opened = Bundle.open(bundle, verify=False)
        result = replace(result, records=check_engines(opened, result.target.key, tiers, progress.update))
    if as_json:
        print_json(describe(result))
    elif check:
        progress.done("")
        print_checks(result.records)
    if check:
        require_passed(result.records, bundle)
        progress.done(f"what they cost on this device: eopc calibrate {bundle}")


def describe(result: EngineSet) -> dict[str, Any]:
    """The JSON object of `eopc engine --json`."""
    target = result.target
    return {
        "device": target.device,
        "key": target.key,
        "compiler": target.compiler,
        "version": target.version,
        "proxy": target.proxy,
        "settings": asdict(result.settings),
        "engines": [
            {**asdict(record), "target": record.target, "reused": (record.tier, record.phase) in result.reused}
            for record in result.records
        ],
    }


def print_checks(records: Iterable[EngineRecord]) -> None:
    """A line per tier that was compared: how near it is to its graph."""
    for tier, check in {record.tier: record.check for record in records}.items():
        if check is not None:
            click.echo(
                f"{tier}: cosine of the logits at least {check.cosine_min:.4f}, most likely token the same in "
                f"{check.top1_agreement:.1%} of {check.tokens} positions"
            )


def print_engines(result: EngineSet) -> None:
    """A table, and what the engines are good for."""
    target = result.target
    print_table(
        ("engine", "target", "layers", "attention", "size", "seconds"),
        [
            (
                record.file or f"{record.tier} {record.phase} (proxy)",
                record.target,
                str(record.layers),
                f"{record.attention_layers}{' + plain' if record.decomposed_attention else ''}",
                format_bytes(record.bytes),
                f"{record.seconds:.0f}",
            )
            for record in result.records
        ],
    )
    if target.proxy:
        click.echo(
            f"proxy: the graphs build for SM{target.compute_capability}, in place of {target.device}. That says "
            f"nothing of speed or joules, and no plan was kept."
        )
    else:
        click.echo(f"written to engines/{target.key}, for {target.title} alone")
