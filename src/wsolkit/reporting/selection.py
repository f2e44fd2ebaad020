"""Compare what a run chose without ground truth with what ground truth would have chosen.

Each way to choose would have taken an epoch, by its best number in the validation, and a threshold τ. One run knows the
accuracy on the reported split for its own checkpoint only, so the table has that accuracy at the τ of each way, beside
the validation's numbers at the epoch of each way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from wsolkit.reporting.charts import Curves, Results, protocol_names, series

WAYS = {
    "pseudo": "pseudo boxes",
    "classification": "classification",
    "truth": "ground truth (val)",
    "best": "ground truth (test)",
}
"""The ways to choose, see `BoxEvaluation.choices`, in words."""

COLUMNS = ("epoch", "val\nTop-1\nCls", "val\npseudo\nMaxBox", "val\nMaxBox\nAcc", "τ", "test\nGT-\nknown")

NOTE = (
    "Each row says which epoch and which τ one way to choose would have taken, with the validation's numbers of that "
    "epoch: Top-1 Cls, and MaxBoxAcc by pseudo boxes and by ground truth. GT-known Loc of the test is that of the one "
    "checkpoint that was evaluated, at the τ of the row. The row of classification has the τ that the maps alone "
    "give, or the default."
)

_USED = {"pseudo": ("pseudo",), "classification": ("maps", "default")}
_BY_EPOCH = {"classification": "top1_cls", "pseudo": "{}/pseudo_max_box_acc", "truth": "{}/max_box_acc"}


class SelectionRow(NamedTuple):
    """A way to choose under a protocol: its name in words, and a text for each of `COLUMNS`."""

    protocol: str
    name: str
    cells: tuple[str, ...]


def chosen_epochs(results: Results, curves: Curves) -> dict[str, float]:
    """Return the epoch that each way would choose by the first protocol, as `epochs/by_<way>`, counted from 1.

    The result is empty if the run chose by ground truth. Without training, or without the numbers of a way, there is no
    epoch for it.

    Args:
        results: the numbers of the test.
        curves: the lists of the epochs as `epochs/…`.
    """
    protocols = _protocols(results, curves)
    epochs = series(curves, "epochs/epoch")
    if not protocols or epochs is None:
        return {}
    known = {way: series(curves, f"epochs/{key.format(protocols[0])}") for way, key in _BY_EPOCH.items()}
    return {
        f"epochs/by_{way}": float(epochs[int(np.nanargmax(values))])
        for way, values in known.items()
        if values is not None
    }


def selection_rows(results: Results, curves: Curves, chosen_on: Mapping[str, str]) -> list[SelectionRow]:
    """Return the rows of the comparison, or none if the run chose by ground truth.

    Args:
        results: the numbers of the test, with `chosen_epochs`.
        curves: the lists of the epochs as `epochs/…`.
        chosen_on: what chose each protocol's τ, see `Evaluation.chosen_on`.
    """
    rows = []
    for place, protocol in enumerate(_protocols(results, curves)):
        for way, words in WAYS.items():
            epoch = results.get(f"epochs/by_{way}") if place == 0 else None
            threshold = results.get(f"{protocol}/threshold_by_{way}")
            if epoch is None and threshold is None:
                continue
            used = " (this run)" if chosen_on.get(protocol) in _USED.get(way, ()) else ""
            cells = (
                "–" if epoch is None else f"{epoch:.0f}",
                *(_at(curves, key.format(protocol), epoch) for key in _BY_EPOCH.values()),
                _number(threshold, 3),
                _number(results.get(f"{protocol}/gt_known_loc_by_{way}"), 1),
            )
            rows.append(SelectionRow(protocol, words + used, cells))
    return rows


def _protocols(results: Results, curves: Curves) -> list[str]:
    """Return the protocols that did not choose by ground truth."""
    names = protocol_names(results, curves)
    return [name for name in names if any(f"{name}/threshold_by_{way}" in results for way in WAYS)]


def _at(curves: Curves, key: str, epoch: float | None) -> str:
    epochs, values = curves.get("epochs/epoch", ()), curves.get(f"epochs/{key}", ())
    return _number(dict(zip(epochs, values, strict=False)).get(epoch), 1)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"
