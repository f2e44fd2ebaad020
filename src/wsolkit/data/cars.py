"""Stanford Cars (Krause et al., 3dRR workshop at ICCV 2013) in its official layouts.

    ROOT/cars_train/*.jpg                     8,144 images for training, of 196 classes
    ROOT/cars_test/*.jpg                      8,041 for the test
    ROOT/devkit/cars_meta.mat                 names of the classes
    ROOT/devkit/cars_train_annos.mat          classes and boxes
    ROOT/cars_test_annos_withlabels.mat       the same of the test images, a download of its own; or in devkit/

or, if there is a folder `car_ims`, the layout that has all images in it:

    ROOT/car_ims/*.jpg
    ROOT/cars_annos.mat                       names of the classes; classes and boxes; which images are for the test

There is no held-out split: thresholds and checkpoints are chosen on the test split.

Coordinates are MATLAB's, from 1, both corners inside: a box around a whole image is 1, 1, width, height. Here they are
counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsolkit.data.files import check_images, read_matlab
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_classes,
    check_count,
    clip_box,
    file_records,
    no_held_out,
    read_sizes,
    require_folder,
)
from wsolkit.errors import DataError

_NAME = "Stanford Cars"
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def cars_records(split: Split, root: str, num_classes: int | None, expected: Mapping[str, int] | None) -> FileRecords:
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
    base = require_folder(root, "cars_train/, cars_test/ and devkit/, or car_ims/ and cars_annos.mat of Stanford Cars")
    together = base / "cars_annos.mat"
    if (base / "car_ims").is_dir():
        path, names_in, folder, file = together, together, base, "relative_im_path"
    else:
        path = base / "devkit" / "cars_train_annos.mat" if split == "train" else _test_annotations(base)
        names_in, folder, file = base / "devkit" / "cars_meta.mat", base / f"cars_{split}", "fname"
    classes = [str(name) for name in np.atleast_1d(read_matlab(names_in, _NAME, ["class_names"])["class_names"])]
    check_classes(len(classes), num_classes, names_in)

    table = np.atleast_1d(read_matlab(path, _NAME, ["annotations"])["annotations"])
    if path == together:
        table = table[_whole(path, table, "test") == (split == "test")]
    check_count(split, len(table), expected, _NAME)
    ids = [str(name) for name in _column(path, table, file)]
    check_images(folder, ids, [str(path)] * len(ids))
    labels: list[int] = (_whole(path, table, "class") - 1).tolist()
    for name, label in zip(ids, labels, strict=True):
        if not 0 <= label < len(classes):
            raise DataError(f"'{path}' gives '{name}' the class {label + 1}, of 1 to {len(classes)}")
    if split == "train":
        return file_records(folder, ids, labels, classes, {}, None)
    sizes = read_sizes(folder, ids)
    corners = np.stack([_whole(path, table, key) for key in _CORNERS], axis=1) - 1
    boxes = {
        name: [clip_box(f"'{path}', '{name}'", box, size, 1)]
        for name, box, size in zip(ids, corners.tolist(), sizes.tolist(), strict=True)
    }
    return file_records(folder, ids, labels, classes, boxes, sizes)


def _test_annotations(base: Path) -> Path:
    places = [folder / "cars_test_annos_withlabels.mat" for folder in (base, base / "devkit")]
    for path in places:
        if path.is_file():
            return path
    raise DataError(
        f"'{places[0]}' does not exist: it has the classes of the test images, which cars_test_annos.mat leaves out"
    )


def _column(path: Path, table: npt.NDArray[Any], key: str) -> npt.NDArray[Any]:
    if key not in (table.dtype.names or ()):
        raise DataError(f"'{path}': the variable 'annotations' has no field '{key}'; it is another file")
    column: npt.NDArray[Any] = table[key]
    return column


def _whole(path: Path, table: npt.NDArray[Any], key: str) -> npt.NDArray[np.int64]:
    """A column of whole numbers."""
    column = _column(path, table, key)
    try:
        return column.astype(np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"'{path}': the field '{key}' of 'annotations' should hold numbers ({error})") from error
