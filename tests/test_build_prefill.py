"""A ladder with a tier whose prompts skip the deepest layers, from the build to the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import BundleError
from eopc_runtime.runners import ort as ort_module
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.session import Session

pytest.importorskip("torch", reason="the compiler extra is not installed")

PROMPT = list(range(40, 70))
DEPTH = 2


@pytest.fixture(scope="module")
def pruned(prefill_bundle: Path) -> Bundle:
    """t0, a tier whose prompts run through 2 of 4 layers, and the tiers below; read only."""
    return Bundle.open(prefill_bundle)


def test_the_tier_stands_below_t0_and_keeps_everything(pruned: Bundle) -> None:
    """All layers and weights, a prefill graph of its own, less per prompt token and the same for steps."""
    t0, t1, *below = pruned.manifest.tiers
    assert t1.prefill is not None and t1.prefill.depth == DEPTH
    assert t1.layers == t0.layers and t1.params == t0.params
    assert below and all(t.prefill is None for t in (t0, *below))
    prices = pruned.energy.tiers
    assert prices[1].step_j(9, 3) == prices[0].step_j(9, 3)
    assert prices[1].prefill_j1 < 0.7 * prices[0].prefill_j1 and prices[1].prefill_j2 == prices[0].prefill_j2 / 2


def test_its_own_bytes_are_keys_and_values_of_skipped_layers(pruned: Bundle) -> None:
    """Two layers of 2 x 2 x 16 columns of 64 inputs, fp32: nothing else is stored twice."""
    own = {e.path: e.bytes for e in pruned.manifest.files if e.path.startswith("tiers/t1/")}
    assert set(own) == {f"tiers/t1/{n}" for n in ("prefill.onnx", "decode.onnx", "extras.bin", "mask.json")}
    assert own["tiers/t1/extras.bin"] == 2 * (2 * 2 * 16) * 64 * 4


def test_its_parity_with_pytorch_was_measured(pruned: Bundle) -> None:
    """Behind the pruned prompt, over 16 cached steps."""
    for tier in pruned.manifest.tiers:
        assert 0 < float(str(tier.parity["max_logit_error"])) <= float(str(tier.parity["tolerance"]))


def test_a_prompt_of_one_token_is_the_dense_one(pruned: Bundle) -> None:
    """It is its own boundary: bit for bit t0's logits."""
    first = [OrtTier(pruned, info) for info in pruned.manifest.tiers[:2]]
    one, two = (runner.prefill(runner.new_cache(), PROMPT[:1]) for runner in first)
    assert np.array_equal(one, two)


