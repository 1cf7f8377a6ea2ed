"""`eopc eval`: perplexity of the tiers, computed by the runtime that ships."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import Progress, print_json, print_table
from eopc_runtime.cli.runners import THREADS, runner_option, show_notes

if TYPE_CHECKING:
    from eopc_runtime.runners.base import Logits, TierRunner
    from eopc_runtime.session import Session

# Logits of a whole window are [tokens, vocab] fp32, 100 MB for 512 tokens of a 50k vocabulary; longer windows
# run in parts of this size, which a causal model cannot tell.
_PART = 512


@click.command("eval")
@click.argument("bundle", type=click.Path())
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="UTF-8 text to predict.")
@click.option("--tier", metavar="TIER", help="Only this tier. [default: all]")
@click.option("--ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only this many tokens of the text.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="So many tokens of every window run as its prompt and are not scored. Without, nothing is a prompt, and a "
    "tier that prunes its prefill scores as t0.",
)
@runner_option
@click.option("--threads", type=THREADS, help="CPU threads. [default: onnxruntime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    bundle: str,
    text: str,
    tier: str | None,
    ctx: int,
    max_tokens: int | None,
    prompt_tokens: int | None,
    runner: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of BUNDLE's tiers on a text.

    The text is cut into windows of --ctx tokens that do not overlap; a tail shorter than a window is dropped
    unless the text is shorter than one window. Perplexity is exp(summed negative log-likelihood / predicted
    tokens).
    """
    from eopc_runtime.errors import UsageError
    from eopc_runtime.session import Session

    with Session.open(bundle, threads=threads, runner=runner) as session:
        if ctx > session.context:
            raise UsageError(f"--ctx {ctx} is larger than this bundle's context of {session.context}; lower it.")
        names = session.tiers if tier is None else (session.bundle.tier(tier).tier,)
        windows = cut_windows(session.tokenizer.encode(_read(Path(text)))[:max_tokens], ctx)
        if prompt_tokens is not None and prompt_tokens >= len(windows[0]):
            raise UsageError(
                f"--prompt-tokens {prompt_tokens} leaves nothing to score of windows of {len(windows[0])} tokens. "
                "Lower it, or raise --ctx."
            )
        progress = Progress()
        rows = [evaluate_tier(session, name, windows, progress, prompt_tokens or 0) for name in names]
        show_notes(session.notes)
    if as_json:
        print_json({"bundle": bundle, "text": text, "ctx": ctx, "prompt_tokens": prompt_tokens, "tiers": rows})
    else:
        print_table(
            ("tier", "perplexity", "tokens"),
            [(r["tier"], f"{r['perplexity']:.4f}", str(r["tokens"])) for r in rows],
        )


def evaluate_tier(
    session: Session, name: str, windows: Sequence[Sequence[int]], progress: Progress, prompt: int = 0
) -> dict[str, Any]:
    """Return {tier, perplexity, tokens} of one tier over all windows, behind prompts of so many tokens."""
    runner = session.pool.get(name)
    total, tokens = 0.0, 0
    for done, window in enumerate(windows):
        progress.update(f"eval {name}: window {done + 1} of {len(windows)}")
        total += window_nll(runner, window, prompt=prompt)
        tokens += len(window) - max(prompt, 1)
    mean = total / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp overflows at 709
    progress.done(f"eval {name}: perplexity {perplexity:.4f} over {tokens} tokens")
    return {"tier": name, "perplexity": perplexity, "tokens": tokens}


def cut_windows(ids: Sequence[int], ctx: int) -> list[list[int]]:
    """Return windows of ctx ids, or the whole text when it is shorter; PromptError below two tokens."""
    from eopc_runtime.errors import PromptError

    if len(ids) < 2:
        raise PromptError(f"the text has {len(ids)} token(s); perplexity needs at least 2. Give a longer text.")
    if len(ids) < ctx:
        return [list(ids)]
    return [list(ids[i : i + ctx]) for i in range(0, len(ids) - ctx + 1, ctx)]


def window_nll(runner: TierRunner, window: Sequence[int], part: int = _PART, prompt: int = 0) -> float:
    """Return the sum of -log p(token | window before it) in nats, over all tokens but the first.

    With a `prompt` of so many tokens, which run as one, over the tokens behind it.
    """
    cache = runner.new_cache()
    total = 0.0
    if prompt:
        total += _nll(runner.prefill(cache, window[:prompt]), window[prompt : prompt + 1])
    for start in range(prompt, len(window) - 1, part):
        fed = window[start : min(start + part, len(window) - 1)]
        total += _nll(runner.forward(cache, fed, logits="all"), window[start + 1 : start + 1 + len(fed)])
    return total


def _nll(logits: Logits, targets: Sequence[int]) -> float:
    """Return the summed negative log-likelihood of targets [n] under logits [n, vocab]."""
    import numpy as np

    top = logits.max(axis=1, keepdims=True)
    # fp32 exp, float64 sum: the error stays below 1e-6 nats without a float64 copy of the logits
    norm = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    return float((norm - logits[np.arange(len(targets)), np.asarray(targets)]).sum())


def _read(path: Path) -> str:
    from eopc_runtime.errors import UsageError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
