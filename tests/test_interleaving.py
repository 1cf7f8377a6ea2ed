"""A real bundle: sequences in turn have the tokens they have alone, also when tiers are let go between their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopc_runtime.errors import BudgetError
from eopc_runtime.evaluation.texts import window_nll
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.scheduler import Scheduler
from eopc_runtime.session import Session

TEXT = "The lamp of the lighthouse was lit every evening, and the sea was told where the rocks are. " * 2


def open_session(bundle: Path, resident_bytes: int = 1 << 30) -> Session:
    box = Session.open(bundle, threads=1, runner="ort", verify=False)
    pool: Any = box.pool
    pool._limit = resident_bytes
    return box


@pytest.mark.parametrize(("count", "resident_bytes"), [(8, 1 << 30), (3, 1)], ids=["all-loaded", "one-loaded"])
def test_interleaved_sequences_have_the_tokens_and_joules_they_have_alone(
    tiny_bundle: Path, count: int, resident_bytes: int
) -> None:
    """Sequences on three tiers, four at a time; with room for one loaded tier, every step loads it anew."""
    requests: list[dict[str, Any]] = [
        {
            "prompt": TEXT[: 10 + 9 * i],
            "tier": f"t{i % 3}",
            "max_new_tokens": 5 + i,
            "sampling": SamplingParams(temperature=0.8, seed=i),
            "logprobs": 2,
        }
        for i in range(count)
    ]
    with open_session(tiny_bundle) as box:
        alone = [list(box.stream(**request)) for request in requests]
    with open_session(tiny_bundle, resident_bytes) as box, Scheduler(box, patience_s=0.0) as scheduler:
        handles = [scheduler.submit(**request) for request in requests]
        together = [list(handle) for handle in handles]
    assert together == alone


def test_scoring_is_what_eval_computes(tiny_bundle: Path) -> None:
    """The log-probabilities of a text sum to the NLL of `eopc eval`, per tier; the best token is the greedy one."""
    with open_session(tiny_bundle) as box, Scheduler(box) as scheduler:
        ids = box.tokenizer.encode(TEXT)
        assert len(ids) > 130  # three parts
        for tier in box.tiers:
            score = scheduler.score(ids, tier=tier, top=3).result(60)
            expected = window_nll(box.pool.get(tier), ids)
            assert -sum(token.logprob for token in score.tokens) == pytest.approx(expected, rel=1e-5)
            assert [token.token for token in score.tokens] == ids[1:]
            assert all(len(token.top) == 3 for token in score.tokens)
            greedy = box.generate(ids, max_new_tokens=1, tier=tier)
            event = next(box.stream(ids, max_new_tokens=1, tier=tier, logprobs=1))
            assert event.token == int(np.argmax(score.following))
            assert event.logprobs is not None
            assert event.logprobs.top == ((event.token, event.logprobs.logprob),)
            assert score.energy_j >= greedy.energy_j


def test_a_text_is_scored_within_its_budget_or_not_at_all(tiny_bundle: Path) -> None:
    """The best tier whose price fits does it; below the cheapest the message names what would do."""
    with open_session(tiny_bundle) as box:
        ids = box.tokenizer.encode(TEXT)
        prices = [box.score(ids, tier=tier).result.energy_j for tier in box.tiers]
        assert prices == sorted(prices, reverse=True)
        below_t0 = prices[0] * 0.999
        score = box.score(ids, budget=below_t0).result
        assert score.tier != "t0"
        assert score.energy_j <= below_t0
        with pytest.raises(BudgetError, match="needs"):
            box.score(ids, budget=prices[-1] * 0.5)
