"""What a run leaves to look at: pictures, images.csv and report.html in its directory, and the same in W&B."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from omegaconf import DictConfig

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import WSOLDataset, evaluation_batch
from wsolkit.data.transforms import denormalise
from wsolkit.drafts import draft
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, Outcome
from wsolkit.names import isolated, readable, shortened
from wsolkit.reporting.charts import (
    EPOCH_METRICS,
    PREDICTED,
    SCORE_COLOURS,
    TRUTH,
    Shown,
    charts,
    example_image,
    threshold_curves,
)
from wsolkit.reporting.examples import FOLDER as EXAMPLES
from wsolkit.reporting.examples import LIST, write_examples
from wsolkit.reporting.figure import PlainFigure
from wsolkit.reporting.gallery import Localize, localize_with, show, shown_threshold
from wsolkit.reporting.images import ImageRow, ImageTables, evenly
from wsolkit.reporting.page import write_page
from wsolkit.reporting.table import write_results
from wsolkit.reporting.terminal import picture
from wsolkit.training.evaluator import Evaluator
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

    What cannot be drawn is left out, see `wsolkit.reporting.terminal.picture`.

    Args:
        folder: of the run.
        title: what was run.
        method: name of the row of numbers.
        class_names: of the classes that were told apart, by label.
        settings: of the run, shown in the report.
        datamodule: whose test split was evaluated.
        evaluation: its protocols; the first one's maps and boxes are shown.
        outcome: of the pass.
        localize: makes the maps of the images that are shown.
        examples: indices of the images in examples.png and examples/.
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
        write_page(
            folder / "report.html",
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


def choose_examples(dataset: WSOLDataset, count: int, names: Sequence[str] = ()) -> list[int]:
    """Indices of the images that are named, or else of `count` images spread evenly over a split.

    Raises:
        ConfigError: the split has no image of that name.
    """
    if not names:
        return evenly(len(dataset), count)
    known = {dataset.records.name(index): index for index in range(len(dataset))}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or list(known)[:1]
            raise ConfigError(f"examples: the test split has no image '{name}'; it has '{close[0]}', for instance")
    return [known[name] for name in dict.fromkeys(names)]


def draw_examples(examples: Sequence[Shown], title: str) -> Figure:
    """A sheet of examples, two in a row, with a legend."""
    rows = max(1, (len(examples) + 1) // 2)
    height = 2.95 * rows + 0.85
    figure = PlainFigure(figsize=(10, height))  # of equal cells, for which a layout engine takes long
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
    """Write maps from within a method, of the class of each image: inside.png, and inside.npz with the numbers.

    The file of numbers has `<name>` [n, steps, h, w] for each series of maps, and `image` [n], the images' ids.

    Args:
        folder: of the run.
        module: whose `inside` is asked.
        datamodule: whose test split has the images.
        examples: their indices.

    Returns:
        the picture; None if there are no examples, or the method has no such maps.
    """
    if not examples:
        return None
    dataset = datamodule.dataset("test")
    batch = evaluation_batch([dataset[0, index] for index in examples])
    image = batch["image"].to(next(module.parameters()))
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
    """A sheet with a row for each image and series, the steps from left to right, each map on its own scale.

    Where no series has more than one step, they share the image's row.
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


