"""Bad manifests, energy tables and masks: every key missing, misspelled, of another type, or far too large."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from .bad_input import assert_refused, label, places, read_record, replace_file, spoiled
from .conftest import write_bundle

Eopc = Callable[..., Result]
FREE = frozenset({"tools", "calibration", "parity", "proxy", "perplexity_by_domain"})
# A reader has a default for these, so that bundles from before they were there open.
OPTIONAL = frozenset({"prefill", "selector", "proxy", "gather_bytes", "own_prompts", "exact_products", "step"})
SIZES = ("bytes", "weight_bytes", "energy_j", "vocab_size", "context", "margin", "step_j0", "source_layer", "schema")


def _cases() -> list[tuple[str, tuple[str | int, ...], str]]:
    """Files, places and ways to spoil them, from a bundle written for this list."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        root = write_bundle(Path(folder) / "box")
        for name in ("manifest.json", "energy.json", "tiers/t0/mask.json"):
            for place in places(read_record(root, name), FREE):
                key = place[-1]
                if any(isinstance(step, int) and step > 0 for step in place):
                    continue  # the first of a list stands for all
                if key not in OPTIONAL:
                    cases.append((name, place, "missing"))
                cases.append((name, place, "type"))
                if key in SIZES:
                    cases.append((name, place, "huge"))
                if len(place) == 1:
                    cases.append((name, place, "misspelled"))
    return cases


CASES = _cases()


@pytest.mark.parametrize(
    ("name", "place", "how"), CASES, ids=[f"{name}:{label(place)}:{how}" for name, place, how in CASES]
)
def test_a_bad_record_is_one_sentence(
    eopc: Eopc, tmp_path: Path, name: str, place: tuple[str | int, ...], how: str
) -> None:
    """A key that is missing, misspelled, of another type or far too large is refused, and the file is named."""
    root = write_bundle(tmp_path / "box")
    record = spoiled(read_record(root, name), place, how)
    if name == "manifest.json":
        (root / name).write_text(json.dumps(record))
    else:
        replace_file(root, name, json.dumps(record))
    message = assert_refused(lambda: eopc("inspect", root))
    assert Path(name).name in message or place[0] == "files"


def test_there_are_many_distinct_records() -> None:
    """The suite does not shrink unseen."""
    assert len(set(CASES)) == len(CASES) >= 200
