"""Calibration text that the model writes itself: drawn from its own distribution, only where it is of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eopc_compiler.cache import StageCache
from eopc_compiler.calibration.own import write_tokens
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import LlamaConfig
from eopc_compiler.model import build_model
from eopc_compiler.pipeline import choose_dialect
from eopc_compiler.stage_text import read_calibration, read_text
from eopc_compiler.state import CompileState
from eopc_runtime.profiles import load_profile

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
NEVER_BELOW = (1000.0,)  # joules: more than the whole tiny model needs


@pytest.fixture
def state(tiny_checkpoint: Path, tmp_path: Path, build_settings: Callable[..., Any]) -> Iterator[CompileState]:
    """A build of the tiny model that knows its dialect, with what it says in `said`."""
    cache = StageCache(tmp_path / "work", resume=False)
    args = build_settings(tiny_checkpoint, tmp_path / "out", own_text=True)
    opened = CompileState(args, cache, load_profile("cpu"), said.append, lambda _: None)
    said.clear()
    yield choose_dialect(replace(opened, checkpoint=open_checkpoint(str(tiny_checkpoint))))
    cache.close()


said: list[str] = []


def names(state: CompileState) -> list[str]:
    return [domain.name for domain in read_text(state).domains]


def test_every_token_is_drawn_from_what_the_whole_text_before_it_predicts(make_tiny: MakeTiny) -> None:
    """The same draws without a cache give the same text."""
    config, tensors = make_tiny()
    model, rows, length = build_model(config, tensors, 64), 5, 12
    generator, text = torch.Generator().manual_seed(3), torch.full((rows, 1), 1)
    for _ in range(length):
        following = torch.softmax(model.score(text)[:, -1], -1)
        text = torch.cat([text, torch.multinomial(following, 1, generator=generator)], 1)
    written = write_tokens(model, 1, rows, length, seed=3)
    assert torch.equal(written, text[:, 1:])
    assert len({tuple(row) for row in written.tolist()}) == rows


def test_another_seed_writes_another_text(make_tiny: MakeTiny) -> None:
    """And the same one the same, in any number of parts."""
    config, tensors = make_tiny()
    model = build_model(config, tensors, 64)
    counts: list[tuple[int, int]] = []
    first = write_tokens(model, 1, 70, 4, seed=0, report=lambda *count: counts.append(count))
    assert torch.equal(first, write_tokens(model, 1, 70, 4, seed=0))
    assert not torch.equal(first, write_tokens(model, 1, 70, 4, seed=1))
    assert counts[0] == (64, 280) and counts[-1] == (280, 280)


def test_a_build_that_is_told_to_calibrates_on_the_models_own_text_too(state: CompileState) -> None:
    """As much of it as of any other domain, in all three splits."""
    read = read_calibration(read_text(state))
    assert read.calibration and read.selection and read.heldout
    for split in (read.calibration, read.selection, read.heldout):
        counts = {name: len(windows) for name, windows in split.domains}
        assert counts["own"] == counts["code"]


def test_it_is_written_once(state: CompileState, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed build reads what an earlier one wrote; another seed writes anew."""
    first = read_text(state).domains
    monkeypatch.setattr("eopc_compiler.stage_text.own_documents", lambda *_: ["a", "b", "c"])
    assert read_text(state).domains == first
    other = read_text(replace(state, args=replace(state.args, seed=1)))
    assert other.domains[-1].documents == ("a", "b", "c")


def test_it_is_not_written_where_nothing_is_pruned_or_nobody_wants_it(state: CompileState, tmp_path: Path) -> None:
    """It takes time; a file of that name takes its place."""
    built_in = ["text", "code", "arithmetic", "dialogue"]
    assert names(state) == [*built_in, "own"]
    assert names(replace(state, args=replace(state.args, budgets_j=NEVER_BELOW))) == built_in
    assert names(replace(state, args=replace(state.args, own_text=False))) == built_in
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(f'{{"text": "Text {i}."}}' for i in range(9)), encoding="utf-8")
    given = read_text(replace(state, args=replace(state.args, calib=(f"own={mine}",))))
    assert given.domains[-1].documents[0] == "Text 0." and len(given.domains) == 5


def test_a_model_that_cannot_begin_a_text_writes_none(state: CompileState) -> None:
    """A checkpoint without a BOS token builds all the same, and the build says so."""
    assert state.checkpoint is not None
    config = replace(state.checkpoint.config, bos_token_id=None)
    silent = replace(state, checkpoint=replace(state.checkpoint, config=config))
    assert names(silent) == ["text", "code", "arithmetic", "dialogue"]
    assert any("no token that begins a text" in line for line in said)


def test_special_tokens_do_not_become_text(tiny_checkpoint: Path) -> None:
    """A document is what a reader would see of it."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    tokenizer, bos = checkpoint.tokenizer(), checkpoint.config.bos_token_id
    ids = tokenizer.encode("sun and moon")
    assert bos is not None and tokenizer.decode([bos, *ids]) == "sun and moon"
