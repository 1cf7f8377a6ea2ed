"""Calibration text: built-in domains, user files, splits and token windows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from eopc_compiler.calibration import Domain, Split, build_calibration, default_domains, load_calib
from eopc_runtime.errors import UsageError

SPLITS: tuple[Split, ...] = ("calibration", "selection", "heldout")


class ByteTokenizer:
    """One token per UTF-8 byte; counts what it was asked to encode."""

    def __init__(self) -> None:
        self.encoded_chars = 0

    def encode(self, text: str) -> list[int]:
        self.encoded_chars += len(text)
        return list(text.encode("utf-8"))


@pytest.fixture(scope="module")
def domains() -> tuple[Domain, ...]:
    """The built-in domains, made once for the module."""
    return default_domains()


def numbered(count: int) -> Domain:
    """A domain of `count` short documents that are told apart by their digit."""
    return Domain("numbers", tuple(f"{i}" * 50 for i in range(count)))


def test_built_in_domains_are_four_and_repeatable(domains: tuple[Domain, ...]) -> None:
    """Read anew, text, code, arithmetic and dialogue are the same."""
    assert [domain.name for domain in domains] == ["text", "code", "arithmetic", "dialogue"]
    assert default_domains.__wrapped__() == domains
    assert all(len(domain.documents) >= 30 for domain in domains)


def test_splits_share_no_document_within_or_across_domains(domains: tuple[Domain, ...]) -> None:
    """Twelve sets of documents, pairwise disjoint, that cover everything."""
    parts = [set(domain.split(split)) for domain in domains for split in SPLITS]
    assert all(parts)
    assert len(set().union(*parts)) == sum(len(part) for part in parts)
    assert len(set().union(*parts)) == len({doc for domain in domains for doc in domain.documents})


def test_code_parses_like_code_and_text_reads_like_text(domains: tuple[Domain, ...]) -> None:
    """Code has definitions, text mostly has not."""
    text, code, *_ = ("\n".join(domain.documents) for domain in domains)
    pattern = re.compile(r"(?m)^\s*(def|class|import|return) ")
    assert len(pattern.findall(code)) / len(code) > 5 * len(pattern.findall(text)) / len(text)


def test_every_worked_sum_is_right(domains: tuple[Domain, ...]) -> None:
    """Each "a op b = c" in the arithmetic domain holds."""
    checked = 0
    for left, operator, right, result in re.findall(
        r"(?<![\d+*/-] )\b(\d+) ([+*-]) (\d+) = \$?(\d+)", "\n".join(domains[2].documents)
    ):
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result)
        checked += 1
    assert checked > 2000


def test_windows_have_the_asked_shape_and_repeat_with_the_seed(domains: tuple[Domain, ...]) -> None:
    """[n_seq, seq_len] int64 per domain; the seed alone decides the windows."""
    first = build_calibration(ByteTokenizer(), domains, 4, 64, seed=1)
    assert first.names == ("text", "code", "arithmetic", "dialogue")
    assert all(windows.shape == (4, 64) and windows.dtype == torch.int64 for _, windows in first.domains)
    assert first.tokens.shape == (16, 64)
    assert build_calibration(ByteTokenizer(), domains, 4, 64, seed=1).fingerprint == first.fingerprint
    assert build_calibration(ByteTokenizer(), domains, 4, 64, seed=2).fingerprint != first.fingerprint


def test_only_as_much_text_is_tokenised_as_is_used(domains: tuple[Domain, ...]) -> None:
    """Megabytes of sources are not encoded for a few windows."""
    tokenizer = ByteTokenizer()
    build_calibration(tokenizer, domains, 2, 64)
    assert tokenizer.encoded_chars < 10_000


def test_a_window_of_one_split_never_holds_text_of_another() -> None:
    """The digits seen in each split's windows come from that split's documents, whatever the seed."""
    domain = numbered(10)
    for seed in range(3):
        for split in SPLITS:
            windows = build_calibration(ByteTokenizer(), [domain], 2, 20, seed, split).domains[0][1]
            seen = set(bytes(windows.flatten().tolist()).decode()) - {"\n"}
            assert seen <= {document[0] for document in domain.split(split)}


def test_few_windows_already_see_many_documents() -> None:
    """Pieces come from the documents in turn, not one document to its end."""
    domain = Domain("long", tuple(f"{i}\n" * 3000 for i in range(9)))
    windows = build_calibration(ByteTokenizer(), [domain], 24, 30).domains[0][1]
    assert len(set(bytes(windows.flatten().tolist()).decode()) - {"\n"}) >= 4


def test_too_short_a_text_is_refused_with_both_numbers() -> None:
    """The message says how many tokens there are and how many are needed."""
    with pytest.raises(UsageError, match=r"numbers has \d+ tokens for heldout.*need 5000"):
        build_calibration(ByteTokenizer(), [numbered(9)], 50, 100, split="heldout")


def test_allow_fewer_gives_what_there_is_but_never_nothing() -> None:
    """A short text may give fewer windows on request, and is refused when not even one fits."""
    fewer = build_calibration(ByteTokenizer(), [numbered(9)], 50, 100, allow_fewer=True)
    assert 1 <= len(fewer.domains[0][1]) < 50
    with pytest.raises(UsageError):
        build_calibration(ByteTokenizer(), [numbered(9)], 1, 5000, allow_fewer=True)


def test_user_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    """Nothing but blank space is lost, and all splits get documents."""
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 30 for i in range(40))
    (tmp_path / "notes.txt").write_text(text, encoding="utf-8")
    (domain,) = load_calib([f"notes={tmp_path / 'notes.txt'}"])
    assert domain.name == "notes"
    assert "".join("".join(domain.documents).split()) == "".join(text.split())
    assert all(domain.split(split) for split in SPLITS)


def test_text_without_line_ends_still_fills_three_splits(tmp_path: Path) -> None:
    """One endless line is cut by length."""
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 23) for i in range(5000)), encoding="utf-8")
    (domain,) = load_calib([f"a={tmp_path / 'a.txt'}"])
    assert all(domain.split(split) for split in SPLITS)


def test_json_lines_are_documents_and_the_field_can_be_named(tmp_path: Path) -> None:
    """One record is one document, by default from "text"; U+2028 inside a record is no line end."""
    path = tmp_path / "d.jsonl"
    rows = [{"text": f"t{i}\u2028x", "body": f"b{i}"} for i in range(4)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    by_default, by_name = load_calib([f"d={path}", f"e={path}:body"])
    assert by_default.documents == tuple(row["text"] for row in rows)
    assert by_name.documents == ("b0", "b1", "b2", "b3")


@pytest.mark.parametrize("spec", ["", "file.txt", "=file.txt", "a=", "a b=file.txt"])
def test_a_malformed_argument_shows_the_expected_form(spec: str) -> None:
    """NAME=FILE is said."""
    with pytest.raises(UsageError, match="NAME=FILE"):
        load_calib([spec])


@pytest.mark.parametrize(
    ("content", "file", "said"),
    [
        (None, "missing.txt", "does not exist"),
        (b"", "empty.txt", "is empty"),
        (b" \n\t\n", "blank.txt", "is empty"),
        (b"caf\xe9 " * 50, "latin1.txt", "not UTF-8"),
        (b"only one short line", "short.txt", "at least 3"),
        (b'{"text": "a"}\n{broken\n', "bad.jsonl", "line 2 is not JSON"),
        (b'{"text": "a"}\n{"body": "b"}\n', "field.jsonl", "line 2 has no text at 'text'.*body"),
        (b'{"text": 5}\n', "number.jsonl", "line 1 has no text"),
        (b"[1]\n", "list.jsonl", "found: list"),
    ],
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path: Path, content: bytes | None, file: str, said: str) -> None:
    """Each message names the file and what is wrong."""
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        load_calib([f"mine={tmp_path / file}"])


def test_a_folder_and_a_repeated_name_are_refused(tmp_path: Path) -> None:
    """Neither is silently accepted."""
    with pytest.raises(UsageError, match="is a folder"):
        load_calib([f"a={tmp_path}"])
    path = tmp_path / "n.txt"
    path.write_text("\n\n".join(f"line {i} " * 40 for i in range(20)), encoding="utf-8")
    with pytest.raises(UsageError, match="given twice"):
        load_calib([f"a={path}", f"a={path}"])