class Report(Callback):
    """Shows the same images after every validation, and writes the report and its charts after the test.

    Pictures, tables and curves go to W&B and, but for tables and curves, to TensorBoard.

    Args:
        folder: run directory.
        count, names: which examples, see `choose_examples`; after validation, images of other splits are not named.
        listed: how many images images.csv and W&B's tables list, see `ImageTables`.
        title: what was run.
        method: its name in tables.
    """

    def __init__(
        self, folder: Path, count: int, names: Sequence[str], listed: int | None, title: str, method: str
    ) -> None:
        self.folder, self.count, self.names, self.title, self.method = folder, count, names, title, method
        self.listed = listed
        self._tables: ImageTables | None = None
        self.epochs: dict[str, list[float]] = {}
        """Numbers of the validation after each epoch, by name; "epoch" counts from 1."""

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path, dataset: WSOLDataset, title: str, method: str) -> Report:
        """The report that settings describe.

        Raises:
            ConfigError: there is no image of a name in `cfg.examples`.
        """
        choose_examples(dataset, cfg.num_examples, cfg.examples)
        return cls(folder, cfg.num_examples, cfg.examples, cfg.num_table_images, title, method)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook: a resumed run continues the lists."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's hook, of a resumed run; and of the test of the best checkpoint, which knows fewer epochs."""
        earlier = state_dict["epochs"]
        if len(earlier.get("epoch", ())) > len(self.epochs.get("epoch", ())):
            self.epochs = earlier

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: in W&B, what validation gives is drawn against epochs."""
        for logger in _loggers(trainer, WandbLogger):
            for name in ("examples/val", *(f"val/{name}" for name in _evaluator(pl_module).evaluation.names)):
                logger.experiment.define_metric(name, step_metric="epoch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            results = _evaluator(pl_module).results
            kept: dict[str, float] = {"epoch": trainer.current_epoch + 1}
            for name, value in results.items():
                if name.rpartition("/")[2] in EPOCH_METRICS and name.count("/") < 2:  # of the method, not of baselines
                    kept[name] = value
            if self.epochs.keys() != kept.keys():  # the first; or a resumed run has other protocols
                self.epochs = {name: [] for name in kept}
            for name, value in kept.items():
                self.epochs[name].append(value)
        if not (_loggers(trainer, WandbLogger, TensorBoardLogger) and self.count > 0):
            return
        module, datamodule = _parts(trainer, pl_module)
        dataset = datamodule.dataset("val")
        normalization = datamodule.mean, datamodule.std
        evaluator = _evaluator(module)
        with picture("examples/val"):
            examples = show(
                localize_with(module, evaluator.evaluation),
                evaluator.evaluation,
                evaluator.results,
                dataset,
                choose_examples(dataset, self.count),
                module.description.class_names,
                normalization,
            )
            _log_examples(trainer, examples)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        module, datamodule = _parts(trainer, pl_module)
        self._tables = ImageTables(_evaluator(module).evaluation, datamodule.dataset("test"), self.listed)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: first the results, then the pictures."""
        module, datamodule = _parts(trainer, pl_module)
        class_names = module.description.class_names
        assert self._tables is not None
        evaluator = _evaluator(module)
        tables = self._tables.rows(evaluator.results, class_names)
        if not trainer.is_global_zero:
            return
        epochs = {f"epochs/{name}": values for name, values in self.epochs.items()}
        outcome = Outcome(evaluator.results, evaluator.curves | epochs)
        write_results(self.folder, outcome, class_names, tables)
        examples = choose_examples(datamodule.dataset("test"), self.count, self.names)
        inside: Figure | None = None
        with picture(self.folder / "inside.png"):
            inside = write_inside(self.folder, module, datamodule, examples)
        write_report(
            self.folder,
            self.title,
            self.method,
            class_names,
            module.description.config,
            datamodule,
            evaluator.evaluation,
            outcome,
            localize_with(module, evaluator.evaluation),
            examples,
        )
        if _loggers(trainer, WandbLogger, TensorBoardLogger):
            figures = {f"charts/{name}": figure for name, figure in charts(*outcome).items()}
            _log_figures(trainer, figures if inside is None else figures | {"examples/inside": inside})
            _log_tables(trainer, tables, outcome)


def _loggers(trainer: Trainer, *kinds: type) -> list[Any]:
    """Loggers of some kinds, in the process that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, kinds) and trainer.is_global_zero]


def _log_examples(trainer: Trainer, examples: Sequence[Shown]) -> None:
    """Log what validation has shown, as `examples/val`."""
    step = max(trainer.global_step - 1, 0)  # that of the validation's numbers
    pictures = [example_image(example) for example in examples]
    fits = ["" if math.isnan(example.iou) else f", IoU {example.iou:.2f}" for example in examples]
    captions = [f"{readable(example.label)}{fit}" for example, fit in zip(examples, fits, strict=True)]
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        images = [wandb.Image(one, caption=said) for one, said in zip(pictures, captions, strict=True)]
        logger.log_metrics({"examples/val": images, "epoch": trainer.current_epoch}, step=step)
    for logger in _loggers(trainer, TensorBoardLogger):
        for example, one in zip(examples, pictures, strict=True):
            logger.experiment.add_image(f"examples/{readable(example.name)}", one, step, dataformats="HWC")


def _log_figures(trainer: Trainer, figures: Mapping[str, Figure]) -> None:
    """Log figures by name."""
    for name, figure in figures.items():
        with picture(f"{name} of the logger"):
            drawn = pixels(figure)
            for logger in _loggers(trainer, WandbLogger):
                logger.log_image(name, [drawn])
            for logger in _loggers(trainer, TensorBoardLogger):
                logger.experiment.add_image(name, drawn, trainer.global_step, dataformats="HWC")


def _log_tables(trainer: Trainer, tables: Mapping[str, Sequence[ImageRow]], outcome: Outcome) -> None:
    """Log tables as `images/<protocol>`, and what is reached at each threshold as `curves/<protocol>`, to W&B."""
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        for protocol, rows in tables.items():
            logger.log_table(f"images/{protocol}", list(ImageRow._fields), [list(row) for row in rows])
            thresholds, lines = threshold_curves(outcome.curves, protocol)
            plot = wandb.plot.line_series(
                thresholds, list(lines.values()), list(lines), title=f"{protocol}: percent at each τ", xname="threshold"
            )
            logger.log_metrics({f"curves/{protocol}": plot})


def _parts(trainer: Trainer, module: LightningModule) -> tuple[WSOLModule, WSOLDataModule]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, WSOLDataModule)
    assert isinstance(module, WSOLModule)
    return module, datamodule


def _evaluator(module: LightningModule) -> Evaluator:
    assert isinstance(module, WSOLModule)
    return module.attached(Evaluator)


def pixels(figure: Figure) -> Image:
    """Draw a figure as an image [H, W, 3]."""
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
