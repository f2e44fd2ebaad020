"""The report of an evaluation as one HTML file that needs nothing else: no network, no folder beside it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from wsolkit.reporting.charts import (
    CLASSIFICATION,
    PREDICTED,
    SCORE_COLOURS,
    TRUTH,
    Curves,
    Results,
    Shown,
    baseline_names,
    charts,
    example_image,
    jpeg,
    series,
    spelled,
    telling_protocols,
)
from wsolkit.reporting.terminal import picture
from wsolkit.system.drafts import write_text
from wsolkit.system.names import readable, runs_from_the_right

_OPEN_UP_TO = 30  # classes whose table is unfolded

_COLUMNS = {
    "threshold": "threshold τ<br>(0 to 1)",
    "chosen_on": "τ chosen<br>on",
    "top1_cls": "Top-1<br>Cls",
    "top5_cls": "Top-5<br>Cls",
    "gt_known_loc": "GT-known<br>Loc, label's<br>map",
    "gt_known_loc_predicted_class": "GT-known<br>Loc, predicted<br>class's map",
    "top1_loc": "Top-1<br>Loc",
    "top5_loc": "Top-5<br>Loc",
    "max_box_acc": "MaxBoxAcc<br>IoU 50",
    "max_box_acc_v2": "mean of IoU<br>30/50/70",
    "pxap": "PxAP",
    "peak_iou": "peak<br>pixel IoU",
}

_CLASS_COLUMNS = {
    "images": "Images",
    "top1_cls": "Top-1 Cls",
    "gt_known_loc": "GT-known Loc",
    "top1_loc": "Top-1 Loc",
}

_CAPTIONS = {
    "threshold": ("Threshold", "How many images are right at each threshold τ, by the IoU δ that a box needs."),
    "iou": ("IoU", "How well the boxes fit at the chosen τ; each bar is 0.05 wide."),
    "errors": (
        "Errors",
        "What is wrong with the boxes at the chosen τ, after the error analysis of SPA (Pan et al., CVPR 2021).",
    ),
    "size": (
        "Object size",
        "How well the map, at the threshold of peak pixel IoU, covers objects of each size; darker means more images.",
    ),
    "epochs": (
        "Epoch by epoch",
        "Classification and localization in the validation after each epoch; the first, the last and the best epochs "
        "are numbered.",
    ),
    "norms": (
        "Feature norms",
        "How long the feature vectors that are classified are on objects and on background (Kim et al., CVPR 2022).",
    ),
    "pixels": ("Pixels", "How well the scores tell object from background, pixel by pixel, over all thresholds."),
}

_STYLE = """
:root { --ink: #1d2329; --dim: #626b75; --line: #dde1e6; --soft: #f5f6f8; --accent: #0b5f96; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body > * { max-width: 1352px; margin: 0 auto; padding: 0 16px; }
body > header { padding-top: 28px; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.6rem 0 .6rem; font-size: 1rem; }
p { margin: .4rem 0 .8rem; max-width: 100ch; overflow-wrap: anywhere; }
.dim, figcaption { color: var(--dim); }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
main { padding-bottom: 3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td.text { text-align: left; overflow-wrap: anywhere; }
thead th { vertical-align: bottom; font-weight: 600; line-height: 1.3; border-bottom: 2px solid var(--line); }
.results thead th { white-space: nowrap; }
.results tbody th { padding-left: 1.2rem; white-space: nowrap; }
.results th:first-child, .comparison th:first-child { position: sticky; left: 0; background: #fff; }
.results .protocol th { padding: .9rem 0 .3rem; font-weight: 600; color: var(--dim); }
.results .baseline > * { font-weight: 400; color: var(--dim); }
.results .method > * { font-weight: 600; }
.classes th:first-child { min-width: 7rem; }
.classes tbody th, .rules th { font-weight: 400; }
th button { padding: 0; border: 0; background: none; color: var(--accent); font: inherit; text-align: inherit;
  cursor: pointer; }
th[aria-sort=ascending] button::before { content: "\\25B2\\A0"; }
th[aria-sort=descending] button::before { content: "\\25BC\\A0"; }
details { margin: 1rem 0; }
details > .wide { margin-top: .5rem; }
summary { cursor: pointer; color: var(--accent); }
pre { max-height: 36rem; overflow: auto; padding: 1rem; background: var(--soft); font-size: .82rem; line-height: 1.45; }
figure { min-width: 0; margin: 0; }
figcaption { font-size: .85rem; line-height: 1.4; overflow-wrap: anywhere; }
figcaption small { font-size: .75rem; }
figcaption b { color: var(--ink); font-weight: 600; }
figcaption b, figcaption small, .classes tbody th { white-space: pre-wrap; }
.charts { display: flex; flex-wrap: wrap; gap: 28px 24px; }
.charts figure { max-width: 100%; }
.charts figcaption { width: 0; min-width: 100%; }
.charts svg { display: block; max-width: 100%; height: auto; }
.charts .pixels svg { min-width: 520px; }
.charts svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 22px 20px; }
.gallery img { display: block; width: 100%; height: auto; margin-bottom: .35rem; }
.comparison { --gap: .5rem; --side: clamp(140px, (min(100vw, 1352px) - 32px) / var(--columns) - 2 * var(--gap), 320px);
  table-layout: fixed; width: 0; }
.comparison th, .comparison td { width: calc(var(--side) + 2 * var(--gap)); padding: .3rem var(--gap); text-align: left;
  overflow-wrap: anywhere; }
.comparison thead th { border-bottom-width: 1px; font-weight: 400; vertical-align: top; }
.comparison thead th:first-child { color: var(--dim); }
.comparison thead tr.setting th { font-weight: 600; }
.comparison tbody th { font-weight: 400; }
.comparison tbody > tr > * { padding-top: .8rem; }
.comparison img { display: block; width: 100%; height: auto; margin-bottom: .35rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; max-width: none; font-size: .85rem; }
.key i { display: inline-block; width: 26px; height: 12px; margin-right: .45rem; vertical-align: -1px; }
@media (max-width: 600px) {
  th, td { padding: .3rem .4rem; }
  table { font-size: .82rem; }
}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("table.classes th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const text = row => row.cells[head.cellIndex].textContent;
    const compare = head.cellIndex === 0
      ? (a, b) => order * text(a).localeCompare(text(b), "en", {numeric: true})
      : (a, b) => {
          const x = parseFloat(text(a)), y = parseFloat(text(b));
          return isNaN(x) - isNaN(y) || order * (x - y) || 0;  // without a number: last
        };
    const rows = [...body.rows].sort(compare);
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    body.append(...rows);
  });
}
"""

# The policy makes the browser refuse whatever would leave the file.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{head}
</header>
<main>
{main}
</main>
<script>{script}</script>
</body>
</html>
"""


