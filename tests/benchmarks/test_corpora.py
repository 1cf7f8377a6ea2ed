"""Corpora of the experiments: how files become documents, and that evaluation never sees calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from eopc_compiler.calibration import Domain
from eopc_runtime.errors import UsageError

CORPORA = Path(__file__).parents[3] / "shared" / "data" / "corpora"  # optional text beside a checkout


class ByteTokenizer:
    """One token per UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder laid out like the corpora, a few made-up documents per domain."""
    articles = "".join(
        f" \n = Article {i} = \n \n Body {i} . \n \n = = Part = = \n \n More {i} . \n" for i in range(10)
    )
    turns = [
        [{"speaker": "USER", "utterance": f"Table {i}?"}, {"speaker": "SYSTEM", "utterance": "Yes."}] for i in range(8)
    ]
    files = {
        "wikitext2/wiki.valid.raw": articles,
        "web/a.jsonl": lines({"text": f"page {i} " * 20} for i in range(6)),
        "web/b.jsonl": lines({"text": f"page {i} " * 20} for i in range(4, 10)),  # two of them again
        "mbpp/mbpp.jsonl": lines({"text": f"Task {i}", "code": f"x = 1\r\ny = {i}"} for i in range(9)),
        "gsm8k/train.jsonl": lines({"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)),
        "sgd_dialogue/d.json": json.dumps([{"turns": rows} for rows in turns]),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    return tmp_path


def lines(rows: object) -> str:
    """JSON lines of dictionaries."""
    return "\n".join(json.dumps(row) for row in rows)  # type: ignore[attr-defined]


def test_every_corpus_becomes_documents(corpora: ModuleType, small: Path) -> None:
    """Articles keep their sections, tasks their code, dialogues their speakers; repeated pages count once."""
    wiki, web, code, maths, dialogue = corpora.read_domains(small)
    assert [d.name for d in (wiki, web, code, maths, dialogue)] == ["wiki", "web", "code", "maths", "dialogue"]
    assert len(wiki.documents) == 10
    assert wiki.documents[3].startswith("= Article 3 =")
    assert "= = Part = =" in wiki.documents[3]
    assert len(web.documents) == 10
    assert code.documents[2] == "Task 2\nx = 1\ny = 2"
    assert maths.documents[0] == "Question: 0 + 1?\nAnswer: #### 1"
    assert dialogue.documents[5] == "User: Table 5?\nAssistant: Yes."


def test_evaluation_and_calibration_share_no_document(corpora: ModuleType, small: Path) -> None:
    """Page numbers in the held-out windows occur in no calibration or selection window, whatever the seed."""
    held = corpora.evaluation_windows(ByteTokenizer(), small, ["web"], windows=4, length=40)
    assert held.split == "heldout"
    seen = {row[5] for row in held.tokens.tolist()}  # "page N ..." from its head
    for split in ("calibration", "selection"):
        for seed in range(3):
            other = corpora.calibration_set(ByteTokenizer(), small, ["web"], 120, 40, seed, split)
            numbers = {token for row in other.tokens.tolist() for token in row if chr(token).isdigit()}
            assert numbers
            assert not numbers & seen


def test_a_document_in_two_splits_is_noticed(corpora: ModuleType) -> None:
    """The same text under two names lands in different splits, and the check says which text."""
    documents = tuple(f"document {i}" for i in range(10))
    stranger = Domain("b", (Domain("a", documents).split("heldout")[0], "x"))
    with pytest.raises(AssertionError, match="document"):
        corpora.check_disjoint([Domain("a", documents), stranger])
    corpora.check_disjoint([Domain("a", documents)])


def test_windows_come_from_the_documents_in_turn(corpora: ModuleType) -> None:
    """The first window of each long document precedes any second one; short documents are joined into one more."""
    windows = corpora.spread_windows(ByteTokenizer(), ["a" * 25, "b" * 25, "c", "d", "e" * 7], 10, 10)
    heads = [bytes(row).decode() for row in windows.tolist()]
    assert heads == ["a" * 10, "b" * 10, "c\n\nd\n\neeee", "a" * 10, "b" * 10]


def test_unknown_names_and_missing_files_are_said(corpora: ModuleType, tmp_path: Path) -> None:
    """One sentence each, with what there is."""
    with pytest.raises(UsageError, match=r"No corpus is called 'news'; there are wiki, web"):
        corpora.read_domains(tmp_path, ["news"])
    with pytest.raises(UsageError, match="There is no gsm8k/"):
        corpora.read_domains(tmp_path, ["maths"])


@pytest.mark.skipif(not CORPORA.is_dir(), reason=f"no corpora at {CORPORA}")
def test_the_public_corpora_fill_calibration_and_evaluation(corpora: ModuleType) -> None:
    """Counts as the sources say (of 974 code tasks one is there twice), and 24 windows of 512 bytes per domain."""
    counts = {d.name: len(d.documents) for d in corpora.read_domains(CORPORA)}
    assert counts == {"wiki": 60, "web": 60, "code": 973, "maths": 2000, "dialogue": 128}
    held = corpora.evaluation_windows(ByteTokenizer(), CORPORA)
    assert all(tuple(windows.shape) == (24, 512) for _, windows in held.domains)
