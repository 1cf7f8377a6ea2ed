"""Texts: perplexity of tiers by text, and how far each tier's predictions are from those of the whole model.

A text is cut into windows that do not overlap. Divergence and agreement are teacher-forced: both models read the same
tokens, and are compared at every position that is scored. The whole model's logits are kept for a few windows at a
time, which all tiers then run over, so that it runs once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from eopc_runtime.errors import PromptError, UsageError
from eopc_runtime.evaluation.likelihood import agreement, divergence, token_nll
from eopc_runtime.runners.base import Logits, RunnerPool, TierRunner

# Logits of a whole window are [tokens, vocab] fp32, 100 MB for 512 tokens of a 50k vocabulary; longer windows
# run in parts of this size, which a causal model cannot tell.
PART = 512
KEPT_BYTES = 512 << 20  # of the whole model's logits
MOST_BYTES = 2 << 30  # for a single window, where it alone is larger than that
WHOLE = "t0"

Window = Sequence[int]
Scored = tuple[Logits, Window]  # logits [n, vocab] and the n tokens they predict


@dataclass(frozen=True, slots=True)
class TextScore:
    """A tier on a text; kl (mean nats per token, KL(t0 || tier)) and top1 (share) are null where t0 did not run."""

    nll: float  # summed, nats
    tokens: int
    kl: float | None
    top1: float | None

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that overflows."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf  # exp overflows at 709


def cut_windows(ids: Window, ctx: int) -> list[list[int]]:
    """Return windows of ctx ids, or the whole text when it is shorter; PromptError below two tokens."""
    if len(ids) < 2:
        raise PromptError(f"the text has {len(ids)} token(s); perplexity needs at least 2. Give a longer text.")
    if len(ids) < ctx:
        return [list(ids)]
    return [list(ids[i : i + ctx]) for i in range(0, len(ids) - ctx + 1, ctx)]


def score_texts(
    pool: RunnerPool,
    tiers: Sequence[str],
    texts: Mapping[str, Sequence[Window]],
    *,
    vocab: int,
    prompt: int = 0,
    compare: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, TextScore]]:
    """Return {tier: {text: score}}.

    Args:
        texts: windows by name of the text.
        vocab: ids of the model, for the size of its logits.
        prompt: so many tokens of every window run as its prompt and are not scored.
        compare: also compare every tier with t0, which runs for that even if it is not among the tiers.

    Raises UsageError where the logits to compare with would not fit into memory.
    """
    found: dict[str, dict[str, TextScore]] = {tier: {} for tier in tiers}
    for name, windows in texts.items():
        sums = {tier: _Sums() for tier in tiers}
        group = _group_size(windows, vocab) if compare else len(windows)
        for start in range(0, len(windows), group):
            some = windows[start : start + group]
            reference = [_kept(pool.get(WHOLE), window, prompt) for window in some] if compare else None
            for tier in tiers:
                show(f"eval {tier} on {name}: window {start + 1} of {len(windows)}")
                _add(sums[tier], pool, tier, some, reference, prompt)
        for tier in tiers:
            found[tier][name] = sums[tier].score(compare)
    return found


def window_nll(runner: TierRunner, window: Window, part: int = PART, prompt: int = 0) -> float:
    """Return the sum of -log p(token | window before it) in nats, over all tokens but the first.

    With a `prompt` of so many tokens, which run as one, over the tokens behind it.
    """
    return sum(float(token_nll(*scored).sum()) for scored in window_logits(runner, window, part, prompt))


def window_logits(runner: TierRunner, window: Window, part: int = PART, prompt: int = 0) -> Iterator[Scored]:
    """Yield the logits of a window's predictions with what they predict, part by part; see `window_nll`."""
    cache = runner.new_cache()
    if prompt:
        yield runner.prefill(cache, window[:prompt]), window[prompt : prompt + 1]
    for start in range(prompt, len(window) - 1, part):
        fed = window[start : min(start + part, len(window) - 1)]
        yield runner.forward(cache, fed, logits="all"), window[start + 1 : start + 1 + len(fed)]


def _kept(runner: TierRunner, window: Window, prompt: int) -> list[Scored]:
    """The logits of a window in memory of their own: a runner may use its buffers again."""
    return [(logits.copy(), targets) for logits, targets in window_logits(runner, window, prompt=prompt)]


@dataclass(slots=True)
class _Sums:
    """What is added up over windows."""

    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0

    def score(self, compared: bool) -> TextScore:
        kl, top1 = (self.kl / self.tokens, self.same / self.tokens) if compared else (None, None)
        return TextScore(self.nll, self.tokens, kl, top1)


def _add(
    sums: _Sums,
    pool: RunnerPool,
    tier: str,
    windows: Sequence[Window],
    reference: Sequence[Sequence[Scored]] | None,
    prompt: int,
) -> None:
    """Run a tier over windows, against the whole model's logits where these are given."""
    for index, window in enumerate(windows):
        kept = reference[index] if reference else ()
        if reference and tier == WHOLE:
            parts: Iterator[Scored] = iter(kept)
        else:
            parts = window_logits(pool.get(tier), window, prompt=prompt)
        for number, (logits, targets) in enumerate(parts):
            sums.nll += float(token_nll(logits, targets).sum())
            sums.tokens += len(targets)
            if reference:
                sums.kl += 0.0 if tier == WHOLE else divergence(kept[number][0], logits)
                sums.same += agreement(kept[number][0], logits)


def _group_size(windows: Sequence[Window], vocab: int) -> int:
    """How many windows' logits are kept at a time."""
    each = 4 * vocab * max(map(len, windows))
    if each > MOST_BYTES:
        raise UsageError(
            f"comparing with t0 keeps the logits of a window, {each / 2**30:.1f} GiB for --ctx "
            f"{max(map(len, windows))}. Lower --ctx, or leave the comparison out with --no-kl."
        )
    return max(1, KEPT_BYTES // each)
