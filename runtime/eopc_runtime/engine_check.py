"""Whether an engine computes what its graph says: its logits against ONNX Runtime's on the CPU, token by token.

Both sides read the same text (teacher-forced), so one wrong token does not lead them apart. A few prompts of rising
length test the prefill engine with its chunks, then the rest of the text runs step by step through the decode engine.
Prefill gives the logits of its last position alone. That hides nothing: what it computes at the others is used through
the caches only, and every decode step reads those. Half-precision attention and other kernels change logits a little:
the check asks for their direction (cosine similarity) and for the most likely token, and says how near they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.engines import MIN_COSINE, MIN_TOP1, EngineCheck, EngineRecord, write_checks
from eopc_runtime.errors import EngineMismatchError, PromptError
from eopc_runtime.runners.base import Logits, RunnerPool, TierRunner
from eopc_runtime.tokenizer import Tokenizer

PROMPTS = 4  # lengths of prompts, up to half of the text
TOKENS = 256  # read of the text at most: a step of a large model on a board's CPU takes a second
TEXT = (
    "The harbour lay quiet in the early morning, and only the gulls were awake. Maria counted the crates on the "
    "pier: forty-two of apples, seventeen of pears, and one that nobody had ordered. She wrote the numbers into "
    "the ledger, multiplied by the price of the week, and frowned. 42 * 3 + 17 * 4 = 194, not 184, as the invoice"
    " said. def total(items): return sum(price * count for price, count in items). The machine agreed with her. "
    "By noon the ship from Rotterdam had come in, its captain had apologised for the mistake, and the last crate "
    "turned out to hold oranges, a present for the office. Why had he not said so at once? Because, he explained "
    "with a smile, a present that is announced is only a delivery. They ate them in the sun and talked about the "
    "weather in the north, where the first snow had fallen, and about engines, which in his opinion were built "
    "better when he was young."
)


def check_against_ort(
    bundle: Bundle,
    tier: str,
    pool: RunnerPool,
    *,
    text: str = TEXT,
    max_tokens: int = TOKENS,
    threads: int | None = None,
) -> EngineCheck:
    """Compare a tier of a pool with ONNX Runtime on the CPU.

    Args:
        pool: hands out what is checked, for example `runners.choose.open_tensorrt(bundle).pool`.
        text: what both read; the bundle's context and `max_tokens` limit it.

    Raises:
        PromptError: the text has fewer than eight tokens.
        MissingExtraError: onnxruntime is not installed.
    """
    from eopc_runtime.runners.ort import OrtTier

    ids = Tokenizer.open(bundle.root / "tokenizer").encode(text)[: min(max_tokens, bundle.manifest.context)]
    if len(ids) < 2 * PROMPTS:
        raise PromptError(f"the text has {len(ids)} tokens; a check needs at least {2 * PROMPTS}. Give a longer text.")
    info = bundle.tier(tier)
    # with `exact` ONNX Runtime keeps activations in floating point, as TensorRT does
    reference = OrtTier(bundle, info, threads, exact={info.graph: bundle.graph(info.graph)})
    pairs = zip(read_along(pool.get(tier), ids), read_along(reference, ids), strict=True)
    return summarise(list(pairs))


def check_engines(
    bundle: Bundle, key: str, tiers: Sequence[str] = (), show: Callable[[str], None] | None = None
) -> tuple[EngineRecord, ...]:
    """Compare the engines of a set with ONNX Runtime, all tiers unless some are named.

    Each result is written into the tier's records at once; all records of the set are returned. Raises what
    `runners.choose.open_tensorrt` and `check_against_ort` raise.
    """
    from eopc_runtime.runners.choose import open_tensorrt

    records: tuple[EngineRecord, ...] = ()
    with closing(open_tensorrt(bundle, key).pool) as pool:
        for tier in tiers or [info.tier for info in bundle.manifest.tiers]:
            if show is not None:
                show(f"check {tier} against ONNX Runtime")
            records = write_checks(bundle.root, key, {tier: check_against_ort(bundle, tier, pool)})
    return records


def require_passed(records: Iterable[EngineRecord], bundle_root: Path) -> None:
    """Raise EngineMismatchError if an engine was compared and computes something else."""
    for record in records:
        check = record.check
        if check is not None and not check.ok:
            raise EngineMismatchError(
                f"the engine of {record.tier} does not compute what its graph says: over {check.tokens} tokens the "
                f"cosine of the logits falls to {check.cosine_min:.4f} (at least {MIN_COSINE}) and the most likely "
                f"token is the same in {check.top1_agreement:.1%} (at least {MIN_TOP1:.0%}). Build it again with "
                f"another TensorRT or precision: eopc engine {bundle_root} --rebuild"
            )


def read_along(runner: TierRunner, ids: Sequence[int]) -> Iterator[Logits]:
    """Logits [vocab] after prompts of rising length, then after each further token."""
    half = len(ids) // 2
    for i in range(1, PROMPTS + 1):
        cache = runner.new_cache()
        yield runner.prefill(cache, ids[: half * i // PROMPTS])[-1].copy()
    for token in ids[half:]:
        yield runner.forward(cache, [token])[-1].copy()


def summarise(pairs: Sequence[tuple[Logits, Logits]]) -> EngineCheck:
    """Compare pairs of logits [vocab]; a value that is no number makes the cosine -1."""
    cosines = [cosine(found, wanted) for found, wanted in pairs]
    same = [int(found.argmax()) == int(wanted.argmax()) for found, wanted in pairs]
    return EngineCheck(len(pairs), min(cosines), sum(same) / len(same))


def cosine(a: Logits, b: Logits) -> float:
    """Cosine of the angle between two vectors, in double precision; -1 where it is no number."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    value = float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-300))
    return value if np.isfinite(value) else -1.0
