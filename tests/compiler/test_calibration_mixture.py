"""The mixture of domains: weights, what replaces what, data sets of the Hub, generated dialogues."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eopc_compiler.calibration import CalibrationSet, Domain, build_calibration, load_calib, read_mixture
from eopc_compiler.calibration.dialogue import task_dialogues
from eopc_compiler.calibration.windows import Piece, Pool, cut_windows, draw
from eopc_runtime.errors import EopcError, MissingExtraError, UsageError


class ByteTokenizer:
    """One token per UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def letters(name: str, weight: float = 1.0) -> Domain:
    """A domain of twenty documents of one letter, told apart by their length."""
    return Domain(name, tuple(name[0] * (50 + i) for i in range(20)), weight)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A text file of forty paragraphs."""
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"Paragraph {i}. " + "word " * 30 for i in range(40)), encoding="utf-8")
    return path


def test_weights_are_shares_uniform_by_default() -> None:
    """They sum to 1, and come with names and windows for statistics of the mixture."""
    windows = torch.zeros(2, 4, dtype=torch.int64)
    assert CalibrationSet((("a", windows), ("b", windows))).weights == (0.5, 0.5)
    weighted = CalibrationSet((("a", windows), ("b", windows)), weights=(3.0, 1.0))
    assert [(name, alpha) for name, alpha, _ in weighted.mixture] == [("a", 0.75), ("b", 0.25)]
    assert weighted.mixture[0][2] is windows
    with pytest.raises(ValueError, match="1 weights for 2 domains"):
        CalibrationSet((("a", windows), ("b", windows)), weights=(1.0,))


def test_the_fingerprint_knows_the_weights() -> None:
    """The same windows under other weights are another calibration; the scale of the weights is not."""
    windows = torch.zeros(2, 4, dtype=torch.int64)
    even, same, uneven = (
        CalibrationSet((("a", windows), ("b", windows)), weights=weights) for weights in ((), (2.0, 2.0), (2.0, 1.0))
    )
    assert even.fingerprint == same.fingerprint != uneven.fingerprint


def test_windows_follow_the_weights_but_judgement_does_not() -> None:
    """A domain of weight 2 has twice the windows; held out, all have the same number."""
    domains = [letters("a", 2.0), letters("b"), letters("c", 0.0)]
    built = build_calibration(ByteTokenizer(), domains, 4, 20)
    assert [(name, len(rows), round(alpha, 6)) for name, alpha, rows in built.mixture] == [
        ("a", 8, round(2 / 3, 6)),
        ("b", 4, round(1 / 3, 6)),
    ]
    held = build_calibration(ByteTokenizer(), domains, 4, 20, split="heldout")
    assert [(name, len(rows)) for name, rows in held.domains] == [("a", 4), ("b", 4), ("c", 4)]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    """Negative, undefined and infinite: one sentence with the domain's name."""
    with pytest.raises(UsageError, match=r"weight of calibration domain b is .*expected 0 or a positive number"):
        build_calibration(ByteTokenizer(), [letters("a"), letters("b", weight)], 2, 20)


def test_all_weights_zero_is_refused() -> None:
    """A mixture needs at least one part."""
    with pytest.raises(UsageError, match="all calibration domains are 0"):
        build_calibration(ByteTokenizer(), [letters("a", 0.0)], 2, 20)


def test_a_weight_is_written_behind_the_file(notes: Path) -> None:
    """NAME=FILE@2, and with a field NAME=FILE:FIELD@0.5; a file with an @ in its name stays one."""
    jsonl = notes.with_suffix(".jsonl")
    jsonl.write_text("\n".join(f'{{"body": "b{i}"}}' for i in range(4)), encoding="utf-8")
    mailed = notes.with_name("me@2")
    mailed.write_bytes(notes.read_bytes())
    a, b, c, d = load_calib([f"a={notes}@2", f"b={jsonl}:body@0.5", f"c={mailed}", f"d={notes}"])
    assert [x.weight for x in (a, b, c, d)] == [2.0, 0.5, 1.0, 1.0]
    assert b.documents == ("b0", "b1", "b2", "b3")
    assert a.documents == c.documents == d.documents


