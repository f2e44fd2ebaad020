"""python -m wsolkit.pseudo_boxes output=DIR: draw a pseudo box in each training image, for method=psol.

DDT projects the feature maps of each class on their first principal component, see `wsolkit.methods.psol`. The network
is the backbone of a checkpoint, or a pretrained one. The output folder holds localization.txt and settings.json, and
dataset.train_boxes takes it. After an interruption, the same command continues with the next class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.errors import ConfigError
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.conf import as_named, given_overrides

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from wsolkit.data.datamodule import WSOLDataModule

_CLASSES = "classes"
"""The folder of the boxes of each class, from which the list is made."""


@dataclass
class Settings:
    """The settings of conf/pseudo_boxes.yaml."""

    output: str
    checkpoint: str | None
    image_size: int | None
    pool_after: str | None
    batch_size: int
    device: str
    progress: bool


def pseudo_boxes(cfg: DictConfig, folder: Path) -> None:
    """Write the pseudo boxes of the training images of `cfg.dataset` into a folder."""
    import numpy as np
    from omegaconf import OmegaConf
    from rich.progress import track

    from wsolkit.backbones.cnn import CNN
    from wsolkit.build import build_datamodule, build_model
    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.data.pseudo_boxes import LIST
    from wsolkit.localizer import device_of
    from wsolkit.settings.restore import restore
    from wsolkit.system.drafts import write_text
    from wsolkit.system.folders import filling
    from wsolkit.system.libraries import quieten_libraries
    from wsolkit.system.names import AS_IN_FILES

    if OmegaConf.is_missing(cfg, "output"):
        raise ConfigError("required and not given: output. Add output=DIR")
    checkpoint = None if cfg.checkpoint is None else read_checkpoint(cfg.checkpoint)
    if checkpoint is not None:
        cfg = restore(cfg, checkpoint, given_overrides())
    check_config(cfg, Settings)
    size = 2 * cfg.dataset.image_size if cfg.image_size is None else cfg.image_size
    for name, value in (("image_size", size), ("batch_size", cfg.batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}: expected 1 or more")
    quieten_libraries()
    datamodule = build_datamodule(cfg)
    datamodule.read("train")
    records = datamodule.dataset("train").records
    model = build_model(cfg, datamodule.class_names if checkpoint is None else checkpoint.class_names)
    if checkpoint is not None:
        checkpoint.load_into(model)
    backbone = model.network.backbone
    if not isinstance(backbone, CNN):
        raise ConfigError(f"backbone={cfg.backbone.name}: DDT needs a convolutional network, such as backbone=vgg16")
    if cfg.pool_after is not None:
        backbone.pool_after(cfg.pool_after)
    backbone = backbone.eval().to(device_of(cfg.device))
    labels = np.asarray(records.labels)
    made_with = {
        "command": "pseudo_boxes",
        "checkpoint": None if checkpoint is None else str(checkpoint.path.absolute()),
        "backbone": str(cfg.backbone.name),
        "weights": cfg.backbone.weights,
        "image_size": size,
        "pool_after": cfg.pool_after,
        "images": [records.name(0), records.name(len(labels) - 1), len(labels)],
    }
    with filling(folder, made_with) as complete:
        parts = folder / _CLASSES
        if not complete:
            parts.mkdir(exist_ok=True)
            todo = [label for label in np.unique(labels).tolist() if not (parts / f"{label}.txt").is_file()]
            found = boxes_of_classes(datamodule, backbone, todo, size, cfg.batch_size)
            for label, boxes in track(found, "Drawing boxes", len(todo), disable=not cfg.progress):
                lines = (f"{records.name(index)},{','.join(map(str, box))}\n" for index, box in boxes)
                write_text(parts / f"{label}.txt", "".join(lines))
            text = "".join(
                (parts / f"{label}.txt").read_text("utf-8", AS_IN_FILES) for label in np.unique(labels).tolist()
            )
            write_text(folder / LIST, text)
    print(f"{len(labels):,} training images have a box. Written to {as_named(folder / LIST)}")
    print(f"Train: python -m wsolkit.train method=psol dataset.train_boxes={as_named(folder)} …")


def boxes_of_classes(
    datamodule: WSOLDataModule, backbone: torch.nn.Module, classes: list[int], size: int, batch_size: int
) -> Iterator[tuple[int, list[tuple[int, list[int]]]]]:
    """Yield classes with the boxes of their training images: the position of each, and x0, y0, x1, y1 in its pixels.

    The feature maps of one class are in memory at a time.
    """
    import numpy as np
    import torch

    from wsolkit.methods.psol import projection, pseudo_box

    labels = np.asarray(datamodule.dataset("train").records.labels)
    device = next(backbone.parameters()).device
    for label in classes:
        places = np.flatnonzero(labels == label)
        features, sizes = [], []
        with torch.inference_mode():
            for batch in datamodule.whole_images(places.tolist(), size, batch_size):
                features.append(backbone(batch["image"].to(device)).float().cpu())
                sizes += batch["size"].tolist()
        projections = projection(torch.cat(features))
        boxes = [in_pixels(pseudo_box(one), *size) for one, size in zip(projections, sizes, strict=True)]
        yield label, list(zip(places.tolist(), boxes, strict=True))


def in_pixels(box: tuple[float, float, float, float], width: int, height: int) -> list[int]:
    """Turn a box in shares of an image into x0, y0, x1, y1 in its pixels, with both corners inside."""
    x, y, w, h = box
    x0, y0 = min(round(x * width), width - 1), min(round(y * height), height - 1)
    return [x0, y0, max(round((x + w) * width) - 1, x0), max(round((y + h) * height) - 1, y0)]


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint("pseudo_boxes", pseudo_boxes, stopped="the same command continues")


if __name__ == "__main__":
    main()
