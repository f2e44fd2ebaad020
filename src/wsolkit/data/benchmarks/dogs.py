"""Stanford Dogs (Khosla et al., FGVC workshop at CVPR 2011) in its official layout.

    ROOT/Images/<class>/*.jpg      20,580 images of 120 classes (images.tar)
    ROOT/Annotation/<class>/*      their boxes, in ImageNet's XML, without a suffix (annotation.tar)
    ROOT/train_list.mat            12,000 images for training (lists.tar)
    ROOT/test_list.mat             8,580 for the test

Copies from Kaggle have the first two as ROOT/images/Images and ROOT/annotations/Annotation, and no lists. The lists may
also be in ROOT/lists.

There is no held-out split, so thresholds and checkpoints are chosen on the test split.

Coordinates are ImageNet's and are read as they are, from 0, with both corners inside. Boxes are clipped at the edges of
the image. They refer to the image size in the XML file. An image may have several boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from wsolkit.data.files import check_images, read_annotation, read_matlab
from wsolkit.data.layout import find_layout
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_classes,
    check_count,
    file_records,
    no_held_out,
    say_cut_boxes,
)
from wsolkit.errors import DataError

_NAME = "Stanford Dogs"


def dogs_records(split: Split, root: str, num_classes: int | None, expected: Mapping[str, int] | None) -> FileRecords:
    """Read one split.

    Args:
        split: "train" or "test".
        root: the folder of the data set, see `find_layout`.
        num_classes: the expected number of classes.
        expected: the expected numbers of images, see `check_count`.

    Raises:
        DataError: a file is missing or wrong. The message names it.
    """
    if split == "val":
        raise no_held_out(_NAME)
    layout = find_layout(
        root,
        _NAME,
        f"Images/, Annotation/, train_list.mat and test_list.mat of {_NAME}",
        ["train_list.mat", "lists/train_list.mat", "Images/n*", "images/Images"],
        [""],
    )
    lists = layout.find("train_list.mat", "lists/train_list.mat").parent
    classes = _class_names(lists / "train_list.mat")
    check_classes(len(classes), num_classes, lists / "train_list.mat")
    path = lists / f"{split}_list.mat"
    names, labels = _read_list(path)
    check_count(split, len(names), expected, _NAME)
    for name, label in zip(names, labels, strict=True):
        if not 0 <= label < len(classes) or PurePosixPath(name).parent.name != classes[label]:
            raise DataError(
                f"'{path}' gives '{name}' the label {label + 1}, which is of another class in train_list.mat"
            )
    images = layout.find("Images", "images/Images", holds="".join(names[:1]))
    check_images(images, names, [str(path)] * len(names))
    if split == "train":
        return file_records(images, names, labels, classes, {}, None)
    stems = [str(Path(name).with_suffix("")) for name in names]
    annotations = layout.find("Annotation", "annotations/Annotation", holds="".join(stems[:1]))
    boxes, sizes = {}, []
    for name, stem in zip(names, stems, strict=True):
        xml = annotations / stem
        _, size, boxes[name] = read_annotation(xml)
        for box in boxes[name]:
            check_boxes(str(xml), box, size)
        sizes.append(size)
    return say_cut_boxes(file_records(images, names, labels, classes, boxes, np.array(sizes, np.int64)), split, _NAME)


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Return the paths of a list's images, and their labels from 0."""
    content = read_matlab(path, _NAME, ["file_list", "labels"])
    names, labels = (np.atleast_1d(content[key]) for key in ("file_list", "labels"))
    if len(names) != len(labels) or labels.dtype.kind not in "iuf":
        raise DataError(f"'{path}' has {len(names)} images and {len(labels)} labels: expected as many, in numbers")
    return [str(name) for name in names], [int(label) - 1 for label in labels]


def _class_names(path: Path) -> list[str]:
    """Return the names of the classes by label, which are the folders' names."""
    names, labels = _read_list(path)
    folders = {label: PurePosixPath(name).parent.name for name, label in zip(names, labels, strict=True)}
    if sorted(folders) != list(range(len(folders))):
        raise DataError(f"'{path}' must number its {len(folders)} classes from 1 to {len(folders)}")
    return [folders[label] for label in range(len(folders))]
