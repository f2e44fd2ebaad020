"""What a run leaves for people to look at: examples.png and report.html in its directory, and the same in W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import WSOLDataset
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, Outcome
from wsolkit.reporting.charts import PREDICTED, TRUTH, Shown, charts, example_image
from wsolkit.reporting.gallery import Localize, localize_with, show
from wsolkit.reporting.page import write_page
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
    num_examples: int,
) -> None:
    """Write report.html and, unless `num_examples` is 0, examples.png into a run directory.

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
        num_examples: images in examples.png, spread evenly over the split.
    """
    dataset = datamodule.dataset("test")

    def shown(indices: Sequence[int]) -> list[Shown]:
        normalization = datamodule.mean, datamodule.std
        return show(localize, evaluation, outcome.results, dataset, indices, class_names, normalization)

    if num_examples > 0:
        draw_examples(shown(spread(dataset, num_examples)), title).savefig(folder / "examples.png", dpi=100)
    first = next(iter(evaluation.protocols))
    extremes = {name: [int(i) for i in outcome.curves.get(f"{first}/{name}_images", ())] for name in ("worst", "best")}
    write_page(
        folder / "report.html",
        title=title,
        method=method,
        results=outcome.results,
        curves=outcome.curves,
        class_names=class_names,
        worst=shown(extremes["worst"]),
        best=shown(extremes["best"]),
        protocols={name: vars(metric.protocol) for name, metric in evaluation.protocols.items()},
        chosen_on=evaluation.chosen_on(datamodule.held_out),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )


def spread(dataset: WSOLDataset, count: int) -> list[int]:
    """Indices of `count` images, spread evenly over a split."""
    return np.unique(np.linspace(0, len(dataset) - 1, count, dtype=int)).tolist()  # type: ignore[no-any-return]


def draw_examples(examples: Sequence[Shown], title: str) -> Figure:
    """A sheet of examples, two in a row, with a legend."""
    rows = max(1, (len(examples) + 1) // 2)
    figure = Figure(figsize=(10, 3.0 * rows + 0.8), layout="constrained")
    for axes in figure.subplots(rows, 2, squeeze=False).ravel():
        axes.set_axis_off()
    for axes, example in zip(figure.axes, examples, strict=False):
        axes.imshow(example_image(example))
        known = example.predicted_label in (None, example.label)
        said = "" if known else f", taken for {example.predicted_label}"
        axes.set_title(f"{example.label}{said}\nIoU {example.iou:.2f}", fontsize=9)
    handles = [
        Patch(edgecolor=TRUTH, fill=False, label="ground truth"),
        Patch(edgecolor=PREDICTED, fill=False, linestyle="--", label="predicted box"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


class Report(Callback):
    """Shows W&B the same images after every validation, and writes the report and its charts after the test.

    Args:
        folder: run directory.
        count: number of examples.
        title: what was run.
        method: its name in tables.
    """

    def __init__(self, folder: Path, count: int, title: str, method: str) -> None:
        self.folder, self.count, self.title, self.method = folder, count, title, method

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        loggers = _wandb(trainer)
        if not (loggers and self.count > 0):
            return
        module, datamodule = _parts(trainer, pl_module)
        dataset = datamodule.dataset("val")
        normalization = datamodule.mean, datamodule.std
        examples = show(
            localize_with(module),
            module.evaluation,
            module.results,
            dataset,
            spread(dataset, self.count),
            module.training_settings.class_names,
            normalization,
        )
        captions = [f"{example.label}, IoU {example.iou:.2f}" for example in examples]
        for logger in loggers:
            pictures: list[Any] = [example_image(example) for example in examples]
            logger.log_image("examples", pictures, step=trainer.global_step, caption=captions)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        if not trainer.is_global_zero:
            return
        module, datamodule = _parts(trainer, pl_module)
        outcome = Outcome(module.results, module.curves)
        write_report(
            self.folder,
            self.title,
            self.method,
            module.training_settings.class_names,
            module.training_settings.config,
            datamodule,
            module.evaluation,
            outcome,
            localize_with(module),
            self.count,
        )
        for logger in _wandb(trainer):
            for name, figure in charts(*outcome).items():
                logger.log_image(f"charts/{name}", [pixels(figure)])


def _wandb(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def _parts(trainer: Trainer, module: LightningModule) -> tuple[WSOLModule, WSOLDataModule]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, WSOLDataModule)
    assert isinstance(module, WSOLModule)
    return module, datamodule


def pixels(figure: Figure) -> Image:
    """Draw a figure as an image [H, W, 3]."""
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
