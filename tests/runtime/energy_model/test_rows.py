"""Reading measurements: nothing repaired, nothing dropped in silence, every doubt a warning."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from eopc_runtime.energy_model.rows import Measurements, read_measurements
from eopc_runtime.errors import UsageError

HEADER = "n_in,n_out,energy_j"


def write(path: Path, *lines: str) -> Path:
    """A CSV file of these lines."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(tmp_path: Path, *lines: str, by: tuple[str, ...] = (), least: int = 1) -> Measurements:
    """Write and read."""
    return read_measurements(write(tmp_path / "m.csv", *lines), by, least)


def test_rows_become_groups_in_the_order_they_appear(tmp_path: Path) -> None:
    """Groups by two columns; other columns and the order of columns do not matter; spaces around values neither."""
    found = read(
        tmp_path,
        "engine,energy_j,n_out,n_in,quant,note",
        "b,20.5,64,32,int4,x",
        "a,10,64,32,int4,y",
        " b ,41,128,32,int4,z",
        by=("engine", "quant"),
    )
    assert [g.key for g in found.groups] == ["b/int4", "a/int4"]
    assert found.groups[0].by == {"engine": "b", "quant": "int4"}
    assert found.groups[0].samples.energy_j.tolist() == [20.5, 41.0]
    assert found.groups[0].samples.cells() == ((32, 64), (32, 128))
    assert found.left_out == {}


def test_a_gzipped_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    """The content decides, not the suffix; a byte order mark is no part of a column's name."""
    path = tmp_path / "m.dat"
    path.write_bytes(gzip.compress(f"\ufeff{HEADER}\n8,8,1.5\n".encode()))
    assert read_measurements(path).groups[0].samples.energy_j.tolist() == [1.5]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((HEADER, "8,8,x"), 'line 2: energy_j is "x"'),
        ((HEADER, "8,8,1", "8.5,8,1"), "line 3: n_in 8.5"),
        ((HEADER, "nan,8,1"), "whole numbers"),
        ((HEADER, "8,inf,1"), "whole numbers"),
        ((HEADER, "8,8"), "line 2 does not have 3 cells"),
        ((HEADER, "8,8,1,9"), "line 2 does not have 3 cells"),
        (("n_in,n_out,energy", "8,8,1"), 'no column "energy_j". Did you mean "energy"?'),
        ((HEADER,), "it has no rows"),
        ((HEADER, "8,8,"), "1 rows: no energy"),
        (("",), 'no column "n_in"'),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, lines: tuple[str, ...], says: str) -> None:
    """What is no number, no row or no column is named."""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, *lines)
    assert says in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Binary, cut gzip, a missing file, an unknown --by column."""
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "g").write_bytes(gzip.compress(b"n_in,n_out,energy_j\n" * 99)[:30])
    for name, says in (("b", "not a text file"), ("g", "not a text file"), ("none", "cannot be read")):
        with pytest.raises(UsageError, match=says):
            read_measurements(tmp_path / name)
    with pytest.raises(UsageError, match=r'no column "engin".*Did you mean "engine"'):
        read(tmp_path, f"{HEADER},engine", "8,8,1,a", by=("engin",))


def test_rows_that_cannot_be_fitted_are_left_out_and_counted(tmp_path: Path) -> None:
    """No energy, zero or negative energy, no new token, too few new tokens: each reason with its count."""
    lines = (HEADER, "8,8,", "8,8,0", "8,8,-3", "8,0,3", "0,8,3", "8,2,3", "8,8,3")
    found = read(tmp_path, *lines, least=4)
    assert found.groups[0].samples.energy_j.tolist() == [3.0]
    assert found.left_out == {
        "no energy": 1,
        "an energy that is not above 0 J": 2,
        "no prompt, or no new token": 2,
        "fewer than 4 new tokens": 1,
    }


def test_prefix_cache_hits_are_left_out_unless_nothing_else_is_there(tmp_path: Path) -> None:
    """A group of hits alone is fitted, with a warning that its prompts are too cheap."""
    header = f"{HEADER},engine,prefix_cache_suspect"
    rows = ("8,8,3,a,False", "8,8,1,a,True", "8,8,1,b,true", "8,8,2,c,")
    found = read(tmp_path, header, *rows, by=("engine",))
    a, b, c = found.groups
    assert a.samples.energy_j.tolist() == [3.0]
    assert b.samples.energy_j.tolist() == [1.0]
    assert [bool([w for w in g.warnings if "prefix-cache" in w]) for g in (a, b, c)] == [False, True, False]
    assert found.left_out == {"a prefix-cache hit": 1}


def test_other_batch_sizes_are_left_out_unless_fitted_apart(tmp_path: Path) -> None:
    """Batch 1 is kept; a group of batch 8 alone holds for batch 8 only; with --by batch nothing is left out."""
    header = f"{HEADER},engine,batch"
    rows = ("8,8,3,a,1", "8,8,9,a,8", "8,8,9,a,8.0", "8,8,9,b,8")
    found = read(tmp_path, header, *rows, by=("engine",))
    assert found.groups[0].samples.energy_j.tolist() == [3.0]
    assert "2 rows of other batch sizes" in found.groups[0].warnings[0]
    assert found.groups[1].warnings == ("holds for batch 8 only",)
    assert found.left_out == {"a batch size other than 1": 2}
    assert read(tmp_path, header, *rows[:2], by=("engine", "batch")).left_out == {}


def test_mixed_boards_or_modes_are_named(tmp_path: Path) -> None:
    """Energies of two rail sets or power modes in one group are a warning, with the column to add."""
    header = f"{HEADER},power_mode,rails"
    found = read(tmp_path, header, "8,8,3,MAXN,VDD_IN", "8,8,3,15W,VDD_IN")
    assert found.groups[0].warnings == (
        "mixes 2 values of power_mode (15W, MAXN); fit them apart with --by power_mode",
    )
    assert not read(tmp_path, header, "8,8,3,MAXN,VDD_IN", "8,8,3,15W,VDD_IN", by=("power_mode",)).groups[0].warnings


def test_coarse_sampling_is_recognised(tmp_path: Path) -> None:
    """Answers of 1, 16 and 32 tokens that read the same joules come from a slow sensor, not from the model."""
    rows = [f"{n},{m},{11.03 if m < 64 else m / 2}" for n in (128, 256) for m in (1, 16, 32, 64, 256)]
    (group,) = read(tmp_path, HEADER, *rows).groups
    assert group.coarse
    assert "answers of 1 and of 16 tokens both read 11.03 J (4 such pairs)" in group.warnings[0]
    assert "--min-new-tokens 256" in group.warnings[0]  # eight times the longest that tied


def test_a_fine_sensor_is_not_called_coarse(tmp_path: Path) -> None:
    """The negative twin: rising energies, even if two repeats agree to the digit."""
    rows = [f"{n},{m},{m / 2}" for n in (128, 256) for m in (16, 16, 32, 64)]
    (group,) = read(tmp_path, HEADER, *rows).groups
    assert not group.coarse
    assert group.warnings == ()


def test_windows_under_two_seconds_are_counted(tmp_path: Path) -> None:
    """Where the file says how long a row took, short ones are a warning; an empty time says nothing."""
    rows = ("8,8,1,1.5", "8,16,2,3.0", "8,32,4,")
    (group,) = read(tmp_path, f"{HEADER},time_s", *rows).groups
    assert group.warnings == ("1 of 3 rows lasted less than 2 s; repeat short requests back to back",)
