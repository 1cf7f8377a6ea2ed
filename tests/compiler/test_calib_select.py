"""--calib-select: windows by domain, or alike from clusters found in all text, through both commands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from eopc_compiler.cache import StageCache
from eopc_compiler.calibration import Batch, Domain, build_calibration, select_calibration
from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.model import Llama
from eopc_compiler.pipeline import choose_dialect, observe_dense
from eopc_compiler.stage_text import read_calibration, read_text
from eopc_compiler.state import CompileState
from eopc_runtime.cli.main import cli
from eopc_runtime.errors import EopcError, UsageError
from eopc_runtime.profiles import load_profile

pytest.importorskip("sklearn", reason="scikit-learn of the compiler extra is not installed")

SEA = ("harbour", "sail", "anchor", "tide", "gull", "rope", "mast", "keel", "lantern", "storm", "net", "wave")
LAW = ("court", "judge", "appeal", "statute", "clause", "verdict", "jury", "witness", "oath", "ruling", "deed", "plea")
README = Path(__file__).parents[2] / "README.md"


class ByteTokenizer:
    """One token per UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def documents(mark: str, words: Sequence[str], count: int) -> tuple[str, ...]:
    """Documents of one topic; each sentence starts with its mark."""
    rng = random.Random(mark)
    return tuple("".join(f"{mark} {' '.join(rng.choices(words, k=7))}. " for _ in range(20)) for _ in range(count))


MIXED = Domain("mixed", documents("#", SEA, 180) + documents("%", LAW, 20))


def share_of_law(tokens: torch.Tensor) -> float:
    """Sentences about law over all sentences, by their marks."""
    text = bytes(tokens.flatten().tolist())
    return text.count(b"%") / (text.count(b"%") + text.count(b"#"))


def test_by_domain_is_the_mixture_as_ever() -> None:
    """The default draws what build_calibration draws."""
    plain = select_calibration("domains", ByteTokenizer(), [MIXED], 20, 256, 3)
    assert plain.fingerprint == build_calibration(ByteTokenizer(), [MIXED], 20, 256, 3).fingerprint


def test_by_cluster_a_rare_topic_counts_as_much_as_a_common_one() -> None:
    """One document in ten is about law, but a cluster of five, with a fifth of the windows; and that is said."""
    said: list[str] = []
    plain = select_calibration("domains", ByteTokenizer(), [MIXED], 50, 256)
    drawn = select_calibration("ccds", ByteTokenizer(), [MIXED], 50, 256, say=said.append)
    assert share_of_law(plain.tokens) < 0.15
    assert drawn.names == tuple(f"cluster{i}" for i in range(5))
    assert sorted(share_of_law(tokens) for _, tokens in drawn.domains) == [0, 0, 0, 0, 1]
    assert len(set(drawn.weights)) == 1 and {len(tokens) for _, tokens in drawn.domains} == {10}
    assert any(line.startswith("clusters of ") and "TF-IDF" in line for line in said)


def test_text_of_weight_zero_is_not_calibrated_on() -> None:
    """It is to be judged on only, whichever way windows are chosen; the windows are as many as without clusters."""
    domains = [Domain("sea", documents("#", SEA, 60)), Domain("law", documents("%", LAW, 60), 0.0)]
    for how in ("domains", "ccds"):
        drawn = select_calibration(how, ByteTokenizer(), domains, 10, 256)  # type: ignore[arg-type]
        assert share_of_law(drawn.tokens) == 0 and len(drawn.tokens) == 20


def test_an_unknown_way_is_refused() -> None:
    """The message names both."""
    with pytest.raises(UsageError, match="domains, ccds"):
        select_calibration("topics", ByteTokenizer(), [MIXED], 2, 64)  # type: ignore[arg-type]


def test_prune_calibrates_on_clusters(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The domains that were read are clusters of the given text."""
    arguments = ("--ratio", "0.3", "--method", "flap", "--calib", f"mine={README}", "--only-calib", "--json")
    select = ("--calib-select", "ccds", "--calibration-tokens", "2560", "-o", str(tmp_path / "out"))
    result = CliRunner().invoke(cli, ["prune", str(tiny_checkpoint), *arguments, *select])
    assert result.exit_code == 0, result.stderr
    names = [row["domain"] for row in json.loads(result.stdout)["calibration"]]
    assert names == [f"cluster{i}" for i in range(len(names))]
    assert "clusters of " in result.stderr


def test_build_calibrates_on_clusters_and_judges_by_domain(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Callable[..., Any]
) -> None:
    """Selection and held-out text keep their domains."""
    names = ("text", "code", "arithmetic", "dialogue")  # in place of the built-in ones, which take long to cluster
    calib = tuple(f"{name}={README}" for name in names)
    args = build_settings(tiny_checkpoint, tmp_path / "out", calib=calib, calib_select="ccds")
    cache = StageCache(tmp_path / "work", resume=False)
    state = CompileState(args, cache, load_profile("cpu"), lambda _: None, lambda _: None)
    opened = choose_dialect(replace(state, checkpoint=open_checkpoint(str(tiny_checkpoint))))
    read = read_calibration(read_text(opened))
    cache.close()
    assert read.calibration and read.selection and read.heldout
    assert all(name.startswith("cluster") for name in read.calibration.names)
    assert read.selection.names == read.heldout.names == names


@pytest.mark.parametrize(("planned", "repaired"), [(2, 5), (5, 2)])
def test_tiers_are_repaired_on_more_text_than_they_are_planned_on(
    tiny_checkpoint: Path, tmp_path: Path, build_settings: Callable[..., Any], planned: int, repaired: int
) -> None:
    """The calibration text is enough for whichever is more; statistics are of the first windows of it."""
    settings = {"calibration_windows": planned, "repair_windows": repaired}
    args = replace(build_settings(tiny_checkpoint, tmp_path / "out"), **settings)
    cache = StageCache(tmp_path / "work", resume=False)
    state = CompileState(args, cache, load_profile("cpu"), lambda _: None, lambda _: None)
    opened = choose_dialect(replace(state, checkpoint=open_checkpoint(str(tiny_checkpoint))))
    read = read_calibration(read_text(opened))
    seen = list[int]()

    def observed(_model: Llama, batches: Sequence[Batch], *_: Any) -> None:
        seen.extend(len(batch.tokens) for batch in batches if batch.domain == 0)
        raise EopcError("seen")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EopcError, match="seen"):
        patch.setattr("eopc_compiler.pipeline.observe", observed)
        observe_dense(read)
    cache.close()
    assert read.calibration and [len(w) for _, w in read.calibration.domains] == [5, 5, 5, 5]
    assert sum(seen) == planned


def test_build_passes_the_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the settings; another word is wrong usage."""

    def stop(args: Any, *_: object) -> None:
        raise EopcError(f"select {args.calib_select}")

    monkeypatch.setattr("eopc_compiler.build.build", stop)
    for flags, said in (((), "select domains"), (("--calib-select", "ccds"), "select ccds")):
        assert said in CliRunner().invoke(cli, ["build", *flags]).stderr
    assert CliRunner().invoke(cli, ["build", "--calib-select", "topics"]).exit_code == 2
