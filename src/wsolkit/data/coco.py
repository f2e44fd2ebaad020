"""Boxes and masks in COCO's JSON (Lin et al., ECCV 2014; https://cocodataset.org/#format-data).

    {"images": [{"id", "file_name", "width", "height"}, …],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "segmentation", "iscrowd"}, …],
     "categories": [{"id", "name"}, …]}

Boxes are edges in pixels, from 0, rounded to whole pixels. A segmentation is a list of polygons [x, y, x, y, …] or a
run-length encoding {"size": [height, width], "counts"}, as numbers or compressed; without "bbox" the box is around it.
All masks of an image make its object. Crowds ("iscrowd" 1) have no box, and are ignored in the mask.

Where a category has the name of a class, an image's annotations are those of its own class; otherwise they all are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_masks

from wsolkit.data.records import clip_box
from wsolkit.errors import DataError
from wsolkit.types import Mask

_SLACK = 1
"""Pixels by which annotations may reach past the image: rounding."""
_MAX_SIDE = 100_000
_MAX_NUMBER = 1e9


@dataclass(frozen=True)
class RunLengthMasks:
    """Masks of a split, kept run-length encoded.

    Args:
        objects: for each image, the masks of its objects; none: the image has no mask.
        crowds: for each image, the masks of what to ignore; an object goes before.
    """

    objects: Sequence[Sequence[Mapping[str, Any]]]
    crowds: Sequence[Sequence[Mapping[str, Any]]]

    def __call__(self, index: int) -> Mask | None:
        """The mask of an image [h, w]: 0, 1, 255 to ignore."""
        if not self.objects[index]:
            return None
        mask: Mask = rle_masks.decode(rle_masks.merge(self.objects[index]))
        if self.crowds[index]:
            ignored = rle_masks.decode(rle_masks.merge(self.crowds[index]))
            mask[(ignored == 1) & (mask == 0)] = 255
        return np.ascontiguousarray(mask)


class Annotations(NamedTuple):
    """Of some images: boxes by id; sizes [n, 2]; masks, or None if there are none."""

    boxes: dict[str, list[list[int]]]
    sizes: npt.NDArray[np.int64]
    masks: RunLengthMasks | None


def coco_annotations(path: Path, ids: Sequence[str], folder: str, classes: Sequence[str]) -> Annotations:
    """Read the annotations of images; the file may hold those of other images too.

    Args:
        path: of the JSON file.
        ids: paths of the images, which all need a box or a mask. Its "file_name"s are these paths, or relative to
            `folder`, or names without folders where those are unique.
        folder: of the split, relative to what the paths are relative to; "" for none.
        classes: name of each image's class.

    Raises:
        DataError: the file is missing, is not in that format, or has nothing for an image.
    """
    content = _read(path)
    categories = {entry["id"]: str(entry["name"]) for entry in _list(path, content, "categories", ("id", "name"))}
    by_class = not set(classes).isdisjoint(categories.values())
    place_of = _places(ids, folder)
    images: dict[Any, tuple[int, int, int]] = {}  # id → place, width, height
    listed: dict[int, str] = {}  # place → file_name
    known = set()
    for image in _list(path, content, "images", ("id", "file_name", "width", "height")):
        known.add(image["id"])
        place = place_of.get(PurePosixPath(str(image["file_name"])).as_posix())
        if place is not None:
            width, height = image["width"], image["height"]
            if not all(isinstance(side, int) and 0 < side <= _MAX_SIDE for side in (width, height)):
                raise DataError(f"{path}: image '{image['file_name']}' is {width}×{height}: expected numbers of pixels")
            if place in listed:
                raise DataError(
                    f"{path}: '{listed[place]}' and '{image['file_name']}' are both of '{ids[place]}': list each image "
                    "once, by its path relative to dataset.root where names alone are ambiguous"
                )
            listed[place] = str(image["file_name"])
            images[image["id"]] = (place, width, height)

    needed = ("image_id", "category_id") if categories else ("image_id",)
    boxes: dict[str, list[list[int]]] = {}
    objects: list[list[Mapping[str, Any]]] = [[] for _ in ids]
    crowds: list[list[Mapping[str, Any]]] = [[] for _ in ids]
    sizes = np.zeros((len(ids), 2), np.int64)
    for number, entry in enumerate(_list(path, content, "annotations", needed)):
        where = f"{path}: annotation {entry.get('id', number)}"
        if entry["image_id"] not in known:
            raise DataError(f"{where} is of image {entry['image_id']}, which is not among the images")
        if entry["image_id"] not in images:
            continue
        place, width, height = images[entry["image_id"]]
        if by_class and categories.get(entry["category_id"]) != classes[place]:
            continue
        sizes[place] = width, height
        mask = _segmentation(where, entry.get("segmentation"), width, height)
        if entry.get("iscrowd"):
            crowds[place] += [mask] if mask else []
            continue
        objects[place] += [mask] if mask else []
        boxes.setdefault(ids[place], []).append(_box(where, entry.get("bbox"), mask, width, height))
    without = [name for name in ids if name not in boxes]
    if without:
        raise DataError(
            f"'{path}' has no box or mask for {len(without)} of {len(ids)} images, such as '{without[0]}': every image "
            f"that is evaluated needs one{' of its class' if by_class else ''}. A file_name in it is "
            f"{_example(content)}"
        )
    return Annotations(boxes, sizes, RunLengthMasks(objects, crowds) if any(objects) else None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"dataset.annotations: there is no file '{path}'") from error
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"'{path}' is not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is not in COCO's format: expected an object with images and annotations")
    return content


def _list(path: Path, content: Mapping[str, Any], key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects that have some keys."""
    entries = content.get(key, [] if key == "categories" else None)
    if not isinstance(entries, list):
        raise DataError(f"'{path}' is not in COCO's format: it has no list '{key}'")
    for number, entry in enumerate(entries):
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise DataError(f"{path}: entry {number} of '{key}' has no '{lacking[0]}'")
        for name in needed:
            if name.endswith("id") and not isinstance(entry[name], int | str):
                raise DataError(f"{path}: entry {number} of '{key}' has {entry[name]!r} for its '{name}'")
    return entries