def write_page(
    path: Path,
    *,
    title: str,
    method: str,
    results: Results,
    curves: Curves,
    class_names: Sequence[str],
    worst: Sequence[Shown],
    best: Sequence[Shown],
    protocols: Mapping[str, Mapping[str, object]],
    chosen_on: Mapping[str, str],
    settings: str,
) -> None:
    """Write the report as one HTML file; what there is no data for is left out.

    Args:
        path: of the file.
        title: heading of the page.
        method: name of the method's row.
        results: numbers in percent, thresholds from 0 to 1; `charts` names the keys.
        curves: what the charts and the table of classes show, by the same keys.
        class_names: [C], in the order of `<protocol>/per_class/…`.
        worst: images of the gallery by rising IoU.
        best: images of the gallery by falling IoU.
        protocols: each protocol's rules as plain values.
        chosen_on: where each protocol's τ was chosen: "val", "test" or "fixed".
        settings: the run's settings as YAML.
    """
    names = telling_protocols(results, curves)
    figures = charts(results, curves)
    sections = {
        "Results": _results(results, names, method, chosen_on),
        **{f"Protocol {name}": _protocol(name, figures, protocols.get(name, {})) for name in names},
        "Gallery": _gallery("Worst", worst) + _gallery("Best", best),
        "Classes": "".join(_classes(name, curves, class_names) for name in names),
        "Settings": f"<details><summary>Settings of the run</summary><pre>{escape(settings)}</pre></details>"
        if settings
        else "",
    }
    shown = {heading: content for heading, content in sections.items() if content}
    links = "".join(f'<a href="#section-{i}">{escape(heading)}</a>\n' for i, heading in enumerate(shown))
    main = "\n".join(
        f'<section id="section-{i}">\n<h2>{escape(heading)}</h2>\n{content}</section>'
        for i, (heading, content) in enumerate(shown.items())
    )
    page = document(
        title,
        f'<p class="dim">{_summary(method, curves, class_names, names)}</p>\n<nav aria-label="Sections">{links}</nav>',
        main or "<p>There is nothing to show: the evaluation left no numbers.</p>",
    )
    write_text(path, page)


def document(title: str, head: str, main: str) -> str:
    """A whole page in the style of the report, in characters that pages may have.

    Args:
        title: text.
        head: HTML below the title.
        main: HTML.
    """
    return readable(_PAGE.format(title=escape(title), style=_STYLE, head=head, main=main, script=_SCRIPT))


