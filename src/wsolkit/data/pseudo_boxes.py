"""Read pseudo boxes, which stand in for true ones: of held-out images to select by, of training images to learn.

They come in one of these files, or in a folder that holds the first or the second:

- `localization.txt`, a list of the form of the WSOL benchmark: lines `id,x0,y0,x1,y1` in pixels of the image, with both
  corners inside, and one or more lines for an image. Murtaza et al. (WACV 2025) publish such lists. If the images have
  other names than in the list, `mapping.txt` beside it (lines `name,other name`) says how they correspond, as it does
  beside the benchmark's lists of ImageNetV2.
- `pseudo_labels.json`, or another file in COCO's format.
- `predictions.csv`. It may hold the boxes of several classes of an image, and then those of the first one count.

`python -m wsolkit.pseudo_boxes` writes the first, and `python -m wsolkit.predict` the last two. These may hold other
images, too, whereas a list holds only images of the split.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning_utilities.core.rank_zero import rank_zero_warn

from wsolkit.data.benchmarks.listed import read_fields, read_integers
from wsolkit.data.coco import coco_annotations, path_forms, places
from wsolkit.data.files import read_text, whole_number
from wsolkit.data.records import (
    FileRecords,
    Records,
    Split,
    check_boxes,
    file_records,
    named,
    read_orientations,
    say_cut_boxes,
)
from wsolkit.data.subset import Subset
from wsolkit.errors import DataError

LIST, MAPPING, COCO = "localization.txt", "mapping.txt", "pseudo_labels.json"

_COLUMNS = ("file_name", "image_width", "image_height", "category_id", "x", "y", "width", "height")

_Boxes = dict[int, list[list[int]]]
"""The boxes of each image that has some, by its position in the split."""

_Sizes = npt.NDArray[np.int64] | None
"""The widths and heights [n, 2] of the images, or None if they are not known."""

_ANY_SIZE = (2**31, 2**31)


_IMAGES: Mapping[Split, str] = {"train": "training", "val": "held-out", "test": "test"}
_WITHOUT: Mapping[Split, str] = {"train": "nothing about boxes is learned from them"}


def pseudo_boxes(path: Path, records: Records, split: Split = "val", setting: str = "pseudo_boxes") -> FileRecords:
    """Read the pseudo boxes of a split. Say in one line how many of its images have none.

    Of training images, the sizes are not looked up, since there may be a million of them. Their boxes may exceed them.

    Args:
        path: the file or the folder.
        records: the images of the split.
        split: the split.
        setting: the setting of the data set that names the file.

    Returns:
        the same images in the same order, with the pseudo boxes for their boxes.

    Raises:
        DataError: the file is missing, a line of it is wrong, it names an unknown image, or it has no box for any.
    """
    file, images = _file(path, setting), _IMAGES[split]
    whole = records.whole if isinstance(records, Subset) else records
    ids, sizes = _names(whole), None if split == "train" else _sizes(whole)
    if file.suffix.lower() == ".json":
        found = _of_coco(file, ids, sizes)
    elif file.suffix.lower() == ".csv":
        found = _of_table(file, ids, sizes)
    else:
        found = _of_list(file, ids, sizes, images)
    boxes = {ids[place]: of_image for place, of_image in found.items()}
    own = _names(records)
    without = [name for name in own if name not in boxes]
    if len(without) == len(own):
        raise DataError(
            f"'{file}' has no box for any of the {len(own)} {images} images: expected their names, such as '{own[0]}'"
        )
    if without:
        rank_zero_warn(
            f"'{file}' has no box for {len(without):,} of {len(own):,} {images} images{named('image', without)}: "
            + _WITHOUT.get(split, "they do not take part in the selection")
        )
    if sizes is None:
        return file_records(Path(), own, records.labels.tolist(), records.classes, boxes, None)
    size_of = dict(zip(ids, sizes, strict=True))
    own_sizes = np.array([size_of[name] for name in own], np.int64)
    made = file_records(Path(), own, records.labels.tolist(), records.classes, boxes, own_sizes)
    return say_cut_boxes(made, split, f"'{file}'")


def _names(records: Records) -> list[str]:
    return [records.name(index) for index in range(len(records.labels))]


def _sizes(records: Records) -> npt.NDArray[np.int64]:
    """Return the widths and heights [n, 2] of images, from their files' headers if the records do not have them."""
    return np.array([_size(records, index) for index in range(len(records.labels))], np.int64)


