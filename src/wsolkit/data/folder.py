"""Images of one's own: a folder for each class.

    ROOT/train/<class>/…     images for training, at any depth
    ROOT/val/<class>/…       images to evaluate; also other names, and a third folder: the setting `splits`

or, without such a division, `splits` null, and a share of each class is evaluated instead of trained on:

    ROOT/<class>/…

Classes are the training folders' names; labels are their positions in alphabetical order. Training needs no boxes.
Where there are none, classification alone is evaluated; boxes and masks of the evaluated images come in COCO's JSON
(wsolkit/data/coco.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsolkit.data.coco import coco_annotations
from wsolkit.data.files import IMAGE_SUFFIXES, list_folders
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_classes,
    file_records,
    no_held_out,
    read_sizes,
    require_folder,
)
from wsolkit.errors import ConfigError, DataError
from wsolkit.seeding import derive_seed


def folder_records(
    split: Split,
    root: str,
    splits: Mapping[str, str] | None,
    test_fraction: float,
    annotations: str | Mapping[str, str] | None,
    num_classes: int | None,
) -> FileRecords:
    """Read one split.

    Args:
        split: which.
        root: folder of the data set.
        splits: name of the folder under `root` for each split; None: the classes' folders lie in `root` itself.
        test_fraction: without `splits`, the share of each class that is evaluated, drawn by the names of its images.
        annotations: COCO's JSON with boxes or masks of the images that are evaluated, relative to `root`; or one by
            split. None: there are none.
        num_classes: expected number of classes; None: any.

    Raises:
        ConfigError: a setting is wrong. DataError: a folder is missing or empty, or an annotation is wrong.
    """
    base = require_folder(root, "train/<class>/ and val/<class>/ with images")
    if splits is None:
        if split == "val":
            raise no_held_out("a folder without dataset.splits")
        train = name = ""
    else:
        train, name = splits["train"], splits[split]
    classes = _class_names(base, train)
    check_classes(len(classes), num_classes, base / train)
    ids, labels = _images(base, name, classes, needs_all=split == "train")
    if splits is None:
        chosen = _share(ids, labels, classes, test_fraction, split == "test")
        ids, labels = [ids[index] for index in chosen], [labels[index] for index in chosen]
    file = annotations.get(split) if isinstance(annotations, Mapping) else annotations
    if split == "train" or file is None:
        return file_records(base, ids, labels, classes, {}, None)
    path = base / file
    found = coco_annotations(path, ids, name, [classes[label] for label in labels])
    _check_sizes(base, ids, found.sizes, path)
    return file_records(base, ids, labels, classes, found.boxes, found.sizes, found.masks)


def _check_sizes(base: Path, ids: Sequence[str], annotated: npt.NDArray[np.int64], path: Path) -> None:
    """Check that images are annotated as they lie in their files, but for scale."""
    for name, (width, height), (w, h) in zip(ids, read_sizes(base, ids).tolist(), annotated.tolist(), strict=True):
        if abs(h * width - w * height) > h + w + height + width:
            raise DataError(
                f"'{base / name}' is {width}×{height} pixels, '{path}' says {w}×{h}. If the image was annotated as its "
                "EXIF data turns it: that is not applied here, so turn the pixels in the file"
            )


def _class_names(base: Path, train: str) -> list[str]:
    if not (base / train).is_dir():
        raise DataError(
            f"there is no folder '{base / train}': dataset=folder expects {train}/<class>/ under dataset.root. If the "
            "classes' folders lie in dataset.root itself, set dataset.splits=null"
        )
    classes = [name for name in list_folders(base / train) if not name.startswith(".")]
    if not classes:
        raise DataError(f"'{base / train}' holds no folders: expected one for each class, with its images")
    return classes


def _images(base: Path, name: str, classes: Sequence[str], needs_all: bool) -> tuple[list[str], list[int]]:
    """Paths of a split's images, relative to `base`, and their labels."""
    folder = base / name
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}', which dataset.splits names: expected a folder in it for each class, with "
            "the images to evaluate"
        )
    for found in list_folders(folder):
        if found not in classes and not found.startswith("."):
            raise DataError(f"'{folder / found}' is no class: there is no such folder among the training images")
    ids, labels = [], []
    for label, class_name in enumerate(classes):
        images = sorted(path for path in (folder / class_name).rglob("*") if _is_image(path))
        if not images and needs_all:
            raise DataError(f"'{folder / class_name}' holds no images ({', '.join(IMAGE_SUFFIXES)}) to train on")
        ids += [path.relative_to(base).as_posix() for path in images]
        labels += [label] * len(images)
    if not ids:
        raise DataError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)}) in its classes' folders")
    return ids, labels


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _share(
    ids: Sequence[str], labels: Sequence[int], classes: Sequence[str], fraction: float, evaluated: bool
) -> list[int]:
    """Positions of the images that are evaluated, a share of each class; or of the others.

    An image's rank in its class is drawn by its name: new images change little of who is evaluated.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"dataset.test_fraction={fraction}: expected a share of each class between 0 and 1")
    of_class: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        of_class[label].append(index)
    positions: list[int] = []
    for name, members in zip(classes, of_class, strict=True):
        if len(members) < 2:
            raise DataError(
                f"class '{name}' has one image: with dataset.splits=null each class needs two or more, one to train on "
                "and one to evaluate"
            )
        members.sort(key=lambda index: derive_seed(*ids[index].encode(errors="surrogateescape")))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        positions += members[:count] if evaluated else members[count:]
    return sorted(positions)