def _summary(method: str, curves: Curves, class_names: Sequence[str], names: Sequence[str]) -> str:
    """One line: the method, how many images and classes, and the protocols."""
    parts = [f"<b>{escape(method)}</b>"]
    keys = [f"{name}/{kind}" for kind in ("per_class/images", "iou_histogram", "mask_iou_by_size") for name in names]
    counts = [values for key in keys if (values := series(curves, key)) is not None]
    if counts:
        parts.append(f"{int(np.nansum(counts[0])):,} images")
    if class_names:
        parts.append(f"{len(class_names):,} classes")
    if names:
        parts.append(("protocols " if len(names) > 1 else "protocol ") + escape(", ".join(names)))
    return " · ".join(parts)


def _results(results: Results, names: Sequence[str], method: str, chosen_on: Mapping[str, str]) -> str:
    """The main table: a row of the method under each protocol; below those that agree on them, the baselines."""
    names = names or [""]  # without ground truth for localization there is still classification
    rows = {
        (name, baseline): _row(results, f"{name}/{baseline}/" if baseline else f"{name}/")
        for name in names
        for baseline in ("", *baseline_names(results, name))
    }
    for name in names:
        whole = _row(results, "")  # classification, where the protocol has none of its own
        where = {"chosen_on": escape(chosen_on[name])} if name in chosen_on and "threshold" in rows[name, ""] else {}
        classification = {key: whole[key] for key in CLASSIFICATION if key in whole}
        rows[name, ""] = classification | rows[name, ""] | where
    used = [key for key in _COLUMNS if any(key in row for row in rows.values())]
    if not used:
        return ""
    own = [name for name in names if f"{name}/threshold_top1_loc" in results]
    head = "".join(f'<th scope="col">{_COLUMNS[key]}</th>' for key in used)

    def line(kind: str, label: str, row: Mapping[str, str]) -> str:
        cells = "".join(f"<td>{row.get(key, '–')}</td>" for key in used)
        return f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{cells}</tr>'

    def heading(text: str) -> str:
        return f'<tr class="protocol"><th scope="rowgroup" colspan="{len(used) + 1}">{escape(text)}</th></tr>'

    agreeing: dict[str, list[str]] = {}
    for name in names:
        below = [
            line("baseline", spelled(baseline), rows[name, baseline]) for baseline in baseline_names(results, name)
        ]
        agreeing.setdefault("\n".join(below), []).append(name)
    bodies = []
    for baselines, together in agreeing.items():
        lines = [part for name in together for part in (heading(name), line("method", method, rows[name, ""]))]
        if len(together) > 1 and baselines:
            lines.append(heading(f"baselines under {' and '.join(together)}"))
        shown = lines if together != [""] else lines[1:]
        bodies.append("<tbody>\n" + "\n".join([*shown, baselines]).strip() + "\n</tbody>")
    table = f'<table class="results">\n<thead><tr><th scope="col">in %</th>{head}</tr></thead>\n'
    return f'<div class="wide">{table}{"".join(bodies)}</table></div>\n{_note(used, own)}'


def _note(used: Sequence[str], own: Sequence[str]) -> str:
    """How to read the columns that are used; `own`: protocols under which each Loc has its own threshold."""
    parts = []
    if "threshold" in used:
        parts.append("Loc counts boxes at the threshold τ shown.")
    if own:
        parts.append(f"Under {escape(', '.join(own))} each Loc has its own τ; shown is GT-known Loc's.")
    if "chosen_on" in used:
        parts.append(
            "τ was chosen on the validation split (val), on the evaluated split itself (test, which flatters), "
            "or given (fixed)."
        )
    if "max_box_acc" in used:
        parts.append("MaxBoxAcc, and the mean over three IoU thresholds, take the best τ of the evaluated split.")
    return f'<p class="dim">{" ".join(parts)}</p>\n' if parts else ""


