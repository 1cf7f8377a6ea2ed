"""The page in a browser: on a phone nothing is wider than the screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener('load', () => {
  const parts = [...document.querySelectorAll('svg, h1, h2, h3, p, summary')];
  const right = Math.max(...parts.map(part => part.getBoundingClientRect().right));
  parent.document.title = [innerWidth, document.documentElement.scrollWidth, right].join(' ');
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(planned: Path, tmp_path: Path, width: int) -> None:
    """The page has the width of the window, and so have pictures, headings and text; tables scroll in their frames."""
    page = write_report(Bundle.open(planned), tmp_path / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy is not None
    probed = escape(page.replace(policy[0], PROBE))
    frame = (
        f'<iframe width="{width}" height="844" style="border:0" srcdoc="{probed}"></iframe>'  # windows are 500 or more
    )
    (tmp_path / "probe.html").write_text(f"<!doctype html><title>-</title>{frame}", encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,900", "--hide-scrollbars", "--dump-dom", f"file://{tmp_path / 'probe.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<title>(\d+) (\d+) ([\d.]+)</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert int(found[1]) == width
    assert int(found[2]) <= width and float(found[3]) <= width
