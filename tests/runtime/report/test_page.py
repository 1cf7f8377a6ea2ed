"""The page: its numbers are the bundle's, it fetches nothing, and hostile text stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli import cli
from eopc_runtime.report.page import _resource
from eopc_runtime.svg import COLORS
from eopc_runtime.units import format_energy

html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install html5lib")

Edit = Callable[[Callable[[dict[str, Any]], Any]], Path]
HTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}\x00\ud800"


def report(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


def page_of(bundle: Path, *options: object) -> str:
    """The report of a bundle, as it is written into it."""
    result = report(bundle, *options)
    assert result.exit_code == 0, result.output
    return (bundle / "report.html").read_text(encoding="utf-8")


def tree_of(page: str) -> Any:
    """The page as a tree; anything that is not valid HTML is an error."""
    return html5lib.HTMLParser(strict=True).parse(page)


def rows_of(page: str, section: str) -> list[list[str]]:
    """All rows of the tables of a section, as texts."""
    (found,) = (s for s in tree_of(page).iter(f"{HTML}section") if s.get("id") == section)
    return [["".join(cell.itertext()).strip() for cell in row] for row in found.iter(f"{HTML}tr")]


def test_the_front_lists_every_plan_with_the_tables_joules_and_the_plans_losses(planned: Path) -> None:
    """Joules by phase with their source, losses as measured, and `not measured` for the other pairs."""
    rows = rows_of(page_of(planned), "front")
    table = Bundle.open(planned).energy
    assert rows[0][:5] == ["plan", "kind", "sequence (prior)", "prompt", "answer"]
    for name, prefill, decode, loss in (
        ("t0", 0, 0, "+0.0000"),
        ("t0>t1", 0, 1, "+0.0625"),
        ("t1>t2", 1, 2, "not measured"),
        ("t2", 2, 2, "not measured"),
    ):  # fmt: skip
        (row,) = (r for r in rows[1:7] if r[0] == name)
        joules = table.plan_price_j(prefill, decode, 64, 100), table.prefill_price_j(prefill, 64)
        assert row[2:4] == [format_energy(j) for j in joules]
        assert row[5] == loss


def test_only_measured_losses_have_a_mark(planned: Path) -> None:
    """Three plans were measured and have marks; the other three are ticks that say so, in each of three pictures."""
    titles = [t.text for t in tree_of(page_of(planned)).iter(f"{SVG}title")]
    assert sum(t.endswith("quality not measured") for t in titles) == 3 * 3
    assert sum(bool(re.fullmatch(r"t\S+ \(.*\): .* J, \+[\d.]+ nats", t)) for t in titles) == 3 * 3
    assert any(t.startswith("t0>t1 (handed-over pair)") and t.endswith("+0.0625 nats") for t in titles)


def test_what_was_removed_stands_in_its_order_with_joules_and_nats(planned: Path) -> None:
    """The layer first and the channels after it; sums from the manifest, joules from the plan with its source."""
    rows = rows_of(page_of(planned), "removed")
    assert rows[0][5:7] == ["saves of t0 (prior)", "adds, nats (measured)"]
    (t1,) = (r for r in rows if r[0] == "t1")
    assert t1[1:8] == ["t0>t1", "-", "-", "96", "9.9 J", "+0.0625", "0.0123"]
    assert rows[-2:] == [
        ["1", "2", "whole layer", "1", "7.5 J", "-"],
        ["2", "1", "FFN channels", "32", "2.38 J", "0.01171"],
    ]


def test_without_a_plan_the_page_says_so_and_shows_the_rest(planned: Path) -> None:
    """A missing plan.json costs the losses, not the page; a damaged one too."""
    for spoil in (lambda p: p.write_text('{"tiers": 7}'), lambda p: p.unlink()):
        spoil(planned / "plan.json")
        page = page_of(planned)
        assert "What was decided is not shown" in page
        assert [row[5] for row in rows_of(page, "front")[1:7]] == ["not measured"] * 6


def test_parity_versions_and_machine_are_there(edit: Edit) -> None:
    """Free content of the manifest, figure by figure."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["tools"] = {"torch": "9.8.7"}
        manifest["tiers"][1]["parity"] = {"max_logit_error": 2.5e-06, "decode_steps": 16}

    rows = rows_of(page_of(edit(change)), "build")
    assert ["tier", "max logit error", "decode steps"] in rows
    assert ["t1", "2.5e-06", "16"] in rows
    assert ["t0", "-", "-"] in rows
    assert ["torch", "9.8.7"] in rows
    assert {"cpu", "system", "version of eopc", "manifest sha256"} <= {row[0] for row in rows}


