"""Stanford Cars (Krause et al., 3dRR workshop at ICCV 2013) in its official layouts.

    ROOT/cars_train/*.jpg                     8,144 images for training, of 196 classes
    ROOT/cars_test/*.jpg                      8,041 for the test
    ROOT/devkit/cars_meta.mat                 names of the classes
    ROOT/devkit/cars_train_annos.mat          classes and boxes
    ROOT/cars_test_annos_withlabels.mat       the same of the test images, a download of its own; or in devkit/

or, if there is a folder `car_ims`, the layout with all images in it:

    ROOT/car_ims/*.jpg
    ROOT/cars_annos.mat                       names of the classes; classes and boxes; which images are for the test

Copies from Kaggle have ROOT/cars_train/cars_train, ROOT/cars_test/cars_test and ROOT/car_devkit/devkit.

There is no held-out split, so thresholds and checkpoints are chosen on the test split.

In the files, coordinates count from 1 as in MATLAB, with both corners inside. A box around a whole image is 1, 1,
width, height. Here they count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsolkit.data.files import check_images, read_matlab
from wsolkit.data.layout import Layout, find_layout
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_classes,
    check_count,
    file_records,
    missing_numbers,
    no_held_out,
    read_sizes,
    say_cut_boxes,
)
from wsolkit.errors import DataError

_NAME = "Stanford Cars"
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def cars_records(split: Split, root: str, num_classes: int | None, expected: Mapping[str, int] | None) -> FileRecords:
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
        f"cars_train/, cars_test/ and devkit/, or car_ims/ and cars_annos.mat of {_NAME}",
        ["car_ims", "devkit/cars_meta.mat", "car_devkit/devkit/cars_meta.mat", "cars_train", "cars_test"],
        [""],
    )
    together = layout.base / "cars_annos.mat"
    if (layout.base / "car_ims").is_dir():
        path, names_in, file = together, together, "relative_im_path"
    else:
        names_in, file = layout.find(*_in_kit("cars_meta.mat")), "fname"
        path = layout.find(*_in_kit("cars_train_annos.mat")) if split == "train" else _test_annotations(layout)
    classes = [str(name) for name in np.atleast_1d(read_matlab(names_in, _NAME, ["class_names"])["class_names"])]
    check_classes(len(classes), num_classes, names_in)

    table = np.atleast_1d(read_matlab(path, _NAME, ["annotations"])["annotations"])
    everything = [str(name) for name in _column(path, table, file)]
    if path == together:
        table = table[_whole(path, table, "test") == (split == "test")]
    ids = [str(name) for name in _column(path, table, file)]
    check_count(split, len(ids), expected, _NAME, lambda: _missing(everything, expected, split, path == together))
    folder = layout.base
    if path != together:
        folder = layout.find(f"cars_{split}", f"cars_{split}/cars_{split}", holds="".join(ids[:1]))
    check_images(folder, ids, [str(path)] * len(ids))
    labels: list[int] = (_whole(path, table, "class") - 1).tolist()
    for name, label in zip(ids, labels, strict=True):
        if not 0 <= label < len(classes):
            raise DataError(f"'{path}' gives '{name}' the class {label + 1}, of 1 to {len(classes)}")
    if split == "train":
        return file_records(folder, ids, labels, classes, {}, None)
    sizes = read_sizes(folder, ids)
    corners = np.stack([_whole(path, table, key) for key in _CORNERS], axis=1) - 1
    boxes = {}
    for name, box, size in zip(ids, corners.tolist(), sizes.tolist(), strict=True):
        check_boxes(f"'{path}', '{name}'", box, size)
        boxes[name] = [box]
    return say_cut_boxes(file_records(folder, ids, labels, classes, boxes, sizes), split, _NAME)


def _in_kit(file: str) -> tuple[str, str]:
    return f"devkit/{file}", f"car_devkit/devkit/{file}"


def _test_annotations(layout: Layout) -> Path:
    name = "cars_test_annos_withlabels.mat"
    path = layout.find(name, *_in_kit(name))
    if not path.is_file():
        raise DataError(
            f"'{path}' does not exist: it has the classes of the test images, which cars_test_annos.mat leaves out"
        )
    return path


def _missing(names: Sequence[str], expected: Mapping[str, int] | None, split: Split, together: bool) -> str:
    """Say which numbers are missing. They count within the split, or over both if the images lie in one folder."""
    counts = expected or {}
    return missing_numbers(names, sum(counts.values()) if together else counts.get(split, 0))


def _column(path: Path, table: npt.NDArray[Any], key: str) -> npt.NDArray[Any]:
    if key not in (table.dtype.names or ()):
        raise DataError(f"'{path}': the variable 'annotations' has no field '{key}'; it is another file")
    column: npt.NDArray[Any] = table[key]
    return column


def _whole(path: Path, table: npt.NDArray[Any], key: str) -> npt.NDArray[np.int64]:
    """Return a column of whole numbers."""
    column = _column(path, table, key)
    try:
        return column.astype(np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"'{path}': the field '{key}' of 'annotations' should hold numbers ({error})") from error
