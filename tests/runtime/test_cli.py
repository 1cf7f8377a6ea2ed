"""The command line: help without heavy imports, one JSON object, clear errors, right exit codes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from eopc_runtime.bundle import (
    Bundle,
    FileEntry,
    LayerInfo,
    Manifest,
    ModelInfo,
    TierInfo,
    Workload,
    sha256_file,
)
from eopc_runtime.cli import cli, doctor, machine
from eopc_runtime.cli.bench import bench_tier
from eopc_runtime.cli.energy import ENERGY_COMMANDS
from eopc_runtime.cli.evaluate import cut_windows, window_nll
from eopc_runtime.cli.main import COMMANDS, EXTRAS, Entry
from eopc_runtime.cli.output import Progress, format_bytes
from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.errors import PromptError
from eopc_runtime.power.probe import Surroundings
from eopc_runtime.provenance import Calibration, Conformal, Hull
from eopc_runtime.runners.base import Logits, Wanted
from eopc_runtime.session import Session

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 258
CONTEXT = 64
CERTAIN = 5.0  # logit of the byte a fake tier expects; all others are 0


@dataclass
class FakeCache:
    """The tokens of a sequence."""

    tier: str
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return 0


@dataclass
class FakeTier:
    """Expects every byte to be followed by the next one: a, b, c, ..."""

    tier: str

    def new_cache(self) -> FakeCache:
        return FakeCache(self.tier)

    def forward(self, cache: FakeCache, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        assert cache.tier == self.tier
        cache.tokens += tokens
        out = np.zeros((len(tokens), VOCAB), dtype=np.float32)
        out[np.arange(len(tokens)), (np.asarray(tokens) + 1) % VOCAB] = CERTAIN
        return out if logits == "all" else out[-1:]

    def adopt(self, cache: FakeCache) -> FakeCache:
        return FakeCache(self.tier, list(cache.tokens))


class FakePool:
    """Stands where the ONNX Runtime pool stands."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.threads = threads

    def get(self, tier: str) -> FakeTier:
        return FakeTier(tier)

    def close(self) -> None:
        pass


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid bundle of two tiers whose graphs are run by fake tiers; t0 costs 4 J a step, t1 1 J."""
    monkeypatch.setattr("eopc_runtime.runners.ort.OrtPool", FakePool)
    monkeypatch.setattr("eopc_runtime.runners.ort.import_onnxruntime", lambda: None)
    return write_bundle(tmp_path / "box")


def write_bundle(root: Path) -> Path:
    """Write a bundle whose files are all there; the graphs are not ONNX."""
    for name in ("tokenizer", "tiers/t0", "tiers/t1"):
        (root / name).mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(root / "tokenizer/tokenizer.json"))
    (root / "tokenizer/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    steps = (4.0, 1.0)
    prices = tuple(TierEnergy(f"t{i}", 0.0, s / 8, 0.0, s, 0.0, 0.0, "prior") for i, s in enumerate(steps))
    (root / "energy.json").write_text(json.dumps(EnergyTable("fake", "prior", 0.0, prices).to_json()))
    for i in range(2):
        (root / f"tiers/t{i}/model.onnx").write_bytes(b"not a graph")
        (root / f"tiers/t{i}/mask.json").write_text("{}")
    (root / "weights.bin").write_bytes(b"weights")
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    manifest = Manifest(
        eopc_version="0.1.0",
        model=ModelInfo("tiny", "tiny", "llama", VOCAB, 8, 8, 2, CONTEXT, 256, (257,)),
        device="fake",
        dialect="primitive",
        opset=21,
        precision="fp32",
        compute_dtype="float32",
        workload=Workload(8, 8),
        context=CONTEXT,
        tiers=tuple(tier_info(i) for i in range(2)),
        files=tuple(FileEntry(p.relative_to(root).as_posix(), sha256_file(p), p.stat().st_size) for p in paths),
        tools={"torch": "2.9"},
        seed=0,
        calibration={},
    )
    (root / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return root


def tier_info(i: int) -> TierInfo:
    """The manifest record of one tier."""
    return TierInfo(
        tier=f"t{i}",
        budget_j=None if i == 0 else 8.0,
        energy_j=8.0,
        energy_source="prior",
        perplexity=9.5 + i,
        perplexity_dense=9.5,
        perplexity_by_domain={"text": 9.5 + i},
        params=1_000_000,
        keep={"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0 - i / 2},
        layers=(LayerInfo(0, 1, 8 - 4 * i), LayerInfo(1, 1, 8 - 4 * i)),
        cost=TierCost(2, 100, 10, 100.0, 10.0, 1.0),
        graph=f"tiers/t{i}/model.onnx",
        mask=f"tiers/t{i}/mask.json",
        note="lower half of the FFN" if i else "",
        parity={},
    )


def eopc(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process that sees the two packages."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'compiler'}"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, **options)


# help and errors


def test_help_and_every_commands_module_load_no_heavy_package() -> None:
    """Building the help, and importing the runtime's commands, leaves numpy, onnxruntime and torch alone."""
    code = (
        "import importlib, sys\n"
        "from eopc_runtime.cli import cli\n"
        "from eopc_runtime.cli.main import COMMANDS\n"
        "import click\n"
        "cli.get_help(click.Context(cli, info_name='eopc'))\n"
        "print(*(m for m in sys.modules if m.startswith('eopc_runtime.cli.')))\n"
        "[importlib.import_module(e.module) for e in COMMANDS.values() if 'runtime' in e.module]\n"
        "from eopc_runtime.cli.energy import ENERGY_COMMANDS\n"
        "[importlib.import_module(e.module) for e in ENERGY_COMMANDS.values()]\n"
        "print(*(m for m in ('numpy', 'onnxruntime', 'torch', 'tokenizers', 'jinja2') if m in sys.modules))\n"
    )
    done = child("-c", code)
    assert done.returncode == 0, done.stderr
    loaded_by_help, heavy = done.stdout.split("\n")[:2]
    assert loaded_by_help == "eopc_runtime.cli.main"
    assert heavy == ""


