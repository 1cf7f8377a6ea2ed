"""The shipped coefficients are what the public data gives, and the files are what the script writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"  # optional data beside a checkout
ORIN = SHARED / "energy" / "data" / "orin_public.csv.gz"
GOLDEN = SHARED / "methods" / "sweetspot_golden.json"


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    """tools/public_energy.py."""
    return load_tool("public_energy")


def shipped(device: str) -> dict[str, Any]:
    """The content of profiles/measured/DEVICE.json."""
    content: dict[str, Any] = json.loads((ROOT / "profiles" / "measured" / f"{device}.json").read_text("utf-8"))
    return content


def same(found: Any, wanted: Any) -> None:
    """Compare two JSON values; numbers to 1e-5, which another linear algebra library may differ by."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-12)
    else:
        assert found == wanted


@pytest.mark.skipif(not ORIN.is_file(), reason="the public Orin measurements beside the checkout are absent")
def test_the_orin_file_is_what_the_fit_of_the_public_rows_gives(tool: ModuleType) -> None:
    """Coefficients, ranges, errors and margins of all nine sets, sources and notes, come out of the data again."""
    same(json.loads(tool.to_text(tool.orin(ORIN))), shipped("orin"))


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden file beside the checkout is absent")
def test_the_h100_file_is_what_the_published_table_gives(tool: ModuleType) -> None:
    """All thirteen sets."""
    same(json.loads(tool.to_text(tool.h100(GOLDEN))), shipped("h100"))


@pytest.mark.skipif(not ORIN.is_file(), reason="the public Orin measurements beside the checkout are absent")
def test_a_changed_figure_is_found_out(tool: ModuleType) -> None:
    """The comparison above fails for a coefficient that is 0.1 % off: the negative twin."""
    content = shipped("orin")
    content["fits"][0]["theta"]["theta3"] *= 1.001
    with pytest.raises(AssertionError):
        same(json.loads(tool.to_text(tool.orin(ORIN))), content)


def test_text_keeps_short_records_on_one_line_and_loses_nothing(tool: ModuleType) -> None:
    """What fits into a line stands on one; the text reads back as what was written."""
    content = {"a": [1, 2], "b": {"c": "x" * 90, "d": ["y [z] {w}", None, True, 1e-7]}}
    text = tool.to_text(content)
    assert json.loads(text) == content
    assert '  "a": [1, 2],' in text.splitlines()
    assert max(map(len, text.splitlines())) < 120
