"""Read data sets that are described by the text files of the benchmark lists (Choe et al., CVPR 2020).

    ROOT/metadata/<split>/image_ids.txt       path of an image, relative to ROOT
                          class_labels.txt    path,label
                          image_sizes.txt     path,width,height        (not needed for training)
                          localization.txt    path,x0,y0,x1,y1         (not needed for training; several lines an image)

Labels count from 0. Every class has training images, unless `ROOT/classes.txt` (name,label) names it, or the number of
classes is given. A repeated line counts once. Two different lines for one image are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from wsolkit.data.files import as_written, check_images, read_lines, whole_number
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_count,
    check_folders,
    file_records,
    require_folder,
    say_cut_boxes,
)
from wsolkit.errors import DataError


def listed_records(split: Split, root: str, splits: Mapping[str, str], num_classes: int | None) -> FileRecords:
    """Read one split.

    Args:
        split: the split.
        root: the folder of the data set.
        splits: the name of the folder under `metadata/` for each split.
        num_classes: the number of classes, or None for as many as `classes.txt` or the training labels have.

    Raises:
        DataError: a file is missing, or a line of it is wrong. The message names both.
    """
    base = require_folder(root, "metadata/<split>/image_ids.txt and the images")
    folder = base / "metadata" / splits[split]
    classes = _class_names(base, splits["train"], num_classes)
    return say_cut_boxes(read_lists(split, folder, base, classes), split, f"'{base}'")


def held_out_records(
    name: str,
    lists: Path,
    root: Path,
    classes: Sequence[str],
    expected: Mapping[str, int] | None,
    rename: Callable[[str], str] = str,
) -> FileRecords:
    """Read the split "val" that the WSOL benchmark (Choe et al., CVPR 2020) publishes for another data set.

    Args:
        name: names the held-out images.
        lists: the folder of their four text files.
        root: the folder that the images' paths are relative to.
        classes: the names of the classes by label.
        expected: the published number of images, see `check_count`.
        rename: see `read_lists`.

    Raises:
        DataError: a file is missing, or a line of it is wrong, or there are more or fewer images, or the labels do not
            belong to `classes`.
    """
    if not lists.is_dir():
        raise DataError(
            f"there is no folder '{lists}': thresholds and checkpoints are chosen on {name}, whose lists the WSOL "
            "benchmark publishes as metadata/<data set>/val. Put them there, or choose on the test split itself with "
            "selection=test"
        )
    records = read_lists("val", lists, root, classes, rename)
    check_folders(records, lists)
    check_count("val", len(records.labels), expected, name)
    return say_cut_boxes(records, "val", name)


def first_image(folder: Path) -> str:
    """Return the first image in the lists of a folder, which helps to find the others, or "" if there are no lists."""
    path = folder / "image_ids.txt"
    lines = read_fields(path, 1) if path.is_file() else iter([])
    return next((name for _, (name,) in lines), "")


def read_lists(
    split: Split, folder: Path, root: Path, classes: Sequence[str], rename: Callable[[str], str] = str
) -> FileRecords:
    """Read the four text files of a split.

    Args:
        split: the split. For "train", two files are enough.
        folder: the folder of the files.
        root: the folder that the images' paths are relative to.
        classes: the names of the classes by label.
        rename: returns the path of a listed image, relative to `root`.

    Raises:
        DataError: a file is missing, or a line of it is wrong. The message names both.
    """
    ids, labels = read_labels(folder, root, len(classes), rename)
    if split == "train":
        return file_records(root, ids, labels, classes, {}, None)
    known = set(ids)
    sizes = _sizes(folder / "image_sizes.txt", known)
    boxes: dict[str, list[list[int]]] = {}
    for where, name, box in read_integers(folder / "localization.txt", 4, known):
        if name not in sizes:
            raise DataError(f"{where}: image_sizes.txt has no line for '{name}'")
        check_boxes(where, box, sizes[name])
        if box not in boxes.setdefault(name, []):
            boxes[name].append(box)
    without = [name for name in ids if name not in boxes]
    if without:
        raise DataError(
            f"'{folder / 'localization.txt'}' has no box for {len(without)} of {len(ids)} images, such as "
            f"'{without[0]}': every image that is evaluated needs one"
        )
    boxes = {rename(name): found for name, found in boxes.items()}
    widths_and_heights = np.array([sizes[name] for name in ids], np.int64)
    return file_records(root, list(map(rename, ids)), labels, classes, boxes, widths_and_heights)


def read_labels(
    folder: Path, root: Path, num_classes: int, rename: Callable[[str], str] = str
) -> tuple[list[str], list[int]]:
    """Return the paths and labels of the images in `image_ids.txt` and `class_labels.txt`.

    Raises:
        DataError: a file is missing, a line of it is wrong, or an image does not exist.
    """
    path = folder / "image_ids.txt"
    seen: dict[str, str] = {}
    for where, (written,) in read_fields(path, 1):
        name = as_written(root, written)
        if name in seen:
            line = seen[name].rpartition(":")[2]
            raise DataError(f"{where}: '{name}' is listed twice, first in line {line}")
        seen[name] = where
    if not seen:
        raise DataError(f"'{path}' is empty: the {folder.name} split has no images")
    ids = list(seen)
    check_images(root, list(map(rename, ids)), list(seen.values()))
    return ids, _labels(folder / "class_labels.txt", ids, num_classes)


def _class_names(base: Path, train: str, num_classes: int | None) -> list[str]:
    path = base / "classes.txt"
    if path.is_file():
        names: dict[int, str] = {}
        for where, name, (label,) in read_integers(path, 1, None):
            if names.setdefault(label, name) != name:
                raise DataError(f"{where}: class {label} is '{name}', but '{names[label]}' in a line before")
        if sorted(names) != list(range(len(names))):
            raise DataError(f"'{path}' must number its {len(names)} classes from 0 to {len(names) - 1}")
        classes = [names[label] for label in range(len(names))]
        if num_classes is not None and num_classes != len(classes):
            raise DataError(f"dataset.num_classes={num_classes}, but '{path}' names {len(classes)} classes")
        return classes
    path = base / "metadata" / train / "class_labels.txt"
    if num_classes is None or path.is_file():
        labels = {label for _, _, (label,) in read_integers(path, 1, None)}
        check_first_label(path, labels)
        if num_classes is None:
            num_classes = _count(path, labels)
    return [str(label) for label in range(num_classes)]


def check_first_label(path: Path, labels: Collection[int]) -> None:
    """Check that training labels begin at 0. Otherwise all labels would be off, and class 0 would have no images.

    Raises:
        DataError: they do not.
    """
    first = min(labels, default=0)
    if first > 0:
        raise DataError(
            f"the labels in '{path}' begin at {first}: expected 0 for the first class, in all splits alike. If class "
            "0 is meant to have no training images, name all classes in classes.txt"
        )


def _count(path: Path, labels: Collection[int]) -> int:
    """Return the number of classes that training labels from 0 have."""
    count = 1 + max(labels, default=-1)
    if sum(label >= 0 for label in labels) < count:
        without = next(label for label in range(count) if label not in labels)
        raise DataError(
            f"the labels in '{path}' go up to {count - 1}, and none is {without}: number the classes without gaps, or "
            "set dataset.num_classes if some are meant to have no training images"
        )
    return count


def _sizes(path: Path, known: Collection[str]) -> dict[str, list[int]]:
    sizes = {name: size for name, (_, size) in _one_each(path, 2, known).items()}
    for name, (width, height) in sizes.items():
        if width < 1 or height < 1:
            raise DataError(f"'{path}' gives '{name}' {width}×{height} pixels: expected width and height, above 0")
    return sizes


def _labels(path: Path, ids: list[str], num_classes: int) -> list[int]:
    lines = _one_each(path, 1, set(ids))
    lowest = min((label for _, (label,) in lines.values()), default=0)
    for name, (where, (label,)) in lines.items():
        if not 0 <= label < num_classes:
            shifted = f"; the labels begin at {lowest}, and should at 0" if lowest > 0 else ""
            raise DataError(
                f"{where}: label {label} of '{name}' is out of range: expected 0 to {num_classes - 1}{shifted}"
            )
    missing = [name for name in ids if name not in lines]
    if missing:
        raise DataError(f"'{path}' has no label for {len(missing)} images, such as '{missing[0]}'")
    return [lines[name][1][0] for name in ids]


def _one_each(path: Path, count: int, known: Collection[str]) -> dict[str, tuple[str, list[int]]]:
    """Read lines of `path,int,…` as path → ("file:line", integers). An image has one line, which may be repeated."""
    found: dict[str, tuple[str, list[int]]] = {}
    for where, name, numbers in read_integers(path, count, known):
        first, before = found.setdefault(name, (where, numbers))
        if before != numbers:
            raise DataError(
                f"{where}: '{name}' has {','.join(map(str, numbers))}, but {','.join(map(str, before))} in line "
                f"{first.rpartition(':')[2]}: keep one"
            )
    return found


def read_integers(path: Path, count: int, known: Collection[str] | None) -> Iterator[tuple[str, str, list[int]]]:
    """Yield lines of `path,int,…` as ("file:line", name, integers). The name may contain commas.

    Args:
        path: the file.
        count: the number of integers.
        known: the names that are allowed. None allows any.

    Raises:
        DataError: the file is missing, or a line of it is wrong.
    """
    for where, fields in read_fields(path, count + 1):
        name, numbers = fields[0], fields[1:]
        if known is not None and name not in known:
            name = name.replace("\\", "/")  # Windows writes it this way.
            if name not in known:
                raise DataError(f"{where}: '{name}' is not in image_ids.txt")
        try:
            yield where, name, [whole_number(number) for number in numbers]
        except ValueError as error:
            raise DataError(f"{where}: '{','.join(numbers)}' should be {count} whole numbers") from error


def read_fields(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    """Yield lines of `name,field,…` as ("file:line", fields). The name may contain commas.

    Raises:
        DataError: the file is missing, or a line has fewer than `count` fields.
    """
    for where, line in read_lines(path, "a listed data set"):
        fields = [field.strip() for field in line.rsplit(",", count - 1)]
        if len(fields) != count:
            raise DataError(f"{where}: '{line}' has {len(fields)} fields separated by commas, expected {count}")
        yield where, fields
