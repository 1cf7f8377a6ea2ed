"""An engine is compared with its graph, and one that computes something else is found out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from eopc_runtime.cli.main import cli
from eopc_runtime.engine_check import EngineCheck, check_against_ort, check_engines, cosine, summarise
from eopc_runtime.errors import EngineMismatchError, PromptError
from eopc_runtime.runners.choose import open_tensorrt


def test_a_faithful_engine_passes(make_engines: Any, gpu: Any) -> None:
    """Prompts of four lengths, in chunks, then step by step; only rounding differs."""
    bundle = make_engines()
    found = check_against_ort(bundle, "t1", open_tensorrt(bundle).pool, max_tokens=96)
    assert found.tokens == 4 + 48
    assert found.cosine_min > 0.99999
    assert found.top1_agreement == 1.0
    found.require(bundle)


def test_all_engines_of_a_bundle_are_checked(make_engines: Any, gpu: Any) -> None:
    """Or the tiers that are named; the GPU's memory is free again afterwards."""
    shown: list[str] = []
    bundle = make_engines()
    assert [found.tier for found in check_engines(bundle, ("t2",), shown.append) if found.ok] == ["t2"]
    assert shown == ["check t2 against ONNX Runtime"]
    assert [found.tier for found in check_engines(bundle) if found.ok] == ["t0", "t1", "t2"]
    assert gpu.cuda.used == 0


def test_engine_check_command_needs_plans(tiny_bundle: Any) -> None:
    """--proxy keeps none."""
    result = CliRunner().invoke(cli, ["engine", str(tiny_bundle), "--proxy", "--check"])
    assert result.exit_code == 1
    assert "--proxy keeps none" in result.stderr


def test_an_engine_that_computes_something_else_is_found_out(make_engines: Any, gpu: Any) -> None:
    """A decode engine whose cache is wrong by one slot gives wrong steps after right prompts."""
    bundle = make_engines()
    pool = open_tensorrt(bundle).pool
    decode: Any = pool.get("t0")._decode  # type: ignore[attr-defined]
    run = decode.run
    decode.run = lambda arena, addresses, length, tokens, wanted: run(arena, addresses, length - 1, tokens, wanted)
    found = check_against_ort(bundle, "t0", pool, max_tokens=64)
    assert not found.ok
    with pytest.raises(EngineMismatchError, match=r"engine of t0 does not compute.*at least 0.99.*eopc engine"):
        found.require(bundle)


def test_a_short_text_is_refused(make_engines: Any, gpu: Any) -> None:
    """Too little to say anything."""
    bundle = make_engines()
    with pytest.raises(PromptError, match="has 3 tokens"):
        check_against_ort(bundle, "t0", open_tensorrt(bundle).pool, text="abc")


def test_agreement_is_counted_and_the_worst_cosine_kept() -> None:
    """One of four positions has another most likely token, and a right angle."""
    up, right = np.array([0.0, 2.0], np.float32), np.array([1.0, 0.0], np.float32)
    found = summarise("t0", [(up, up), (up, 3 * up), (up, right), (right, right)])
    assert found == EngineCheck("t0", 4, 0.0, 0.75)
    assert not found.ok


def test_a_value_that_is_no_number_fails() -> None:
    """NaN and infinity, which half precision can give."""
    bad = np.array([np.nan, 1.0], np.float32)
    assert cosine(bad, bad) == -1.0
    assert not summarise("t0", [(bad, bad)]).ok
