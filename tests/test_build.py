"""The main job on a tiny checkpoint: what it writes, what it refuses, and how it survives being stopped."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the compiler extra is not installed")

from eopc_compiler import pipeline
from eopc_compiler.build import build, check_output, restore_old
from eopc_compiler.cache import StageCache
from eopc_compiler.state import Workload
from eopc_compiler.weights import WeightWriter
from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import BundleError, EopcError, ParityError
from eopc_runtime.runners.ort import OrtPool, OrtTier
from eopc_runtime.session import Session

Settings = Callable[..., Any]


def run_cli(*args: str) -> Any:
    """Run `eopc` in this process."""
    return CliRunner().invoke(cli, list(args))


# --- what a build writes ------------------------------------------------------------------------------------------


def test_three_budgets_give_three_nested_tiers_within_their_budgets(tiny_bundle: Path) -> None:
    """Every tier's price at the reference workload is within its budget, and each tier lies inside the one above."""
    manifest = Bundle.open(tiny_bundle).manifest  # opening checks nesting and hashes
    assert [t.tier for t in manifest.tiers] == ["t0", "t1", "t2"]
    for tier in manifest.tiers:
        assert tier.budget_j is not None
        assert tier.energy_j <= tier.budget_j
    sizes = [t.params for t in manifest.tiers]
    assert sizes == sorted(set(sizes), reverse=True)
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


def test_tiers_share_one_weight_file(tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings) -> None:
    """A bundle of three tiers is at most 1.15 times a bundle of one; graphs and masks are all that is added."""

    def weights(budgets: tuple[float, ...], name: str) -> int:
        build(build_settings(tiny_checkpoint, tmp_path / name, budgets_j=budgets))
        return (tmp_path / name / "weights.bin").stat().st_size

    one, three = weights((2.0,), "one"), weights((2.0, 0.53, 0.47), "three")
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


def test_given_masks_are_built_as_given(tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings) -> None:
    """--mask FILE: the tier keeps exactly the layers, groups and channels of the file, and computes with them."""
    keep = {
        "layers": [
            {"source_layer": 0, "kv_groups": [1], "ffn_channels": list(range(64, 192))},
            {"source_layer": 3, "kv_groups": [1, 0], "ffn_channels": list(range(64))},
        ]
    }
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps(keep))
    build(build_settings(tiny_checkpoint, tmp_path / "out", masks=(mask,), budgets_j=(2.0,)))
    manifest = Bundle.open(tmp_path / "out").manifest
    assert [(x.source_layer, x.kv_heads, x.ffn) for x in manifest.tiers[1].layers] == [(0, 1, 128), (3, 2, 64)]
    written = json.loads((tmp_path / "out" / manifest.tiers[1].mask).read_text())
    assert [sorted(x["ffn_channels"]) for x in written["layers"]] == [list(range(64, 192)), list(range(64))]


# --- the runtime on a real bundle -----------------------------------------------------------------------------------


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


# --- stopping and resuming -------------------------------------------------------------------------------------------


