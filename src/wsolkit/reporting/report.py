"""What the report of an evaluation shows, as data: `page` turns it into a page."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from wsolkit.reporting.charts import (
    CLASSIFICATION,
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
from wsolkit.reporting.selection import COLUMNS as SELECTION_COLUMNS
from wsolkit.reporting.selection import NOTE, selection_rows
from wsolkit.reporting.terminal import picture

_COLUMNS = {
    "threshold": "threshold τ\n(0 to 1)",
    "chosen_on": "τ chosen\non",
    "top1_cls": "Top-1\nCls",
    "top5_cls": "Top-5\nCls",
    "gt_known_loc": "GT-known\nLoc, label's\nmap",
    "gt_known_loc_predicted_class": "GT-known\nLoc, predicted\nclass's map",
    "top1_loc": "Top-1\nLoc",
    "top5_loc": "Top-5\nLoc",
    "max_box_acc": "MaxBoxAcc\nIoU 50",
    "max_box_acc_v2": "mean of IoU\n30/50/70",
    "max_box_acc_size_mean": "mean of\nobject\nsizes",
    "pxap": "PxAP",
    "peak_iou": "peak\npixel IoU",
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
    "object_size": (
        "Accuracy by object size",
        "How many images are right, by the share of the image that the object's box takes: the mean over the IoU "
        "thresholds, each at its best τ over all images. The numbers count images.",
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


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, and a text for each column.

    A row that is the heading of those below it has no values. In the table of results, `kind` says what the row is
    of: "protocol" (such a heading), "method" or "baseline".
    """

    name: str
    values: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class ResultsTable:
    """The main table: headings of its columns, rows in groups, and sentences on how to read it."""

    columns: Sequence[str]
    groups: Sequence[Sequence[Row]]
    notes: Sequence[str]


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart: its name among the protocol's charts, what is said of it, and the figure."""

    name: str
    heading: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class ProtocolPart:
    """What is shown of a protocol: its charts, and its rules by name."""

    name: str
    charts: Sequence[Chart]
    rules: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture's file, such as a JPEG, and what it shows in words.

    content: of the file; kind: its media type; width, height: in pixels.
    """

    content: bytes
    kind: str
    width: int
    height: int
    description: str


@dataclass(frozen=True)
class GalleryImage:
    """An image of a gallery.

    name: its id; label: name of its class; taken_for: another class's name, or None; iou: in [0, 1], None without
    ground truth.
    """

    name: str
    label: str
    taken_for: str | None
    iou: float | None
    picture: Picture


@dataclass(frozen=True)
class Gallery:
    """Images under a heading, and whether any of them has ground truth."""

    heading: str
    images: Sequence[GalleryImage]
    with_truth: bool


@dataclass(frozen=True)
class ClassTable:
    """The classes under a protocol, in the order of one of the columns."""

    protocol: str
    columns: Sequence[str]
    sorted_by: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Report:
    """All that a report shows, as text, figures and pictures; what there is no data for is empty or None.

    title: what was run; method: its name; facts: how many images and classes, and which protocols; selection: what each
    way to choose costs; settings: the run's settings as YAML.
    """

    title: str
    method: str
    facts: Sequence[str]
    results: ResultsTable | None
    selection: ResultsTable | None
    protocols: Sequence[ProtocolPart]
    galleries: Sequence[Gallery]
    classes: Sequence[ClassTable]
    settings: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing below the title."""
        return not (self.results or self.protocols or self.galleries or self.classes or self.settings)


def describe(
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
) -> Report:
    """Gather what the report of an evaluation shows.

    Args:
        title: what was run.
        method: name of the method's row.
        results: numbers in percent, thresholds from 0 to 1; `charts` names the keys.
        curves: what the charts and the table of classes show, by the same keys.
        class_names: [C], in the order of `<protocol>/per_class/…`.
        worst: images of the gallery by rising IoU.
        best: images of the gallery by falling IoU.
        protocols: each protocol's rules as plain values.
        chosen_on: what chose each protocol's τ, see `Evaluation.chosen_on`.
        settings: the run's settings as YAML.
    """
    names = telling_protocols(results, curves)
    figures = charts(results, curves)
    parts = [_protocol(name, figures, protocols.get(name, {})) for name in names]
    galleries = [_gallery("Worst", worst), _gallery("Best", best)]
    return Report(
        title=title,
        method=method,
        facts=_facts(curves, class_names, names),
        results=_results(results, names, method, chosen_on),
        selection=_selection(results, curves, chosen_on),
        protocols=[part for part in parts if part.charts or part.rules],
        galleries=[gallery for gallery in galleries if gallery.images],
        classes=[table for name in names if (table := _classes(name, curves, class_names)) is not None],
        settings=settings,
    )


def picture_file(content: bytes, description: str) -> Picture:
    """A picture's file with what a page must know of it."""
    with PIL.Image.open(io.BytesIO(content)) as opened:
        return Picture(content, str(opened.get_format_mimetype()), *opened.size, description)


def mistaken_for(label: str, predicted_label: str | None) -> str | None:
    """The class that an image was taken for; None if it was recognized, or nobody knows."""
    return None if predicted_label == label else predicted_label


def _facts(curves: Curves, class_names: Sequence[str], names: Sequence[str]) -> list[str]:
    """How many images and classes, and the protocols."""
    facts = []
    keys = [f"{name}/{kind}" for kind in ("per_class/images", "iou_histogram", "mask_iou_by_size") for name in names]
    counts = [values for key in keys if (values := series(curves, key)) is not None]
    if counts:
        facts.append(f"{int(np.nansum(counts[0])):,} images")
    if class_names:
        facts.append(f"{len(class_names):,} classes")
    if names:
        facts.append(("protocols " if len(names) > 1 else "protocol ") + ", ".join(names))
    return facts


