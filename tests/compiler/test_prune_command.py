"""`eopc prune` from the command line: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.cli.prune import prune as command
from eopc_compiler.model import build_model
from eopc_compiler.perplexity import cut_text, perplexity
from eopc_compiler.prune import METHODS, PruneArgs, prune
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import EopcError, UsageError

README = Path(__file__).parents[2] / "README.md"


def run_cli(*args: object) -> Any:
    """Run `eopc prune` in this process, with little calibration text."""
    return CliRunner().invoke(cli, ["prune", *map(str, args), "--calibration-tokens", "512"])


@pytest.fixture(scope="module")
def four_groups(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with four KV groups of two heads, hidden 64."""
    return write_checkpoint(tmp_path_factory.mktemp("groups") / "model", num_attention_heads=8, num_key_value_heads=4)


def test_json_counts_measures_and_names_what_was_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One object on stdout; counts equal the folder's, perplexities those of the two folders."""
    out = tmp_path / "out"
    result = run_cli(tiny_checkpoint, "--ratio", "0.3", "-o", out, "--text", f"readme={README}", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    written, dense = open_checkpoint(str(out)), open_checkpoint(str(tiny_checkpoint))
    assert content["output"] == str(out) and content["method"] == "iterative"
    assert (
        content["params"] == written.config.param_count == sum(written.tensor(n).numel() for n in written.tensor_names)
    )
    assert content["params_dense"] == dense.config.param_count
    blocks = written.config.block_param_count / dense.config.block_param_count
    assert content["ratio_blocks"] == pytest.approx(1 - blocks)
    assert content["ratio_units"] == pytest.approx(0.3, abs=0.02)  # half of one of 24 blocks
    assert [k["intermediate_size"] for k in content["kept"]] == [d.intermediate_size for d in written.config.layers]
    windows = cut_text(dense.tokenizer().encode(README.read_text(encoding="utf-8")))
    assert windows.shape == (24, 512)
    for name, checkpoint in (("dense", dense), ("pruned", written)):
        model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names}, 512)
        assert content["perplexity"]["readme"][name] == pytest.approx(perplexity(model, windows))
    assert content["perplexity"]["readme"]["dense"] != content["perplexity"]["readme"]["pruned"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_mask_json_and_tokenizer_travel_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Slicing the dense tensors by mask.json gives the written ones; the text becomes the same tokens."""
    run_cli(tiny_checkpoint, "--ratio", "0.3", "-o", tmp_path / "out", "--method", "random", "--seed", 3)
    written, dense = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tiny_checkpoint))
    for i, layer in enumerate(json.loads((tmp_path / "out/mask.json").read_text())["layers"]):
        assert layer["source_layer"] == i
        name = f"model.layers.{i}.mlp.up_proj.weight"
        assert torch.equal(written.tensor(name), dense.tensor(name)[layer["ffn_channels"]])
    assert written.tokenizer().encode("a b é") == dense.tokenizer().encode("a b é")
    assert (tmp_path / "out/chat_template.jinja").read_text() == (tiny_checkpoint / "chat_template.jinja").read_text()


@pytest.mark.parametrize("method", ["flap", "sleb"])
def test_ratio_zero_writes_the_dense_model_bit_for_bit(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    """Same config, same tensors, and no calibration text is read."""
    result = run_cli(tiny_checkpoint, "--ratio", "0", "-o", tmp_path / "out", "--method", method)
    assert result.exit_code == 0, result.stderr
    written, dense = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tiny_checkpoint))
    assert written.config == dense.config
    assert all(torch.equal(written.tensor(n), dense.tensor(n)) for n in dense.tensor_names)
    assert "reading calibration" not in result.stderr


@pytest.mark.parametrize("method", ["iterative", "obs", "wifv", "flap", "wanda-sp", "magnitude", "random"])
def test_uniform_is_loaded_by_transformers_with_the_same_logits(four_groups: Path, tmp_path: Path, method: str) -> None:
    """The whole way: command, folder, stock LlamaForCausalLM.

    30 % of four KV groups is one, but stock configs of this model accept only 1, 2 and 4: the FFN carries the ratio.
    """
    transformers = pytest.importorskip("transformers")
    arguments = ("--ratio", "0.3", "--uniform", "--method", method, "--steps", "2", "-o", tmp_path / "out")
    result = run_cli(four_groups, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "stock transformers loads it" in result.stdout
    written = open_checkpoint(str(tmp_path / "out"))
    # a group has as many parameters as 32 channels: 0.3 x (192 + 4 x 32) = 96 channels go
    assert {(d.num_key_value_heads, d.intermediate_size) for d in written.config.layers} == {(4, 96)}
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 258, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = build_model(written.config, {n: written.tensor(n) for n in written.tensor_names}, 64).score(tokens)
    with torch.no_grad():
        torch.testing.assert_close(ours, stock(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_differ_are_said_to_need_eopc(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The output names the flag that gives a stock checkpoint."""
    result = run_cli(tiny_checkpoint, "--ratio", "0.3", "-o", tmp_path / "out", "--units", "ffn")
    assert result.exit_code == 0
    assert "stock transformers does not" in result.stdout and "--uniform" in result.stdout


def test_sub_blocks_are_left_out_and_the_folder_reads_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """EvoP removes one attention and one FFN of four; eopc reads the folder, and its output says that others do not."""
    result = run_cli(tiny_checkpoint, "--ratio", "0.25", "--method", "evop", "--sub-blocks", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    layers = open_checkpoint(str(tmp_path / "out")).config.layers
    whole = [(d.num_key_value_heads, d.intermediate_size) for d in layers].count((2, 192))
    assert (len(layers), whole) in {(4, 2), (3, 3)}  # of two layers, or both of one
    assert whole == 3 or "stock transformers does not" in result.stdout


def test_the_same_seed_writes_the_same_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Bytes are equal; another draw of calibration text chooses otherwise."""
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_cli(tiny_checkpoint, "--ratio", "0.4", "-o", tmp_path / name, "--align", 1, "--seed", seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_own_text_joins_the_built_in_domains_or_replaces_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The domains that were read are in the result, with windows and length."""
    for name, flags, domains in (
        ("a", [], ["text", "code", "arithmetic", "dialogue", "mine"]),
        ("b", ["--only-calib"], ["mine"]),
    ):
        result = run_cli(
            tiny_checkpoint, "--ratio", "0.3", "-o", tmp_path / name, "--calib", f"mine={README}", "--json", *flags
        )
        calibration = json.loads(result.stdout)["calibration"]
        assert [c["domain"] for c in calibration] == domains
        assert {(c["windows"], c["tokens"]) for c in calibration} == {(2, 256)}


def test_a_text_too_short_for_what_was_asked_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Fewer windows than asked for are used, and named."""
    said: list[str] = []
    args = PruneArgs(
        0.3,
        tmp_path / "out",
        str(tiny_checkpoint),
        calib=(f"mine={README}",),
        only_calib=True,
        calibration_tokens=10**6,
    )
    prune(args, said.append)
    assert any(line.startswith("mine has only") for line in said)


def test_a_pruned_model_can_be_pruned_again_and_half_precision_is_measured(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The second run starts from lists and biases; its perplexity is that of the rounded file."""
    run_cli(tiny_checkpoint, "--ratio", "0.2", "-o", tmp_path / "once")
    second = ("--dtype", "bfloat16", "--text", f"readme={README}", "--json")
    result = run_cli(tmp_path / "once", "--ratio", "0.2", "-o", tmp_path / "twice", *second)
    content = json.loads(result.stdout)
    once, twice = open_checkpoint(str(tmp_path / "once")), open_checkpoint(str(tmp_path / "twice"))
    assert twice.config.param_count < once.config.param_count == content["params_dense"]
    model = build_model(twice.config, {n: twice.tensor(n) for n in twice.tensor_names}, 512)
    windows = cut_text(twice.tokenizer().encode(README.read_text(encoding="utf-8")))
    assert content["perplexity"]["readme"]["pruned"] == pytest.approx(perplexity(model, windows))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--ratio", "nan"), 1, "at least 0 and below 1"),
        (("--ratio", "-0.1"), 1, "at least 0 and below 1"),
        (("--ratio", "1"), 1, "at least 0 and below 1"),
        (("--ratio", "inf"), 1, "at least 0 and below 1"),
        (("--ratio", "a fifth"), 2, "not a valid float"),
        ((), 2, "--ratio"),
        (("--ratio", "0.9"), 1, "cannot be reached"),
        (("--ratio", "0.9", "--uniform"), 1, "cannot be reached"),
        (("--ratio", "0.3", "--method", "wanda"), 1, "Did you mean wanda-sp?"),
        (("--ratio", "0.3", "--method", "qqq"), 1, "Choose from"),
        (("--ratio", "0.05", "--method", "sleb"), 1, "rounds to 0"),
        (("--ratio", "0.3", "--method", "sleb", "--units", "ffn"), 1, "--units"),
        (("--ratio", "0.3", "--method", "shortgpt", "--sub-blocks"), 1, "evop and sleb"),
        (("--ratio", "0.3", "--method", "evop", "--sub-blocks", "--uniform"), 1, "--uniform"),
        (("--ratio", "0.3", "--align", "7"), 1, "does not divide"),
        (("--ratio", "0.3", "--align", "0"), 2, "--align"),
        (("--ratio", "0.3", "--only-calib"), 1, "--calib NAME=FILE"),
        (("--ratio", "0.3", "--calib", "x"), 1, "NAME=FILE"),
        (("--ratio", "0.3", "--text", "x=/no/such/file"), 1, "Text /no/such/file does not exist"),
        (("--ratio", "0.3", "--text", f"x={__file__}", "--text", f"x={__file__}"), 1, "given twice"),
        (("--ratio", "0.3", "--dtype", "int8"), 2, "--dtype"),
    ],
)
def test_bad_arguments_are_one_message_and_nothing_is_written(
    tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """Exit 1 for what cannot be met, 2 for wrong usage; the output folder is not there."""
    result = run_cli(tiny_checkpoint, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert said in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_window_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A perplexity on other windows would not be comparable."""
    (tmp_path / "short.txt").write_text("a few words")
    result = run_cli(
        tiny_checkpoint, "--ratio", "0.3", "-o", tmp_path / "out", "--text", f"short={tmp_path / 'short.txt'}"
    )
    assert result.exit_code == 1 and "window of 512" in result.stderr
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_models_and_outputs_that_are_not_free_are_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """An empty folder has no config.json; a folder with files in it, or a file, is not overwritten."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    for model, output, said in (
        (tmp_path / "empty", tmp_path / "out", "config.json"),
        (tiny_checkpoint, tmp_path / "full", "not empty"),
        (tiny_checkpoint, tmp_path / "full/thesis.txt", "is a file"),
        (tiny_checkpoint, "/proc/none/out", "cannot be written"),
        (tiny_checkpoint, "..", "no name of its own"),
    ):
        result = run_cli(model, "--ratio", "0.3", "-o", output)
        assert result.exit_code == 1 and said in result.stderr, result.stderr
        assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_a_link_to_one_are_filled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """-o may exist; a link stays a link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert run_cli(tiny_checkpoint, "--ratio", "0.3", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/config.json").is_file()


def test_a_run_that_fails_while_writing_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staged folder and the parents made for it are gone."""

    def fail(*_: object) -> None:
        raise EopcError("the disk is full")

    monkeypatch.setattr("eopc_compiler.prune.write_checkpoint", fail)
    with pytest.raises(EopcError, match="disk is full"):
        prune(PruneArgs(0.3, tmp_path / "new/out", str(tiny_checkpoint), calibration_tokens=512))
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_method_and_the_default(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The command line repeats the table, because importing the table would need torch."""
    option = next(p for p in command.params if p.name == "method")
    assert set(METHODS) == {n.strip() for n in str(option.help).replace("; whole layers:", ",").rstrip(".").split(",")}
    assert option.default == PruneArgs(0.1, tmp_path).method


def test_the_function_checks_what_the_command_line_cannot_pass(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Callers from Python get the same messages."""
    for changes in ({"units": "heads"}, {"dtype": "int8"}, {"calibration_tokens": 1}, {"steps": 0}, {"align": -1}):
        with pytest.raises(UsageError):
            prune(PruneArgs(0.3, tmp_path / "out", str(tiny_checkpoint), **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
