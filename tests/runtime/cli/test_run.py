"""`eopc run`: text on stdout, the summary on stderr, one JSON object, clear mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Eopc = Callable[..., Result]


def test_run_streams_text_to_stdout_and_a_summary_to_stderr(eopc: Eopc, bundle: Path) -> None:
    """The text alone is on stdout; tier, joules, budget, source and reason are on stderr."""
    result = eopc("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "5J")
    assert result.exit_code == 0
    # t0 reads the prompt for 4 J; three steps of 1 J would not fit into 5 J, so t1 does both: 1 + 3 = 4 J
    assert result.stdout == "ijkl\n"
    assert result.stderr.splitlines()[-1].startswith("[t1: 4 J of 5 J (prior), 8 + 4 tokens, ")
    assert result.stderr.endswith("ended by length]\n")


def test_run_json_is_exactly_the_documented_object(eopc: Eopc, bundle: Path) -> None:
    """--json prints one object with the documented keys and nothing else on stdout."""
    result = eopc("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "7.5J", "--json")
    value = json.loads(result.stdout)
    assert list(value) == [
        *("text", "tier", "plan", "tiers_used", "budget_j", "energy_j", "energy_source", "finish_reason"),
        *("prompt_tokens", "completion_tokens", "ttft_s", "decode_tokens_per_s", "enforced_by", "warnings"),
    ]
    assert (value["text"], value["plan"], value["tiers_used"]) == ("ijkl", "t0>t1", ["t0", "t1"])
    assert (value["energy_j"], value["budget_j"], value["finish_reason"]) == (7.0, 7.5, "length")
    assert value["enforced_by"] == "model"
    assert [w for w in value["warnings"] if "prior joules" in w]
    assert result.stderr == ""


def test_run_under_a_prior_warns_once_and_strict_refuses_unless_a_safety_factor_is_named(
    eopc: Eopc, bundle: Path
) -> None:
    """One warning line before the summary; --strict exits with 1 and the cure; --safety 4 raises every price."""
    options = ("run", bundle, "--prompt", "abcdefgh", "--raw", "--max-new-tokens", 4, "--budget", "40J")
    plain = eopc(*options)
    assert plain.stderr.startswith("Warning: The budget is kept in prior joules")
    assert plain.stderr.count("Warning") == 1
    refused = eopc(*options, "--strict")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "safety factor of 4 or more" in refused.stderr
    safe = json.loads(eopc(*options, "--strict", "--safety", 4, "--json").stdout)
    assert (safe["plan"], safe["energy_j"]) == ("t0>t1", 4 * (8 * 0.5 + 3 * 1.0))
    assert "raised 4 times" in safe["warnings"][0]
    assert eopc(*options, "--safety", 0.5).exit_code == 2


def test_a_strict_run_needs_a_budget(eopc: Eopc, bundle: Path) -> None:
    """There is nothing to hold otherwise."""
    result = eopc("run", bundle, "--prompt", "a", "--strict")
    assert result.exit_code == 1
    assert "no budget was given" in result.stderr


def test_run_uses_template_system_stop_and_tier(eopc: Eopc, bundle: Path) -> None:
    """The chat template wraps prompt and system message; --stop and --tier reach the session."""
    result = eopc("run", bundle, "--prompt", "a", "--system", "s", "--stop", "e", "--tier", "t1", "--json")
    value = json.loads(result.stdout)
    assert value["prompt_tokens"] == len("system:suser:a")
    assert (value["text"], value["plan"], value["finish_reason"]) == ("bcd", "t1", "stop")


def test_run_samples_when_a_filter_is_given(eopc: Eopc, fake_tier: Any, bundle: Path) -> None:
    """--top-k without --temperature samples, and --seed makes it repeatable."""
    options = ("run", bundle, "--prompt", "a", "--raw", "--top-k", fake_tier.vocab, "--max-new-tokens", 30, "--json")
    texts = [json.loads(eopc(*options, *more).stdout)["text"] for more in (("--seed", 1), ("--seed", 1), ())]
    assert texts[0] == texts[1] != texts[2]
    greedy = json.loads(eopc("run", bundle, "--prompt", "a", "--raw", "--json").stdout)["text"]
    assert greedy.startswith("bcdefgh")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", ""), "empty"),
        (("--prompt", "x" * 64), "context of 64"),
        (("--prompt", "a", "--budget", "0.1J"), "No tier fits"),
        (("--prompt", "a", "--budget", "5 bananas"), "bananas"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--tier", "t7"), "t0, t1"),
        (("--prompt", "a", "--stop", ""), "stop"),
        (("--prompt", "a", "--raw", "--system", "s"), "--raw"),
    ],
)
def test_run_mistakes_are_one_error_line_on_stderr(
    eopc: Eopc, bundle: Path, options: tuple[str, ...], words: str
) -> None:
    """Every mistake exits with 1, an empty stdout (also with --json) and one `Error:` message."""
    result = eopc("run", bundle, *options, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr


def test_wrong_usage_is_exit_code_2(eopc: Eopc, bundle: Path) -> None:
    """Missing or malformed options are click's usage errors."""
    assert eopc("run", bundle).exit_code == 2
    assert eopc("run", bundle, "--prompt", "a", "--max-new-tokens", 0).exit_code == 2
    assert eopc("run", bundle, "--prompt", "a", "--top-k", "many").exit_code == 2
