"""Read boxes and masks in COCO's JSON (Lin et al., ECCV 2014; https://cocodataset.org/#format-data).

    {"images": [{"id", "file_name", "width", "height"}, …],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "segmentation", "iscrowd"}, …],
     "categories": [{"id", "name"}, …]}

Boxes are edges in pixels from 0, rounded to whole pixels. A segmentation is a list of polygons [x, y, x, y, …] or a
run-length encoding {"size": [height, width], "counts"}, as numbers or compressed. Without "bbox", the box surrounds the
segmentation. All masks of an image form its object. Crowds ("iscrowd" 1) have no box, and the mask ignores them.

If a category has the name of a class, only the annotations of its own class count for an image. Otherwise all count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_masks

from wsolkit.data.files import read_json
from wsolkit.data.records import clip_box
from wsolkit.errors import DataError
from wsolkit.types import Mask

_SLACK = 1
"""Annotations may exceed the image by this many pixels, because of rounding."""
_MAX_SIDE = 100_000
_MAX_NUMBER = 1e9
_LONGEST_RUN = 40
"""The bits of a run length."""
_CROWD = dict.fromkeys(("none", "", "0", "0.0", "false"), False) | dict.fromkeys(("1", "1.0", "true"), True)


@dataclass(frozen=True)
class RunLengthMasks:
    """Masks of a split, kept in run-length encoding.

    Args:
        objects: for each image, the masks of its objects. Without any, the image has no mask.
        crowds: for each image, the masks of regions to ignore. An object takes precedence.
    """

    objects: Sequence[Sequence[Mapping[str, Any]]]
    crowds: Sequence[Sequence[Mapping[str, Any]]]

    def __call__(self, index: int) -> Mask | None:
        """Return the mask of an image [h, w]: 0, 1, or 255 to ignore."""
        if not self.objects[index]:
            return None
        mask: Mask = rle_masks.decode(rle_masks.merge(self.objects[index]))
        if self.crowds[index]:
            ignored = rle_masks.decode(rle_masks.merge(self.crowds[index]))
            mask[(ignored == 1) & (mask == 0)] = 255
        return np.ascontiguousarray(mask)


class Annotations(NamedTuple):
    """Annotations of some images: boxes by id; sizes [n, 2]; masks, or None if there are none."""

    boxes: dict[str, list[list[int]]]
    sizes: npt.NDArray[np.int64]
    masks: RunLengthMasks | None


def coco_annotations(
    path: Path, ids: Sequence[str], folder: str, classes: Sequence[str], needs_all: bool
) -> Annotations:
    """Read the annotations of images. The file may hold other images, too.

    Args:
        path: the JSON file.
        ids: the paths of the images, see `places`.
        folder: the folder of the split, see `places`.
        classes: the name of each image's class. Without any, the annotations of all classes count.
        needs_all: whether each image needs a box or a mask. If not, `sizes` is 0 for an image without one.

    Raises:
        DataError: the file is missing, has another format, or has nothing for an image that needs it.
    """
    content = _read(path)
    categories = {own: str(entry["name"]) for own, entry in _by_id(path, content, "categories", ("name",)).items()}
    by_class = not set(classes).isdisjoint(categories.values())
    images = _images(path, content, ids, folder)

    boxes: dict[str, list[list[int]]] = {}
    objects: list[list[Mapping[str, Any]]] = [[] for _ in ids]
    crowds: list[list[Mapping[str, Any]]] = [[] for _ in ids]
    sizes = np.zeros((len(ids), 2), np.int64)
    known: set[str] = set()
    needed = ("image_id", "category_id") if by_class else ("image_id",)
    for number, entry in enumerate(_list(path, content, "annotations", needed)):
        own = None if entry.get("id") is None else _id(path, "annotations", number, entry, "id")
        where = f"{path}: annotation {number if own is None else own}"
        if own is not None:
            if own in known:
                raise DataError(f"{where} is there twice: give each annotation an id of its own, or none")
            known.add(own)
        image_id = _id(path, "annotations", number, entry, "image_id")
        if image_id not in images:
            raise DataError(f"{where} is of image {image_id}, which is not among the images")
        category = None
        if by_class or (categories and entry.get("category_id") is not None):
            category_id = _id(path, "annotations", number, entry, "category_id")
            if category_id not in categories:
                raise DataError(f"{where} is of category {category_id}, which is not among the categories")
            category = categories[category_id]
        place, width, height = images[image_id]
        if place is None or (by_class and category != classes[place]):
            continue
        sizes[place] = width, height
        mask = _segmentation(where, entry.get("segmentation"), width, height)
        if _is_crowd(where, entry.get("iscrowd")):
            crowds[place] += [mask] if mask else []
            continue
        objects[place] += [mask] if mask else []
        boxes.setdefault(ids[place], []).append(_box(where, entry.get("bbox"), mask, width, height))
    without = [name for name in ids if name not in boxes]
    if without and needs_all:
        raise DataError(
            f"'{path}' has no box or mask for {len(without)} of {len(ids)} images, such as '{without[0]}': every image "
            f"that is evaluated needs one{' of its class' if by_class else ''}. A file_name in it is "
            f"{_example(content)}"
        )
    return Annotations(boxes, sizes, RunLengthMasks(objects, crowds) if any(objects) else None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"dataset.annotations: there is no file '{path}'") from error
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is not in COCO's format: expected an object with images and annotations")
    return content


def _list(path: Path, content: Mapping[str, Any], key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return a list of objects that have some keys."""
    entries = content.get(key)
    if entries is None and key == "categories":
        return []
    if not isinstance(entries, list):
        raise DataError(f"'{path}' is not in COCO's format: it has no list '{key}'")
    for number, entry in enumerate(entries):
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise DataError(f"{path}: entry {number} of '{key}' has no '{lacking[0]}'")
    return entries


