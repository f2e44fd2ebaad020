"""A page that shows what the rows of a sweep's table make of the same images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from wsolkit.errors import JobError
from wsolkit.reporting.examples import FOLDER, Example, read_examples
from wsolkit.reporting.page import colour_key, document, embedded, isolated, mistake
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
    lines = [*remarks(sweep), *_left_out(sweep, len(columns), len(every))]
    head = "\n".join(f'<p class="dim">{escape(line)}</p>' for line in lines)
    title = f"{directory.resolve().name}: the same images side by side"
    key = colour_key(any(column.examples[image].iou is not None for column in columns for image in column.examples))
    return document(title, head, f"{key}\n{_table(sweep, columns, images)}"), problems


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


def _table(sweep: Sweep, columns: Sequence[Column], images: Sequence[ImageKey]) -> str:
    """A row for each image, below the rows of the heading."""
    body = "\n".join(_image(columns, key) for key in images)
    return (
        f'<div class="wide"><table class="comparison" style="--columns: {len(columns) + 1}">\n'
        f"<thead>\n{_heading(sweep, columns)}\n</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _heading(sweep: Sweep, columns: Sequence[Column]) -> str:
    """The columns' rows of the table, turned by 90 degrees, which runs are shown, and where their boxes are drawn."""
    names, rows = cells(sweep)
    texts = [rows[sweep.rows.index(column.row)] for column in columns]
    lines = []
    for place, name in enumerate(names[: len(sweep.keys) + 1 + _METRICS]):
        if place == len(sweep.keys):
            if any(len(column.row.runs) > 1 for column in columns):
                lines.append(_line(name, [text[place] for text in texts]))
                lines.append(_line("shown", [_which(sweep, column) for column in columns]))
        else:
            lines.append(_line(name, [text[place] for text in texts], setting=place < len(sweep.keys)))
    drawn = [next(iter(column.examples.values())) for column in columns]
    lines.append(_line("boxes at", [f"τ {example.threshold:.3f} ({example.protocol})" for example in drawn]))
    return "\n".join(lines)


def _line(name: str, values: Sequence[str], *, setting: bool = False) -> str:
    cells = "".join(f'<th scope="col">{escape(value)}</th>' for value in values)
    name = re.sub(r"(?<=[/._])", "<wbr>", escape(name))  # broken there rather than anywhere
    return f'<tr{" class=setting" * setting}><th scope="row">{name}</th>{cells}</tr>'


def _which(sweep: Sweep, column: Column) -> str:
    """Which of its row's runs a column shows: the settings in which these differ."""
    if len(column.row.runs) == 1:
        return "–"
    differing = column.row.differing((*sweep.pooled, SEED))
    values = {key: column.run.value(key) for key in differing}
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None) or column.run.name


def _image(columns: Sequence[Column], key: ImageKey) -> str:
    """The row of an image: with ground truth, and as each column has it."""
    first = next(column for column in columns if key in column.examples)
    example = first.examples[key]
    shown_truth = "" if example.iou is None else ": ground truth"
    picture = embedded((first.folder / example.truth_file).read_bytes(), f"{example.image}{shown_truth}")
    caption = f"<b>{isolated(example.label)}</b><br><small>{isolated(example.image)}</small>"
    cells = "".join(f"<td>{_cell(column, key)}</td>" for column in columns)
    return f'<tr><th scope="row">{_figure(picture, caption)}</th>{cells}</tr>'


def _cell(column: Column, key: ImageKey) -> str:
    if key not in column.examples:
        return "–"
    example = column.examples[key]
    values = ", ".join(shown(value) for value in column.row.values if value is not None)
    picture = embedded(
        (column.folder / example.map_file).read_bytes(), f"{example.image}: score map and box of {values}"
    )
    fit = "" if example.iou is None else f"IoU <b>{example.iou:.2f}</b>"
    said = (fit + mistake(example.label, example.predicted_label)).removeprefix(", ")
    return _figure(picture, f"{said}{'<br>' if said else ''}<small>{escape(values)}</small>")


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}\n<figcaption>{caption}</figcaption></figure>"
