"""Print the table at the end of a run, and write its numbers to files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from wsolkit.metrics.baselines import BASELINES
from wsolkit.metrics.evaluation import Outcome
from wsolkit.reporting.charts import CLASSIFICATION, telling_protocols
from wsolkit.reporting.images import FILE, ImageRow, write_images
from wsolkit.reporting.selection import COLUMNS as SELECTION_COLUMNS
from wsolkit.reporting.selection import NOTE, selection_rows
from wsolkit.reporting.terminal import PlainConsole
from wsolkit.system.drafts import write_text

_COLUMNS = {
    "threshold": "τ",
    "chosen_on": "from",
    "top1_cls": "Top-1\nCls",
    "top5_cls": "Top-5\nCls",
    "gt_known_loc": "GT-\nknown",
    "gt_known_loc_predicted_class": "pred.\nmap",
    "top1_loc": "Top-1\nLoc",
    "top5_loc": "Top-5\nLoc",
    "max_box_acc": "MaxBox\nAcc",
    "max_box_acc_v2": "30/50\n/70",
    "pxap": "PxAP",
    "peak_iou": "peak\nIoU",
}

_DIGITS = 4


_LOCALIZED = (
    "Boxes for GT-known Loc, by the label's and by the predicted class's map, and for Top-1 and Top-5 Loc are drawn at "
    "the threshold τ. It comes from the held-out split (val), from pseudo boxes of it (pseudo), or from the reported "
    "split itself (test), or is given (fixed) or the default. MaxBoxAcc, at IoU 50 and as the mean over IoU 30/50/70, "
    "takes the best τ of the reported split."
)
_CLASSIFIED = "The images have neither boxes nor masks: classification is all that can be evaluated."
_WIDTH = 90  # The width of the text below a table.


def print_results(
    console: Console, results: Mapping[str, float], chosen_on: Mapping[str, str], method: str, title: str
) -> None:
    """Print the table at the end of a run. It is never cut off, because long lines are better than missing numbers.

    Args:
        results: in percent, with τ from 0 to 1.
        chosen_on: what chose each protocol's threshold, see `Evaluation.chosen_on`.
        method: the name of the method in the table.
        title: describes the run.
    """
    table = results_table(results, chosen_on, method)
    console.width = max(console.width, PlainConsole(width=400).measure(table).maximum)
    console.print(title, style="table.title", soft_wrap=True)
    console.print()
    console.print(table)
    localized = any(name.endswith(("/threshold", "/pxap")) for name in results)
    said = _LOCALIZED if localized else _CLASSIFIED
    console.print(f"In percent. {said}", style="table.caption", width=min(console.width, _WIDTH))


def print_selection(console: Console, outcome: Outcome, chosen_on: Mapping[str, str]) -> None:
    """Print what each way to choose epoch and threshold costs, if the run chose without ground truth."""
    rows = selection_rows(outcome.results, outcome.curves, chosen_on)
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("protocol", "chosen by"):
        table.add_column(name, no_wrap=True)
    for name in SELECTION_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.protocol, row.name, *row.cells)
    console.width = max(console.width, PlainConsole(width=400).measure(table).maximum)
    console.print(table)
    console.print(NOTE, style="table.caption", width=min(console.width, _WIDTH))


def results_table(results: Mapping[str, float], chosen_on: Mapping[str, str], method: str) -> Table:
    """Make a table with a row for each protocol, and with the baselines below the protocols that agree on them."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(method, no_wrap=True)
    protocols = telling_protocols(results, {})
    if not protocols:
        known = [key for key in CLASSIFICATION if key in results]
        for key in known:
            table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
        table.add_row("classification", *(_cell(key, results[key]) for key in known), style="bold")
        return table
    used = [
        key
        for key in _COLUMNS
        if key != "top5_cls"  # There is no room for it.
        and any(f"{protocol}/{'threshold' if key == 'chosen_on' else key}" in results for protocol in protocols)
    ]
    for key in used:
        table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
    for baselines, agreeing in _by_baselines(results, protocols, used).items():
        for protocol in agreeing:
            where = chosen_on.get(protocol, "") if f"{protocol}/threshold" in results else "–"
            cells = [where if key == "chosen_on" else _cell(key, results.get(f"{protocol}/{key}")) for key in used]
            table.add_row(protocol, *cells, style="bold")
        for name, *cells in baselines:
            table.add_row(f"  {name}", *cells, style="dim")
        table.add_section()
    return table


def _by_baselines(
    results: Mapping[str, float], protocols: Iterable[str], used: Sequence[str]
) -> dict[tuple[tuple[str, ...], ...], list[str]]:
    """Return the rows of the baselines, and the protocols that share them."""
    grouped: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for protocol in protocols:
        rows = [(name, *(_cell(key, results.get(f"{protocol}/{name}/{key}")) for key in used)) for name in BASELINES]
        known = tuple(row for row in rows if any(cell != "–" for cell in row[1:]))
        grouped.setdefault(known, []).append(protocol)
    return grouped


def _cell(key: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if key == "threshold" else f"{value:.1f}"


def write_results(
    folder: Path, outcome: Outcome, class_names: Sequence[str], tables: Mapping[str, Iterable[ImageRow]]
) -> None:
    """Write metrics.json, and images.csv if the images have boxes, into a run directory."""
    write_metrics(outcome, class_names, folder / "metrics.json")
    if tables:
        write_images(tables, folder / FILE)


def write_metrics(outcome: Outcome, class_names: Sequence[str], path: Path) -> None:
    """Write numbers, curves and tables as a JSON object with flat keys. NaN (0/0) becomes null."""
    content: dict[str, Any] = {name: _plain(value) for name, value in outcome.results.items()}
    content |= {name: _plain(values) for name, values in outcome.curves.items()}
    content["class_names"] = list(class_names)
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(round(part, _DIGITS) if isinstance(part, float) else part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