def _by_id(path: Path, content: Mapping[str, Any], key: str, needed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a list of objects by id. Each has its own id and some other keys."""
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(_list(path, content, key, ("id", *needed))):
        own = _id(path, key, number, entry, "id")
        if own in found:
            raise DataError(
                f"{path}: two entries of '{key}' have the id {own}, {_short(found[own])} and {_short(entry)}: "
                "give each an id of its own"
            )
        found[own] = entry
    return found


def _id(path: Path, key: str, number: int, entry: Mapping[str, Any], name: str) -> str:
    """Return an id as text, so that 1, 1.0 and "1" are the same."""
    value = entry[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{path}: entry {number} of '{key}' has {_short(value)} for its '{name}'")
    return str(value).strip()


def _images(
    path: Path, content: Mapping[str, Any], ids: Sequence[str], folder: str
) -> dict[str, tuple[int | None, int, int]]:
    """Return the place in `ids`, or None, and the width and height of each image in a file, by id."""
    place_of = places(ids, folder)
    images: dict[str, tuple[int | None, int, int]] = {}
    id_of: dict[str, str] = {}  # file_name → id
    listed: dict[int, str] = {}  # place → file_name
    for own, image in _by_id(path, content, "images", ("file_name", "width", "height")).items():
        name, given = image["file_name"], [image[side] for side in ("width", "height")]
        width, height = (int(side) if side is not None and side.is_integer() else 0 for side in map(_number, given))
        if not isinstance(name, str):
            raise DataError(f"{path}: image {own} has {_short(name)} for its 'file_name'")
        if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
            raise DataError(f"{path}: image '{name}' is {'×'.join(map(_short, given))}: expected numbers of pixels")
        if name in id_of:
            raise DataError(f"{path}: '{name}' is the file_name of the images {id_of[name]} and {own}: list each once")
        id_of[name] = own
        place = next((place_of[form] for form in path_forms(name) if form in place_of), None)
        if place is not None and place in listed:
            raise DataError(
                f"{path}: '{listed[place]}' and '{name}' are both of '{ids[place]}': list each image "
                "once, by its path relative to dataset.root where names alone are ambiguous"
            )
        if place is not None:
            listed[place] = name
        images[own] = place, width, height
    return images


def path_forms(name: str) -> tuple[str, str]:
    """Return a path in POSIX's form, as it is and, if it comes from Windows, with its separators replaced."""
    return PurePosixPath(name).as_posix(), PurePosixPath(name.replace("\\", "/")).as_posix()


def places(ids: Sequence[str], folder: str) -> dict[str, int]:
    """Return the positions of images by each of their possible names in a file.

    These are an image's path, the path relative to a folder, and any end of its path that no other image has, such as
    its name without folders.

    Args:
        ids: the paths of the images.
        folder: the folder, relative to the base of the paths, or "" for none.
    """
    found = {name: place for place, name in enumerate(ids)}
    ends: dict[str, int | None] = {}
    for place, name in enumerate(ids):
        if folder:
            found.setdefault(name.removeprefix(f"{folder}/"), place)
        parts = name.split("/")
        for start in range(1, len(parts)):
            end = "/".join(parts[start:])
            ends[end] = None if end in ends else place
    for end, only in ends.items():
        if only is not None:
            found.setdefault(end, only)
    return found


def _example(content: Mapping[str, Any]) -> str:
    names = [str(image["file_name"]) for image in content["images"]]
    return f"'{names[0]}'" if names else "not to be found: it lists no images"


def _number(value: Any) -> float | None:
    """Return a number, which may be a text, or None if it is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
        return None
    return float(value)


def _numbers(where: str, values: Any, count: int | None) -> list[float]:
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    found = [number for number in numbers if number is not None]
    if not found or len(found) < len(numbers) or count not in (None, len(found)):
        raise DataError(f"{where}: {_short(values)} should be {count or 'a list of'} numbers")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _is_crowd(where: str, given: Any) -> bool:
    text = str(given).strip().lower()
    if text not in _CROWD:
        raise DataError(f"{where}: 'iscrowd' is {_short(given)}: expected 0 or 1")
    return _CROWD[text]


def _box(where: str, given: Any, mask: Mapping[str, Any] | None, width: int, height: int) -> list[int]:
    if given in (None, []) and mask is not None:
        given = rle_masks.toBbox(mask).tolist()
    x, y, w, h = _numbers(where, given, 4)
    left, top, right, bottom = round(x), round(y), round(x + w) - 1, round(y + h) - 1
    if w <= 0 or h <= 0:
        raise DataError(f"{where}: the box is {w:g}×{h:g} pixels: expected x, y, width, height, which are above 0")
    return clip_box(where, [left, top, max(left, right), max(top, bottom)], (width, height), _SLACK)


def _segmentation(where: str, given: Any, width: int, height: int) -> Mapping[str, Any] | None:
    """Return a mask of an image in run-length encoding, or None if there is none, or no pixel is marked."""
    if isinstance(given, list):
        given = [polygon for polygon in given if polygon != []]
    if not given:
        return None
    if isinstance(given, list):
        polygons = [_polygon(where, polygon, width, height) for polygon in given]
        encoded: Mapping[str, Any] = rle_masks.merge(rle_masks.frPyObjects(polygons, height, width))
    elif not isinstance(given, dict) or given.get("size") != [height, width]:
        raise DataError(
            f"{where}: {_short(given)} should be polygons, or a run-length encoding with the image's size "
            f"[{height}, {width}]"
        )
    else:
        counts = given.get("counts")
        lengths: Any = _run_lengths(counts) if isinstance(counts, str) else counts
        whole = isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)
        if not whole or sum(lengths) != height * width:  # The library would read on in the memory behind it.
            raise DataError(f"{where}: {_short(given)} is no run-length encoding of {height}×{width} pixels")
        encoded = rle_masks.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    return encoded if rle_masks.area(encoded) else None


def _run_lengths(compressed: str) -> list[int]:
    """Decode compressed run lengths: 5 bits a character, and after the third, differences to the last but one."""
    lengths: list[int] = []
    value = shift = 0
    for character in compressed:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > _LONGEST_RUN:
            return []
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def _polygon(where: str, given: Any, width: int, height: int) -> list[float]:
    numbers = _numbers(where, given, None)
    if len(numbers) < 6 or len(numbers) % 2:
        raise DataError(f"{where}: a polygon of {len(numbers)} numbers: expected x and y of three corners or more")
    low, high = -_SLACK, (width + _SLACK, height + _SLACK)
    if any(not low <= number <= high[place % 2] for place, number in enumerate(numbers)):
        raise DataError(f"{where}: a polygon does not lie in its image of {width}×{height} pixels")
    return numbers
