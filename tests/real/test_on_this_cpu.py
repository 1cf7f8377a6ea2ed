"""The real default model on this machine's CPU: a newcomer's served answer, int8 and fp32, prefill-only pruning."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .real_model import CORPORA, NEEDS, QUESTION, ROOT, eopc, expect_int8_near_torch, expect_paris

pytestmark = NEEDS


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


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the text beside the checkout is not there")
def test_int8_perplexity_is_within_half_a_percent_of_torch(
    cpu_built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The cpu profile's int8 adds at most 0.5 % to PyTorch's fp32 perplexity over three domains, none above 1 %."""
    expect_int8_near_torch(cpu_built[0], tmp_path)
