"""Pages that need nothing else, no network and no folder beside them: what they show is put into templates."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from wsolkit.reporting.charts import PREDICTED, SCORE_COLOURS, TRUTH
from wsolkit.reporting.report import Chart, Report
from wsolkit.reporting.terminal import picture
from wsolkit.system.drafts import write_text
from wsolkit.system.names import readable, runs_from_the_right

_TEMPLATES = Environment(
    loader=PackageLoader("wsolkit.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["base64"] = lambda content: base64.b64encode(content).decode()
_TEMPLATES.tests["running_from_the_right"] = runs_from_the_right
_TEMPLATES.globals["colours"] = {
    "truth": TRUTH,
    "predicted": PREDICTED,
    "scores": [to_hex(colour) for colour in matplotlib.colormaps[SCORE_COLOURS](np.linspace(0, 1, 9))],
}


def write_page(path: Path, report: Report) -> None:
    """Write a report as one HTML file; a chart that cannot be drawn is left out.

    Args:
        path: of the file.
        report: what it shows.
    """
    drawings: dict[Chart, Markup] = {}
    for protocol in report.protocols:
        for chart in protocol.charts:
            with picture(f"chart '{chart.heading}' of report.html"):
                drawings[chart] = Markup(_svg(chart.figure, f"{protocol.name}-{chart.name}", chart.heading))
    write_text(path, render("report.html", report=report, drawings=drawings))


def render(template: str, **content: object) -> str:
    """A page in characters that pages may have.

    Args:
        template: a file in `templates/`.
        content: what the template shows, by the names that it uses.
    """
    return readable(_TEMPLATES.get_template(template).render(content))


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as an SVG element whose text is text and whose ids start with `prefix`."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style element would hold for the whole page, and matplotlib counts its ids anew in every figure.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "_", prefix)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
