"""The journal: what is finished is on the disk, a torn line is measured again, two runs do not share one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eopc_runtime.calibration.journal import Journal, Measured, journal_folder, journal_key
from eopc_runtime.errors import UsageError

OWNER = {"engine": "abc", "plan": [1, 2]}


def measured(turn: int = 0, tier: str = "t0", n: int = 32) -> Measured:
    """One finished visit."""
    return Measured(turn, tier, n, 64, (1.5, 1.25), (1.0, 0.75), 2, 3.5, 70, 51.5, 0.01)


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    """Visits and idle power survive, and the second run appends."""
    first = Journal(tmp_path / "j", OWNER)
    assert not first.has_idle
    first.set_idle(5.25)
    first.add(measured(0))
    first.close()
    again = Journal(tmp_path / "j", OWNER)
    assert again.done == {measured(0).visit: measured(0)}
    assert (again.has_idle, again.idle_w) == (True, 5.25)
    again.add(measured(1))
    again.close()
    third = Journal(tmp_path / "j", OWNER)
    assert list(third.done.values()) == [measured(0), measured(1)]
    third.close()


def test_that_idle_power_cannot_be_measured_is_remembered_too(tmp_path: Path) -> None:
    """null is a finding, not a gap."""
    first = Journal(tmp_path, OWNER)
    first.set_idle(None)
    first.close()
    again = Journal(tmp_path, OWNER)
    assert (again.has_idle, again.idle_w) == (True, None)
    again.close()


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_last_line_is_dropped_and_the_file_mended(tmp_path: Path, cut: int) -> None:
    """A crash in the middle of a line loses that visit alone; the next line does not grow out of its rest."""
    first = Journal(tmp_path, OWNER)
    first.add(measured(0))
    first.add(measured(1))
    first.close()
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:-cut])
    again = Journal(tmp_path, OWNER)
    assert list(again.done.values()) == [measured(0)]
    again.add(measured(1))
    again.close()
    assert first.path.read_bytes() == whole


def test_a_header_that_was_torn_is_no_journal_yet(tmp_path: Path) -> None:
    """A crash within the first line begins anew."""
    first = Journal(tmp_path, OWNER)
    first.close()
    first.path.write_bytes(first.path.read_bytes()[:10])
    again = Journal(tmp_path, OWNER)
    again.add(measured())
    again.close()
    assert [json.loads(line).get("tier") for line in first.path.read_text().splitlines()] == [None, "t0"]


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    """A line that is whole and no JSON, or of unknown keys, is not skipped in silence."""
    first = Journal(tmp_path, OWNER)
    first.add(measured())
    first.close()
    text = first.path.read_text()
    first.path.write_text(text.replace('"tier": "t0"', '"tier: "t0"'))
    with pytest.raises(UsageError, match=r"line 2 is damaged.*--no-resume"):
        Journal(tmp_path, OWNER)
    first.path.write_text(text.replace('"tier"', '"teir"'))
    with pytest.raises(UsageError, match="line 2"):
        Journal(tmp_path, OWNER)


def test_no_resume_begins_anew(tmp_path: Path) -> None:
    """What was measured before is gone."""
    first = Journal(tmp_path, OWNER)
    first.add(measured())
    first.close()
    fresh = Journal(tmp_path, OWNER, resume=False)
    assert fresh.done == {}
    fresh.close()


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    """The second is refused while the first has it open, and gets it afterwards."""
    first = Journal(tmp_path, OWNER)
    with pytest.raises(UsageError, match=r"another eopc calibrate is measuring the same"):
        Journal(tmp_path, OWNER)
    first.close()
    Journal(tmp_path, OWNER).close()


def test_whatever_it_depends_on_has_a_journal_of_its_own(tmp_path: Path) -> None:
    """Another engine, another mode, another plan: another name."""
    assert journal_key(OWNER) == journal_key(dict(reversed(OWNER.items())))
    assert journal_key(OWNER) != journal_key({**OWNER, "engine": "abd"})
    first, other = Journal(tmp_path, OWNER), Journal(tmp_path, {**OWNER, "mode": "MAXN"})
    assert first.path != other.path
    first.close()
    other.close()


def test_a_retired_journal_is_kept_but_not_gone_on_with(tmp_path: Path) -> None:
    """The same command measures anew after its prices were published."""
    first = Journal(tmp_path, OWNER)
    first.add(measured())
    kept = first.retire()
    assert kept.name.endswith(".done.jsonl")
    assert "t0" in kept.read_text()
    again = Journal(tmp_path, OWNER)
    assert again.done == {}
    again.close()


def test_journals_lie_beside_the_bundle(tmp_path: Path) -> None:
    """Not in it: a bundle that is built anew takes nothing over by accident."""
    assert journal_folder(tmp_path / "a.eopc") == tmp_path.resolve() / ".a.eopc.calibrate"