def _results(results: Results, names: Sequence[str], method: str, chosen_on: Mapping[str, str]) -> ResultsTable | None:
    """The main table: a row of the method under each protocol; below those that agree on them, the baselines."""
    names = names or [""]  # without ground truth for localization there is still classification
    cells = {
        (name, baseline): _cells(results, f"{name}/{baseline}/" if baseline else f"{name}/")
        for name in names
        for baseline in ("", *baseline_names(results, name))
    }
    for name in names:
        whole = _cells(results, "")  # classification, where the protocol has none of its own
        where = {"chosen_on": chosen_on[name]} if name in chosen_on and "threshold" in cells[name, ""] else {}
        classification = {key: whole[key] for key in CLASSIFICATION if key in whole}
        cells[name, ""] = classification | cells[name, ""] | where
    used = [key for key in _COLUMNS if any(key in row for row in cells.values())]
    if not used:
        return None

    def row(kind: str, label: str, name: str, baseline: str) -> Row:
        return Row(label, tuple(cells[name, baseline].get(key, "–") for key in used), kind)

    agreeing: dict[tuple[Row, ...], list[str]] = {}
    for name in names:
        below = tuple(row("baseline", spelled(one), name, one) for one in baseline_names(results, name))
        agreeing.setdefault(below, []).append(name)
    groups = []
    for baselines, together in agreeing.items():
        group = []
        for name in together:
            if name:
                group.append(Row(name, kind="protocol"))
            group.append(row("method", method, name, ""))
        if len(together) > 1 and baselines:
            group.append(Row(f"baselines under {' and '.join(together)}", kind="protocol"))
        groups.append([*group, *baselines])
    own = [name for name in names if f"{name}/threshold_top1_loc" in results]
    return ResultsTable([_COLUMNS[key] for key in used], groups, _notes(used, own))


def _selection(results: Results, curves: Curves, chosen_on: Mapping[str, str]) -> ResultsTable | None:
    """The table of what each way to choose costs: a group for each protocol."""
    rows = selection_rows(results, curves, chosen_on)
    groups = [
        [Row(protocol, kind="protocol"), *(Row(row.name, row.cells, "method") for row in together)]
        for protocol, together in itertools.groupby(rows, lambda row: row.protocol)
    ]
    return ResultsTable(SELECTION_COLUMNS, groups, [NOTE]) if groups else None


def _notes(used: Sequence[str], own: Sequence[str]) -> list[str]:
    """How to read the columns that are used; `own`: protocols under which each Loc has its own threshold."""
    notes = []
    if "threshold" in used:
        notes.append("Loc counts boxes at the threshold τ shown.")
    if own:
        notes.append(f"Under {', '.join(own)} each Loc has its own τ; shown is GT-known Loc's.")
    if "chosen_on" in used:
        notes.append(
            "τ was chosen on the validation split (val), by pseudo boxes of it (pseudo), on the evaluated split itself "
            "(test, which flatters), or given (fixed), or is the default where no boxes choose it (default)."
        )
    if "max_box_acc" in used:
        notes.append("MaxBoxAcc, and the mean over three IoU thresholds, take the best τ of the evaluated split.")
    if "max_box_acc_size_mean" in used:
        notes.append("The mean of object sizes gives objects of each size the same weight.")
    return notes


def _cells(results: Results, prefix: str) -> dict[str, str]:
    values = {key: results.get(prefix + key, math.nan) for key in _COLUMNS}
    return {
        key: _number(value, 3 if key == "threshold" else 1) for key, value in values.items() if not math.isnan(value)
    }


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _protocol(name: str, figures: Mapping[str, Figure], rules: Mapping[str, object]) -> ProtocolPart:
    drawn = [
        Chart(chart, heading, caption, figures[f"{name}/{chart}"])
        for chart, (heading, caption) in _CAPTIONS.items()
        if f"{name}/{chart}" in figures
    ]
    return ProtocolPart(name, drawn, [(spelled(rule), _plain(value)) for rule, value in rules.items()])


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _gallery(heading: str, images: Sequence[Shown]) -> Gallery:
    drawn = []
    for shown in images:
        with picture(f"image '{shown.name}' in the gallery of report.html"):
            drawn.append(_gallery_image(shown))
    return Gallery(heading, drawn, any(len(shown.truth) for shown in images))


def _gallery_image(shown: Shown) -> GalleryImage:
    drawn = picture_file(jpeg(example_image(shown)), f"{shown.name}: boxes, and the same under the score map")
    taken_for = mistaken_for(shown.label, shown.predicted_label)
    return GalleryImage(shown.name, shown.label, taken_for, None if math.isnan(shown.iou) else shown.iou, drawn)


def _classes(name: str, curves: Curves, class_names: Sequence[str]) -> ClassTable | None:
    """The table of classes under a protocol, worst first."""
    every = {key: series(curves, f"{name}/per_class/{key}") for key in _CLASS_COLUMNS}
    columns = {key: values for key, values in every.items() if values is not None}
    order = [key for key in ("gt_known_loc", "top1_loc", "top1_cls") if key in columns]
    if not order:
        return None
    rows = [
        Row(
            class_names[i],
            tuple(_number(column[i], 0 if key == "images" else 1) for key, column in columns.items()),
        )
        for i in np.argsort(columns[order[0]], kind="stable")  # NaN comes last
    ]
    return ClassTable(name, [_CLASS_COLUMNS[key] for key in columns], _CLASS_COLUMNS[order[0]], rows)
