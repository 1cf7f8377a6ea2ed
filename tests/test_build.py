"""What the main job writes on a tiny checkpoint, and how the runtime runs it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the compiler extra is not installed")

from eopc_compiler.build import build
from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import DeviceError
from eopc_runtime.runners import ort as ort_runner
from eopc_runtime.runners import ort_pool
from eopc_runtime.runners.fit import tier_bytes, weight_bytes
from eopc_runtime.runners.ort import OrtTier
from eopc_runtime.runners.ort_pool import NO_VNNI, STEPS_DO_NOT_FIT, OrtPool
from eopc_runtime.session import Session

Settings = Callable[..., Any]


def run_cli(*args: str) -> Any:
    """Run `eopc` in this process."""
    return CliRunner().invoke(cli, list(args))


def test_three_budgets_give_three_nested_tiers_within_their_budgets(tiny_bundle: Path) -> None:
    """Every tier's price at the reference workload is within its budget, and each tier lies inside the one above."""
    manifest = Bundle.open(tiny_bundle).manifest  # opening checks nesting and hashes
    assert [t.tier for t in manifest.tiers] == ["t0", "t1", "t2"]
    for tier in manifest.tiers:
        assert tier.budget_j is not None
        assert tier.energy_j <= tier.budget_j
    sizes = [t.params for t in manifest.tiers]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] < sizes[0]
    assert "dense" in manifest.tiers[0].note


def test_the_manifest_carries_measured_parity_and_perplexity(tiny_bundle: Path) -> None:
    """Parity errors are measured numbers within tolerance, and t0's perplexity equals PyTorch's within 0.1 %."""
    for tier in Bundle.open(tiny_bundle).manifest.tiers:
        error, tolerance = tier.parity["max_logit_error"], tier.parity["tolerance"]
        assert isinstance(error, float) and isinstance(tolerance, float)
        assert 0 < error <= tolerance
        assert tier.parity["decode_steps"] == 16
    t0 = Bundle.open(tiny_bundle).manifest.tiers[0]
    assert t0.perplexity == pytest.approx(t0.perplexity_dense, rel=1e-3)


