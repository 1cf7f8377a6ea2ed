"""`eopc eval`: perplexity, divergence and multiple-choice accuracy of the tiers, by the runtime that ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eopc_runtime.cli.output import Progress, command_progress, print_json, print_table
from eopc_runtime.cli.runners import THREADS, runner_option, show_notes

if TYPE_CHECKING:
    from eopc_runtime.evaluation.choices import TaskScore
    from eopc_runtime.evaluation.tasks import Task
    from eopc_runtime.evaluation.texts import TextScore
    from eopc_runtime.session import Session

Scores = Mapping[str, Mapping[str, "TextScore"]]  # by tier, then by text
Answers = Mapping[str, Mapping[str, "TaskScore"]]  # by tier, then by task


@click.command("eval")
@click.argument("bundle", type=click.Path())
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME=]FILE",
    help="UTF-8 text to predict; may be given again, each a domain of its own.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE[,LABELS]",
    help="Multiple-choice questions to answer, one JSON object per line; NAME is piqa, arc_easy or hellaswag. May be "
    "given again.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of every task.")
@click.option("--tier", metavar="TIER", help="Only this tier. [default: all]")
@click.option("--ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only this many tokens of every text.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="So many tokens of every window run as its prompt and are not scored. Without, nothing is a prompt, and a "
    "tier that prunes its prefill scores as t0.",
)
@click.option(
    "--kl/--no-kl",
    default=True,
    show_default=True,
    help="Also compare every tier's predictions on the texts with t0's: divergence and the same most likely token.",
)
@runner_option
@click.option("--threads", type=THREADS, help="CPU threads. [default: onnxruntime's choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    bundle: str,
    texts: tuple[str, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    tier: str | None,
    ctx: int,
    max_tokens: int | None,
    prompt_tokens: int | None,
    kl: bool,
    runner: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure what BUNDLE's tiers are worth on texts and on multiple-choice questions.

    A text is cut into windows of --ctx tokens that do not overlap; a tail shorter than a window is dropped unless the
    text is shorter than one window. Perplexity is exp(summed negative log-likelihood / predicted tokens); of several
    texts, the geometric mean of theirs. A question is answered by the choice of the highest log-likelihood (acc), or
    of the highest per character (acc_norm), as in lm-evaluation-harness without examples.
    """
    from eopc_runtime.errors import UsageError
    from eopc_runtime.evaluation.tasks import read_task
    from eopc_runtime.session import Session

    if not texts and not tasks:
        raise click.UsageError("There is nothing to evaluate: give --text FILE, or --task NAME=FILE.")
    files = named_texts(texts)
    questions = [read_task(task, limit) for task in tasks]
    with Session.open(bundle, threads=threads, runner=runner) as session:
        if files and ctx > session.context:
            raise UsageError(f"--ctx {ctx} is larger than this bundle's context of {session.context}; lower it.")
        names = session.tiers if tier is None else (session.bundle.tier(tier).tier,)
        progress = command_progress()
        windows = {name: _windows(session, path, ctx, max_tokens, prompt_tokens) for name, path in files.items()}
        scores = _texts(session, names, windows, prompt_tokens or 0, kl and names != ("t0",), progress)
        answers = _tasks(session, names, questions, progress)
        show_notes(session.notes)
    rows = [tier_row(name, scores[name], answers[name]) for name in names]
    if as_json:
        paths = {name: str(path) for name, path in files.items()}
        one = next(iter(paths.values())) if len(paths) == 1 else None
        head = {"bundle": bundle, "text": one, "texts": paths, "tasks": [_described(task) for task in questions]}
        print_json({**head, "ctx": ctx, "prompt_tokens": prompt_tokens, "limit": limit, "tiers": rows})
    else:
        _print(rows)


def named_texts(options: Sequence[str]) -> dict[str, Path]:
    """Return the files of --text by name, NAME or the file's; wrong usage where one is missing or a name is not new."""
    found: dict[str, Path] = {}
    for option in options:
        name, equals, rest = option.partition("=")
        plain = Path(option).is_file() or not equals
        path = Path(option if plain else rest)
        name = path.stem if plain else name.strip()
        if not path.is_file():
            raise click.UsageError(f"--text {path} does not exist. Give a file, or NAME=FILE.")
        if name in found or not name:
            raise click.UsageError(f'--text has the name "{name}" twice. Name each text: --text NAME={path}')
        found[name] = path
    return found


