"""`eopc inspect`, `eopc eval` and `eopc energy` of a bundle: exact figures and clear mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from eopc_runtime.bundle_files import sha256_file
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import PromptError
from eopc_runtime.evaluation.texts import cut_windows, window_nll
from eopc_runtime.provenance import Calibration, Conformal, Hull

Eopc = Callable[..., Result]


def test_energy_commands_read_a_bundle(eopc: Eopc, bundle: Path) -> None:
    """Every tier of a bundle is predicted, and its sweet spot says that nothing was measured."""
    value = json.loads(eopc("energy", "predict", bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--json").stdout)
    assert [(p["name"], p["energy_j"]) for p in value["predictions"]] == [("t0", 16.0), ("t1", 4.0)]
    assert {p["energy_source"] for p in value["predictions"]} == {"prior"}
    spot = json.loads(eopc("energy", "sweetspot", bundle, "--json").stdout)
    assert (spot["name"], spot["n_out_star"]) == ("t1", None)
    assert "not measured" in spot["warnings"][0]


def test_inspect_shows_tiers_and_files(eopc: Eopc, bundle: Path) -> None:
    """The JSON has tiers, files and ok; the table names every tier and file."""
    value = json.loads(eopc("inspect", bundle, "--json").stdout)
    assert value["ok"] is True
    assert [tier["tier"] for tier in value["tiers"]] == ["t0", "t1"]
    assert value["tiers"][1]["prices"]["step_j0"] == 1.0
    assert {entry["path"] for entry in value["files"]} >= {"energy.json", "tiers/t0/model.onnx"}
    text = eopc("inspect", bundle).stdout
    assert "10.50 (dense 9.50)" in text
    assert "t1: lower half of the FFN" in text
    assert "all verified" in text


def test_inspect_shows_where_calibrated_prices_hold(eopc: Eopc, bundle: Path) -> None:
    """Mode, range and level, in words and in JSON; a prior has none of them."""
    assert json.loads(eopc("inspect", bundle, "--json").stdout)["energy"]["calibration"] is None
    calibration = Calibration(Hull((8, 64), (4, 32)), Conformal(0.05, 19, 0.02, 0.95), 31, {"t0": 0.006}, None, None)
    tiers = tuple(TierEnergy(f"t{i}", 0.0, s / 8, 0.0, s, 0.0, 0.0, "calibrated") for i, s in enumerate((4.0, 1.0)))
    table = EnergyTable("fake", "calibrated", 0.02, tiers, "MAXN", calibration)
    (bundle / "energy.json").write_text(json.dumps(table.to_json()))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = bundle / entry["path"]
        entry["sha256"], entry["bytes"] = sha256_file(path), path.stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    energy = json.loads(eopc("inspect", bundle, "--json").stdout)["energy"]
    assert (energy["mode"], energy["modes"]) == ("MAXN", ["MAXN"])
    assert energy["calibration"]["hull"] == {"n_in": [8, 64], "n_out": [4, 32]}
    text = eopc("inspect", bundle).stdout
    assert "calibrated in power mode MAXN for 8 to 64 prompt and 4 to 32 new tokens" in text
    assert "the margin holds for 95% of sequences" in text


def test_inspect_of_a_damaged_or_missing_bundle_exits_1_with_the_reason(
    eopc: Eopc, bundle: Path, tmp_path: Path
) -> None:
    """A changed byte and a missing folder are named on stderr; stdout stays empty."""
    (bundle / "tiers/t1/model.onnx").write_bytes(b"not a grapH")
    for path, words in [(bundle, "tiers/t1/model.onnx does not match"), (tmp_path / "no", "does not exist")]:
        result = eopc("inspect", path, "--json")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert words in result.stderr


def test_eval_computes_perplexity_over_whole_windows(eopc: Eopc, fake_tier: Any, bundle: Path, tmp_path: Path) -> None:
    """Two windows of 4, tail dropped: the perplexity follows from the fake model's logits."""
    text = tmp_path / "text.txt"
    text.write_text("abcd" + "bcxy" + "zz")
    result = eopc("eval", bundle, "--text", text, "--ctx", 4, "--json")
    norm = math.log(math.exp(fake_tier.certain) + fake_tier.vocab - 1)
    # of the six predicted bytes five follow their predecessor; x after c does not
    want = math.exp((6 * norm - 5 * fake_tier.certain) / 6)
    tiers = json.loads(result.stdout)["tiers"]
    assert [tier["tier"] for tier in tiers] == ["t0", "t1"]
    for tier in tiers:
        assert tier["tokens"] == 6
        assert tier["perplexity"] == pytest.approx(want, rel=1e-6)  # fp32 logits
    assert result.stderr.count("perplexity") == 2


def test_eval_of_a_text_shorter_than_a_window_uses_all_of_it(eopc: Eopc, bundle: Path, tmp_path: Path) -> None:
    """A short text is one short window; --max-tokens cuts it further; --tier picks one tier."""
    text = tmp_path / "text.txt"
    text.write_text("abcdef")
    one = json.loads(eopc("eval", bundle, "--text", text, "--tier", "t1", "--ctx", 32, "--json").stdout)
    assert [(t["tier"], t["tokens"]) for t in one["tiers"]] == [("t1", 5)]
    cut = json.loads(eopc("eval", bundle, "--text", text, "--max-tokens", 3, "--ctx", 32, "--json").stdout)
    assert cut["tiers"][0]["tokens"] == 2
    assert "perplexity" in eopc("eval", bundle, "--text", text, "--ctx", 32).stdout


def test_eval_behind_prompts_scores_what_follows_them(eopc: Eopc, fake_tier: Any, bundle: Path, tmp_path: Path) -> None:
    """The prompt's own tokens count in no figure; the token that the prompt predicts does."""
    window = [1, 2, 3, 9, 10]
    assert window_nll(fake_tier, window, prompt=4) == pytest.approx(window_nll(fake_tier, [9, 10]))
    assert window_nll(fake_tier, window, prompt=3) > window_nll(fake_tier, window, prompt=4)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh")
    rows = json.loads(eopc("eval", bundle, "--text", text, "--ctx", 4, "--prompt-tokens", 3, "--json").stdout)
    assert (rows["prompt_tokens"], rows["tiers"][0]["tokens"]) == (3, 2)
    result = eopc("eval", bundle, "--text", text, "--ctx", 4, "--prompt-tokens", 4)
    assert result.exit_code != 0 and "leaves nothing to score" in result.stderr


def test_eval_mistakes_are_clear(eopc: Eopc, bundle: Path, tmp_path: Path) -> None:
    """Too little text, other encodings, and windows beyond the context are errors with the reason."""
    text = tmp_path / "text.txt"
    for raw, ctx, words in [
        (b"a", 32, "at least 2"),
        (b"\xff\xfea", 32, "not UTF-8"),
        (b"abc", 65, "context of 64"),
    ]:
        text.write_bytes(raw)
        result = eopc("eval", bundle, "--text", text, "--ctx", ctx)
        assert result.exit_code == 1
        assert words in result.stderr
    assert eopc("eval", bundle, "--text", tmp_path / "no.txt").exit_code == 2


def test_windows_and_their_parts(fake_tier: Any) -> None:
    """Windows do not overlap, and running one in parts gives the same likelihood."""
    assert cut_windows(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(range(3), 4) == [[0, 1, 2]]
    with pytest.raises(PromptError, match="1 token"):
        cut_windows([1], 4)
    window = [1, 2, 3, 9, 10, 11, 5]
    whole = window_nll(fake_tier, window)
    assert window_nll(fake_tier, window, part=2) == pytest.approx(whole, rel=1e-12)
