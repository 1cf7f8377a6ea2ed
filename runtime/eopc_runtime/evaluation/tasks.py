"""Multiple-choice tasks from local files, as lm-evaluation-harness puts the questions (version 0.4, without examples).

    piqa       {"goal", "sol1", "sol2"}, labels beside it or as "label"     Question: GOAL\nAnswer: SOL
    arc_easy   {"question", "choices", "answerKey"} of ai2_arc              Question: QUESTION\nAnswer: CHOICE
    hellaswag  {"activity_label", "ctx_a", "ctx_b", "endings", "label"}     LABEL: CTX_A Ctx_b ENDING

A continuation is a space and the choice; the space is none of the characters that a length counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields, did_you_mean


@dataclass(frozen=True, slots=True)
class Question:
    """A context, the texts that may go on, and which of them is right."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task by name, with its questions."""

    name: str
    questions: tuple[Question, ...]


def read_task(option: str, limit: int | None = None) -> Task:
    """Read `NAME=FILE[,LABELS]`; UsageError names the file and line that is no question of the task.

    Args:
        limit: take the first so many questions.
    """
    name, equals, rest = option.partition("=")
    reader = READERS.get(name.strip())
    if reader is None or not equals or not rest:
        near = did_you_mean(name, READERS)
        raise UsageError(
            f'--task "{option}" is not NAME=FILE[,LABELS] with a name of {", ".join(READERS)}.{near} '
            "Give one as in --task piqa=valid.jsonl,valid-labels.lst."
        )
    file, _, labels_file = (rest, "", "") if Path(rest).is_file() else rest.partition(",")
    lines = _lines(Path(file))[:limit]
    labels = _lines(Path(labels_file)) if labels_file else None
    if labels is not None and len(labels) < len(lines):
        raise UsageError(
            f"{labels_file} has {len(labels)} labels for {len(lines)} questions. Give the file of this set."
        )
    questions = []
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            fields = Fields(json.loads(line), where, UsageError)
        except ValueError:
            raise UsageError(f"{where} is no JSON. A task is a file of one JSON object per line.") from None
        question = reader(fields, None if labels is None else labels[number - 1].strip())
        if not 0 <= question.gold < len(question.choices) or not all(question.choices) or not question.context:
            fields.fail(f"a question has a context, choices that are not empty, and a label among them ({name}).")
        questions.append(question)
    if not questions:
        raise UsageError(f"{file} holds no question.")
    return Task(name.strip(), tuple(questions))


def _piqa(fields: Fields, label: str | None) -> Question:
    choices = fields.text("sol1"), fields.text("sol2")
    return Question(f"Question: {fields.text('goal')}\nAnswer:", choices, _number(fields, label))


def _arc(fields: Fields, label: str | None) -> Question:
    """Questions as on the Hugging Face Hub (choices as two lists) or as first published (a list of objects)."""
    if isinstance(fields.raw("question"), dict):
        stem = fields.child("question")
        text, rows = stem.text("stem"), stem.children("choices")
        texts, labels = tuple(r.text("text") for r in rows), tuple(r.text("label") for r in rows)
    else:
        choices = fields.child("choices")
        text, texts, labels = fields.text("question"), choices.texts("text"), choices.texts("label")
    answer = fields.text("answerKey") if label is None else label
    if answer not in labels:
        fields.fail(f'the answer "{answer}" is none of the choices {", ".join(labels)}.')
    return Question(f"Question: {text}\nAnswer:", texts, labels.index(answer))


def _hellaswag(fields: Fields, label: str | None) -> Question:
    context = f"{fields.text('activity_label')}: {fields.text('ctx_a')} {fields.text('ctx_b').capitalize()}"
    endings = tuple(_clean(ending) for ending in fields.texts("endings"))
    return Question(_clean(context), endings, _number(fields, label))


def _clean(text: str) -> str:
    """Take out what WikiHow left in HellaSwag's texts."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _number(fields: Fields, label: str | None) -> int:
    """The label as a number, from the labels file or the question."""
    value = fields.raw("label") if label is None else label
    try:
        return int(str(value))
    except ValueError:
        fields.fail(f'the label "{value}" is no number.')


def _lines(path: Path) -> Sequence[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None


READERS: dict[str, Callable[[Fields, str | None], Question]] = {
    "piqa": _piqa,
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
}
