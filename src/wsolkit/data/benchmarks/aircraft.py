"""FGVC-Aircraft (Maji et al., 2013), release 2013b, in its official layout.

    ROOT/data/images/*.jpg                                          10,000 images of 100 variants
    ROOT/data/variants.txt                                          their names
    ROOT/data/images_variant_{train,val,trainval,test}.txt          id variant; 3,334, 3,333, 6,667 and 3,333 images
    ROOT/data/images_box.txt                                        id xmin ymin xmax ymax

ROOT may also be the folder `data` itself, or contain a folder `fgvc-aircraft-2013b`, or the same folder in another of
this name, as in copies from Kaggle. A setting says which list is which split. Papers train on `trainval` and choose
thresholds on the test images. Here `val` is held out by default.

In the files, coordinates count from 1 with both corners inside, as the README of the data set says. Here they count
from 0. Some are 0 in the files even so, and boxes may reach into the banner. They are clipped at the edges of the
image.

At the bottom of each image, a banner of 20 pixels has a copyright notice, which the README asks to remove. It is cut
off the images, and the boxes refer to the remaining size. SAT's released code keeps it (`banner` 0).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wsolkit.data.files import check_images, numbers_of, read_by_id, read_lines
from wsolkit.data.layout import find_layout
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_classes,
    check_count,
    file_records,
    named,
    read_sizes,
    say_cut_boxes,
)
from wsolkit.errors import ConfigError, DataError

_NAME = "FGVC-Aircraft"


def aircraft_records(
    split: Split,
    root: str,
    splits: Mapping[str, str],
    banner: int,
    num_classes: int | None,
    expected: Mapping[str, int] | None,
) -> FileRecords:
    """Read one split.

    Args:
        split: the split.
        root: the folder of the data set, see `find_layout`.
        splits: the list of each split.
        banner: the height in pixels of what is cut off the bottom of the images.
        num_classes: the expected number of classes.
        expected: the expected number of images in each list, see `check_count`.

    Raises:
        ConfigError: the held-out images are among the training images.
        DataError: a file is missing, or a line of it is wrong. The message names both.
    """
    if split == "val" and splits["train"] == "trainval":
        raise ConfigError(
            f"dataset.splits.train=trainval: the images of '{splits['val']}' cannot be held out, since the network "
            "sees them in training. Choose on the test split with selection=test, as the papers do"
        )
    if banner < 0:
        raise ConfigError(f"dataset.banner={banner}: expected 0 or more pixels")
    base = find_layout(
        root,
        _NAME,
        f"data/images/, data/variants.txt and the other files of {_NAME}",
        ["variants.txt"],
        ["data", "", "fgvc-aircraft-2013b/data"],
    ).base
    path = base / f"images_variant_{splits[split]}.txt"
    images = read_by_id(path, _NAME)
    label_of = {name: label for label, (_, name) in enumerate(read_lines(base / "variants.txt", _NAME))}
    unknown = sorted({name for _, name in images.values()} - label_of.keys())
    check_classes(len(label_of), num_classes, base / "variants.txt", lambda: named("variant", unknown))
    check_count(splits[split], len(images), expected, _NAME)
    for where, name in images.values():
        if name not in label_of:
            raise DataError(f"{where}: there is no variant '{name}' in variants.txt")
    ids, labels = [f"{number}.jpg" for number in images], [label_of[name] for _, name in images.values()]
    check_images(base / "images", ids, [where for where, _ in images.values()])
    classes = list(label_of)
    if split == "train":
        return file_records(base / "images", ids, labels, classes, {}, None, banner=banner)

    lines = read_by_id(base / "images_box.txt", _NAME)
    sizes = read_sizes(base / "images", ids)
    boxes = {}
    for number, (width, height) in zip(images, sizes.tolist(), strict=True):
        if number not in lines:
            raise DataError(f"'{base / 'images_box.txt'}' has no line for image {number} of {path.name}")
        where, text = lines[number]
        box = [int(corner) - 1 for corner in numbers_of(where, text.split(), 4)]
        check_boxes(where, box, (width, height - banner))
        boxes[f"{number}.jpg"] = [box]
    sizes = sizes - np.array([0, banner])
    records = file_records(base / "images", ids, labels, classes, boxes, sizes, banner=banner)
    return say_cut_boxes(records, splits[split], _NAME)
