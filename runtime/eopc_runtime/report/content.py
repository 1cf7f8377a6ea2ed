"""What a page consists of: sections of words, pictures and tables. Texts are plain; the page escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, as SVG of ours, and what it shows. `legend` pairs a small picture or colour with its meaning."""

    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under headers; a `folded` one is opened by its caption."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page; figures come after the words, tables after the figures."""

    name: str
    title: str
    words: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
