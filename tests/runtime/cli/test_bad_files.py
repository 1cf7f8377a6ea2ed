"""Bad power logs, energy CSVs, fits, texts and sequence logs: one sentence each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from .bad_input import assert_refused

Eopc = Callable[..., Result]
HEADER = "n_in,n_out,energy_j\n"
CELLS = [(n, m) for n in (16, 64, 256, 1024) for m in (8, 32, 128)]
ROWS = "".join(f"{n},{m},{2 + n * 0.01 + m * 0.5}\n" for n, m in CELLS)
LINE = "RAM 2/7620MB CPU [3%@729] VDD_IN 4000mW/4000mW VDD_CPU_GPU_CV 500mW/500mW VDD_SOC 1400mW/1400mW\n"
CSVS: dict[str, str | bytes] = {
    "empty": "",
    "blank lines": "\n\n\n",
    "header alone": HEADER,
    "no energy column": "n_in,n_out\n1,2\n",
    "misspelled column": "n_in,n_out,energy_joule\n1,2,3\n",
    "words": HEADER + "many,few,much\n",
    "half a token": HEADER + "1.5,2,3\n",
    "nan": HEADER + "1,2,nan\n",
    "infinity": HEADER + "1,2,inf\n",
    "1e999": HEADER + "1,2,1e999\n",
    "negative energy": HEADER + "1,2,-3\n",
    "no energy at all": HEADER + "1,2,0\n",
    "negative length": HEADER + "-1,2,3\n",
    "length of 400 digits": HEADER + "9" * 400 + ",2,3\n",
    "length of 5000 digits": HEADER + "9" * 5000 + ",2,3\n",
    "one row": HEADER + "1,2,3\n",
    "one cell a hundred times": HEADER + "1,2,3\n" * 100,
    "three cells": HEADER + "1,2,3\n4,5,6\n7,8,9\n",
    "a row too short": HEADER + ROWS + "1,2\n",
    "a row too long": HEADER + ROWS + "1,2,3,4\n",
    "an open quote": HEADER + ROWS + '1,2,"3\n',
    "an empty cell": HEADER + ROWS + "1,,3\n",
    "blanks for a number": HEADER + ROWS + "1, ,3\n",
    "binary": b"\xff\xfe\x00\x01" * 100,
    "nul": HEADER.encode() + b"1,2,\x003\n",
    "utf-16": (HEADER + ROWS).encode("utf-16"),
    "half a gzip": gzip.compress((HEADER + ROWS).encode())[:30],
    "no gzip": b"\x1f\x8bno gzip at all",
    "damaged gzip": gzip.compress((HEADER + ROWS).encode())[:-8] + b"\x00" * 8,
    "a gzip bomb": gzip.compress(b"0" * (70 << 20)),
    "a field of a megabyte": HEADER + "1" * 1_000_000 + ",2,3\n",
    "json": '{"n_in": 1}',
    "semicolons": HEADER.replace(",", ";") + ROWS.replace(",", ";"),
    "column twice": "n_in,n_out,energy_j,n_in\n" + ROWS.replace("\n", ",5\n"),
    "decimal comma": HEADER + ROWS + '1,2,"3,5"\n',
    "hexadecimal": HEADER + ROWS + "0x10,2,3\n",
    "arabic digits": HEADER + ROWS + "\u0661,2,3\n",
    "underscores": HEADER + ROWS + "1_0,2,3\n",
}
LOGS: dict[str, str | bytes] = {
    "empty": "",
    "blank lines": "\n\n\n",
    "prose": "The board was warm.\n" * 10,
    "binary": b"\xff\xfe\x00\x9f" * 1000,
    "no rail": "RAM 2/7620MB CPU [3%@729] cpu@40C\n" * 5,
    "numbers alone": "4000mW/4000mW\n" * 5,
    "one endless line": "VDD_IN " * 200_000,
    "a line of digits": "9" * 2_000_000,
    "csv": HEADER + ROWS,
    "json": json.dumps({"VDD_IN": 4000}),
}
RAIL_CHOICES = {
    "twice": "VDD_IN,VDD_IN",
    "unknown": "VDD_OUT",
    "empty": ",",
    "a path": "../VDD_IN",
    "long": "V" * 5000,
}
RECORDS = {
    "empty": "",
    "prose": "so it ran\n",
    "list": "[]\n",
    "empty object": "{}\n",
    "other kind": '{"schema": 1, "kind": "another"}\n',
    "newer schema": '{"schema": 99, "kind": "eopc sequence"}\n',
    "binary": b"\xff\xfe\n",
    "deep": "[" * 100_000 + "\n",
    "nan": '{"schema": NaN}\n{}\n',
    "digits": '{"schema": ' + "9" * 5000 + "}\n{}\n",
}
FITS = {
    "empty": "",
    "list": "[]",
    "no groups": "{}",
    "half": '{"schema": 1,',
    "wrong types": '{"schema": 1, "kind": "fit", "groups": "many"}',
    "newer": '{"schema": 99, "groups": []}',
    "nan": '{"groups": [NaN]}',
    "deep": "[" * 100_000,
}


def write(path: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
def test_a_bad_csv_is_one_sentence(eopc: Eopc, tmp_path: Path, content: str | bytes) -> None:
    """`eopc energy fit` names the file, and the line where there is one."""
    path = write(tmp_path / "cells.csv", content)
    assert_refused(lambda: eopc("energy", "fit", path, "-o", tmp_path / "fit.json"))
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize("content", LOGS.values(), ids=LOGS)
def test_a_bad_power_log_is_one_sentence(eopc: Eopc, tmp_path: Path, content: str | bytes) -> None:
    """`eopc energy read` says what it expected."""
    path = write(tmp_path / "power.log", content)
    assert_refused(lambda: eopc("energy", "read", "--tegrastats", path, "--interval", "1"))


@pytest.mark.parametrize("rails", RAIL_CHOICES.values(), ids=RAIL_CHOICES)
def test_bad_rails_are_one_sentence(eopc: Eopc, tmp_path: Path, rails: str) -> None:
    """A sound log does not help where the rails asked for are none of its own."""
    path = write(tmp_path / "power.log", LINE * 5)
    assert eopc("energy", "read", "--tegrastats", path, "--interval", "1").exit_code == 0
    assert_refused(lambda: eopc("energy", "read", "--tegrastats", path, "--interval", "1", "--rails", rails))


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_bad_sequence_log_is_one_sentence(eopc: Eopc, bundle: Path, tmp_path: Path, content: str | bytes) -> None:
    """`eopc validate` names the line."""
    power, log = write(tmp_path / "power.log", LINE * 5), write(tmp_path / "sequences.jsonl", content)
    assert_refused(lambda: eopc("validate", bundle, "--tegrastats", power, "--interval", "1", "--log", log))


@pytest.mark.parametrize("content", FITS.values(), ids=FITS)
def test_a_bad_fit_is_one_sentence(eopc: Eopc, tmp_path: Path, content: str) -> None:
    """`eopc energy predict` and `sweetspot` refuse a file that `energy fit` did not write."""
    path = write(tmp_path / "fit.json", content)
    assert_refused(lambda: eopc("energy", "predict", path, "--prompt-tokens", 5, "--new-tokens", 5))
    assert_refused(lambda: eopc("energy", "sweetspot", path))


TEXTS = {"empty": b"", "binary": b"\xff\xfe\x00\x9f", "one letter": b"a"}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_a_bad_text_is_one_sentence(eopc: Eopc, bundle: Path, tmp_path: Path, content: bytes) -> None:
    """`eopc eval` needs text of some length."""
    path = write(tmp_path / "text.txt", content)
    assert_refused(lambda: eopc("eval", bundle, "--text", path, "--ctx", 16))
