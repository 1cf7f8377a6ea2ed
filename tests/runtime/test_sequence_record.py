"""The log of sequences: what a line holds, and that nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.controller import Decision, Start
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import UsageError
from eopc_runtime.policy import Request
from eopc_runtime.provenance import Calibration, Hull
from eopc_runtime.sequence_log import SequenceLog
from eopc_runtime.sequence_record import SequenceRecord, append_record, predicted_j, read_records
from eopc_runtime.session import Session
from eopc_runtime.tokenizer import Tokenizer

RECORD = SequenceRecord(
    engine="abc",
    start_wall_s=1_700_000_000.25,
    end_wall_s=1_700_000_004.5,
    utc_offset_s=7200.0,
    start_s=10.0,
    end_s=14.25,
    plan="t0>t1",
    tiers_used=("t0", "t1"),
    prompt_tokens=64,
    completion_tokens=100,
    predicted_j=80.0,
    price_j=84.0,
    budget_j=100.0,
    energy_j=84.0,
    energy_source="calibrated",
    power_mode="MAXN",
    finish_reason="length",
    enforced_by="meter",
)


def table(hull: Hull | None = None) -> EnergyTable:
    """Two tiers with a margin and a constant that is not credited."""
    tiers = (
        TierEnergy("t0", 1.0, 0.5, 0.0, 4.0, 0.25, 0.125, "calibrated", -2.0),
        TierEnergy("t1", 0.5, 0.25, 0.0, 2.0, 0.125, 0.0, "calibrated", -1.0),
    )
    calibration = Calibration(hull, None, 10, {}, None, None)
    return EnergyTable("fake", "calibrated", 0.25, tiers, calibration=calibration)


def log_of(*decisions: Decision) -> SequenceLog:
    """The log of a sequence with a prompt of 8 tokens."""
    return SequenceLog(Start(Request(8, 50), None), (), decisions)


def test_a_record_survives_its_line(tmp_path: Path) -> None:
    """Appended and read back, one line per sequence."""
    path = tmp_path / "sequences.jsonl"
    other = replace(RECORD, budget_j=None, enforced_by=None)
    append_record(path, RECORD)
    append_record(path, other)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    assert read_records(lines, "x") == (RECORD, other)


def test_a_torn_last_line_is_left_out_and_any_other_is_refused(tmp_path: Path) -> None:
    """A run that was killed while it wrote costs its own line; damage elsewhere is said."""
    path = tmp_path / "sequences.jsonl"
    append_record(path, RECORD)
    append_record(path, RECORD)
    text = path.read_text()
    assert read_records(text[:-30].splitlines(keepends=True), "x") == (RECORD,)
    with pytest.raises(UsageError, match=r"x, line 1 is no JSON.*eopc run --log"):
        read_records([text[:40] + "\n", text[-40:] + "\n"], "x")
    with pytest.raises(UsageError, match="holds no sequence"):
        read_records([], "x")
    with pytest.raises(UsageError, match=r'line 1: "kind"'):
        read_records([json.dumps({**RECORD.to_json(), "kind": "eopc run"})], "x")


def test_the_prediction_of_one_tier_is_what_a_meter_is_expected_to_show() -> None:
    """No margin, and the constant counted: the same as TierEnergy.expected_j."""
    steps = log_of(
        Decision("prefill", 0, 0, 9.9, 0.0), Decision("step", 0, 3, 9.9, 0.0), Decision("step", 0, 1, 9.9, 0.0)
    )
    assert predicted_j(table(), steps) == table().tiers[0].expected_j(8, 5)


def test_the_prediction_follows_a_sequence_down_the_ladder() -> None:
    """Prefill and two steps on t0, then two on t1, which are its third and fourth."""
    moved = log_of(
        Decision("prefill", 0, 0, 9.9, 0.0),
        Decision("step", 0, 2, 9.9, 0.0),
        Decision("step", 1, 2, 9.9, 0.0),
        Decision("stop", 1, 0, 0.0, 0.0),
    )
    upper, lower = table().tiers
    want_j = upper.prefill_j(8) + upper.step_j(8, 1) + upper.step_j(8, 2) + lower.step_j(8, 3) + lower.step_j(8, 4)
    assert predicted_j(table(), moved) == pytest.approx(want_j - 1.0)


def test_outside_the_measured_lengths_a_short_sequence_is_not_free() -> None:
    """The negative constant cannot eat up a prefill and a step: the least is the price of the steps."""
    short = log_of(Decision("prefill", 1, 0, 9.9, 0.0))
    outside = table(Hull((32, 64), (32, 64)))
    assert predicted_j(outside, short) == outside.tiers[1].expected_j(8, 1, measured=False)


def test_a_generation_gives_its_record(lab: Any) -> None:
    """Times of both clocks, tokens, what was predicted and what was charged, and the decisions to replay."""
    bundle = lab.bundle
    box = Session(
        bundle,
        lab.rig().pool,
        Tokenizer.open(bundle.root / "tokenizer"),
        clock=lab.device.clock,
        wall=lambda: 1e9 + lab.device.clock(),
    )
    generation = box.stream("x" * 40, budget="60J", max_new_tokens=30, raw=True)
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = generation.span
    result = generation.result
    record = SequenceRecord.of(generation, box.table, "abc", offset=lambda wall_s: 3600.0)
    spent_s = lab.device.clock()
    assert (record.start_s, record.end_s) == (0.0, spent_s)
    assert (record.start_wall_s, record.end_wall_s) == (1e9, 1e9 + spent_s)
    assert (record.prompt_tokens, record.completion_tokens) == (40, result.completion_tokens)
    assert record.price_j == pytest.approx(result.energy_j)
    assert record.predicted_j == pytest.approx(box.table.tiers[0].expected_j(40, result.completion_tokens))
    assert record.decisions == generation.log
    assert SequenceRecord.from_json(record.to_json(), "x") == record