def _places(ids: Sequence[str], folder: str) -> dict[str, int]:
    """Positions of images by each of the names they may go by."""
    places = {name: place for place, name in enumerate(ids)}
    bare: dict[str, list[int]] = {}
    for place, name in enumerate(ids):
        bare.setdefault(PurePosixPath(name).name, []).append(place)
        if folder:
            places.setdefault(name.removeprefix(f"{folder}/"), place)
    for name, found in bare.items():
        if len(found) == 1:
            places.setdefault(name, found[0])
    return places


def _example(content: Mapping[str, Any]) -> str:
    names = [str(image["file_name"]) for image in content["images"]]
    return f"'{names[0]}'" if names else "not to be found: it lists no images"


def _numbers(where: str, values: Any, count: int | None) -> list[float]:
    numbers = values if isinstance(values, list) else []
    if not numbers or not all(isinstance(value, int | float) and abs(value) < _MAX_NUMBER for value in numbers):
        numbers = []
    if not numbers or count not in (None, len(numbers)):
        raise DataError(f"{where}: {_short(values)} should be {count or 'a list of'} numbers")
    return [float(value) for value in numbers]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _box(where: str, box: Any, mask: Mapping[str, Any] | None, width: int, height: int) -> list[int]:
    if box is None and mask is not None:
        box = rle_masks.toBbox(mask).tolist()
    x, y, w, h = _numbers(where, box, 4)
    left, top, right, bottom = round(x), round(y), round(x + w) - 1, round(y + h) - 1
    if w < 0 or h < 0:
        raise DataError(f"{where}: the box is {w:g}×{h:g} pixels: expected x, y, width, height")
    return clip_box(where, [left, top, max(left, right), max(top, bottom)], (width, height), _SLACK)


def _segmentation(where: str, given: Any, width: int, height: int) -> Mapping[str, Any] | None:
    """A mask of an image, run-length encoded; None if there is none."""
    if not given:
        return None
    if isinstance(given, list):
        polygons = [_polygon(where, polygon, width, height) for polygon in given]
        encoded: Mapping[str, Any] = rle_masks.merge(rle_masks.frPyObjects(polygons, height, width))
        return encoded
    if not isinstance(given, dict) or given.get("size") != [height, width]:
        raise DataError(
            f"{where}: {_short(given)} should be polygons, or a run-length encoding with the image's size "
            f"[{height}, {width}]"
        )
    counts = given.get("counts")
    lengths: Any = _run_lengths(counts) if isinstance(counts, str) else counts
    whole = isinstance(lengths, list) and all(isinstance(length, int) and length >= 0 for length in lengths)
    if not whole or sum(lengths) != height * width:  # the library would go on with what lies behind in memory
        raise DataError(f"{where}: {_short(given)} is no run-length encoding of {height}×{width} pixels")
    encoded = rle_masks.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    return encoded


def _run_lengths(compressed: str) -> list[int]:
    """Run lengths of the compressed encoding: 5 bits a character; after the third, differences to the last but one."""
    lengths: list[int] = []
    value = shift = 0
    for character in compressed:
        code = ord(character) - 48
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