def _row(results: Results, prefix: str) -> dict[str, str]:
    values = {key: results.get(prefix + key, math.nan) for key in _COLUMNS}
    return {
        key: _number(value, 3 if key == "threshold" else 1) for key, value in values.items() if not math.isnan(value)
    }


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _protocol(name: str, figures: Mapping[str, Figure], rules: Mapping[str, object]) -> str:
    """A protocol's charts and, folded, its rules."""
    drawn = ""
    for chart, (heading, caption) in _CAPTIONS.items():
        if f"{name}/{chart}" in figures:
            with picture(f"chart '{heading}' of report.html"):
                drawn += (
                    f'<figure class="{chart} wide">\n{_svg(figures[f"{name}/{chart}"], f"{name}-{chart}", heading)}\n'
                    f"<figcaption><b>{heading}.</b> {caption}</figcaption>\n</figure>\n"
                )
    content = f'<div class="charts">\n{drawn}</div>\n' if drawn else ""
    if rules:
        rows = "".join(
            f'<tr><th scope="row">{escape(spelled(rule))}</th><td class="text">{escape(_plain(value))}</td></tr>\n'
            for rule, value in rules.items()
        )
        table = f'<div class="wide"><table class="rules"><tbody>\n{rows}</tbody></table></div>'
        content += f"<details><summary>Rules of this protocol</summary>{table}</details>\n"
    return content


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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


def _gallery(heading: str, images: Sequence[Shown]) -> str:
    items = ""
    for shown in images:
        with picture(f"image '{shown.name}' in the gallery of report.html"):
            items += _item(shown)
    if not items:
        return ""
    key = colour_key(any(len(shown.truth) for shown in images))
    return f'<h3>{heading}</h3>\n{key}\n<div class="gallery">\n{items}</div>\n'


def colour_key(with_truth: bool) -> str:
    """What the colours in pictures of examples mean, as HTML; `with_truth`: whether any of them has ground truth."""
    colours = ", ".join(to_hex(colour) for colour in matplotlib.colormaps[SCORE_COLOURS](np.linspace(0, 1, 9)))
    truth = f'<span><i style="border: 3px solid {TRUTH}"></i>ground truth</span>' if with_truth else ""
    return (
        f'<p class="key dim">{truth}'
        f'<span><i style="border: 3px dashed {PREDICTED}"></i>predicted box</span>'
        f'<span>score 0 <i style="width: 80px; margin: 0 .3rem; background: linear-gradient(90deg, {colours})"></i> 1'
        "</span></p>"
    )


def _item(shown: Shown) -> str:
    drawn = embedded(jpeg(example_image(shown)), f"{shown.name}: boxes, and the same under the score map")
    fit = "" if math.isnan(shown.iou) else f"IoU {_number(shown.iou, 2)}<br>"
    return (
        f"<figure>{drawn}\n<figcaption><b>{isolated(shown.label)}</b>{mistake(shown.label, shown.predicted_label)}<br>"
        f"{fit}<small>{isolated(shown.name)}</small></figcaption></figure>\n"
    )


def embedded(picture: bytes, description: str) -> str:
    """A picture's file as an HTML element that holds it."""
    with PIL.Image.open(io.BytesIO(picture)) as opened:
        (width, height), kind = opened.size, opened.get_format_mimetype()
    data = base64.b64encode(picture).decode()
    return (
        f'<img src="data:{kind};base64,{data}" width="{width}" height="{height}" loading="lazy" '
        f'alt="{escape(description)}">'
    )


def mistake(label: str, predicted_label: str | None) -> str:
    """What an image was taken for, as HTML; nothing if it was recognized, or nobody knows."""
    return "" if predicted_label in (None, label) else f", taken for {isolated(str(predicted_label))}"


def isolated(name: str) -> str:
    """A name within a line, as HTML: one that runs from right to left turns nothing beside it."""
    return f"<bdi>{escape(name)}</bdi>" if runs_from_the_right(name) else escape(name)


def _classes(name: str, curves: Curves, class_names: Sequence[str]) -> str:
    """The table of classes under a protocol, worst first."""
    every = {key: series(curves, f"{name}/per_class/{key}") for key in _CLASS_COLUMNS}
    columns = {key: values for key, values in every.items() if values is not None}
    order = [key for key in ("gt_known_loc", "top1_loc", "top1_cls") if key in columns]
    if not order:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(class_names[i])}</th>'
        + "".join(f"<td>{_number(column[i], 0 if key == 'images' else 1)}</td>" for key, column in columns.items())
        + "</tr>"
        for i in np.argsort(columns[order[0]], kind="stable")  # NaN comes last
    ]
    head = '<th scope="col"><button type="button">Class</button></th>' + "".join(
        f'<th scope="col"{" aria-sort=ascending" if key == order[0] else ""}>'
        f'<button type="button">{_CLASS_COLUMNS[key]}</button></th>'
        for key in columns
    )
    unfolded = " open" if len(rows) <= _OPEN_UP_TO else ""
    return (
        f"<details{unfolded}><summary>{len(rows):,} classes under {escape(name)}, in %</summary>\n"
        f'<div class="wide"><table class="classes">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div></details>\n"
    )