def test_an_interrupted_build_leaves_nothing_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during export: no bundle; the same command reuses the finished stages and finishes."""
    args = build_settings(tiny_checkpoint, tmp_path / "out")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "export_tier", interrupt)
        build(args)
    assert not args.output.exists()
    said: list[str] = []
    result = build(args, said.append)
    assert set(result.resumed) >= {"observe", "plan", "weights"}
    assert any(line.startswith("reused from an earlier run: observe") for line in said)
    assert Bundle.open(args.output).manifest.tiers
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_wrong_graph_stops_the_build_and_keeps_the_old_bundle(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose norm epsilon is off fails the parity gate; the bundle that was there stays as it was."""
    args = build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,))
    build(args)
    before = (args.output / "manifest.json").read_bytes()
    real = pipeline.export_tier

    def broken(config: Any, *rest: Any) -> None:
        real(replace(config, rms_norm_eps=1.0), *rest)

    monkeypatch.setattr(pipeline, "export_tier", broken)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        build(args)
    assert (args.output / "manifest.json").read_bytes() == before
    assert Bundle.open(args.output).manifest.tiers


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while weights are written: a clear error, no bundle, no leftovers."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightWriter, "tensor", full)
    with pytest.raises(EopcError, match="disk is full"):
        build(build_settings(tiny_checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_recognised_through_a_library_s_own_error(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter that wraps ENOSPC in its own type gives the same sentence; other exceptions stay what they are."""

    def wrapped(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save the model") from error

    def other(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    args = build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,))
    for function, kind, said in ((other, RuntimeError, "a bug"), (wrapped, EopcError, "disk is full")):
        monkeypatch.setattr(pipeline, "export_tier", function)
        with pytest.raises(kind, match=said):
            build(args)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_does_not_stop_the_next(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """Half-written outputs and staging folders of a dead process are removed, and the build finishes."""
    (tmp_path / ".out.work/partial-weights-0").mkdir(parents=True)
    (tmp_path / ".out.work/partial-weights-0/weights.bin").write_bytes(b"half")
    (tmp_path / ".out.staged-1/tiers").mkdir(parents=True)
    build(build_settings(tiny_checkpoint, tmp_path / "out", budgets_j=(2.0,)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_stage_replaces_its_half_written_output(tmp_path: Path) -> None:
    """A stage whose output is a folder runs again after it failed half-way."""
    cache = StageCache(tmp_path / "work")

    def produce(path: Path, fail: bool) -> None:
        path.mkdir()
        if fail:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        cache.get("stage", {}, "", lambda path: produce(path, True))
    assert cache.get("stage", {}, "", lambda path: produce(path, False)).is_dir()
    assert cache.reused == []


def test_a_second_build_of_the_same_output_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """While one build holds the work folder another stops at once and touches nothing; afterwards it may run."""
    (tmp_path / ".out.staged-1").mkdir()  # what the first build is writing
    first = StageCache(tmp_path / ".out.work")
    args = build_settings(tiny_checkpoint, tmp_path / "out", dry_run=True)
    with pytest.raises(EopcError, match="another eopc build"):
        build(args)
    assert (tmp_path / ".out.staged-1").is_dir()
    first.close()
    assert build(args).resumed == ()


def test_a_build_killed_while_replacing_gives_the_old_bundle_back(tmp_path: Path) -> None:
    """The bundle put aside is renamed back when there is no new one, and removed when there is."""
    old, output = tmp_path / ".out.old-1", tmp_path / "out"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    restore_old(output)
    assert (output / "manifest.json").read_text() == "old"
    old.mkdir()
    restore_old(output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budgets", "0J"), "0J"),
        (("--budgets", "-1"), "-1"),
        (("--budgets", "5 parsecs"), "parsecs"),
        (("--budgets", ""), "budget"),
        (("--device", "orinn"), "orin"),
        (("--workload", "12"), "IN:OUT"),
        (("--precision", "int3"), "int3"),
        (("--workload", "3000:1"), "--context"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_1(
    tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Budgets, devices, workloads and precisions that make no sense are refused before anything is written."""
    result = run_cli("build", str(tiny_checkpoint), "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_budget_names_the_smallest_reachable(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A budget below the smallest mask is an error with the figure that would do, and nothing is written."""
    result = run_cli(
        "build", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--budgets", "1uJ,20J".replace("u", "m")
    )
    assert result.exit_code == 1
    assert "the smallest needs" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_a_bundle_is_not_overwritten(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """An output folder with other content is refused, and the content stays."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EopcError, match="not empty and not a bundle"):
        build(build_settings(tiny_checkpoint, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_bundle_with_a_stranger_in_it_is_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle may be replaced; not so a file in its folder, a web page's manifest.json, or a bundle by a plan."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    check_output(copy, dry_run=False)
    with pytest.raises(EopcError, match="a plan would spoil"):
        check_output(copy, dry_run=True)
    (copy / "tiers/notes.txt").write_text("years of work")
    with pytest.raises(EopcError, match=r"holds tiers/notes\.txt"):
        check_output(copy, dry_run=False)
    (copy / "manifest.json").write_text(json.dumps({"name": "web page", "files": []}))
    with pytest.raises(EopcError, match="not empty and not a bundle"):
        check_output(copy, dry_run=False)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("/dev/null", "is a file"),
        (".", "no name of its own"),
        ("file/out", "cannot be"),
        ("/proc/none/out", "cannot be"),
    ],
)
def test_an_output_that_cannot_be_is_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    """Devices, the current folder, and parents that are files or cannot be made are refused."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    result = run_cli("build", str(tiny_checkpoint), "-o", output)
    assert result.exit_code == 1
    assert said in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_as_output_is_followed(tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings) -> None:
    """-o LINK writes the folder the link leads to, and the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    build(build_settings(tiny_checkpoint, tmp_path / "out", dry_run=True))
    assert (tmp_path / "disk/out/plan.json").is_file()
    assert (tmp_path / "out").is_symlink()


def test_masks_and_workloads_are_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Settings
) -> None:
    """A mask that cannot be read, and a workload beyond the model's positions, stop before the model is observed."""
    output = tmp_path / "new/out"
    with pytest.raises(EopcError, match="cannot be read: No such file"):
        build(build_settings(tiny_checkpoint, output, masks=(tmp_path / "none.json",)))
    with pytest.raises(EopcError, match="does not fit the 512 positions"):
        build(build_settings(tiny_checkpoint, output, workload=Workload(500, 100), context=1024))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"].update(vocab_size=100),
        lambda m: m["model"].update(head_dim=8),
        lambda m: m.update(compute_dtype="float16"),
        lambda m: [t["layers"][0].update(kv_heads=1) for t in m["tiers"]],
    ],
)
def test_a_manifest_that_does_not_describe_its_graphs_is_refused(
    tiny_bundle: Path, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    """Vocabulary, head size, type or heads edited in the manifest: one sentence, not a wrong buffer."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    content = json.loads((copy / "manifest.json").read_text())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    result = run_cli("run", str(copy), "--prompt", "x", "--tier", "t0")
    assert result.exit_code == 1
    assert "is not the graph that manifest.json describes" in result.stderr


@pytest.mark.parametrize("command", ["run", "inspect", "eval", "bench"])
def test_a_flipped_byte_is_found_by_commands_that_verify(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    """One changed bit in weights.bin is refused with the file's name (bench of one tier checks sizes only)."""
    if command == "bench":
        pytest.skip("bench does not hash: it measures")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[1000] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    extra = {"run": ["--prompt", "x"], "eval": ["--text", __file__]}.get(command, [])
    result = run_cli(command, str(copy), *extra)
    assert result.exit_code == 1
    assert "weights.bin" in result.stderr


def test_a_graph_that_points_outside_the_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """External data with a path that leaves the bundle does not load, even with a consistent manifest."""
    onnx = pytest.importorskip("onnx")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    shutil.copy(tiny_bundle / "weights.bin", tmp_path / "outside.bin")
    path = copy / "tiers/t0/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    onnx.save(model, path)
    bundle = (
        Bundle.open(copy, verify=False)
        if path.stat().st_size == (tiny_bundle / "tiers/t0/model.onnx").stat().st_size
        else None
    )
    if bundle is None:
        with pytest.raises(BundleError):
            Bundle.open(copy)
    else:
        with pytest.raises(BundleError):
            OrtTier(bundle, bundle.tier("t0"))
