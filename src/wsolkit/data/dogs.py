"""Stanford Dogs (Khosla et al., FGVC workshop at CVPR 2011) in its official layout.

    ROOT/Images/<class>/*.jpg      20,580 images of 120 classes (images.tar)
    ROOT/Annotation/<class>/*      their boxes, in ImageNet's XML, without a suffix (annotation.tar)
    ROOT/train_list.mat            12,000 images for training (lists.tar)
    ROOT/test_list.mat             8,580 for the test

There is no held-out split: thresholds and checkpoints are chosen on the test split.

Coordinates are ImageNet's and are read as they are, from 0, both corners inside; what reaches past an image's edge is
cut off. They refer to the image's size in the XML. An image may have several boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from wsolkit.data.files import check_images, read_annotation, read_matlab
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_classes,
    check_count,
    clip_box,
    file_records,
    no_held_out,
    require_folder,
)
from wsolkit.errors import DataError

_NAME = "Stanford Dogs"


def dogs_records(split: Split, root: str, num_classes: int | None, expected: Mapping[str, int] | None) -> FileRecords:
    """Read one split.

    Args:
        split: "train" or "test".
        root: folder of the data set.
        num_classes: expected number of classes.
        expected: expected numbers of images, see `check_count`.

    Raises:
        DataError: a file is missing or wrong; the message names it.
    """
    if split == "val":
        raise no_held_out(_NAME)
    base = require_folder(root, "Images/, Annotation/, train_list.mat and test_list.mat of Stanford Dogs")
    classes = _class_names(base / "train_list.mat")
    check_classes(len(classes), num_classes, base / "train_list.mat")
    path = base / f"{split}_list.mat"
    names, labels = _read_list(path)
    check_count(split, len(names), expected, _NAME)
    for name, label in zip(names, labels, strict=True):
        if not 0 <= label < len(classes) or PurePosixPath(name).parent.name != classes[label]:
            raise DataError(
                f"'{path}' gives '{name}' the label {label + 1}, which is of another class in train_list.mat"
            )
    check_images(base / "Images", names, [str(path)] * len(names))
    if split == "train":
        return file_records(base / "Images", names, labels, classes, {}, None)
    boxes, sizes = {}, []
    for name in names:
        xml = base / "Annotation" / Path(name).with_suffix("")
        _, size, found = read_annotation(xml)
        boxes[name] = [clip_box(str(xml), box, size, None) for box in found]
        sizes.append(size)
    return file_records(base / "Images", names, labels, classes, boxes, np.array(sizes, np.int64))


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Paths of a list's images, and their labels from 0."""
    content = read_matlab(path, _NAME, ["file_list", "labels"])
    names, labels = (np.atleast_1d(content[key]) for key in ("file_list", "labels"))
    if len(names) != len(labels) or labels.dtype.kind not in "iuf":
        raise DataError(f"'{path}' has {len(names)} images and {len(labels)} labels: expected as many, in numbers")
    return [str(name) for name in names], [int(label) - 1 for label in labels]


def _class_names(path: Path) -> list[str]:
    """Names of the classes by label: the folders' names."""
    names, labels = _read_list(path)
    folders = {label: PurePosixPath(name).parent.name for name, label in zip(names, labels, strict=True)}
    if sorted(folders) != list(range(len(folders))):
        raise DataError(f"'{path}' must number its {len(folders)} classes from 1 to {len(folders)}")
    return [folders[label] for label in range(len(folders))]