def test_layers_that_run_hold_what_t0_holds(pruned: Bundle) -> None:
    """Keys and values up to the first skipped layer, which writes before it is skipped; the next differ."""
    caches = []
    for info in pruned.manifest.tiers[:2]:
        runner = OrtTier(pruned, info)
        caches.append(cache := runner.new_cache())
        logits = runner.prefill(cache, PROMPT)
        assert logits.shape == (1, pruned.manifest.model.vocab_size) and cache.length == len(PROMPT)
    for layer in range(DEPTH + 1):
        a, b = (c.keys[layer][:, :, : len(PROMPT)] for c in caches)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_skipping_layers_changes_the_answer(pruned: Bundle) -> None:
    """The logits differ from t0's: the last layer's keys and values are of another layer's input."""
    one, two = (
        runner.prefill(runner.new_cache(), PROMPT)
        for runner in (OrtTier(pruned, info) for info in pruned.manifest.tiers[:2])
    )
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 7, 29])
def test_a_long_prompt_runs_in_chunks(pruned: Bundle, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The boundary token is the prompt's last one, not that of every chunk."""
    runner = OrtTier(pruned, pruned.tier("t1"))
    whole = runner.prefill(runner.new_cache(), PROMPT)
    monkeypatch.setattr(ort_module, "PREFILL_CHUNK", chunk)
    np.testing.assert_allclose(runner.prefill(runner.new_cache(), PROMPT), whole, atol=1e-4)


def test_a_session_answers_behind_a_pruned_prompt(pruned: Bundle) -> None:
    """The first token is the one that the runner's prefill gives, and the ledger books the tier's own price."""
    with Session.open(pruned.root) as session:
        result = session.generate("hello there", raw=True, tier="t1", max_new_tokens=1)
        ids = session.encode_prompt("hello there", raw=True)
    runner = OrtTier(pruned, pruned.tier("t1"))
    token = int(runner.prefill(runner.new_cache(), ids)[-1].argmax())
    assert result.plan == "t1" and result.tiers_used == ("t1",)
    assert result.text == session.tokenizer.decode([token])
    assert result.energy_j == pytest.approx(pruned.energy.prefill_price_j(1, len(ids)))


def test_lower_tiers_go_on_behind_it(pruned: Bundle) -> None:
    """A cache that a pruned prompt has filled is handed down like any other."""
    upper, lower = (OrtTier(pruned, pruned.tier(t)) for t in ("t1", pruned.manifest.tiers[-1].tier))
    cache = upper.new_cache()
    upper.prefill(cache, PROMPT)
    handed = lower.adopt(cache)
    assert handed.length == len(PROMPT) and np.isfinite(lower.forward(handed, [5])).all()


def test_eval_tells_it_from_t0_only_behind_prompts(pruned: Bundle, tmp_path: Path) -> None:
    """Without a prompt the whole model scores every token; behind one, what it skipped is missed."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    command = ["eval", str(pruned.root), "--text", str(text), "--ctx", "64", "--runner", "ort", "--json"]
    plain, behind = (
        json.loads(CliRunner().invoke(cli, [*command, *more]).stdout)["tiers"]
        for more in ([], ["--prompt-tokens", "40"])
    )
    assert plain[1]["perplexity"] == pytest.approx(plain[0]["perplexity"], rel=1e-6)
    assert abs(behind[1]["perplexity"] / behind[0]["perplexity"] - 1) > 1e-3
    assert (plain[0]["tokens"], behind[0]["tokens"]) == (2 * 63, 2 * 24)


def test_the_plan_says_how_deep_prompts_run(pruned: Bundle) -> None:
    """plan.json names the pair of every tier and the depth."""
    rows = json.loads((pruned.root / "plan.json").read_text(encoding="utf-8"))["tiers"]
    assert [r["prefill_depth"] for r in rows][:2] == [None, DEPTH]
    assert rows[1]["plan"] == "t1" and all(r["plan"] in (f"t0>{r['tier']}", f"t1>{r['tier']}") for r in rows[2:])


@pytest.mark.parametrize(
    ("depth", "words"), [("0", "between 1 and 3"), ("4", "between 1 and 3"), ("deep", "not auto, all or a number")]
)
def test_a_depth_that_cannot_be_is_refused(tiny_checkpoint: Path, tmp_path: Path, depth: str, words: str) -> None:
    """Before anything is written."""
    target = tmp_path / "b.eopc"
    args = ["build", str(tiny_checkpoint), "--device", "cpu", "-o", str(target), "--prefill-depth", depth]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code in (1, 2) and words in done.output
    assert not target.exists()


def test_a_manifest_whose_depth_cannot_be_is_refused(pruned: Bundle, tmp_path: Path) -> None:
    """Depth and cost belong together, and some layer is skipped."""
    from eopc_runtime.bundle import Manifest

    good = pruned.manifest
    t1 = good.tiers[1]
    assert t1.prefill is not None
    for bad in (replace(t1, prefill=replace(t1.prefill, depth=4)), replace(t1, prefill=None)):
        content = replace(good, tiers=(good.tiers[0], bad, *good.tiers[2:])).to_json()
        with pytest.raises(BundleError):
            Manifest.from_json(content)
    assert Manifest.from_json(good.to_json()) == good
