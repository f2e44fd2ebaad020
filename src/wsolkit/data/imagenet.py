"""ILSVRC 2012 classification and localization, in its official layout.

    ROOT/train/<wnid>/*.JPEG     1,281,167 images of 1,000 classes
    ROOT/val/*.JPEG              50,000 images, in one folder or in one folder per class
    ROOT/<box folder>/*.xml      their boxes, in the official XML; the folder is a setting

Labels are the positions of the wnids in alphabetical order, as every pretrained ImageNet network has them. Where
`ROOT/metadata` holds the lists of the usual WSOL benchmark, use `dataset=listed` instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from wsolkit.data.records import FileRecords, Split, check_boxes, file_records, require_folder
from wsolkit.errors import DataError

_SUFFIXES = (".jpeg", ".jpg", ".png")


def imagenet_records(split: Split, root: str, box_folders: Sequence[str], num_classes: int) -> FileRecords:
    """Read one split; "val" and "test" are both the official validation images.

    Args:
        split: which.
        root: folder of the data set.
        box_folders: where the XML files may be, relative to `root`; the first that has some is taken.
        num_classes: expected number of folders in `train/`.

    Raises:
        DataError: a folder is missing or empty, the number of classes differs, or an XML file is wrong.
    """
    base = require_folder(root, "train/<wnid>/*.JPEG and val/")
    wnids = sorted(entry.name for entry in os.scandir(_folder(base, "train")) if entry.is_dir())
    if len(wnids) != num_classes:
        raise DataError(
            f"'{base / 'train'}' holds {len(wnids)} class folders, dataset.num_classes says {num_classes}: "
            f"unpack all classes, or set dataset.num_classes={len(wnids)}"
        )
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    if split == "train":
        ids = [f"train/{wnid}/{name}" for wnid in wnids for name in _images(base / "train" / wnid)]
        labels = [label_of[name.split("/")[1]] for name in ids]
        return file_records(base, _not_empty(ids, base / "train"), labels, wnids, {}, None)

    val = _folder(base, "val")
    folders = sorted(entry.name for entry in os.scandir(val) if entry.is_dir())
    ids = [f"val/{name}" for name in _images(val)]
    ids += [f"val/{wnid}/{name}" for wnid in folders for name in _images(val / wnid)]
    _not_empty(ids, val)
    xml = _xml_folder(base, box_folders)
    labels, sizes, boxes = [], [], {}
    for name in ids:
        wnid, size, found = _read_xml(xml / f"{Path(name).stem}.xml")
        if wnid not in label_of:
            raise DataError(f"'{xml / Path(name).stem}.xml' names class '{wnid}', which has no folder in train/")
        labels.append(label_of[wnid])
        sizes.append(size)
        boxes[name] = found
    return file_records(base, ids, labels, wnids, boxes, np.array(sizes, np.int64))


def _read_xml(path: Path) -> tuple[str, tuple[int, int], list[list[int]]]:
    """Class, (width, height) and boxes x0, y0, x1, y1 of an official annotation file."""
    try:
        tree = ElementTree.parse(path)
        size = [int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
        objects = tree.findall("object")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[int(entry.findtext(f"bndbox/{corner}", "")) for corner in corners] for entry in objects]
        names = [entry.findtext("name", "") for entry in objects]
    except FileNotFoundError as error:
        raise DataError(f"there are no boxes for image '{path.stem}': '{path}' does not exist") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"'{path}' is not an annotation in the official XML ({error})") from error
    if not boxes:
        raise DataError(f"'{path}' holds no object: every validation image has at least one box")
    for box in boxes:
        check_boxes(str(path), box, size)
    return names[0], (size[0], size[1]), boxes


def _xml_folder(base: Path, candidates: Sequence[str]) -> Path:
    for candidate in candidates:
        folder = base / candidate
        if folder.is_dir() and any(entry.name.endswith(".xml") for entry in os.scandir(folder)):
            return folder
    raise DataError(
        f"no box annotations (*.xml) under '{base}': looked in {', '.join(candidates)}. Unpack the official "
        "validation boxes there, or set dataset.box_folders=[FOLDER]"
    )


def _folder(base: Path, name: str) -> Path:
    if not (base / name).is_dir():
        raise DataError(f"there is no folder '{base / name}': ILSVRC has train/<wnid>/ and val/ under dataset.root")
    return base / name


def _images(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(_SUFFIXES))


def _not_empty(ids: list[str], folder: Path) -> list[str]:
    if not ids:
        raise DataError(f"'{folder}' holds no images ({', '.join(_SUFFIXES)}): the split is empty")
    return ids
