"""The table at the end of a run, and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from wsolkit.metrics.evaluation import BASELINES

_COLUMNS = {
    "max_box_acc": "MaxBoxAcc\nIoU 50",
    "max_box_acc_v2": "mean of\n30/50/70",
    "gt_known_loc": "GT-known\nLoc",
    "top1_loc": "Top-1\nLoc",
    "top5_loc": "Top-5\nLoc",
    "pxap": "PxAP",
    "peak_iou": "peak\nIoU",
    "threshold": "τ",
}


def results_table(results: Mapping[str, float], method: str, title: str) -> Table:
    """A section for each protocol, a row in it for the method and each baseline; in percent, τ from 0 to 1."""
    caption = f"Classification: Top-1 {results['top1_cls']:.1f}, Top-5 {results['top5_cls']:.1f}. All in percent but τ."
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    protocols = list(dict.fromkeys(name.split("/")[0] for name in results if "/" in name))
    used = [key for key in _COLUMNS if any(f"{protocol}/{key}" in results for protocol in protocols)]
    table.add_column("")
    for key in used:
        table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
    for protocol in protocols:
        table.add_row(protocol, style="italic")
        for row, prefix in {method: "", **{name: f"{name}/" for name in BASELINES}}.items():
            cells = [_cell(key, results.get(f"{protocol}/{prefix}{key}")) for key in used]
            table.add_row(f"  {row}", *cells, style="bold" if row == method else "dim")
        table.add_section()
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key == "threshold" else f"{value:.1f}"


def write_metrics(results: Mapping[str, float], path: Path) -> None:
    """Write metrics as a flat JSON object."""
    path.write_text(json.dumps(dict(results), indent=2) + "\n", encoding="utf-8")
