"""The report of a bundle as a file: gathered, rendered, and put in place in one step."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.machine import machine_info, versions
from eopc_runtime.cli.output import format_bytes
from eopc_runtime.errors import EopcError
from eopc_runtime.files import write_output, write_whole
from eopc_runtime.report.facts import Maker, gather
from eopc_runtime.report.ladder_sections import front_plot
from eopc_runtime.report.page import render_page

REPORT_NAME = "report.html"


def write_report(
    bundle: Bundle,
    target: Path | None = None,
    log: Path | None = None,
    validation: Path | None = None,
    plot: Path | None = None,
) -> Path:
    """Write the report and return where it is: by default report.html in the bundle.

    The manifest does not list it: it is made from the bundle, at any time, and holds nothing that the runtime reads.
    `plot` gets its first picture, as SVG. Raises as `gather` and `render_page`; OSError where a file cannot be written.
    """
    machine = machine_info()
    memory = machine.pop("memory_bytes")
    machine["memory"] = None if memory is None else format_bytes(memory)
    maker = Maker(datetime.now().astimezone().isoformat(" ", "minutes"), machine, versions())
    facts = gather(bundle, maker, log, validation)
    page = render_page(facts)
    if plot is not None:
        write_output(plot, front_plot(facts).encode("utf-8", "replace"))
    path = target or bundle.root / REPORT_NAME
    write_whole(path, page.encode("utf-8", "replace"))
    return path


def refresh_report(bundle: Bundle) -> str | None:
    """Write the report of a bundle into it, at the end of other work; return why there is none, where it fails."""
    try:
        write_report(bundle)
    except (EopcError, OSError) as error:
        return f"{REPORT_NAME} was not written: {error}"
    return None