@pytest.mark.parametrize(
    ("weight", "said"), [("-1", "is -1"), ("nan", "is nan"), ("inf", "is inf"), ("two", "not a number"), ("", "not a")]
)
def test_a_bad_weight_on_the_command_line_is_one_clear_error(notes: Path, weight: str, said: str) -> None:
    """The weight is quoted, and the form shown."""
    with pytest.raises(UsageError, match=said):
        load_calib([f"a={notes}@{weight}"])


def test_given_text_replaces_a_built_in_domain_of_its_name(notes: Path) -> None:
    """Names stay unique, so that no domain's loss hides another's."""
    mixture = read_mixture([f"code={notes}@2"])
    assert [(d.name, d.weight) for d in mixture] == [("text", 1), ("arithmetic", 1), ("dialogue", 1), ("code", 2)]
    assert len(read_mixture([])) == 4


def test_given_text_is_enough_where_python_has_no_sources(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice to give --calib works; without it the error stays."""

    def none() -> tuple[Domain, ...]:
        raise UsageError("no sources")

    monkeypatch.setattr("eopc_compiler.calibration.user_text.default_domains", none)
    assert [d.name for d in read_mixture([f"mine={notes}"])] == ["mine"]
    with pytest.raises(UsageError, match="no sources"):
        read_mixture([])


class FakeHub(ModuleType):
    """A `datasets` module that serves endless rows and remembers what was asked for and read."""

    def __init__(self, rows: list[dict[str, Any]] | None = None, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error = rows, error
        self.asked: list[Any] = []
        self.served = 0

    def load_dataset(self, path: str, name: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        """Endless numbered rows, or the given ones."""
        self.asked.append((path, name, split, streaming))
        if self.error:
            raise self.error
        return iter(self.rows) if self.rows is not None else self.endless()

    def endless(self) -> Iterator[dict[str, Any]]:
        """Every third row is blank."""
        while True:
            self.served += 1
            text = f"row {self.served}" if self.served % 3 else " \n"
            yield {"text": text, "question": f"q{self.served}", "label": 1}


@pytest.mark.parametrize(
    ("spec", "asked", "first", "weight"),
    [
        ("a=hf:imdb", ("imdb", None), "row 1", 1.0),
        ("a=hf:Salesforce/wikitext/wikitext-2-raw-v1@3", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "row 1", 3.0),
        ("a=hf:openai/gsm8k/main:question@0.5", ("openai/gsm8k", "main"), "q1", 0.5),
    ],
)
def test_a_data_set_gives_its_first_documents(
    monkeypatch: pytest.MonkeyPatch, spec: str, asked: tuple[str, str | None], first: str, weight: float
) -> None:
    """The train split, streamed, at most 2000 documents; no row beyond them is read."""
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (domain,) = load_calib([spec])
    assert hub.asked == [(*asked, "train", True)]
    assert domain.documents[0] == first
    assert len(domain.documents) == 2000
    assert hub.served <= 3000
    assert all(document.strip() for document in domain.documents)
    assert domain.weight == weight


@pytest.mark.parametrize(
    ("hub", "spec", "said"),
    [
        (FakeHub(error=ConnectionError("Couldn't reach\nthe Hub")), "hf:imdb", r"\(ConnectionError: Couldn't reach\)"),
        (FakeHub(error=ValueError("no config")), "hf:a/b", r"a/b cannot be read.*ValueError: no config"),
        (FakeHub([{"body": "x", "n": 1}]), "hf:imdb", r"no text at 'text' \(found: body, n\)"),
        (FakeHub([{"text": "x"}, {"text": "x"}]), "hf:imdb", r"has 1 separate documents"),
        (FakeHub(), "hf:", "not of the form"),
        (FakeHub(), "hf:a//b", "not of the form"),
        (FakeHub(), "hf:imdb@many", "not a number"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: str, said: str
) -> None:
    """Offline, unknown, without the field, too short, or malformed."""
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(UsageError, match=said):
        load_calib([f"a={spec}"])


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The install line is shown."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "eopc\[hf\]"'):
        load_calib(["a=hf:imdb"])
    assert issubclass(MissingExtraError, EopcError)


def test_dialogues_take_turns_and_differ() -> None:
    """User first, strictly alternating; no two alike, nor any two of their summaries; of many lengths."""
    dialogues = task_dialogues(400, random.Random(1))
    assert len(set(dialogues)) == 400
    for dialogue in dialogues:
        speakers = [line.split(":")[0] for line in dialogue.splitlines()]
        assert speakers == [("User", "Assistant")[i % 2] for i in range(len(speakers))]
        assert len(speakers) >= 6
        assert "{" not in dialogue
    openings = {dialogue.splitlines()[0] for dialogue in dialogues}
    assert len(openings) > 200
    summaries = [line for d in dialogues for line in d.splitlines() if line.count(",") >= 3]
    assert len(set(summaries)) == len(summaries) > 250
    assert len({len(dialogue.splitlines()) for dialogue in dialogues}) >= 8


def test_every_total_in_a_dialogue_is_right() -> None:
    """Units times price plus fee is what is said, and people pay for as many as they said they are."""
    checked = 0
    for dialogue in task_dialogues(400, random.Random(2)):
        for units, price, fee, total in re.findall(
            r"(\d+) at \$(\d+) each plus a fee of \$(\d+), \$(\d+) in all", dialogue
        ):
            assert int(units) * int(price) + int(fee) == int(total)
            if "nights" not in dialogue and (people := re.findall(r"people (\d+)", dialogue)):
                assert people[-1] == units
            checked += 1
    assert checked > 200


def pool(name: str, count: int, weight: float = 1.0) -> Pool:
    """Numbered pieces of one document each."""
    return Pool(name, tuple(Piece(name, f"{name}{i}", f"{name}{i}") for i in range(count)), weight)


def test_a_cursor_skips_no_piece_and_repeats_none() -> None:
    """Whatever pool is drawn in between, each pool's pieces come in their own order, all of them, once."""
    pools = [pool("a", 40), pool("b", 7), pool("c", 3)]
    drawn = list(draw(pools, random.Random(5)))
    for each in pools:
        assert [piece for piece in drawn if piece.pool == each.name] == list(each.pieces)
    assert [piece.pool for piece in drawn] != sorted(piece.pool for piece in drawn)


def test_a_pool_of_short_pieces_gets_its_share_of_characters() -> None:
    """Pieces of 5 and of 100 characters, 100 a draw: both pools give about half of the text, nothing is skipped."""
    short = Pool("s", tuple(Piece("s", str(i), f"{i:05d}") for i in range(4000)))
    long = Pool("l", tuple(Piece("l", str(i), "x" * 100) for i in range(400)))
    drawn = draw([short, long], random.Random(1), chars=100)
    pieces = [next(drawn) for _ in range(4000)]
    chars = {name: sum(len(p.text) for p in pieces if p.pool == name) for name in "sl"}
    assert 0.42 < chars["s"] / sum(chars.values()) < 0.58  # some 360 draws: one standard deviation is 0.026
    assert [p for p in pieces if p.pool == "s"] == list(short.pieces[: chars["s"] // 5])


def test_pools_are_drawn_by_weight() -> None:
    """Three to one, within the spread of a thousand draws; weight 0 is never drawn."""
    drawn = draw([pool("a", 5000, 3.0), pool("b", 5000), pool("c", 9, 0.0)], random.Random(0))
    names = [next(drawn).pool for _ in range(1000)]
    assert abs(names.count("a") - 750) < 50  # standard deviation 14
    assert "c" not in names


def test_the_record_names_the_pieces_of_each_window() -> None:
    """A piece that spans a border is in both windows."""
    pieces = [Piece("p", str(i), text) for i, text in enumerate(("aaaa", "bb", "cccccccc", "dd"))]
    cut = cut_windows(ByteTokenizer(), pieces, 2, 8)  # with blank lines: 6 + 4 + 10 bytes
    assert [bytes(row).decode() for row in cut.tokens.tolist()] == ["aaaa\n\nbb", "\n\ncccccc"]
    assert [record.documents for record in cut.records] == [("0", "1"), ("1", "2")]
    assert [record.piece_tokens for record in cut.records] == [(6, 2), (2, 6)]
    assert [record.tokens for record in cut.records] == [8, 8]
    assert [piece.document for piece in cut.pieces] == ["0", "1", "2"]


def test_build_calibration_is_the_sampler_over_given_labels() -> None:
    """A weight changes how many windows a domain has, not which come first."""
    one = build_calibration(ByteTokenizer(), [letters("a"), letters("b")], 4, 20)
    other = build_calibration(ByteTokenizer(), [replace(letters("a"), weight=3.0), letters("b")], 4, 20)
    assert torch.equal(other.domains[0][1][:4], one.domains[0][1])