def tier_row(tier: str, texts: Mapping[str, TextScore], tasks: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Return the JSON of a tier; perplexity is the geometric mean over texts, kl and top1 are means over texts."""
    from statistics import geometric_mean

    kls = [score.kl for score in texts.values() if score.kl is not None]
    top1s = [score.top1 for score in texts.values() if score.top1 is not None]
    return {
        "tier": tier,
        "perplexity": geometric_mean([score.perplexity for score in texts.values()]) if texts else None,
        "tokens": sum(score.tokens for score in texts.values()),
        "kl": sum(kls) / len(kls) if kls else None,
        "top1": sum(top1s) / len(top1s) if top1s else None,
        "texts": {
            name: {"perplexity": score.perplexity, "tokens": score.tokens, "kl": score.kl, "top1": score.top1}
            for name, score in texts.items()
        },
        "tasks": {name: asdict(score) for name, score in tasks.items()},
    }


def _windows(
    session: Session, path: Path, ctx: int, max_tokens: int | None, prompt: int | None
) -> Sequence[Sequence[int]]:
    """The windows of a text; UsageError where the prompt leaves nothing of them."""
    from eopc_runtime.errors import UsageError
    from eopc_runtime.evaluation.texts import cut_windows

    windows = cut_windows(session.tokenizer.encode(_read(path))[:max_tokens], ctx)
    if prompt is not None and prompt >= len(windows[0]):
        raise UsageError(
            f"--prompt-tokens {prompt} leaves nothing to score of windows of {len(windows[0])} tokens. "
            "Lower it, or raise --ctx."
        )
    return windows


def _texts(
    session: Session,
    tiers: Sequence[str],
    windows: Mapping[str, Sequence[Sequence[int]]],
    prompt: int,
    compare: bool,
    progress: Progress,
) -> Scores:
    from eopc_runtime.evaluation.texts import score_texts

    vocab = session.bundle.manifest.model.vocab_size
    scores = score_texts(
        session.pool, tiers, windows, vocab=vocab, prompt=prompt, compare=compare, show=progress.update
    )
    for tier in tiers if windows else ():
        row = tier_row(tier, scores[tier], {})
        progress.done(f"eval {tier}: perplexity {row['perplexity']:.4f} over {row['tokens']} tokens")
    return scores


def _tasks(session: Session, tiers: Sequence[str], tasks: Sequence[Task], progress: Progress) -> Answers:
    from eopc_runtime.evaluation.choices import encode_pair, score_task

    answers: dict[str, dict[str, TaskScore]] = {tier: {} for tier in tiers}
    for tier in tiers:
        for task in tasks:
            total = len(task.questions)
            score = score_task(
                session.pool.get(tier),
                task.questions,
                lambda context, continuation: encode_pair(session.tokenizer, context, continuation),
                session.context,
                lambda done, what=f"{tier} on {task.name}", n=total: progress.update(  # type: ignore[misc]
                    f"eval {what}: question {done + 1} of {n}"
                ),
            )
            answers[tier][task.name] = score
            progress.done(f"eval {tier}: {task.name} {score.acc.value:.1%} of {total}")
    return answers


def _described(task: Task) -> dict[str, Any]:
    return {"task": task.name, "questions": len(task.questions)}


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table of texts, and a table of tasks."""
    texts = [(row["tier"], name, score) for row in rows for name, score in row["texts"].items()]
    if texts:
        print_table(
            ("tier", "text", "perplexity", "tokens", "KL to t0, nats", "top-1 as t0"),
            [
                (
                    tier,
                    name,
                    f"{score['perplexity']:.4f}",
                    str(score["tokens"]),
                    "-" if score["kl"] is None else f"{score['kl']:.5f}",
                    "-" if score["top1"] is None else f"{score['top1']:.1%}",
                )
                for tier, name, score in texts
            ],
        )
    tasks = [(row["tier"], name, score) for row in rows for name, score in row["tasks"].items()]
    if tasks:
        print_table(
            ("tier", "task", "questions", "acc", "95 % interval", "acc_norm", "95 % interval"),
            [
                (
                    tier,
                    name,
                    str(score["questions"]),
                    *(cell for kind in ("acc", "acc_norm") for cell in _share(score[kind])),
                )
                for tier, name, score in tasks
            ],
        )


def _share(share: Mapping[str, float]) -> tuple[str, str]:
    return f"{share['value']:.1%}", f"{share['low']:.1%} to {share['high']:.1%}"


def _read(path: Path) -> str:
    from eopc_runtime.errors import UsageError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
