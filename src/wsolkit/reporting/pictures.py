"""Pictures of what a method sees: ground truth, score map and predicted box on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import WSOLDataset, evaluation_batch
from wsolkit.data.transforms import denormalise
from wsolkit.localization.boxes import boxes_at_thresholds
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.functional import box_iou
from wsolkit.types import Boxes, Image

_TRUTH, _PREDICTED = "#00e000", "#ff3030"


class Example(NamedTuple):
    """image [S, S, 3]; score_map [R, R] in [0, 1]; boxes [n, 4] in pixels of the map; names of the classes."""

    image: Image
    score_map: npt.NDArray[np.float32]
    truth: Boxes
    predicted: Boxes
    label: str
    predicted_label: str


def localize_examples(
    module: WSOLModule,
    dataset: WSOLDataset,
    indices: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Example]:
    """Run a module on images of a split, under its first protocol, with the map of the ground-truth class."""
    name, metric = next(iter(module.evaluation.protocols.items()))
    protocol = metric.protocol
    threshold = module.results.get(f"{name}/threshold", 0.5)
    batch = evaluation_batch([dataset[0, index] for index in indices])
    # With trainer.precision=bf16-true the weights are half precision, and so must the images be.
    image = batch["image"].to(next(module.parameters()))
    label = batch["label"].to(module.device)
    training = module.training
    module.eval()
    localization = module.localize(image, label[:, None])
    module.train(training)
    maps = protocol.localization_maps(localization.maps[:, 0]).cpu().numpy()
    predictions = localization.logits.argmax(dim=1).tolist()
    classes = dataset.records.classes
    return [
        Example(
            denormalise(batch["image"][i], mean, std),
            maps[i],
            protocol.scale_boxes(batch["boxes"][i], *batch["size"][i].tolist()),
            boxes_at_thresholds(maps[i], np.array([threshold]), "largest"),
            classes[int(label[i])],
            classes[predictions[i]],
        )
        for i in range(len(indices))
    ]


def draw_example(figure: Figure | SubFigure, example: Example) -> None:
    """Image with boxes on the left, score map over it on the right, the IoU in the title."""
    left, right = figure.subplots(1, 2)
    size = example.score_map.shape[0]
    for axes in (left, right):
        axes.imshow(example.image, extent=(0, size, size, 0))
        axes.set_axis_off()
    right.imshow(example.score_map, cmap="jet", alpha=0.55, vmin=0, vmax=1, extent=(0, size, size, 0))
    for axes in (left, right):
        for boxes, colour in ((example.truth, _TRUTH), (example.predicted, _PREDICTED)):
            for x0, y0, x1, y1 in boxes:
                axes.add_patch(Rectangle((x0, y0), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=colour, linewidth=2))
    iou = box_iou(example.predicted, example.truth).max() if len(example.truth) else float("nan")
    said = "" if example.label == example.predicted_label else f"\ntaken for {example.predicted_label}"
    figure.suptitle(f"{example.label}{said}\nIoU {iou:.2f}", fontsize=9)


def draw_examples(examples: Sequence[Example], title: str) -> Figure:
    """A sheet of examples, two in a row, with a legend."""
    rows = max(1, (len(examples) + 1) // 2)
    figure = Figure(figsize=(10, 3.0 * rows + 0.8), layout="constrained")
    for part, example in zip(figure.subfigures(rows, 2, squeeze=False).ravel(), examples):  # noqa: B905 (odd number: one part stays empty)
        draw_example(part, example)
    handles = [
        Patch(edgecolor=_TRUTH, fill=False, label="ground truth"),
        Patch(edgecolor=_PREDICTED, fill=False, label="predicted box"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


class ExamplePictures(Callback):
    """Draws the same images after every validation for W&B, and into the run directory after the test.

    Args:
        folder: run directory; gets `examples.png`.
        count: number of images, spread evenly over the split.
        title: of the sheet.
    """

    def __init__(self, folder: Path, count: int, title: str) -> None:
        self.folder, self.count, self.title = folder, count, title

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not (trainer.is_global_zero and loggers and self.count > 0):
            return
        pictures = []
        for example in self._examples(trainer, pl_module, "val"):
            figure = Figure(figsize=(5, 3), layout="constrained")
            draw_example(figure, example)
            pictures.append(_pixels(figure))
        for logger in loggers:
            logger.log_image("examples", pictures, step=trainer.global_step)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        if trainer.is_global_zero and self.count > 0:
            examples = self._examples(trainer, pl_module, "test")
            draw_examples(examples, self.title).savefig(self.folder / "examples.png", dpi=100)

    def _examples(self, trainer: Trainer, module: LightningModule, split: Any) -> list[Example]:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, WSOLDataModule)
        assert isinstance(module, WSOLModule)
        dataset = datamodule.dataset(split)
        indices = np.unique(np.linspace(0, len(dataset) - 1, self.count, dtype=int)).tolist()
        with torch.inference_mode():
            return localize_examples(module, dataset, indices, datamodule.mean, datamodule.std)


def _pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
