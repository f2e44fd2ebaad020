"""Data sets described by the text files of the usual benchmark lists (Choe et al., CVPR 2020).

    ROOT/metadata/<split>/image_ids.txt       path of an image, relative to ROOT
                          class_labels.txt    path,label
                          image_sizes.txt     path,width,height        (not needed for training)
                          localization.txt    path,x0,y0,x1,y1         (not needed for training; several lines an image)

Labels count from 0. `ROOT/classes.txt` (name,label) names the classes, if it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from wsolkit.data.records import FileRecords, Split, check_boxes, file_records, require_folder
from wsolkit.errors import DataError

# Looking for each file costs about ten microseconds on a local disk, far more on a network's.
_MAX_FILES_TO_LOOK_FOR = 100_000


def listed_records(split: Split, root: str, splits: Mapping[str, str], num_classes: int | None) -> FileRecords:
    """Read one split.

    Args:
        split: which.
        root: folder of the data set.
        splits: name of the folder under `metadata/` for each split.
        num_classes: number of classes, or None: as many as `classes.txt` or the training labels have.

    Raises:
        DataError: a file is missing, or a line of it is wrong; the message names both.
    """
    base = require_folder(root, "metadata/<split>/image_ids.txt and the images")
    folder = base / "metadata" / splits[split]
    classes = _class_names(base, splits["train"], num_classes)
    ids = [fields[0] for _, fields in _read(folder / "image_ids.txt", 1)]
    if not ids:
        raise DataError(f"'{folder / 'image_ids.txt'}' is empty: the {split} split has no images")
    _check_ids(base, folder / "image_ids.txt", ids)
    labels = _labels(folder / "class_labels.txt", ids, len(classes))
    if split == "train":
        return file_records(base, ids, labels, classes, {}, None)
    known = set(ids)
    sizes = {name: size for _, name, size in _integers(folder / "image_sizes.txt", 2, known)}
    boxes: dict[str, list[list[int]]] = {}
    for where, name, box in _integers(folder / "localization.txt", 4, known):
        if name not in sizes:
            raise DataError(f"{where}: image_sizes.txt has no line for '{name}'")
        check_boxes(where, box, sizes[name])
        boxes.setdefault(name, []).append(box)
    without = [name for name in ids if name not in boxes]
    if without:
        raise DataError(
            f"'{folder / 'localization.txt'}' has no box for {len(without)} of {len(ids)} images, such as "
            f"'{without[0]}': every image that is evaluated needs one"
        )
    return file_records(base, ids, labels, classes, boxes, np.array([sizes[name] for name in ids], np.int64))


def _class_names(base: Path, train: str, num_classes: int | None) -> list[str]:
    path = base / "classes.txt"
    if path.is_file():
        names = {label: name for _, name, (label,) in _integers(path, 1, None)}
        if sorted(names) != list(range(len(names))):
            raise DataError(f"'{path}' must number its {len(names)} classes from 0 to {len(names) - 1}")
        classes = [names[label] for label in range(len(names))]
        if num_classes is not None and num_classes != len(classes):
            raise DataError(f"dataset.num_classes={num_classes}, but '{path}' names {len(classes)} classes")
        return classes
    if num_classes is None:
        lines = _integers(base / "metadata" / train / "class_labels.txt", 1, None)
        num_classes = 1 + max((label for _, _, (label,) in lines), default=-1)
    return [str(label) for label in range(num_classes)]


def _labels(path: Path, ids: list[str], num_classes: int) -> list[int]:
    labels: dict[str, int] = {}
    for where, name, (label,) in _integers(path, 1, set(ids)):
        if not 0 <= label < num_classes:
            raise DataError(f"{where}: label {label} of '{name}' is out of range: expected 0 to {num_classes - 1}")
        labels[name] = label
    missing = [name for name in ids if name not in labels]
    if missing:
        raise DataError(f"'{path}' has no label for {len(missing)} images, such as '{missing[0]}'")
    return [labels[name] for name in ids]


def _check_ids(base: Path, path: Path, ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for line, name in enumerate(ids, start=1):
        if name in seen:
            raise DataError(f"{path}:{line}: '{name}' is listed twice, first in line {seen[name]}")
        seen[name] = line
    if len(ids) <= _MAX_FILES_TO_LOOK_FOR:
        for line, name in enumerate(ids, start=1):
            if not (base / name).is_file():
                raise DataError(f"{path}:{line}: image '{base / name}' does not exist")


def _integers(path: Path, count: int, known: set[str] | None) -> Iterator[tuple[str, str, list[int]]]:
    """Lines of `path,int,…` as ("file:line", name, integers); the name may contain commas."""
    for where, fields in _read(path, count + 1):
        name, numbers = fields[0], fields[1:]
        if known is not None and name not in known:
            raise DataError(f"{where}: '{name}' is not in image_ids.txt")
        try:
            yield where, name, [int(number) for number in numbers]
        except ValueError as error:
            raise DataError(f"{where}: '{','.join(numbers)}' should be {count} whole numbers") from error


def _read(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: a listed data set needs it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not a text file in UTF-8 ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.strip().rsplit(",", count - 1)
        if len(fields) != count:
            raise DataError(f"{path}:{number}: '{line}' has {len(fields)} fields separated by commas, expected {count}")
        yield f"{path}:{number}", fields
