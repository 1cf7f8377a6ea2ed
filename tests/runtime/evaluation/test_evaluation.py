"""`eopc eval` on a tiny bundle, against PyTorch and against whole windows of logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eopc_runtime.cli import cli
from eopc_runtime.errors import UsageError
from eopc_runtime.evaluation import texts as texts_module
from eopc_runtime.evaluation.choices import encode_pair, log_likelihood
from eopc_runtime.evaluation.texts import score_texts
from eopc_runtime.session import Session

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
torch = pytest.importorskip("torch", reason="the compiler extra is not installed")

PAIRS = (("Question: why?\nAnswer:", " because"), ("a b c ", " d e f g"), ("x", "y"))
TEXTS = {"letters": "abcdefghij" * 30, "digits": "0123456789 " * 20}


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Any:
    """The tiny bundle, open."""
    with Session.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    """The checkpoint in PyTorch."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()


def eopc(*arguments: object) -> Result:
    """Run `eopc eval` in this process."""
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_choice_has_the_likelihood_that_pytorch_gives_it(session: Session, model: Any, pair: tuple[str, str]) -> None:
    """One pass over context and continuation, log-softmax, the continuation's tokens summed."""
    head, tail = encode_pair(session.tokenizer, *pair)
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    want = float(logits[len(head) - 1 : -1].gather(1, torch.tensor(tail)[:, None]).sum())
    got = log_likelihood(session.pool.get("t0"), head, tail, session.context)
    assert got == pytest.approx(want, abs=2e-3)  # fp32 on both sides; seen: 1e-5


def test_a_context_that_is_too_long_loses_its_beginning(session: Session) -> None:
    """The last `limit` tokens before the last one count, as in lm-evaluation-harness; a choice without room fails."""
    runner, head, tail = session.pool.get("t0"), list(range(60)), [70, 71, 72]
    assert log_likelihood(runner, head, tail, 20) == pytest.approx(log_likelihood(runner, head[-18:], tail, 256))
    with pytest.raises(UsageError, match="leaves no room"):
        log_likelihood(runner, head, list(range(21)), 20)
    with pytest.raises(UsageError, match="adds no token"):
        log_likelihood(runner, head, [], 20)


