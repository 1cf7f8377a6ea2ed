"""Bad flags, budgets, prompts and keys, of every command: one sentence each, and nothing begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from eopc_runtime.cli.energy import ENERGY_COMMANDS
from eopc_runtime.cli.main import COMMANDS

from .bad_input import assert_refused

Eopc = Callable[..., Result]
HUGE = "9" * 400
BUDGETS = [
    *(
        "",
        " ",
        "J",
        "5 5J",
        "0J",
        "-1J",
        "nan J",
        "nanJ",
        "infJ",
        "1e999J",
        f"{HUGE}J",
        "5kJ5",
        "5 joules",
        "5j/s",
    ),
    *("5,10J", "10 W", "5Whh", "five J", "0x5J", "1_0J", "٣J", "1e-400J", "--5J", "5J" * 1000),
]
RUN = ("run", "BUNDLE", "--prompt", "hi")
RUNS = {
    "no prompt": ("run", "BUNDLE"),
    "empty prompt": ("run", "BUNDLE", "--prompt", ""),
    "empty prompt, raw": ("run", "BUNDLE", "--prompt", "", "--raw"),
    "prompt too long": ("run", "BUNDLE", "--prompt", "x" * 5000),
    "prompt of bytes that are no text": ("run", "BUNDLE", "--prompt", "\udcff\udcfe", "--raw"),
    "message of bytes that are no text": ("run", "BUNDLE", "--prompt", "\udcff\udcfe"),
    "prompt as long as the context": ("run", "BUNDLE", "--prompt", "x" * 64, "--raw"),
    "system with raw": (*RUN, "--raw", "--system", "be brief"),
    "system too long": (*RUN, "--system", "x" * 5000),
    "no bundle": ("run", "--prompt", "hi"),
    "two bundles": (*RUN, "BUNDLE"),
    "unknown flag": (*RUN, "--budgett", "5J"),
    "flag without value": (*RUN, "--budget"),
    "unknown tier": (*RUN, "--tier", "t9"),
    "empty tier": (*RUN, "--tier", ""),
    "tier like a path": (*RUN, "--tier", "../t0"),
    "safety below 1": (*RUN, "--safety", "0.5"),
    "safety nan": (*RUN, "--safety", "nan"),
    "safety inf": (*RUN, "--safety", "inf"),
    "no tokens": (*RUN, "--max-new-tokens", "0"),
    "negative tokens": (*RUN, "--max-new-tokens", "-1"),
    "half a token": (*RUN, "--max-new-tokens", "1.5"),
    "tokens in words": (*RUN, "--max-new-tokens", "many"),
    "negative temperature": (*RUN, "--temperature", "-1"),
    "temperature nan": (*RUN, "--temperature", "nan"),
    "temperature inf": (*RUN, "--temperature", "inf"),
    "temperature in words": (*RUN, "--temperature", "hot"),
    "top-k 0": (*RUN, "--top-k", "0"),
    "top-k negative": (*RUN, "--top-k", "-5"),
    "top-p 0": (*RUN, "--top-p", "0"),
    "top-p above 1": (*RUN, "--top-p", "1.5"),
    "top-p nan": (*RUN, "--top-p", "nan"),
    "min-p above 1": (*RUN, "--min-p", "2"),
    "min-p negative": (*RUN, "--min-p", "-0.1"),
    "penalty 0": (*RUN, "--repetition-penalty", "0"),
    "penalty negative": (*RUN, "--repetition-penalty", "-1"),
    "penalty nan": (*RUN, "--repetition-penalty", "nan"),
    "seed negative": (*RUN, "--temperature", "1", "--seed", "-1"),
    "seed in words": (*RUN, "--seed", "lucky"),
    "empty stop": (*RUN, "--stop", ""),
    "unknown meter": (*RUN, "--meter", "crystal"),
    "proxy without watts": (*RUN, "--meter", "proxy", "--proxy-w", "0"),
    "proxy watts nan": (*RUN, "--meter", "proxy", "--proxy-w", "nan"),
    "proxy watts negative": (*RUN, "--meter", "proxy", "--proxy-w", "-3"),
    "unknown runner": (*RUN, "--runner", "abacus"),
    "engines that are not there": (*RUN, "--runner", "tensorrt"),
    "no threads": (*RUN, "--threads", "0"),
    "strict with a prior": (*RUN, "--budget", "50J", "--strict"),
    "log into a folder that is not there": (*RUN, "--log", "NOWHERE/sequences.jsonl"),
    "log onto a folder": (*RUN, "--log", "FOLDER"),
    "budget too small": (*RUN, "--budget", "1mJ"),
}
OTHERS = {
    "no such command": ("generate",),
    "near miss": ("rum",),
    "flag for a command": ("--fast",),
    "inspect nothing": ("inspect",),
    "inspect flag": ("inspect", "BUNDLE", "--deep"),
    "eval without text": ("eval", "BUNDLE"),
    "eval text missing": ("eval", "BUNDLE", "--text", "NOWHERE"),
    "eval text is a folder": ("eval", "BUNDLE", "--text", "FOLDER"),
    "eval text empty": ("eval", "BUNDLE", "--text", "EMPTY"),
    "eval text binary": ("eval", "BUNDLE", "--text", "BINARY"),
    "eval context of 1": ("eval", "BUNDLE", "--text", "TEXT", "--ctx", "1"),
    "eval context too long": ("eval", "BUNDLE", "--text", "TEXT", "--ctx", "100000"),
    "eval tier": ("eval", "BUNDLE", "--text", "TEXT", "--tier", "t7"),
    "eval of no tokens": ("eval", "BUNDLE", "--text", "TEXT", "--max-tokens", "0"),
    "eval prompt longer than window": ("eval", "BUNDLE", "--text", "TEXT", "--ctx", "8", "--prompt-tokens", "8"),
    "bench tier": ("bench", "BUNDLE", "--tier", "t7"),
    "bench of no prompt": ("bench", "BUNDLE", "--prompt-tokens", "0"),
    "bench of one token": ("bench", "BUNDLE", "--new-tokens", "1"),
    "bench beyond the context": ("bench", "BUNDLE", "--tier", "t0", "--prompt-tokens", "60", "--new-tokens", "60"),
    "bench no runs": ("bench", "BUNDLE", "--runs", "0"),
    "calibrate range": ("calibrate", "BUNDLE", "--meter", "proxy", "--prompt-range", "8"),
    "calibrate range backwards": ("calibrate", "BUNDLE", "--meter", "proxy", "--prompt-range", "9:3"),
    "calibrate range of words": ("calibrate", "BUNDLE", "--meter", "proxy", "--new-range", "a:b"),
    "calibrate beyond the context": ("calibrate", "BUNDLE", "--meter", "proxy", "--prompt-range", "10:5000"),
    "calibrate tier": ("calibrate", "BUNDLE", "--meter", "proxy", "--tier", "t7"),
    "calibrate cells": ("calibrate", "BUNDLE", "--meter", "proxy", "--fit-cells", "0"),
    "calibrate rounds": ("calibrate", "BUNDLE", "--meter", "proxy", "--rounds", "0"),
    "calibrate seconds": ("calibrate", "BUNDLE", "--meter", "proxy", "--seconds-per-window", "-1"),
    "calibrate temperature": ("calibrate", "BUNDLE", "--meter", "proxy", "--max-temperature", "hot"),
    "calibrate patience": ("calibrate", "BUNDLE", "--meter", "proxy", "--patience", "-1"),
    "validate without a log": ("validate", "BUNDLE", "--tegrastats", "TEXT"),
    "validate log missing": ("validate", "BUNDLE", "--tegrastats", "NOWHERE", "--log", "TEXT"),
    "validate log of text": ("validate", "BUNDLE", "--tegrastats", "TEXT", "--log", "TEXT"),
    "validate interval": ("validate", "BUNDLE", "--tegrastats", "TEXT", "--log", "TEXT", "--interval", "0"),
    "validate start": ("validate", "BUNDLE", "--tegrastats", "TEXT", "--log", "TEXT", "--start", "yesterday"),
    "validate board": ("validate", "BUNDLE", "--tegrastats", "TEXT", "--log", "TEXT", "--board", "toaster"),
    "validate no sequences": ("validate", "BUNDLE", "--sequences", "0"),
    "predict nothing": ("energy", "predict"),
    "predict without tokens": ("energy", "predict", "BUNDLE"),
    "predict no prompt": ("energy", "predict", "BUNDLE", "--prompt-tokens", "0", "--new-tokens", "5"),
    "predict key": ("energy", "predict", "BUNDLE", "--prompt-tokens", "5", "--new-tokens", "5", "--key", "t7"),
    "predict budget": ("energy", "predict", "BUNDLE", "--prompt-tokens", "5", "--new-tokens", "5", "--budget", "J"),
    "predict a text": ("energy", "predict", "TEXT", "--prompt-tokens", "5", "--new-tokens", "5"),
    "predict nowhere": ("energy", "predict", "NOWHERE", "--prompt-tokens", "5", "--new-tokens", "5"),
    "predict huge": ("energy", "predict", "BUNDLE", "--prompt-tokens", HUGE, "--new-tokens", "5"),
    "sweetspot nowhere": ("energy", "sweetspot", "NOWHERE"),
    "sweetspot of a text": ("energy", "sweetspot", "TEXT"),
    "sweetspot key": ("energy", "sweetspot", "BUNDLE", "--key", "t7"),
    "sweetspot prompt": ("energy", "sweetspot", "BUNDLE", "--prompt-tokens", HUGE),
    "threads without number": ("run", "BUNDLE", "--prompt", "hi", "--threads", HUGE),
    "read nothing": ("energy", "read"),
    "read nowhere": ("energy", "read", "--tegrastats", "NOWHERE"),
    "read a folder": ("energy", "read", "--tegrastats", "FOLDER"),
    "read board": ("energy", "read", "--tegrastats", "TEXT", "--board", "toaster"),
    "read rails": ("energy", "read", "--tegrastats", "TEXT", "--rails", "VDD_NOTHING"),
    "read interval": ("energy", "read", "--tegrastats", "TEXT", "--interval", "0"),
    "read interval nan": ("energy", "read", "--tegrastats", "TEXT", "--interval", "nan"),
    "fit nothing": ("energy", "fit"),
    "fit nowhere": ("energy", "fit", "NOWHERE"),
    "fit form": ("energy", "fit", "TEXT", "--form", "cubic"),
    "fit alpha": ("energy", "fit", "TEXT", "--alpha", "1"),
    "fit alpha nan": ("energy", "fit", "TEXT", "--alpha", "nan"),
    "energy alone": ("energy", "burn"),
    "devices toaster": ("devices", "toaster"),
    "devices path": ("devices", "../../etc/passwd"),
    "devices tokens": ("devices", "orin", "--prompt-tokens", "0"),
    "report of nothing": ("report", "NOWHERE"),
    "report of a text": ("report", "TEXT"),
    "report onto a folder": ("report", "BUNDLE", "-o", "FOLDER"),
    "report with no log": ("report", "BUNDLE", "--log", "NOWHERE"),
    "report with a text as log": ("report", "BUNDLE", "--log", "TEXT"),
    "serve nothing": ("serve", "NOWHERE"),
    "serve to everyone without a key": ("serve", "BUNDLE", "--host", "0.0.0.0"),
    "serve with no keys": ("serve", "BUNDLE", "--api-key", "NOWHERE"),
    "serve with empty keys": ("serve", "BUNDLE", "--api-key", "EMPTY"),
    "serve an allowance without a period": ("serve", "BUNDLE", "--allowance", "2Wh"),
    "serve an allowance of nothing": ("serve", "BUNDLE", "--allowance", "0J/day"),
    "serve a budget above the most": ("serve", "BUNDLE", "--budget", "5J", "--max-budget", "1J"),
    "serve port": ("serve", "BUNDLE", "--port", "65536"),
    "eval texts of one name": ("eval", "BUNDLE", "--text", "a=TEXT", "--text", "a=TEXT"),
    "eval unknown task": ("eval", "BUNDLE", "--task", "riddles=TEXT"),
    "eval nothing": ("eval", "BUNDLE"),
    "doctor argument": ("doctor", "please"),
    "keygen nowhere": ("keygen", "NOWHERE/key"),
    "keygen onto a file": ("keygen", "TEXT"),
    "keygen onto a folder": ("keygen", "FOLDER"),
    "sign without key": ("sign", "BUNDLE"),
    "sign with no key": ("sign", "BUNDLE", "--key", "NOWHERE"),
    "sign with a text": ("sign", "BUNDLE", "--key", "TEXT"),
    "sign with a folder": ("sign", "BUNDLE", "--key", "FOLDER"),
    "sign with binary": ("sign", "BUNDLE", "--key", "BINARY"),
    "verify without key": ("verify", "BUNDLE"),
    "verify with a text": ("verify", "BUNDLE", "--key", "TEXT"),
    "verify with an empty file": ("verify", "BUNDLE", "--key", "EMPTY"),
    "verify nothing": ("verify", "NOWHERE", "--key", "TEXT"),
}
CASES = {
    **{f"budget {i}: {text[:8]!r}": (*RUN, "--budget", text) for i, text in enumerate(BUDGETS)},
    **{f"run: {name}": words for name, words in RUNS.items()},
    **OTHERS,
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_bad_flags_are_one_sentence(eopc: Eopc, bundle: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """What cannot be meant is refused before anything is generated, measured or written."""
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {"TEXT": b"so much text, " * 40, "EMPTY": b"", "BINARY": b"\xff\xfe\x00\x9f"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    places = {"BUNDLE": bundle, "FOLDER": folder, **{name: tmp_path / name for name in (*contents, "NOWHERE")}}

    def placed(word: str) -> str:
        first, slash, rest = word.partition("/")
        return f"{places[first]}{slash}{rest}" if first in places else word

    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert_refused(lambda: eopc(*map(placed, words)))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_every_command_of_the_runtime_has_a_bad_call() -> None:
    """No command is left out."""
    called = {words[0] for words in CASES.values()} | {words[1] for words in CASES.values() if words[0] == "energy"}
    assert {name for name, entry in COMMANDS.items() if "eopc_runtime" in entry.module} <= called
    assert set(ENERGY_COMMANDS) <= called