def test_hostile_text_stays_text(edit: Edit, planned: Path) -> None:
    """Markup, templates and broken Unicode in every free text: no element, no attribute, no evaluation."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["name"] = manifest["model"]["source"] = HOSTILE
        manifest["device"] = manifest["eopc_version"] = HOSTILE
        manifest["tools"] = manifest["calibration"] = {HOSTILE: HOSTILE}
        for tier in manifest["tiers"]:
            tier["note"] = HOSTILE
            tier["parity"] = {HOSTILE: HOSTILE}
            tier["perplexity"], tier["perplexity_by_domain"] = 9.0, {HOSTILE: 9.0}

    plan = json.loads((planned / "plan.json").read_text())
    plan["energy_source"] = plan["tiers"][1]["plan"] = HOSTILE
    (planned / "plan.json").write_text(json.dumps(plan))
    page = page_of(edit(change))
    root = html5lib.parse(page.replace("\x00", ""))
    tags = {element.tag for element in root.iter() if isinstance(element.tag, str)}
    assert not tags & {f"{HTML}{tag}" for tag in ("script", "img", "link", "iframe", "object", "form")}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    text = "".join(root.itertext())
    assert text.count("<script>alert('x')</script>") >= 15
    assert "{{ 7 * 7 }}" in text


def test_the_page_fetches_nothing(planned: Path) -> None:
    """No address, no source, no import; links lead to its own parts; a policy forbids the rest."""
    page = page_of(planned)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link|\bsrc=", page)
    links = re.findall(r'href="([^"]*)"', page)
    assert links and all(link.startswith("#") and f'id="{link[1:]}"' in page for link in links)
    assert "default-src 'none'" in page


def test_colours_of_text_have_contrast_in_both_schemes() -> None:
    """At least 4.5 to 1 on the page and on a picture's card, as text of this size needs."""
    css = _resource("page.css")
    for block in re.findall(r":root \{\s*(--paper.*?)\}", css, re.DOTALL):
        colors = dict(re.findall(r"--(\w+): (#\w{6})", block))
        assert set(COLORS) | {"card"} <= set(colors)
        for name in set(colors) - {"paper", "card", "grid"}:
            for ground in ("paper", "card"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground, colors[name])


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_report_is_no_file_of_the_manifest_and_may_lie_anywhere(planned: Path, tmp_path: Path) -> None:
    """The bundle verifies with it; -o writes elsewhere; --json names the file."""
    page_of(planned)
    assert "report.html" not in {entry.path for entry in Bundle.open(planned, verify=True).manifest.files}
    result = report(planned, "-o", tmp_path / "page.html", "--json")
    content = json.loads(result.stdout)
    assert content == {
        "bundle": str(planned), "report": str(tmp_path / "page.html"), "bytes": (tmp_path / "page.html").stat().st_size
    }  # fmt: skip


def test_mistakes_are_one_error(planned: Path, tmp_path: Path) -> None:
    """No bundle, a folder that does not exist, a log and a validation that are none."""
    (tmp_path / "no.txt").write_text("nothing\n")
    for options, words in (
        ((tmp_path / "no.eopc",), "does not exist"),
        ((planned, "-o", tmp_path / "no/page.html"), "cannot be read or written"),
        ((planned, "--log", tmp_path / "no.txt"), "is no JSON"),
        ((planned, "--validation", tmp_path / "no.txt"), "is no JSON"),
        ((planned, "--validation", tmp_path / "no.json"), "cannot be read"),
    ):
        result = report(*options)
        assert result.exit_code == 1, result.output
        assert words in result.stderr and "Traceback" not in result.stderr


def test_figures_that_cannot_be_drawn_are_one_error(edit: Edit, planned: Path) -> None:
    """Finite numbers whose sums are not: the page is refused, with the reason."""
    energy = json.loads((planned / "energy.json").read_text())
    for tier in energy["tiers"]:
        tier["step_j0"] = 1.7e308
    (planned / "energy.json").write_text(json.dumps(energy))

    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            if entry["path"] == "energy.json":
                entry["bytes"] = (planned / "energy.json").stat().st_size

    result = report(edit(change))
    assert result.exit_code == 1 and "cannot be drawn" in result.stderr


def test_the_front_as_a_file_names_every_plan_and_where_its_joules_come_from(planned: Path, tmp_path: Path) -> None:
    """--plot: well-formed SVG with the measured plans, their source, and hostile names as text."""
    import xml.etree.ElementTree as ElementTree

    plot = tmp_path / "front.svg"
    page_of(planned, "--plot", plot)
    tree = ElementTree.parse(plot).getroot()
    assert tree.tag == f"{SVG}svg"
    texts = [element.text or "" for element in tree.iter(f"{SVG}text")]
    bundle = Bundle.open(planned, verify=False)
    assert bundle.manifest.tiers[0].tier in texts
    assert any(bundle.energy.source in text for text in texts)
    assert any(bundle.manifest.device in text for text in texts)


def test_a_hostile_model_name_is_text_in_the_plot(edit: Edit, tmp_path: Path) -> None:
    """What a bundle says of itself cannot leave its place in the file."""
    import xml.etree.ElementTree as ElementTree

    plot = tmp_path / "front.svg"
    page_of(edit(lambda m: m["model"].update(name="<script>alert(1)</script>&")), "--plot", plot)
    tree = ElementTree.parse(plot).getroot()
    assert not list(tree.iter(f"{SVG}script"))
    assert any("<script>" in (element.text or "") for element in tree.iter(f"{SVG}text"))
