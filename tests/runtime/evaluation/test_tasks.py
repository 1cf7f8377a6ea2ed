"""Task files: the questions are put as lm-evaluation-harness puts them, and what is no question is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.errors import UsageError
from eopc_runtime.evaluation.choices import encode_pair
from eopc_runtime.evaluation.tasks import Question, read_task
from eopc_runtime.tokenizer import Tokenizer

PIQA = {"goal": "Open a jar ", "sol1": "twist it", "sol2": "eat it"}
ARC_HUB = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
ARC_FIRST = {
    "question": {"stem": "What is hot?", "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]},
    "answerKey": "2",
}
SWAG = {
    "activity_label": "Baking", "ctx_a": "A  man stirs. [title] Next [step] he", "ctx_b": "then HE",
    "endings": [" pours [substeps] it.", "sings."], "label": "1",
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """One object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_piqa_has_its_labels_beside_it_or_within(tmp_path: Path) -> None:
    """The goal as it is, spaces included; --limit takes the first."""
    file, labels = write(tmp_path / "p.jsonl", PIQA, PIQA), tmp_path / "labels.lst"
    labels.write_text("1\n0\n")
    want = Question("Question: Open a jar \nAnswer:", ("twist it", "eat it"), 1)
    task = read_task(f"piqa={file},{labels}")
    assert (task.name, task.questions[0], task.questions[1].gold) == ("piqa", want, 0)
    assert read_task(f"piqa={file},{labels}", limit=1).questions == (want,)
    assert read_task(f"piqa={write(tmp_path / 'l.jsonl', {**PIQA, 'label': 1})}").questions == (want,)


def test_arc_is_read_in_both_its_forms(tmp_path: Path) -> None:
    """Lists of the hub's form, objects of the first; the answer is a letter or a digit."""
    want = Question("Question: What is hot?\nAnswer:", ("ice", "fire"), 1)
    assert read_task(f"arc_easy={write(tmp_path / 'a.jsonl', ARC_HUB, ARC_FIRST)}").questions == (want, want)


def test_hellaswag_is_cleaned(tmp_path: Path) -> None:
    """Titles become full stops, brackets go, pairs of spaces become one, the second part begins a sentence."""
    (question,) = read_task(f"hellaswag={write(tmp_path / 'h.jsonl', SWAG)}").questions
    assert question.context == "Baking: A man stirs.. Next he Then he"
    assert question.choices == ("pours it.", "sings.")
    assert question.gold == 1


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("piqa", {"goal": "g", "sol1": "a"}, '"sol2" is missing'),
        ("piqa", {**PIQA, "label": 2}, "a label among them"),
        ("piqa", {**PIQA, "label": "one"}, "is no number"),
        ("piqa", {**PIQA, "sol1": "", "label": 0}, "choices that are not empty"),
        ("arc_easy", {**ARC_HUB, "answerKey": "Z"}, "none of the choices A, B"),
        ("hellaswag", {**SWAG, "endings": "x"}, "must be a list"),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(
    tmp_path: Path, name: str, row: dict[str, Any], words: str
) -> None:
    """The file, the line and the reason."""
    good = {"piqa": {**PIQA, "label": 0}, "arc_easy": ARC_HUB, "hellaswag": SWAG}[name]
    with pytest.raises(UsageError, match="line 2") as caught:
        read_task(f"{name}={write(tmp_path / 'f.jsonl', good, row)}")
    assert words in str(caught.value)


def test_options_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """An unknown task, no file, too few labels, a file that is not there, one without questions."""
    file, labels = write(tmp_path / "p.jsonl", PIQA, PIQA), tmp_path / "labels.lst"
    labels.write_text("1\n")
    (tmp_path / "empty").write_text("\n")
    for option, words in (
        ("piqqa=x", 'Did you mean "piqa"'),
        ("piqa", "NAME=FILE"),
        (f"piqa={file},{labels}", "1 labels for 2 questions"),
        (f"piqa={tmp_path / 'no.jsonl'}", "cannot be read"),
        (f"piqa={tmp_path / 'empty'}", "holds no question"),
    ):
        with pytest.raises(UsageError) as caught:
            read_task(option)
        assert words in str(caught.value)


def test_spaces_between_context_and_choice_belong_to_the_choice(lab: Any) -> None:
    """As in lm-evaluation-harness: the context is cut at its last letter, both are tokenised together."""
    tokenizer = Tokenizer.open(lab.bundle_path / "tokenizer")
    head, tail = encode_pair(tokenizer, "ab ", " c")
    assert tokenizer.decode(head) == "ab" and tokenizer.decode(tail) == "  c"