def test_divergence_and_agreement_are_those_of_whole_windows(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(t0 || tier) per position in double precision; the same when few windows are kept at a time."""
    windows = {"w": [list(range(40, 100)), list(range(130, 190)), list(range(20, 80))]}
    vocab = session.bundle.manifest.model.vocab_size
    found = score_texts(session.pool, ("t0", "t1"), windows, vocab=vocab, compare=True)
    kls, same = [], []
    for window in windows["w"]:
        p, q = (forward(session, tier, window) for tier in ("t0", "t1"))
        kls.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    score = found["t1"]["w"]
    assert score.kl == pytest.approx(float(np.mean(kls)), rel=1e-4) and score.kl > 1e-3
    assert score.top1 == pytest.approx(float(np.mean(same)))
    assert (found["t0"]["w"].kl, found["t0"]["w"].top1, score.tokens) == (0.0, 1.0, 3 * 59)
    monkeypatch.setattr(texts_module, "KEPT_BYTES", 1)
    assert score_texts(session.pool, ("t0", "t1"), windows, vocab=vocab, compare=True) == found
    monkeypatch.setattr(texts_module, "MOST_BYTES", 1)
    with pytest.raises(UsageError, match="--no-kl"):
        score_texts(session.pool, ("t1",), windows, vocab=vocab, compare=True)


def forward(session: Session, tier: str, window: list[int]) -> Any:
    """Log-probabilities of a window's predictions [n - 1, vocab], in double precision."""
    runner = session.pool.get(tier)
    logits = runner.forward(runner.new_cache(), window[:-1], logits="all").astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_behind_a_prompt_only_what_follows_is_compared(session: Session) -> None:
    """Of 60 tokens behind 50, ten are scored; the first of them by the prompt's own logits."""
    window = list(range(40, 100))
    vocab = session.bundle.manifest.model.vocab_size
    found = score_texts(session.pool, ("t1",), {"w": [window]}, vocab=vocab, prompt=50, compare=True)["t1"]["w"]
    p, q = (forward(session, tier, window)[49:] for tier in ("t0", "t1"))
    assert (found.tokens, found.kl) == (10, pytest.approx(float((np.exp(p) * (p - q)).sum(axis=1).mean()), rel=1e-4))


def test_several_texts_have_a_row_each_and_a_geometric_mean(tiny_bundle: Path, tmp_path: Path) -> None:
    """Named or by file name; the keys of a single text stay as they were."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    both = ["--text", f"mine={tmp_path / 'letters.txt'}", "--text", tmp_path / "digits.txt", "--ctx", 64, "--json"]
    value = json.loads(eopc(tiny_bundle, *both).stdout)
    assert value["texts"] == {"mine": str(tmp_path / "letters.txt"), "digits": str(tmp_path / "digits.txt")}
    assert value["text"] is None
    for row in value["tiers"]:
        one, two = (row["texts"][name] for name in ("mine", "digits"))
        assert row["perplexity"] == pytest.approx(math.sqrt(one["perplexity"] * two["perplexity"]))
        assert row["tokens"] == one["tokens"] + two["tokens"] == 63 * (4 + 3)
        assert row["kl"] == pytest.approx((one["kl"] + two["kl"]) / 2)
        assert (row["kl"] == 0) == (row["tier"] == "t0")
    alone = json.loads(eopc(tiny_bundle, "--text", tmp_path / "digits.txt", "--ctx", 64, "--no-kl", "--json").stdout)
    assert alone["text"] == str(tmp_path / "digits.txt")
    assert [row["kl"] for row in alone["tiers"]] == [None] * len(alone["tiers"])
    assert alone["tiers"][1]["perplexity"] == pytest.approx(value["tiers"][1]["texts"]["digits"]["perplexity"])


def test_tasks_are_answered_by_every_tier(tiny_bundle: Path, tmp_path: Path, session: Session) -> None:
    """Counts and intervals per tier; the answers are those of the likelihoods one by one."""
    rows = [{"goal": f"g{i}", "sol1": "abc" * (1 + i % 3), "sol2": f"xyz{i}", "label": i % 2} for i in range(6)]
    file = tmp_path / "piqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    value = json.loads(eopc(tiny_bundle, "--task", f"piqa={file}", "--limit", 5, "--json").stdout)
    assert value["tasks"] == [{"task": "piqa", "questions": 5}]
    for found in value["tiers"]:
        runner, plain, normalised = session.pool.get(found["tier"]), 0, 0
        for row in rows[:5]:
            pairs = [
                encode_pair(session.tokenizer, f"Question: {row['goal']}\nAnswer:", f" {row[k]}")
                for k in ("sol1", "sol2")
            ]
            lls = [log_likelihood(runner, *pair, session.context) for pair in pairs]
            plain += int(lls[1] > lls[0]) == row["label"]
            normalised += int(lls[1] / len(str(row["sol2"])) > lls[0] / len(str(row["sol1"]))) == row["label"]
        task = found["tasks"]["piqa"]
        assert (task["acc"]["value"], task["acc_norm"]["value"]) == (plain / 5, normalised / 5)
        assert task["acc"]["low"] <= task["acc"]["value"] <= task["acc"]["high"]
        assert (found["perplexity"], found["tokens"]) == (None, 0)
    table = eopc(tiny_bundle, "--task", f"piqa={file}", "--tier", "t1")
    assert "95 % interval" in table.stdout and "piqa" in table.stdout


def test_usage_mistakes_are_clear(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nothing to do, a name twice, a file that is not there: wrong usage; a bad task: one error."""
    (tmp_path / "a.txt").write_text("some text")
    a = tmp_path / "a.txt"
    for options, code, words in (
        ((), 2, "nothing to evaluate"),
        (("--text", a, "--text", f"a={a}"), 2, "twice"),
        (("--text", f"b={tmp_path / 'no.txt'}"), 2, "does not exist"),
        (("--task", "boolq=x"), 1, "is not NAME=FILE"),
    ):
        result = eopc(tiny_bundle, *options)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
