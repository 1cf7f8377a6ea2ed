"""Where text is cut: into pieces behind line ends, into chunks of sentences, into documents at blank lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A sentence ends behind . ! ? and blank space, or with its line, so that code and dialogues have sentences too.
_SENTENCE = re.compile(r"(?s).{1,1000}?(?:(?<=[.!?])\s+|\n+|\Z)|.{1,1000}")


def cut_lines(text: str, size: int) -> list[str]:
    """Cut text behind line ends into pieces of at most `size` characters; longer lines are cut anywhere."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if current and len(current) + len(part) > size:
                pieces.append(current)
                current = ""
            current += part
    return [*pieces, current] if current or not pieces else pieces


def cut_sentences(text: str) -> list[str]:
    """Sentences, each with the blank space behind it and at most some 1000 characters; joined they are the text."""
    return _SENTENCE.findall(text)


def join_sentences(sentences: Sequence[str], count: int) -> list[str]:
    """Chunks of `count` consecutive sentences; the last may be shorter."""
    return ["".join(sentences[i : i + count]) for i in range(0, len(sentences), count)]


def cut_documents(text: str) -> list[str]:
    """Cut one text into at least some twenty documents where possible, at blank lines."""
    size = min(max(len(text) // 20, 200), 8000)
    documents, current = [], ""
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        current += paragraph + "\n"
        if len(current) >= size:
            documents += cut_lines(current, 2 * size)
            current = ""
    return [*documents, *cut_lines(current, 2 * size)] if current.strip() else documents
