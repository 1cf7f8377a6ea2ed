"""A ladder with a tier whose prompts run some of their tokens through some layers, from the build to the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import BundleError
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.session import Session

pytest.importorskip("torch", reason="the compiler extra is not installed")
onnx = pytest.importorskip("onnx")

PROMPT = list(range(30, 120))
HALF = 0.5


@pytest.fixture(scope="module")
def tokens_bundle(
    cached_traces: None,
    tiny_checkpoint: Path,
    build_settings: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tier t1 whose prompts run half of their tokens through layers 1 and 2 of 0..3; read only."""
    from eopc_compiler.build import build

    output = tmp_path_factory.mktemp("tokens") / "tiny.eopc"
    build(build_settings(tiny_checkpoint, output, prefill_depth=1, prefill_tokens=HALF))
    return output


@pytest.fixture
def bundle(tokens_bundle: Path) -> Bundle:
    return Bundle.open(tokens_bundle)


def chosen_tokens(bundle: Bundle, root: Path, tokens: list[int]) -> list[list[int]]:
    """The tokens that each TopK of t1's prefill graph picks, from the graph as it ships with these as outputs."""
    import onnxruntime as ort

    info = bundle.manifest.tiers[1]
    assert info.prefill is not None
    model = onnx.load(bundle.path(info.prefill.graph), load_external_data=False)
    picks = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(p, onnx.TensorProto.INT64, None) for p in picks)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.root))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    count, head = len(tokens), bundle.manifest.model.head_dim
    mask = np.triu(np.full((count, count), -30000.0, np.float32), 1)[None, None]
    feeds: dict[str, Any] = {
        "input_ids": np.array([tokens]),
        "position_ids": np.arange(count)[None],
        "write_index": np.array([0]),
        "attn_mask": mask,
    }
    for i, layer in enumerate(info.layers):
        for kind in "kv":
            feeds[f"{kind}_cache_{i}"] = np.zeros((1, layer.kv_heads, count, head), np.float32)
    return [sorted(found.tolist()) for found in session.run(picks, feeds)]


def test_the_tier_says_what_runs_and_costs_less_per_token_of_a_prompt(bundle: Bundle) -> None:
    """Between t0 and a tier whose prompts skip the layers wholly; steps cost what they do on t0."""
    t0, t1 = bundle.manifest.tiers[:2]
    assert t1.prefill is not None and (t1.prefill.depth, t1.prefill.share) == (1, HALF)
    assert t1.layers == t0.layers and "50% of a prompt's tokens run through the last 3 of 4 layers" in t1.note
    prices = bundle.energy.tiers
    assert prices[1].step_j(9, 3) == prices[0].step_j(9, 3)
    assert 0.4 < prices[1].prefill_j1 / prices[0].prefill_j1 < 0.85


@pytest.mark.parametrize("count", [1, 32, 33, 90])
def test_the_graph_runs_as_many_tokens_as_are_priced(bundle: Bundle, tmp_path: Path, count: int) -> None:
    """32 and half of the rest, in both layers that choose: counted on the graph that ships."""
    picked = chosen_tokens(bundle, tmp_path, PROMPT[:count])
    assert [len(set(ids)) for ids in picked] == [min(count, 32) + -(-max(count - 32, 0) // 2)] * 2


def test_which_tokens_run_depends_on_the_prompt_alone(bundle: Bundle, tmp_path: Path) -> None:
    """The same again for the same prompt, others for another one."""
    one, again, other = (chosen_tokens(bundle, tmp_path, p) for p in (PROMPT, PROMPT, PROMPT[::-1]))
    assert one == again != other


def test_its_own_bytes_are_keys_and_values_of_the_last_layer_and_a_row_a_scorer(bundle: Bundle) -> None:
    """2 x 2 x 16 columns of 64 inputs in fp32, and 64 fp32 weights for each of two layers, aligned to 64 bytes."""
    (own,) = (e.bytes for e in bundle.manifest.files if e.path == "tiers/t1/extras.bin")
    assert own == 2 * 2 * 16 * 64 * 4 + 2 * 64 * 4


def test_its_parity_with_pytorch_was_measured(bundle: Bundle) -> None:
    """Behind the pruned prompt, over 16 cached steps."""
    parity = bundle.manifest.tiers[1].parity
    assert 0 < float(str(parity["max_logit_error"])) <= float(str(parity["tolerance"]))


def test_more_of_the_prompt_reaches_the_answer_than_where_it_skips_the_layers(bundle: Bundle) -> None:
    """Its logits are not t0's; every token's keys and values are there."""
    runners = [OrtTier(bundle, info) for info in bundle.manifest.tiers[:2]]
    caches = [runner.new_cache() for runner in runners]
    dense, ours = (runner.prefill(cache, PROMPT) for runner, cache in zip(runners, caches, strict=True))
    assert np.abs(dense - ours).max() > 1e-3
    assert all(np.abs(k[:, :, : len(PROMPT)]).sum((1, 3)).all() for k in caches[1].keys)


def test_a_session_answers_the_same_twice(bundle: Bundle) -> None:
    """Behind a prompt of which half the tokens ran through two layers, priced as the table says."""
    with Session.open(bundle.root) as session:
        one, two = (session.generate("hello there", raw=True, tier="t1", max_new_tokens=3) for _ in range(2))
        ids = session.encode_prompt("hello there", raw=True)
    assert one.text == two.text and one.plan == "t1"
    assert one.energy_j >= bundle.energy.prefill_price_j(1, len(ids))


def test_the_plan_and_the_report_say_so(bundle: Bundle) -> None:
    """plan.json names depth and share, report.html what half faded layers are."""
    rows = json.loads((bundle.root / "plan.json").read_text(encoding="utf-8"))["tiers"]
    assert [(r["prefill_depth"], r["prefill_share"]) for r in rows][:2] == [(None, None), (1, HALF)]
    assert "Half faded ones run for 50% of a prompt" in (bundle.root / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prefill-tokens", "0.3"], "must be a multiple of 1/16 between 0 and 1"),
        (["--prefill-tokens", "1"], "must be a multiple of 1/16 between 0 and 1"),
        (["--prefill-tokens", "nan"], "must be a multiple of 1/16 between 0 and 1"),
        (["--prefill-tokens", "half"], "not auto, none or a share"),
        (["--prefill-tokens", "0.5", "--prefill-depth", "all"], "--prefill-depth all has none"),
    ],
)
def test_a_share_that_cannot_be_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    """Before anything is written."""
    target = tmp_path / "b.eopc"
    done = CliRunner().invoke(cli, ["build", str(tiny_checkpoint), "--device", "cpu", "-o", str(target), *options])
    assert done.exit_code in (1, 2) and words in done.output
    assert not target.exists()


def test_a_manifest_with_a_share_that_cannot_be_is_refused(bundle: Bundle) -> None:
    """All of the tokens cannot skip a layer; a manifest without a share is one of an earlier version."""
    from eopc_runtime.bundle import Manifest

    good = bundle.manifest
    t1 = good.tiers[1]
    assert t1.prefill is not None
    content = replace(good, tiers=(good.tiers[0], replace(t1, prefill=replace(t1.prefill, share=1.0)))).to_json()
    with pytest.raises(BundleError, match="share"):
        Manifest.from_json(content)
    assert Manifest.from_json(good.to_json()) == good