def test_no_path_of_the_machine_is_written(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """Neither JSON files nor graphs name the folder the checkpoint was read from."""
    secret = str(tiny_checkpoint.parent).encode()
    for file in tiny_bundle.rglob("*"):
        assert not file.is_file() or secret not in file.read_bytes(), file


def test_tiers_share_one_weight_file(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """The weights of three tiers are those of one; nothing is stored again for a smaller tier."""
    build(build_settings(tiny_checkpoint, tmp_path / "one", budgets_j=(2.0,)))
    one, three = ((folder / "weights.bin").stat().st_size for folder in (tmp_path / "one", tiny_bundle))
    assert three <= one * 1.02  # alignment of more pieces to 64 bytes, on a model of 0.4 MB


def test_a_dry_run_writes_the_plan_and_nothing_else(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """--dry-run leaves plan.json with joules saved and loss added per tier; building over it afterwards works."""
    output = tmp_path / "out"
    build(build_settings(tiny_checkpoint, output, dry_run=True))
    assert [p.name for p in output.iterdir()] == ["plan.json"]
    tiers = json.loads((output / "plan.json").read_text())["tiers"]
    assert tiers[1]["energy_saved_j"] > 0
    assert build(build_settings(tiny_checkpoint, output)).bundle == output
    assert Bundle.open(output).manifest.tiers


def test_a_build_leaves_a_report_that_the_manifest_does_not_list(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """It shows every tier's plan with its measured loss; a build over the bundle replaces both."""
    page = (tiny_bundle / "report.html").read_text(encoding="utf-8")
    manifest = Bundle.open(tiny_bundle, verify=True).manifest
    assert "report.html" not in {entry.path for entry in manifest.files}
    plan = json.loads((tiny_bundle / "plan.json").read_text())
    for tier in plan["tiers"][1:]:
        assert f"{tier['loss_added']:+.4f}" in page
        saved_j = sum(removal["energy_saved_j"] for removal in tier["removed"])
        above_j = plan["tiers"][int(tier["tier"][1:]) - 1]["energy_saved_j"]
        assert saved_j == pytest.approx(tier["energy_saved_j"] - above_j, rel=0.05)  # prices are not quite additive
    output = tmp_path / "out"
    build(build_settings(tiny_checkpoint, output, budgets_j=(2.0,)))
    (output / "report.html").write_text("old")
    build(build_settings(tiny_checkpoint, output, budgets_j=(2.0,)))
    assert "<!doctype html>" in (output / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def masked(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, build_settings: Settings
) -> tuple[Path, list[str]]:
    """A bundle built from a given mask, and what its progress line said."""
    keep = {
        "layers": [
            {"source_layer": 0, "kv_groups": [1], "ffn_channels": list(range(64, 192))},
            {"source_layer": 3, "kv_groups": [1, 0], "ffn_channels": list(range(64))},
        ]
    }
    folder, ticks = tmp_path_factory.mktemp("masked"), list[str]()
    (folder / "mask.json").write_text(json.dumps(keep))
    args = build_settings(tiny_checkpoint, folder / "out", masks=(folder / "mask.json",), budgets_j=(2.0,))
    return build(args, tick=ticks.append).bundle, ticks


def test_given_masks_are_built_as_given(masked: tuple[Path, list[str]]) -> None:
    """--mask FILE: the tier keeps exactly the layers, groups and channels of the file, and computes with them."""
    bundle, _ = masked
    manifest = Bundle.open(bundle).manifest
    assert [(x.source_layer, x.kv_heads, x.ffn) for x in manifest.tiers[1].layers] == [(0, 1, 128), (3, 2, 64)]
    written = json.loads((bundle / manifest.tiers[1].mask).read_text())
    assert [sorted(x["ffn_channels"]) for x in written["layers"]] == [list(range(64, 192)), list(range(64))]


def test_the_weight_bytes_are_those_of_all_weight_files(masked: tuple[Path, list[str]]) -> None:
    """weights.bin and what the repaired tier has of its own; every tensor of this model fills its 64 bytes."""
    bundle, _ = masked
    sizes = [(bundle / name).stat().st_size for name in ("weights.bin", "tiers/t1/extras.bin")]
    assert min(sizes) > 0
    assert Bundle.open(bundle).manifest.calibration["weight_bytes"] == {"float32": sum(sizes)}


def test_whatever_may_take_long_is_counted(masked: tuple[Path, list[str]]) -> None:
    """The progress line reaches the end of every count, among them the repair, which walks all layers."""
    _, ticks = masked
    counts = {what: tuple(count.split()[0].split("/")) for what, count in (tick.split(": ") for tick in ticks)}
    assert counts["repairing t1"] == ("4", "4")
    assert {"sensitivity of the loss", "observing the dense model", "writing fp32 weights"} <= set(counts)
    assert {"loss on selection.text", "t0 on dialogue", "t1 on dialogue"} <= set(counts)
    assert all(done == total for done, total in counts.values())


def assert_parts_equal_whole(tier: OrtTier, tokens: list[int], prefilled: int) -> None:
    """Prefilling a part and decoding the rest must give the last logits of one whole prefill."""
    whole = tier.forward(tier.new_cache(), tokens)[-1].copy()
    cache = tier.new_cache()
    tier.forward(cache, tokens[:prefilled])
    for token in tokens[prefilled:]:
        last = tier.forward(cache, [token])[-1]
    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-4 * float(np.abs(whole).max()))


def test_a_prompt_in_parts_equals_a_prompt_at_once(tiny_bundle: Path) -> None:
    """Prefill 20 tokens, or prefill 5 and decode 15: the same logits (fp32, other summation order: 1e-4)."""
    tier = OrtPool(Bundle.open(tiny_bundle)).get("t1")
    tokens = list(range(40, 60))
    assert_parts_equal_whole(tier, tokens, 5)


def test_a_cache_grows_without_losing_what_it_holds(tiny_bundle: Path) -> None:
    """Crossing a growth step (128 slots) leaves the logits what one large prefill gives."""
    tier = OrtPool(Bundle.open(tiny_bundle)).get("t0")
    tokens = [(7 * i) % 250 for i in range(140)]
    assert_parts_equal_whole(tier, tokens, 120)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_a_long_prompt_runs_in_chunks(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """All logits of a prompt cut into chunks, the last one short, are those of the prompt in one piece."""
    tier = OrtPool(Bundle.open(tiny_bundle)).get("t0")
    tokens = list(range(40, 60))
    whole = tier.forward(tier.new_cache(), tokens, logits="all")
    monkeypatch.setattr(ort_runner, "PREFILL_CHUNK", chunk)
    cache = tier.new_cache()
    pieces = tier.forward(cache, tokens, logits="all")
    assert cache.length == len(tokens) and pieces.shape == whole.shape
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4 * float(np.abs(whole).max()))
    np.testing.assert_allclose(tier.forward(tier.new_cache(), tokens)[-1], pieces[-1], rtol=1e-4, atol=1e-4)


def test_an_adopted_cache_holds_the_kept_heads_of_the_kept_layers(tiny_bundle: Path) -> None:
    """Handing a cache down the ladder copies prefixes; handing it up is refused."""
    bundle = Bundle.open(tiny_bundle)
    pool = OrtPool(bundle, max_resident_bytes=1 << 40)
    upper, lower = pool.get("t0"), pool.get("t2")
    cache = upper.new_cache()
    upper.forward(cache, list(range(30)))
    adopted = lower.adopt(cache)
    sources = [x.source_layer for x in bundle.tier("t0").layers]
    for mine, layer in enumerate(bundle.tier("t2").layers):
        theirs = cache.keys[sources.index(layer.source_layer)]
        np.testing.assert_array_equal(adopted.keys[mine][:, :, :30], theirs[:, : layer.kv_heads, :30])
    lower.forward(adopted, [31])
    assert adopted.length == 31
    with pytest.raises(ValueError, match="down the ladder"):
        upper.adopt(adopted)


def test_the_pool_lets_the_least_recently_used_tier_go(tiny_bundle: Path) -> None:
    """Loaded tiers stay within the byte limit, and a tier that was let go loads again."""
    bundle = Bundle.open(tiny_bundle)
    largest = max(t.cost.weight_bytes for t in bundle.manifest.tiers)
    pool = OrtPool(bundle, max_resident_bytes=largest)
    for name in ("t0", "t1", "t0"):
        pool.get(name)
        assert pool.resident == (name,)


def test_a_server_keeps_all_tiers_loaded_where_memory_allows_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most half of the memory left; else tiers come and go as they do elsewhere."""
    bundle = Bundle.open(tiny_bundle)
    names, needed = tuple(t.tier for t in bundle.manifest.tiers), sum(map(weight_bytes, bundle.manifest.tiers))
    pool = OrtPool(bundle)
    monkeypatch.setattr(ort_pool, "left_bytes", lambda: 2 * needed - 1)
    assert not pool.keep_loaded() and pool.resident == ()
    monkeypatch.setattr(ort_pool, "left_bytes", lambda: 2 * needed)
    assert pool.keep_loaded() and pool.resident == names
    for name in (*names, *names[::-1]):
        pool.get(name)
        assert set(pool.resident) == set(names)


def test_a_forced_start_steps_down_and_keeps_the_budget(tiny_bundle: Path) -> None:
    """Started on t0 with joules for t2 only, a sequence steps down on the real graphs and never overspends."""
    with Session.open(tiny_bundle) as session:
        table = session.bundle.energy
        prompt_j = table.prefill_price_j(0, 30)
        budget = prompt_j + table.steps_price_j(2, 30, 0, 45)
        result = session.generate("a" * 30, budget=budget, max_new_tokens=40, tier="t0", raw=True)
    assert result.energy_j <= budget
    assert result.tiers_used[0] == "t0"
    assert result.finish_reason in {"length", "stop", "budget"}
    if result.finish_reason != "stop":
        assert len(result.tiers_used) > 1


def test_run_prints_the_documented_json(tiny_bundle: Path) -> None:
    """`eopc run --json` prints one object with the contract's keys, within the budget."""
    result = run_cli("run", str(tiny_bundle), "--prompt", "hello", "--budget", "1J", "--max-new-tokens", "5", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["energy_j"] <= 1.0
    assert content["energy_source"] == "proxy"
    assert content["completion_tokens"] <= 5


def test_run_takes_only_what_the_owner_of_a_key_signed(tiny_bundle: Path, tmp_path: Path) -> None:
    """With --key: an unsigned bundle is refused in one sentence, a signed one answers, a changed one is refused."""
    pytest.importorskip("cryptography", reason="the sign extra is not installed")
    key, copy = tmp_path / "key", shutil.copytree(tiny_bundle, tmp_path / "signed.eopc")
    assert run_cli("keygen", str(key)).exit_code == 0
    command = ["run", str(copy), "--prompt", "hello", "--max-new-tokens", "2", "--key", f"{key}.pub"]
    refused = run_cli(*command)
    assert refused.exit_code == 1 and "is not signed" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert run_cli("sign", str(copy), "--key", str(key)).exit_code == 0
    assert run_cli(*command).exit_code == 0
    with (copy / "weights.bin").open("r+b") as file:
        file.write(b"changed")
    changed = run_cli(*command)
    assert changed.exit_code == 1 and "weights.bin" in changed.stderr


def test_eval_through_the_runtime_equals_torch(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`eopc eval` of t0 gives transformers' perplexity of the same windows within 0.1 %."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 12)
    result = run_cli("eval", str(tiny_bundle), "--text", str(text), "--ctx", "64", "--tier", "t0", "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["tiers"]
    ids = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)(text.read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert row["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)


def test_8_bit_floats_are_for_devices_that_multiply_them(
    tiny_checkpoint: Path, build_settings: Callable[..., Any], tmp_path: Path
) -> None:
    """An H100's bundle holds them, inputs rounded too, and is parity-checked; Orin's profile does not offer them."""
    import onnx

    args = build_settings(tiny_checkpoint, tmp_path / "h100.eopc", device="h100", precision=("fp8",), proxy="none")
    bundle = Bundle.open(build(replace(args, budgets_j=(1000.0,))).bundle)
    assert bundle.manifest.precision == "fp8"
    graph = onnx.load(str(bundle.path(bundle.manifest.tiers[0].graph)), load_external_data=False).graph
    rounded = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(rounded) == 3 * len(bundle.manifest.tiers[0].layers)  # q/k/v, gate and up
    types = {t.data_type for t in graph.initializer if len(t.dims) == 2 and "proj" in t.name}
    assert types == {onnx.TensorProto.FLOAT8E4M3FN}
    with Session.open(bundle.root) as session:
        assert session.generate("abcd", max_new_tokens=3, raw=True).completion_tokens == 3
    with pytest.raises(DeviceError, match="fp8"):
        build(replace(args, device="orin", output=tmp_path / "orin.eopc"))


@pytest.fixture(scope="module")
def codes_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, build_settings: Settings) -> Bundle:
    """Two tiers in int8 for a CPU: prompts round their inputs, single tokens have a graph of their own."""
    output = tmp_path_factory.mktemp("codes") / "cpu.eopc"
    return Bundle.open(
        build(build_settings(tiny_checkpoint, output, precision=("int8",), budgets_j=(2.0, 0.47))).bundle
    )


def test_single_tokens_run_through_their_own_graph_and_prompts_do_not(codes_bundle: Bundle) -> None:
    """Prompts are the same to the bit with and without it; a step differs by what rounding its inputs would do."""
    info = codes_bundle.manifest.tiers[1]
    assert info.step == "tiers/t1/step.onnx" and info.step in info.graphs
    with_steps, without = (OrtTier(codes_bundle, info, 1, own_steps=own) for own in (True, False))
    caches = [tier.new_cache() for tier in (with_steps, without)]
    tokens = [(7 * i) % 250 for i in range(40)]
    pairs = [
        [tier.forward(cache, part).copy() for tier, cache in zip((with_steps, without), caches, strict=True)]
        for part in (tokens, [3], [5])
    ]
    np.testing.assert_array_equal(*pairs[0])
    for own, shared in pairs[1:]:
        assert 0 < np.abs(own - shared).max() < 0.1 * np.abs(shared).max()  # seen: 0.03


def test_weights_of_single_tokens_count_and_are_left_out_where_memory_does_not_hold_them(
    codes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool counts weights twice; with memory for them once, it answers through one graph, and says so."""
    manifest, info = codes_bundle.manifest, codes_bundle.manifest.tiers[0]
    twice = tier_bytes(manifest, info, ort_runner.GROWTH) + info.cost.weight_bytes
    for left, notes in ((twice, ()), (twice - 1, (STEPS_DO_NOT_FIT,))):
        monkeypatch.setattr(ort_pool, "left_bytes", lambda left=left: left)
        pool = OrtPool(codes_bundle, 1, max_resident_bytes=2 * info.cost.weight_bytes)
        tier = pool.get("t0")
        cache = tier.new_cache()
        tier.forward(cache, [1, 2, 3])
        assert tier.forward(cache, [4]).shape == (1, manifest.model.vocab_size)
        assert pool.notes == notes
        pool.get("t1")
        assert pool.resident == ("t1",)  # counted once, both would stay


def test_codes_that_never_overflow_run_as_codes_and_others_in_floating_point_where_they_would(
    codes_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle whose manifest does not say so may hold larger codes: on a CPU without VNNI a note says how it runs."""
    onnx = pytest.importorskip("onnx")
    root = shutil.copytree(codes_bundle.root, tmp_path / "cpu.eopc")
    model = onnx.load(str(root / "tiers/t0/model.onnx"), load_external_data=False)
    onnx.external_data_helper.load_external_data_for_model(model, str(root))
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2]
    reads_codes = [t for t in matrices if re.search(r"(qkv|gate|up)_proj.*data", t.name)]
    assert len(reads_codes) >= 3
    for codes in (onnx.numpy_helper.to_array(t).astype(int) for t in reads_codes):
        assert np.abs(codes).max() > 64 >= np.abs(codes[::2] + codes[1::2]).max() / 2
    manifest = root / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content["exact_products"]
    monkeypatch.setattr(ort_runner, "int8_products_overflow", lambda: True)
    for notes in ((), (NO_VNNI,)):
        with Session.open(root, verify=False) as session:
            assert session.generate("abc", max_new_tokens=2).completion_tokens >= 1
            assert session.notes == notes
        content.pop("exact_products", None)
        manifest.write_text(json.dumps(content), encoding="utf-8")
