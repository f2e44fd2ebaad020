"""The table at the end of a run, and the files of its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from wsolkit.drafts import write_text
from wsolkit.metrics.baselines import BASELINES
from wsolkit.metrics.evaluation import Outcome
from wsolkit.reporting.images import FILE, ImageRow, write_images

_COLUMNS = {
    "threshold": "τ",
    "chosen_on": "from",
    "top1_cls": "Top-1\nCls",
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


def results_table(results: Mapping[str, float], chosen_on: Mapping[str, str], method: str, title: str) -> Table:
    """A row for each protocol, below it one for each baseline; in percent, τ from 0 to 1.

    Args:
        chosen_on: where each protocol's threshold was chosen, see `Evaluation.chosen_on`.
    """
    caption = (
        "In percent. Boxes for GT-known Loc, by the label's and by the predicted class's map, and for Top-1 and Top-5 "
        "Loc are drawn at the threshold τ; it comes from the held-out split (val), the reported split itself (test), "
        "or is given (fixed). MaxBoxAcc, at IoU 50 and as the mean over IoU 30/50/70, takes the best τ of the "
        "reported split."
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.box, table.padding, table.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    protocols = list(dict.fromkeys(name.split("/")[0] for name in results if "/" in name))
    used = [
        key
        for key in _COLUMNS
        if any(f"{protocol}/{'threshold' if key == 'chosen_on' else key}" in results for protocol in protocols)
    ]
    table.add_column(method, no_wrap=True)
    for key in used:
        table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
    for protocol in protocols:
        where = chosen_on.get(protocol, "") if f"{protocol}/threshold" in results else "–"
        cells = [where if key == "chosen_on" else _cell(key, results.get(f"{protocol}/{key}")) for key in used]
        table.add_row(protocol, *cells, style="bold")
        for name in BASELINES:
            cells = [_cell(key, results.get(f"{protocol}/{name}/{key}")) for key in used]
            if any(cell != "–" for cell in cells):
                table.add_row(f"  {name}", *cells, style="dim")
        table.add_section()
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if key == "threshold" else f"{value:.1f}"


def write_results(
    folder: Path, outcome: Outcome, class_names: Sequence[str], tables: Mapping[str, Iterable[ImageRow]]
) -> None:
    """Write metrics.json and images.csv into a run directory."""
    write_metrics(outcome, class_names, folder / "metrics.json")
    write_images(tables, folder / FILE)


def write_metrics(outcome: Outcome, class_names: Sequence[str], path: Path) -> None:
    """Write numbers, curves and tables as a JSON object with flat keys; what is not a number (0/0) is null."""
    content: dict[str, Any] = {name: _plain(value) for name, value in outcome.results.items()}
    content |= {name: _plain(values) for name, values in outcome.curves.items()}
    content["class_names"] = list(class_names)
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(round(part, _DIGITS) if isinstance(part, float) else part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
