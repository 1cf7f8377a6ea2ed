"""The main job on the real default model, as a user types it: it runs once, and every test reads its bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .real_model import CORPORA, NEEDS, QUESTION, eopc, expect_int8_near_torch, expect_paris

pytestmark = NEEDS


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`eopc build --device orin --budgets 5,10,20J` on the default model and workload."""
    output = tmp_path_factory.mktemp("main-job") / "smollm2-orin.eopc"
    yield output, eopc("build", "--device", "orin", "--budgets", "5,10,20J", "-o", str(output))


def test_three_budgets_are_three_tiers_priced_within_them(built: tuple[Path, dict[str, Any]]) -> None:
    """Three different tiers, each at most its budget at the reference workload; the dense one says that it is dense."""
    tiers = built[1]["tiers"]
    assert [t["budget_j"] for t in tiers] == [20.0, 10.0, 5.0]
    assert all(t["energy_j"] <= t["budget_j"] for t in tiers)
    assert len({t["params"] for t in tiers}) == 3
    assert "dense" in tiers[0]["note"]
    assert {t["energy_source"] for t in tiers} == {"prior"}


def test_a_build_streams_its_weights(built: tuple[Path, dict[str, Any]]) -> None:
    """Peak memory stays under twice the fp32 weights plus 1 GiB."""
    params = built[1]["tiers"][0]["params"]
    assert built[1]["peak_rss_bytes"] < 2.0 * 4 * params + 2**30


def test_lower_tiers_add_almost_nothing_to_the_bundle(built: tuple[Path, dict[str, Any]]) -> None:
    """Three nested tiers take at most 1.15 times the bytes of the same bundle with t0 alone."""
    total = sum(f.stat().st_size for f in built[0].rglob("*") if f.is_file())
    lower = sum(f.stat().st_size for t in ("t1", "t2") for f in (built[0] / "tiers" / t).iterdir())
    assert total <= 1.15 * (total - lower)


def test_every_graph_agrees_with_pytorch(built: tuple[Path, dict[str, Any]]) -> None:
    """The parity gate measured every tier over prefill and 16 cached steps, and each error is within tolerance."""
    for tier in built[1]["tiers"]:
        assert tier["parity"]["decode_steps"] == 16
        assert 0 < tier["parity"]["max_logit_error"] <= tier["parity"]["tolerance"]


def test_t0_answers_without_torch_in_the_process(built: tuple[Path, dict[str, Any]]) -> None:
    """`eopc run` in the default precision says Paris, within 10 J, where torch, transformers and onnx are blocked."""
    blocked = ("torch", "transformers", "onnx", "safetensors", "eopc_compiler")
    result = eopc("run", str(built[0]), "--prompt", QUESTION, "--budget", "10J", block=blocked)
    assert result["tier"] == "t0"
    assert result["energy_j"] <= 10.0
    expect_paris(built[0], result["text"])


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the text beside the checkout is not there")
def test_int8_perplexity_is_within_half_a_percent_of_torch(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The orin profile's int8 adds at most 0.5 % to PyTorch's fp32 perplexity over three domains, none above 1 %."""
    expect_int8_near_torch(built[0], tmp_path)
