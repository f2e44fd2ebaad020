"""A page that shows what the rows of a sweep's table make of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsolkit.errors import JobError
from wsolkit.reporting.examples import FOLDER, Example, read_examples
from wsolkit.reporting.page import render
from wsolkit.reporting.report import Picture, mistaken_for, picture_file
from wsolkit.sweeps.tables import SEED, Row, Run, Sweep, Value, cells, order, remarks, shown

_MOST_COLUMNS = 12  # wider tables are no longer read, and each picture makes the file larger
_METRICS = 3  # in a column's heading

ImageKey = tuple[Value, str]
"""A data set and an image's id in it: two data sets may use the same ids."""


@dataclass(frozen=True)
class Column:
    """A row of the table as a column of pictures: those of one of its runs, and the folder they are in."""

    row: Row
    run: Run
    folder: Path
    examples: Mapping[ImageKey, Example]


@dataclass(frozen=True)
class Line:
    """A line of the heading: the name of a setting or metric, and a text for each column."""

    name: str
    values: Sequence[str]
    is_setting: bool = False


@dataclass(frozen=True)
class Cell:
    """What a column makes of an image.

    row: the column's row of the table; taken_for: another class's name, or None; iou: in [0, 1], None without ground
    truth.
    """

    row: str
    taken_for: str | None
    iou: float | None
    picture: Picture


@dataclass(frozen=True)
class ImageRow:
    """An image: its id, its class, its picture with ground truth, and a cell for each column; None has no picture."""

    name: str
    label: str
    truth: Picture
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Comparison:
    """All that the page shows; `columns` are counted, and `with_truth` says whether any image has ground truth."""

    title: str
    remarks: Sequence[str]
    columns: int
    heading: Sequence[Line]
    images: Sequence[ImageRow]
    with_truth: bool


def comparison(sweep: Sweep, directory: Path) -> tuple[str | None, list[str]]:
    """The page, and what is wrong with pictures that are left out.

    Args:
        sweep: what the table shows.
        directory: of the sweep; the runs' names are paths in it.

    Returns:
        HTML, or None if no image is shown in two rows of the table; a line for each run whose pictures are damaged.
    """
    every, problems = _columns(sweep, directory)
    columns = every[:_MOST_COLUMNS]
    counts = Counter(key for column in columns for key in column.examples)
    images = [key for key, count in counts.most_common() if count > 1]  # those that most columns show come first
    if not images:
        return None, problems
    content = Comparison(
        title=f"{directory.resolve().name}: the same images side by side",
        remarks=[*remarks(sweep), *_left_out(sweep, len(columns), len(every))],
        columns=len(columns),
        heading=_heading(sweep, columns),
        images=[_image(columns, key) for key in images],
        with_truth=any(column.examples[key].iou is not None for column in columns for key in column.examples),
    )
    return render("comparison.html", comparison=content), problems


def _columns(sweep: Sweep, directory: Path) -> tuple[list[Column], list[str]]:
    """A column for each row that has pictures, of its lowest seed that has them; and what is damaged."""
    columns, problems = [], []
    for row in sweep.rows:
        for run in sorted(row.finished, key=lambda run: order(run.value(SEED))):
            try:
                examples = read_examples(directory / run.name)
            except JobError as error:
                problems.append(str(error))
                continue
            if examples:
                by_image = {(run.value("dataset"), example.image): example for example in examples}
                columns.append(Column(row, run, directory / run.name / FOLDER, by_image))
                break
    return columns, problems


def _left_out(sweep: Sweep, columns: int, pictured: int) -> list[str]:
    """Rows of the table that are no columns, and why."""
    lines = []
    if columns < pictured:
        fewer = f"; keys=[…] with fewer of {', '.join(sweep.keys)} makes fewer columns" * (len(sweep.keys) > 1)
        lines.append(f"The first {columns} of {pictured} rows of the table are shown{fewer}.")
    if pictured < len(sweep.rows):
        lines.append(f"Rows of the table without pictures: {len(sweep.rows) - pictured}.")
    return lines


def _heading(sweep: Sweep, columns: Sequence[Column]) -> list[Line]:
    """The columns' rows of the table, turned by 90 degrees, which runs are shown, and where their boxes are drawn."""
    names, rows = cells(sweep)
    texts = [rows[sweep.rows.index(column.row)] for column in columns]
    lines = []
    for place, name in enumerate(names[: len(sweep.keys) + 1 + _METRICS]):
        if place == len(sweep.keys):
            if any(len(column.row.runs) > 1 for column in columns):
                lines.append(Line(name, [text[place] for text in texts]))
                lines.append(Line("shown", [_which(sweep, column) for column in columns]))
        else:
            lines.append(Line(name, [text[place] for text in texts], is_setting=place < len(sweep.keys)))
    drawn = [next(iter(column.examples.values())) for column in columns]
    lines.append(Line("boxes at", [f"τ {example.threshold:.3f} ({example.protocol})" for example in drawn]))
    return lines


def _which(sweep: Sweep, column: Column) -> str:
    """Which of its row's runs a column shows: the settings in which these differ."""
    if len(column.row.runs) == 1:
        return "–"
    differing = column.row.differing((*sweep.pooled, SEED))
    values = {key: column.run.value(key) for key in differing}
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None) or column.run.name


def _image(columns: Sequence[Column], key: ImageKey) -> ImageRow:
    """An image: with ground truth, and as each column has it."""
    first = next(column for column in columns if key in column.examples)
    example = first.examples[key]
    shown_truth = "" if example.iou is None else ": ground truth"
    truth = picture_file((first.folder / example.truth_file).read_bytes(), f"{example.image}{shown_truth}")
    return ImageRow(example.image, example.label, truth, [_cell(column, key) for column in columns])


def _cell(column: Column, key: ImageKey) -> Cell | None:
    example = column.examples.get(key)
    if example is None:
        return None
    values = ", ".join(shown(value) for value in column.row.values if value is not None)
    drawn = (column.folder / example.map_file).read_bytes()
    picture = picture_file(drawn, f"{example.image}: score map and box of {values}")
    return Cell(values, mistaken_for(example.label, example.predicted_label), example.iou, picture)