def test_help_lists_every_command_with_its_line() -> None:
    """`eopc --help` names all commands of the table, and --version the version."""
    text = " ".join(eopc("--help").output.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.help}" in text
    assert "eopc, version" in eopc("--version").output


RUNTIME_COMMANDS = [
    *([name] for name, entry in COMMANDS.items() if "runtime" in entry.module and name != "energy"),
    *(["energy", name] for name in ENERGY_COMMANDS),
]


@pytest.mark.parametrize("words", RUNTIME_COMMANDS, ids=" ".join)
def test_every_runtime_command_has_help(words: list[str]) -> None:
    """Every command explains itself and knows --json."""
    result = eopc(*words, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_unknown_command_names_the_nearest_or_all() -> None:
    """A typo gets its near miss, nonsense gets the list; both are wrong usage (2)."""
    assert "Did you mean 'inspect'?" in eopc("inspct").output
    result = eopc("zzzz")
    assert result.exit_code == 2
    assert "Commands: build, run" in result.output
    assert "Did you mean 'predict'?" in eopc("energy", "predct").output
    assert eopc("energy", "zzzz").exit_code == 2


@pytest.mark.parametrize("package", ["torch", "eopc_compiler"])
def test_a_command_whose_extra_is_missing_says_how_to_install_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch, `eopc build` names the compiler extra; `eopc --help` still works."""
    (tmp_path / "needs_it.py").write_text(f"import {package}_that_is_missing_here.part")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "build", Entry("needs_it", "build", "Compile."))
    monkeypatch.setitem(sys.modules["eopc_runtime.cli.main"].EXTRAS, f"{package}_that_is_missing_here", "compiler")
    result = eopc("build", "--help")
    assert result.exit_code == 1
    assert "`eopc build` needs the compiler extra" in result.output
    assert 'pip install "eopc[compiler]"' in result.output
    assert eopc("--help").exit_code == 0


def test_a_missing_module_of_our_own_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: a broken import that no extra explains stays a visible bug."""
    (tmp_path / "broken_one.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "build", Entry("broken_one", "build", "Compile."))
    assert isinstance(eopc("build").exception, ModuleNotFoundError)


def test_interrupt_is_one_line_and_130(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with one line on stderr and the code shells expect."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "stream", interrupted)
    result = eopc("run", bundle, "--prompt", "a")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    """A closed pipe ends the command quietly."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    command = [sys.executable, "-m", "eopc_runtime.cli", "devices"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert stderr == ""


def test_a_stream_without_utf8_shows_marks_instead_of_a_traceback() -> None:
    """Output that the terminal cannot show is replaced."""
    code = (
        "import click\nfrom eopc_runtime.cli.main import main, cli\n"
        "cli.get_command = lambda ctx, name: click.Command('run', callback=lambda: click.echo('\\u65e5'))\n"
        "main(['run'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (0, "?\n")


# run


def test_run_streams_text_to_stdout_and_a_summary_to_stderr(bundle: Path) -> None:
    """The text alone is on stdout; tier, joules, budget, source and reason are on stderr."""
    result = eopc("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "5J")
    assert result.exit_code == 0
    # t0 reads the prompt for 4 J; three steps of 1 J would not fit into 5 J, so t1 does both: 1 + 3 = 4 J
    assert result.stdout == "ijkl\n"
    assert result.stderr.splitlines()[-1].startswith("[t1: 4 J of 5 J (prior), 8 + 4 tokens, ")
    assert result.stderr.endswith("ended by length]\n")


def test_run_json_is_exactly_the_documented_object(bundle: Path) -> None:
    """--json prints one object with the documented keys and nothing else on stdout."""
    result = eopc("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "7.5J", "--json")
    value = json.loads(result.stdout)
    assert list(value) == [
        *("text", "tier", "plan", "tiers_used", "budget_j", "energy_j", "energy_source", "finish_reason"),
        *("prompt_tokens", "completion_tokens", "ttft_s", "decode_tokens_per_s", "enforced_by", "warnings"),
    ]
    assert (value["text"], value["plan"], value["tiers_used"]) == ("ijkl", "t0>t1", ["t0", "t1"])
    assert (value["energy_j"], value["budget_j"], value["finish_reason"]) == (7.0, 7.5, "length")
    assert value["enforced_by"] == "model"
    assert [w for w in value["warnings"] if "prior joules" in w]
    assert result.stderr == ""


def test_run_under_a_prior_warns_once_and_strict_refuses_unless_a_safety_factor_is_named(bundle: Path) -> None:
    """One warning line before the summary; --strict exits with 1 and the cure; --safety 4 raises every price."""
    options = ("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "40J")
    plain = eopc(*options)
    assert plain.stderr.startswith("Warning: The budget is kept in prior joules")
    assert plain.stderr.count("Warning") == 1
    refused = eopc(*options, "--strict")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "safety factor of 4 or more" in refused.stderr
    safe = json.loads(eopc(*options, "--strict", "--safety", 4, "--json").stdout)
    assert (safe["plan"], safe["energy_j"]) == ("t0>t1", 4 * (8 * 0.5 + 3 * 1.0))
    assert "raised 4 times" in safe["warnings"][0]
    assert eopc(*options, "--safety", 0.5).exit_code == 2


def test_a_strict_run_needs_a_budget(bundle: Path) -> None:
    """There is nothing to hold otherwise."""
    result = eopc("run", bundle, "--prompt", "a", "--strict")
    assert result.exit_code == 1
    assert "no budget was given" in result.stderr


def test_run_uses_template_system_stop_and_tier(bundle: Path) -> None:
    """The chat template wraps prompt and system message; --stop and --tier reach the session."""
    result = eopc("run", bundle, "--prompt", "a", "--system", "s", "--stop", "e", "--tier", "t1", "--json")
    value = json.loads(result.stdout)
    assert value["prompt_tokens"] == len("system:suser:a")
    assert (value["text"], value["plan"], value["finish_reason"]) == ("bcd", "t1", "stop")


def test_run_samples_when_a_filter_is_given(bundle: Path) -> None:
    """--top-k without --temperature samples, and --seed makes it repeatable."""
    options = ("run", bundle, "--prompt", "a", "--raw", "--top-k", VOCAB, "--max-new-tokens", 30, "--json")
    texts = [json.loads(eopc(*options, *more).stdout)["text"] for more in (("--seed", 1), ("--seed", 1), ())]
    assert texts[0] == texts[1] != texts[2]
    greedy = json.loads(eopc("run", bundle, "--prompt", "a", "--raw", "--json").stdout)["text"]
    assert greedy.startswith("bcdefgh")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", ""), "empty"),
        (("--prompt", "x" * 64), "context of 64"),
        (("--prompt", "a", "--budget", "0.1J"), "No tier fits"),
        (("--prompt", "a", "--budget", "5 bananas"), "bananas"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--tier", "t7"), "t0, t1"),
        (("--prompt", "a", "--stop", ""), "stop"),
        (("--prompt", "a", "--raw", "--system", "s"), "--raw"),
    ],
)
def test_run_mistakes_are_one_error_line_on_stderr(bundle: Path, options: tuple[str, ...], words: str) -> None:
    """Every mistake exits with 1, an empty stdout (also with --json) and one `Error:` message."""
    result = eopc("run", bundle, *options, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr


def test_wrong_usage_is_exit_code_2(bundle: Path) -> None:
    """Missing or malformed options are click's usage errors."""
    assert eopc("run", bundle).exit_code == 2
    assert eopc("run", bundle, "--prompt", "a", "--max-new-tokens", 0).exit_code == 2
    assert eopc("run", bundle, "--prompt", "a", "--top-k", "many").exit_code == 2


# energy


def test_energy_commands_read_a_bundle(bundle: Path) -> None:
    """Every tier of a bundle is predicted, and its sweet spot says that nothing was measured."""
    value = json.loads(eopc("energy", "predict", bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--json").stdout)
    assert [(p["name"], p["energy_j"]) for p in value["predictions"]] == [("t0", 16.0), ("t1", 4.0)]
    assert {p["energy_source"] for p in value["predictions"]} == {"prior"}
    spot = json.loads(eopc("energy", "sweetspot", bundle, "--json").stdout)
    assert (spot["name"], spot["n_out_star"]) == ("t1", None)
    assert "not measured" in spot["warnings"][0]


# inspect


def test_inspect_shows_tiers_and_files(bundle: Path) -> None:
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


def test_inspect_shows_where_calibrated_prices_hold(bundle: Path) -> None:
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


def test_inspect_of_a_damaged_or_missing_bundle_exits_1_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    """A changed byte and a missing folder are named on stderr; stdout stays empty."""
    (bundle / "tiers/t1/model.onnx").write_bytes(b"not a grapH")
    for path, words in [(bundle, "tiers/t1/model.onnx does not match"), (tmp_path / "no", "does not exist")]:
        result = eopc("inspect", path, "--json")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert words in result.stderr


# eval


def test_eval_computes_perplexity_over_whole_windows(bundle: Path, tmp_path: Path) -> None:
    """Two windows of 4, tail dropped: the perplexity follows from the fake model's logits."""
    text = tmp_path / "text.txt"
    text.write_text("abcd" + "bcxy" + "zz")
    result = eopc("eval", bundle, "--text", text, "--ctx", 4, "--json")
    norm = math.log(math.exp(CERTAIN) + VOCAB - 1)
    # of the six predicted bytes five follow their predecessor; x after c does not
    want = math.exp((6 * norm - 5 * CERTAIN) / 6)
    tiers = json.loads(result.stdout)["tiers"]
    assert [tier["tier"] for tier in tiers] == ["t0", "t1"]
    for tier in tiers:
        assert tier["tokens"] == 6
        assert tier["perplexity"] == pytest.approx(want, rel=1e-6)  # fp32 logits
    assert result.stderr.count("perplexity") == 2


def test_eval_of_a_text_shorter_than_a_window_uses_all_of_it(bundle: Path, tmp_path: Path) -> None:
    """A short text is one short window; --max-tokens cuts it further; --tier picks one tier."""
    text = tmp_path / "text.txt"
    text.write_text("abcdef")
    one = json.loads(eopc("eval", bundle, "--text", text, "--tier", "t1", "--ctx", 32, "--json").stdout)
    assert [(t["tier"], t["tokens"]) for t in one["tiers"]] == [("t1", 5)]
    cut = json.loads(eopc("eval", bundle, "--text", text, "--max-tokens", 3, "--ctx", 32, "--json").stdout)
    assert cut["tiers"][0]["tokens"] == 2
    assert "perplexity" in eopc("eval", bundle, "--text", text, "--ctx", 32).stdout


def test_eval_mistakes_are_clear(bundle: Path, tmp_path: Path) -> None:
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


def test_windows_and_their_parts() -> None:
    """Windows do not overlap, and running one in parts gives the same likelihood."""
    assert cut_windows(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(range(3), 4) == [[0, 1, 2]]
    with pytest.raises(PromptError, match="1 token"):
        cut_windows([1], 4)
    window = [1, 2, 3, 9, 10, 11, 5]
    whole = window_nll(FakeTier("t0"), window)
    assert window_nll(FakeTier("t0"), window, part=2) == pytest.approx(whole, rel=1e-12)


# bench


def test_bench_medians_come_from_the_clock(bundle: Path) -> None:
    """With a clock that we set, the medians are exact and the warm-up run does not count."""
    # per run: start, first token, end; the warm-up is slow, one timed run is an outlier
    readings = iter([0, 90, 190, 200, 201, 203, 300, 301, 303, 400, 440, 480])
    with Session.open(bundle) as session:
        row = bench_tier(session, "t1", 10, 5, 3, clock=lambda: float(next(readings)))
    assert (row["tier"], row["ttft_s"]) == ("t1", 1.0)
    assert (row["prefill_tokens_per_s"], row["decode_tokens_per_s"]) == (10.0, 2.0)
    assert row["peak_rss_bytes"] > 1 << 20


def test_bench_json_has_speeds_machine_and_versions(bundle: Path) -> None:
    """One tier is measured in this process; the object says on what machine and with which versions."""
    options = ("--tier", "t0", "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 2)
    value = json.loads(eopc("bench", bundle, *options, "--threads", 1, "--json").stdout)
    assert set(value["tiers"][0]) == {
        *("tier", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "peak_rss_bytes", "runner"),
    }
    assert value["machine"]["threads"] == 1
    assert value["machine"]["cpu"]
    assert {"eopc", "onnxruntime"} <= set(value["versions"])
    assert "decode tokens/s" in eopc("bench", bundle, *options).stdout


def test_bench_of_all_tiers_runs_each_in_its_own_process(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --tier, every tier is a child `eopc bench --tier`, whose row is passed on."""
    commands = []

    def fake_run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        row = {"tier": command[command.index("--tier") + 1], "ttft_s": 0.5}
        return SimpleNamespace(returncode=0, stdout=json.dumps({"tiers": [row]}).encode())

    monkeypatch.setattr("subprocess.run", fake_run)
    result = eopc("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--threads", 2, "--json")
    assert [row["tier"] for row in json.loads(result.stdout)["tiers"]] == ["t0", "t1"]
    assert all(command[-2:] == ["--threads", "2"] for command in commands)


def test_bench_child_that_fails_gives_its_reason_and_code(tmp_path: Path) -> None:
    """A real child that cannot load its graph says so itself, and the parent exits with its code."""
    pytest.importorskip("onnxruntime", reason="the child needs ONNX Runtime to refuse the graph")
    box = write_bundle(tmp_path / "box")
    done = child("-m", "eopc_runtime.cli", "bench", str(box), "--prompt-tokens", "8", "--new-tokens", "4")
    assert done.returncode == 1
    assert done.stderr.count("Error: ") == 1
    assert "tiers/t0/model.onnx" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "options",
    [("--prompt-tokens", 60, "--new-tokens", 5), ("--tier", "t5", "--prompt-tokens", 8, "--new-tokens", 4)],
)
def test_bench_mistakes_are_clear(bundle: Path, options: tuple[object, ...]) -> None:
    """More tokens than the context, and an unknown tier, are errors."""
    result = eopc("bench", bundle, *options)
    assert result.exit_code == 1
    assert "context of 64" in result.stderr or "t5" in result.stderr


# devices and doctor


def test_a_command_of_a_group_is_named_with_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra of `eopc energy read` is told by the words that were typed."""
    (tmp_path / "needs_nvml.py").write_text("import pynvml_that_is_missing_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(EXTRAS, "pynvml_that_is_missing_here", "nvml")
    monkeypatch.setitem(ENERGY_COMMANDS, "read", Entry("needs_nvml", "read", "Read."))
    result = eopc("energy", "read")
    assert result.exit_code == 1
    assert "`eopc energy read` needs the nvml extra" in result.stderr


def test_devices_lists_every_profile_with_marks() -> None:
    """The table and the JSON name the same devices, and every constant carries a mark and a source."""
    value = json.loads(eopc("devices", "--json").stdout)
    text = eopc("devices").stdout
    assert "orin" in [device["name"] for device in value["devices"]]
    for device in value["devices"]:
        assert device["name"] in text
        for constant in device["constants"].values():
            assert constant["mark"] in value["marks"]
            assert constant["source"]


def test_doctor_reports_and_gives_a_fix_for_every_gap() -> None:
    """The report is one JSON object; what is missing carries a fix."""
    value = json.loads(eopc("doctor", "--json").stdout)
    names = {check["name"]: check for check in value["checks"]}
    wanted = {"python", "onnxruntime", "torch", "tensorrt", "gpu", "nvpmodel", "energy meter", "memory", "disk"}
    assert wanted <= set(names)
    assert all(check["found"] or check["fix"] for check in value["checks"])
    assert "python" in eopc("doctor").stdout


def test_doctor_reads_power_modes_by_name(tmp_path: Path) -> None:
    """The active id is looked up in nvpmodel.conf; a Jetson without it gets a fix, another machine none."""
    assert doctor.nvpmodel_check(tmp_path).fix is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    assert "nvpmodel" in (doctor.nvpmodel_check(tmp_path).fix or "")
    (tmp_path / "etc/nvpmodel.conf").write_text(
        "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n"
    )
    assert "unknown" in (doctor.nvpmodel_check(tmp_path).fix or "")
    status = tmp_path / "var/lib/nvpmodel/status"
    status.parent.mkdir(parents=True)
    status.write_text("pmode:0002")
    assert doctor.nvpmodel_check(tmp_path).found == "MODE_30W (of MAXN, MODE_30W)"


def test_doctor_finds_rails_by_label_and_rapl_packages(tmp_path: Path) -> None:
    """INA3221 channels with a label and a current are rails; shunt sums, NC and RAPL core domains are not."""
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for name, text in {
        "name": "ina3221",
        "in1_label": "VDD_GPU_SOC",
        "in1_input": "19864",
        "curr1_input": "180",
        "in2_label": "NC",
        "in2_input": "0",
        "curr2_input": "0",
        "in7_label": "sum of shunt voltages",
        "in7_input": "3",
    }.items():
        (chip / name).write_text(text + "\n")
    other = tmp_path / "sys/class/hwmon/hwmon0"
    other.mkdir()
    (other / "name").write_text("coretemp\n")
    for domain, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core"}.items():
        folder = tmp_path / "sys/class/powercap" / domain
        folder.mkdir(parents=True)
        (folder / "name").write_text(name)
        (folder / "energy_uj").write_text("1")
    sensors = doctor.power_sensors(tmp_path)
    assert [(s.kind, s.rail) for s in sensors] == [("ina3221", "VDD_GPU_SOC"), ("rapl", "package-0")]
    assert doctor.sensor_check(sensors).fix is None
    locked = [doctor.Sensor("rapl", "package-0", "/sys/x", readable=False)]
    assert "sudo chmod a+r /sys/x" in (doctor.sensor_check(locked).fix or "")
    assert "None in sysfs" in (doctor.sensor_check([]).fix or "")


def test_doctor_names_the_meter_and_why_others_were_passed_over(tmp_path: Path) -> None:
    """On a Jetson with a monitor that is the meter, with its rails; without one a proxy, and a reason for each."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    here = Surroundings(root=tmp_path, tegrastats_command=("no-such-tegrastats",), proxy_w=30.0, threaded=False)
    report = doctor.meter_report(here)
    assert (report["meter"], report["source"]) == ("proxy", "proxy")
    assert [entry["meter"] for entry in report["passed_over"]][:2] == ["ina3221", "tegrastats"]
    assert all(entry["reason"] for entry in report["passed_over"])
    check = doctor.meter_check(report)
    assert "nothing was measured" in (check.found or "")
    assert check.fix
    assert doctor.meter_check(doctor.meter_report(replace(here, proxy_w=None))).found is None
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "900"}.items():
        (chip / name).write_text(text)
    report = doctor.meter_report(here)
    assert (report["meter"], report["rails"], report["passed_over"]) == ("ina3221", ["VDD_IN"], [])
    assert doctor.meter_check(report) == doctor.Check("energy meter", "ina3221, VDD_IN")


def test_doctor_prints_the_reasons() -> None:
    """Both outputs of the command carry them."""
    report = json.loads(eopc("doctor", "--json").stdout)["meter"]
    text = eopc("doctor").stdout
    assert all(f"{entry['meter']}: " in text for entry in report["passed_over"])


def test_doctor_reads_the_gpu_report() -> None:
    """A device is shown by name; a driver error and a missing driver each get the fix."""
    gpu = {"name": "Orin", "sm": "8.7", "memory_bytes": 8 << 30}
    good = json.dumps({"init": 0, "driver": "12.6", "devices": [gpu]})
    assert doctor.gpu_check(lambda: good).found == "Orin (sm 8.7, 8.0 GiB), driver for CUDA 12.6"
    bad = doctor.gpu_check(lambda: json.dumps({"init": 100, "driver": "0.0", "devices": []}))
    assert bad.found is None
    assert "cuInit returned 100" in (bad.fix or "")

    def no_driver() -> str:
        raise subprocess.CalledProcessError(1, "python")

    assert "No CUDA driver" in (doctor.gpu_check(no_driver).fix or "")


def test_machine_facts_come_from_proc(tmp_path: Path) -> None:
    """Board, CPU and memory are read from /proc, and a machine without these files gives None."""
    proc = tmp_path / "proc"
    (proc / "device-tree").mkdir(parents=True)
    (proc / "device-tree/model").write_text("NVIDIA Jetson Orin Nano\0")
    (proc / "cpuinfo").write_text("processor : 0\nmodel name : Fast CPU\n")
    (proc / "meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    info = machine.machine_info(tmp_path)
    assert (info["board"], info["cpu"], info["memory_bytes"]) == (
        "NVIDIA Jetson Orin Nano",
        "Fast CPU",
        1 << 20,
    )
    assert machine.machine_info(tmp_path / "empty")["board"] is None
    assert machine.installed("no-such-distribution", "click")
    assert machine.installed("no-such-distribution") is None


# output


def test_progress_is_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal only finished parts are written, one per line, on stderr."""
    progress = Progress()
    progress.update("1 of 2")
    progress.done("both done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "both done\n")


def test_json_output_never_holds_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity and NaN, which JSON does not have, become null."""
    from eopc_runtime.cli.output import print_json

    print_json({"a": [math.inf, {"b": math.nan}], "c": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": 1.5}


def test_sizes_for_people() -> None:
    """Bytes are shown in binary units with one digit."""
    assert [format_bytes(n) for n in (10, 1536, 3 << 20, 5 << 40)] == [
        "10 B",
        "1.5 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]


def test_the_group_is_a_click_group() -> None:
    """The entry point stays usable by tools that walk click commands."""
    assert isinstance(cli, click.Group)
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)


def test_a_full_disk_behind_stdout_is_one_sentence(bundle: Path) -> None:
    """`eopc inspect > /dev/full` says what failed, without a traceback (the negative twin is every other test)."""
    command = [sys.executable, "-m", "eopc_runtime.cli", "inspect", str(bundle)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    assert done.returncode == 1
    assert "Error: the output cannot be read or written: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr
