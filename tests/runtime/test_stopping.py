"""Stop strings across token borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.errors import UsageError
from eopc_runtime.stopping import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """All text let out, and whether a stop string was met."""
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces)
    return shown + scanner.finish(), scanner.stopped


def test_stop_string_over_three_tokens_is_never_shown() -> None:
    """Nothing of a stop string comes out even when it arrives in parts."""
    scanner = StopScanner(["</end>"])
    assert [scanner.push(p) for p in ["hello <", "/en", "d> more"]] == ["hello ", "", ""]
    assert scanner.stopped
    assert scanner.push("later") == scanner.finish() == ""


def test_text_that_only_begins_like_a_stop_string_is_let_go() -> None:
    """Held text comes out as soon as it can no longer become a stop string, or at the end."""
    scanner = StopScanner(["</end>"])
    assert [scanner.push(p) for p in ["a</e", "m>b</", ""]] == ["a", "</em>b", ""]
    assert scanner.finish() == "</"
    assert not scanner.stopped


def test_without_stop_strings_text_passes_at_once() -> None:
    """No stop strings, no delay."""
    scanner = StopScanner()
    assert scanner.push("abc") == "abc"
    assert scanner.finish() == ""


def test_of_two_stop_strings_the_first_complete_one_wins() -> None:
    """Overlapping stop strings cut where the one that ends first begins."""
    assert scan(["xabcd"], ["abcd", "bc"]) == ("xa", True)
    assert scan(["xabc"], ["bc", "abc"]) == ("x", True)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_cut_into_tokens_does_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    """Any cut into pieces shows what the whole text at once shows, and never a stop string."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, stopped = scan(pieces, stops)
    assert (shown, stopped) == scan([text], stops)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize("bad", [[""], "stop", [3]])
def test_malformed_stop_lists_are_refused(bad: list[str]) -> None:
    """An empty string, a bare string and a number are errors."""
    with pytest.raises(UsageError, match="stop"):
        StopScanner(bad)
