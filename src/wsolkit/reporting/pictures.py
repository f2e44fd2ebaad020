"""Write a run's pictures, images.csv and report.html into its directory, and log the same to W&B."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import WSOLDataset, evaluation_batch
from wsolkit.data.transforms import denormalise
from wsolkit.errors import ConfigError
from wsolkit.localization.inputs import images_to
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, Outcome
from wsolkit.reporting.charts import (
    PREDICTED,
    SCORE_COLOURS,
    TRUTH,
    Shown,
    example_image,
)
from wsolkit.reporting.examples import FOLDER as EXAMPLES
from wsolkit.reporting.examples import LIST, write_examples
from wsolkit.reporting.figure import PlainFigure
from wsolkit.reporting.gallery import Localize, show, shown_threshold
from wsolkit.reporting.images import evenly
from wsolkit.reporting.page import write_page
from wsolkit.reporting.report import describe
from wsolkit.reporting.terminal import picture
from wsolkit.system.drafts import draft
from wsolkit.system.names import isolated, shortened
from wsolkit.types import Image, PlainConfig


def write_report(
    folder: Path,
    title: str,
    method: str,
    class_names: Sequence[str],
    settings: PlainConfig,
    datamodule: WSOLDataModule,
    evaluation: Evaluation,
    outcome: Outcome,
    localize: Localize,
    examples: Sequence[int],
) -> None:
    """Write report.html and, if there are examples, examples.png and examples/ into a run directory.

    Pictures that cannot be drawn are left out, see `wsolkit.reporting.terminal.picture`.

    Args:
        folder: the run directory.
        title: describes the run.
        method: the name of the row of numbers.
        class_names: the names of the classes, by label.
        settings: the settings of the run, which the report shows.
        datamodule: the data set whose test split was evaluated.
        evaluation: names the protocols. The report shows maps and boxes of the first one.
        outcome: the metrics of the pass.
        localize: makes the maps of the images in the report.
        examples: the indices of the images in examples.png and examples/.
    """
    dataset = datamodule.dataset("test")

    first = next(iter(evaluation.protocols))

    def shown(what: str, indices: Sequence[int]) -> list[Shown]:
        found: list[Shown] = []
        with picture(what):
            normalization = datamodule.mean, datamodule.std
            found = show(localize, evaluation, outcome.results, dataset, indices, class_names, normalization)
        return found

    def extremes(which: str) -> list[Shown]:
        indices = [int(index) for index in outcome.curves.get(f"{first}/{which}_images", ())]
        return shown(f"the gallery of {which} images in report.html", indices)

    pictures = shown("the examples", examples)
    if pictures:
        with picture(folder / "examples.png"), draft(folder / "examples.png", "wb") as file:
            draw_examples(pictures, title).savefig(file, dpi=100)
        with picture(folder / EXAMPLES / LIST):
            write_examples(folder, pictures, first, shown_threshold(outcome.results, first))
    with picture(folder / "report.html"):
        report = describe(
            title=title,
            method=method,
            results=outcome.results,
            curves=outcome.curves,
            class_names=class_names,
            worst=extremes("worst"),
            best=extremes("best"),
            protocols={name: vars(metric.protocol) for name, metric in evaluation.protocols.items()},
            chosen_on=evaluation.chosen_on(datamodule.held_out),
            settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        )
        write_page(folder / "report.html", report)


def choose_examples(dataset: WSOLDataset, count: int, names: Sequence[str] = ()) -> list[int]:
    """Return the indices of the named images, or else of `count` images spread evenly over a split.

    Raises:
        ConfigError: the split has no image of that name.
    """
    if not names:
        return evenly(len(dataset), count)
    known = {dataset.records.name(index): index for index in range(len(dataset))}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or list(known)[:1]
            raise ConfigError(f"examples: the test split has no image '{name}'. It has '{close[0]}', for instance")
    return [known[name] for name in dict.fromkeys(names)]


def draw_examples(examples: Sequence[Shown], title: str) -> Figure:
    """Draw a sheet of examples, two per row, with a legend."""
    rows = max(1, (len(examples) + 1) // 2)
    height = 2.95 * rows + 0.85
    figure = PlainFigure(figsize=(10, height))  # All cells are equal, and a layout engine would take long for them.
    for axes in figure.subplots(rows, 2, squeeze=False).ravel():
        axes.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.5 / height, top=1 - 0.85 / height, wspace=0.03, hspace=0.2)
    for axes, example in zip(figure.axes, examples, strict=False):
        axes.imshow(example_image(example))
        known = example.predicted_label in (None, example.label)
        said = "" if known else f", taken for {isolated(shortened(str(example.predicted_label), 30))}"
        label = isolated(shortened(example.label, 64 if known else 30))
        fit = "" if math.isnan(example.iou) else f"\nIoU {example.iou:.2f}"
        axes.set_title(f"{label}{said}{fit}", fontsize=9)
    handles = [Patch(edgecolor=PREDICTED, fill=False, linestyle="--", label="predicted box")]
    if any(len(example.truth) for example in examples):
        handles.insert(0, Patch(edgecolor=TRUTH, fill=False, label="ground truth"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles))
    figure.suptitle(shortened(title, 100), y=1 - 0.2 / height)
    return figure


def write_inside(
    folder: Path, module: WSOLModule, datamodule: WSOLDataModule, examples: Sequence[int]
) -> Figure | None:
    """Write maps from inside a method, for the class of each image: inside.png, and inside.npz with the numbers.

    The file of numbers has `<name>` [n, steps, h, w] for each series of maps, and `image` [n] with the images' ids.

    Args:
        folder: the run directory.
        module: the module whose `inside` makes the maps.
        datamodule: the data set whose test split has the images.
        examples: their indices.

    Returns:
        the picture, or None if there are no examples, or the method has no maps of this kind.
    """
    if not examples:
        return None
    dataset = datamodule.dataset("test")
    batch = evaluation_batch([dataset[0, index] for index in examples])
    image = images_to(batch, next(module.parameters()))["image"]
    training = module.training
    series = module.eval().inside(image, batch["label"].to(module.device))
    module.train(training)
    if not series:
        return None
    arrays = {name: maps.float().cpu().numpy() for name, maps in series.items()}
    names = [dataset.records.name(index) for index in examples]
    with draft(folder / "inside.npz", "wb") as file:
        np.savez_compressed(file, **{"image": np.array(names), **arrays})  # type: ignore[arg-type]
    pictures = [denormalise(one, datamodule.mean, datamodule.std) for one in batch["image"]]
    figure = draw_inside(pictures, arrays)
    with draft(folder / "inside.png", "wb") as file:
        figure.savefig(file, dpi=100)
    return figure


_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_inside(pictures: Sequence[Image], series: Mapping[str, npt.NDArray[np.float32]]) -> Figure:
    """Draw a sheet with a row for each image and series. Steps go from left to right, each map on its own scale.

    If no series has more than one step, the series share the image's row.
    """
    steps = max(maps.shape[1] for maps in series.values())
    rows: list[tuple[Image | None, list[tuple[str, npt.NDArray[np.float32]]]]] = []
    for which, image in enumerate(pictures):
        if steps == 1:
            rows.append((image, [(name, maps[which, 0]) for name, maps in series.items()]))
            continue
        for place, (name, maps) in enumerate(series.items()):
            row = [(name + str(step).translate(_RAISED), one) for step, one in enumerate(maps[which])]
            rows.append((None if place else image, row))
    columns = 1 + max(len(row) for _, row in rows)
    figure = PlainFigure(figsize=(1.3 * columns, 1.5 * len(rows)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - 0.22 / (1.5 * len(rows)), wspace=0.05, hspace=0.17)
    for axes in grid.ravel():
        axes.set_axis_off()
    for line, (picture_or_none, row) in zip(grid, rows, strict=True):
        if picture_or_none is not None:
            line[0].imshow(picture_or_none)
        for axes, (title, one) in zip(line[1:], row, strict=False):
            axes.imshow(one, cmap=SCORE_COLOURS)
            axes.set_title(title, fontsize=9)
    return figure


def pixels(figure: Figure) -> Image:
    """Draw a figure as an image [H, W, 3]."""
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
