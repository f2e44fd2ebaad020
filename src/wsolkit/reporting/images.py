"""Tabulate single images of an evaluation: images.csv in the run directory, and W&B's tables."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import distributed

from wsolkit.data.dataset import WSOLDataset
from wsolkit.metrics.boxes import Verdicts
from wsolkit.metrics.errors import CLS, ERRORS
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.system.drafts import draft
from wsolkit.system.names import write_csv

FILE = "images.csv"


class ImageRow(NamedTuple):
    """An image under a protocol.

    image: its id; label, predicted: names of classes, None for an unknown prediction; iou: of the box from the label's
    map at the protocol's threshold, in [0, 1]; error: one of `ERRORS`; correct: whether box and class are right, as for
    Top-1 Loc at that threshold.
    """

    image: str
    label: str
    predicted: str | None
    iou: float
    error: str
    correct: bool


class _Seen(NamedTuple):
    label: int
    predicted: int | None
    right_class: bool
    iou: npt.NDArray[np.float64]
    error: npt.NDArray[np.uint8]


class ImageTables:
    """Collects rows of some images with boxes from an evaluation, under each protocol.

    The threshold is unknown before all images are seen, so it keeps 9 bytes for each image and threshold.

    Args:
        evaluation: the evaluation of the split.
        dataset: the split.
        count: the maximum number of images, spread evenly over the split. None takes all.
    """

    def __init__(self, evaluation: Evaluation, dataset: WSOLDataset, count: int | None) -> None:
        self._evaluation, self._records = evaluation, dataset.records
        self._images = set(evenly(len(dataset), len(dataset) if count is None else count))
        self._seen: dict[str, dict[int, _Seen]] = {name: {} for name in evaluation.protocols}
        for name, metric in evaluation.protocols.items():
            metric.boxes.on_verdicts = functools.partial(self._listen, self._seen[name])

    def _listen(self, seen: dict[int, _Seen], verdicts: Verdicts) -> None:
        for row, image in enumerate(verdicts.image.tolist()):
            if image in self._images:
                seen[image] = _Seen(
                    int(verdicts.label[row]),
                    None if verdicts.predicted is None else int(verdicts.predicted[row]),
                    verdicts.top1 is None or bool(verdicts.top1[row]),
                    verdicts.iou[row].copy(),
                    verdicts.error[row].copy(),
                )

    def rows(self, results: Mapping[str, float], class_names: Sequence[str]) -> dict[str, list[ImageRow]]:
        """Return the rows of each protocol that saw boxes, in the split's order, from all processes. Stop collecting.

        Args:
            results: the numbers of the evaluation, for the thresholds.
            class_names: the names of the classes by label.
        """
        tables: dict[str, list[ImageRow]] = {}
        for name, metric in self._evaluation.protocols.items():
            metric.boxes.on_verdicts = None
            if f"{name}/threshold" not in results:
                continue
            rules = metric.protocol
            step = int(np.abs(rules.thresholds - results[f"{name}/threshold"]).argmin())
            own = {}
            for image, (label, predicted, right_class, ious, errors) in self._seen[name].items():
                iou = float(ious[step])
                right_box = iou >= 0.5 if rules.top_k_comparison == "at_least" else iou > 0.5
                own[image] = ImageRow(
                    self._records.name(image),
                    class_names[label],
                    None if predicted is None else class_names[predicted],
                    round(iou, 4),
                    ERRORS[errors[step] if right_class else CLS],
                    right_box and right_class,
                )
            tables[name] = [row for _, row in sorted(_gather(own).items())]
        return tables


def evenly(total: int, count: int) -> list[int]:
    """Return at most `count` of the numbers below `total`, spread evenly."""
    return np.unique(np.linspace(0, total - 1, max(count, 0), dtype=int)).tolist()  # type: ignore[no-any-return]


def _gather(rows: dict[int, ImageRow]) -> dict[int, ImageRow]:
    """Gather the rows of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return {image: row for part in parts for image, row in part.items()}


def write_images(tables: Mapping[str, Iterable[ImageRow]], path: Path) -> None:
    """Write the rows of all protocols as CSV, with the columns of `ImageRow` after the protocol's name."""
    with draft(path) as file:
        write_csv(file, [("protocol", *ImageRow._fields)])
        write_csv(file, ((protocol, *row) for protocol, rows in tables.items() for row in rows))