def _size(records: Records, index: int) -> tuple[int, int]:
    known, source = records.size(index), records.source(index)
    if known is not None:
        return known
    if source is None:
        height, width = records.image(index).shape[:2]
        return width, height
    width, height, orientation = read_orientations(Path(), [str(source.path)])[0].tolist()
    if source.exif == "apply" and orientation >= 5:
        width, height = height, width
    return width, height - source.banner


def _file(path: Path, setting: str) -> Path:
    """Return the file to read.

    Raises:
        DataError: there is none.
    """
    candidates = [path / LIST, path / COCO] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    if path.is_dir():
        raise DataError(f"dataset.{setting}: the folder '{path}' holds neither {LIST} nor {COCO}")
    raise DataError(
        f"dataset.{setting}: there is no file or folder '{path}': expected {LIST}, or the output of wsolkit.predict"
    )


def _of_list(path: Path, ids: Sequence[str], sizes: _Sizes, images: str) -> _Boxes:
    place_of, other = places(ids, ""), _mapping(path.with_name(MAPPING))
    found: _Boxes = {}
    for where, name, box in read_integers(path, 4, None):
        forms = [form for one in path_forms(name) for form in (one, *_mapped(one, other))]
        place = next((place_of[form] for form in forms if form in place_of), None)
        if place is None:
            raise DataError(f"{where}: '{name}' is not among the {images} images, which have names such as '{ids[0]}'")
        _add(found, place, where, box, sizes)
    return found


def _mapping(path: Path) -> dict[str, str]:
    """Return the other name of each image in a file of names, in both directions, or {} if there is no such file."""
    if not path.is_file():
        return {}
    pairs = [(old, new) for _, (old, new) in read_fields(path, 2)]
    return dict(pairs) | {new: old for old, new in pairs}


def _mapped(name: str, other: Mapping[str, str]) -> list[str]:
    """Return further names of an image. A mapping of names leaves out their first folder, which may differ as well."""
    below = name.partition("/")[2]
    return [below, other.get(below, below)] if other else []


def _of_coco(path: Path, ids: Sequence[str], sizes: _Sizes) -> _Boxes:
    read = coco_annotations(path, ids, "", (), needs_all=False)
    for place, (name, said) in enumerate(zip(ids, read.sizes.tolist(), strict=True)):
        if name in read.boxes:
            _check_size(str(path), name, said, place, sizes)
    return {place: read.boxes[name] for place, name in enumerate(ids) if name in read.boxes}


def _of_table(path: Path, ids: Sequence[str], sizes: _Sizes) -> _Boxes:
    place_of, category_of = places(ids, ""), dict[int, str]()
    found: _Boxes = {}
    for where, row in _rows(path):
        place = next((place_of[form] for form in path_forms(row["file_name"]) if form in place_of), None)
        if place is None or category_of.setdefault(place, row["category_id"]) != row["category_id"] or not row["x"]:
            continue  # It is another image, another class, or a map without a box.
        try:
            width, height, x, y, w, h = (whole_number(row[key]) for key in (*_COLUMNS[1:3], *_COLUMNS[4:]))
        except ValueError as error:
            raise DataError(f"{where}: {error}: expected the table that wsolkit.predict writes") from error
        _check_size(where, ids[place], [width, height], place, sizes)
        _add(found, place, where, [x, y, x + w - 1, y + h - 1], sizes)
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the lines of a CSV file with the columns of predictions as ("file:line", fields by column)."""
    table = csv.DictReader(io.StringIO(read_text(path)))
    lacking = [name for name in _COLUMNS if name not in (table.fieldnames or ())]
    if lacking:
        raise DataError(f"'{path}' has no column '{lacking[0]}': expected the table that wsolkit.predict writes")
    for row in table:
        where = f"{path}:{table.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{where}: the line has another number of fields than the first line")
        yield where, row


def _check_size(where: str, name: str, said: Sequence[int], place: int, sizes: _Sizes) -> None:
    size = list(said) if sizes is None else sizes[place].tolist()
    if list(said) != size:
        raise DataError(
            f"{where}: '{name}' has {said[0]}×{said[1]} pixels there, but {size[0]}×{size[1]} in the data set: the "
            "boxes are of another image, or of one that was turned or resized"
        )


def _add(found: _Boxes, place: int, where: str, box: list[int], sizes: _Sizes) -> None:
    check_boxes(where, box, _ANY_SIZE if sizes is None else sizes[place])
    if box not in found.setdefault(place, []):
        found[place].append(box)
