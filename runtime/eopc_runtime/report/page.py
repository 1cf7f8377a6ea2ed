"""Sections to one HTML file that fetches nothing: words and numbers of a bundle are escaped, pictures are our own."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from eopc_runtime import __version__
from eopc_runtime.errors import BundleError
from eopc_runtime.report.build_section import build_section
from eopc_runtime.report.energy_sections import (
    calibration_section,
    curves_section,
    sequences_section,
    sources_section,
)
from eopc_runtime.report.facts import Facts
from eopc_runtime.report.ladder_sections import front_section, map_section, removed_section
from eopc_runtime.svg import COLORS

_SECTIONS = (
    front_section,
    removed_section,
    map_section,
    curves_section,
    calibration_section,
    sequences_section,
    sources_section,
    build_section,
)


def render_page(facts: Facts) -> str:
    """Return the page; BundleError where the figures of a bundle are beyond what can be drawn."""
    try:
        sections = [section for make in _SECTIONS if (section := make(facts)) is not None]
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise BundleError(
            f"the figures of {facts.bundle.root} cannot be drawn ({error}). Build or calibrate the bundle again."
        ) from error
    manifest = facts.bundle.manifest
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_resource("page.html"))
    return page.render(
        manifest=manifest,
        energy=facts.bundle.energy,
        sections=sections,
        notes=facts.notes,
        manifest_sha256=facts.manifest_sha256,
        version=__version__,
        when=facts.maker.when,
        style=Markup(_resource("page.css") + role_styles()),
        safe=Markup,
    )


def role_styles() -> str:
    """Return the rules that give the roles of pictures the page's colours."""
    return "".join(f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in COLORS)


def _resource(name: str) -> str:
    return (files("eopc_runtime.report") / name).read_text(encoding="utf-8")
