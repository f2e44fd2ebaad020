"""ILSVRC 2012 classification and localization in its official layout, with ImageNetV2 as held-out split.

    ROOT/train/<wnid>/*.JPEG     1,281,167 images of 1,000 classes
    ROOT/val/*.JPEG              50,000 images, in one folder or in one folder per class: the papers' test split
    ROOT/<box folder>/*.xml      their boxes, in the official XML; the folder is a setting
    ROOT/val2/<label>/*.jpeg     10,000 held-out images: the folder of ImageNetV2's Threshold0.7 (Recht et al., ICML
                                 2019), renamed
    ROOT/metadata/val/*.txt      their lists: metadata/ILSVRC/val of the WSOL benchmark's repository (Choe et al., CVPR
                                 2020)
    ROOT/metadata/test/*.txt     its lists for val/, instead of the XML
    ROOT/<mask folder>/*.png     masks of some of the images in val/, named as they are; the folder is a setting

Labels are the positions of the wnids in alphabetical order, as every pretrained ImageNet network, ImageNetV2 and the
benchmark's lists have them.

The masks that papers on localization use are those of the LID challenge (CVPR 2020 workshops, track 3): 23,151 public
ones. Images without one count for boxes alone. A pixel belongs to the object where its grey level is above 0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wsolkit.data.files import IMAGE_SUFFIXES, list_folders, list_images, read_annotation, say_left_out
from wsolkit.data.listed import held_out_records, read_lists
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import FileRecords, Split, check_boxes, check_count, file_records, require_folder
from wsolkit.errors import DataError

# The LID challenge has the masks of these two turned by a quarter, against the images as they are read.
_TURNED = {"ILSVRC2012_val_00017615", "ILSVRC2012_val_00018903"}


def imagenet_records(
    split: Split,
    root: str,
    box_folders: Sequence[str],
    lists: str,
    masks: str | None,
    num_classes: int,
    expected: Mapping[str, int] | None,
) -> FileRecords:
    """Read one split; "val" is ImageNetV2, "test" the official validation images.

    Args:
        split: which.
        root: folder of the data set.
        box_folders: where the XML files may be, relative to `root`; the first that has some is taken.
        lists: folder of the benchmark's lists; those of the test split are read if there are no XML files.
        masks: folder of masks of the test split, relative to `root`; None: boxes alone are evaluated.
        num_classes: expected number of folders in `train/`.
        expected: expected numbers of images, see `check_count`.

    Raises:
        DataError: a folder is missing or empty, the number of classes or images differs, or an XML file is wrong.
    """
    base = require_folder(root, "train/<wnid>/*.JPEG and val/")
    wnids = list_folders(_folder(base, "train"))
    if len(wnids) != num_classes:
        raise DataError(
            f"'{base / 'train'}' holds {len(wnids)} class folders, dataset.num_classes says {num_classes}: "
            f"unpack all classes, or set dataset.num_classes={len(wnids)}"
        )
    if split == "val":
        return held_out_records("ImageNetV2", Path(lists) / "val", base, wnids, expected)
    if split == "train":
        left_out: Counter[str] = Counter()
        names = [list_images(base / "train" / wnid, left_out) for wnid in wnids]
        say_left_out(base / "train", left_out)
        ids = [f"train/{wnid}/{name}" for wnid, found in zip(wnids, names, strict=True) for name in found]
        records = file_records(base, _not_empty(ids, base / "train"), _repeat(names), wnids, {}, None)
    else:
        records = _validation_images(base, wnids, box_folders, Path(lists) / "test", masks)
    check_count(split, len(records.labels), expected, "ILSVRC 2012")
    return records


def _repeat(names: Sequence[Sequence[str]]) -> list[int]:
    return [label for label, found in enumerate(names) for _ in found]


def _validation_images(
    base: Path, wnids: list[str], box_folders: Sequence[str], lists: Path, masks: str | None
) -> FileRecords:
    val = _folder(base, "val")
    ids = [f"val/{name}" for name in list_images(val)]
    ids += [f"val/{wnid}/{name}" for wnid in list_folders(val) for name in list_images(val / wnid)]
    _not_empty(ids, val)
    xml = _xml_folder(base, box_folders)
    if xml is None and (lists / "localization.txt").is_file():
        listed = read_lists("test", lists, base, wnids)
        return replace(listed, masks=_masks(base, masks, [listed.name(index) for index in range(len(listed.labels))]))
    if xml is None:
        raise DataError(
            f"no box annotations (*.xml) under '{base}': looked in {', '.join(box_folders)}. Unpack the official "
            "validation boxes there, set dataset.box_folders=[FOLDER], or put the WSOL benchmark's lists into "
            f"'{lists}'"
        )
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels, sizes, boxes = [], [], {}
    for name in ids:
        path = xml / f"{Path(name).stem}.xml"
        wnid, size, found = read_annotation(path)
        if wnid not in label_of:
            raise DataError(f"'{path}' names class '{wnid}', which has no folder in train/")
        for box in found:
            check_boxes(str(path), box, size)
        labels.append(label_of[wnid])
        sizes.append(size)
        boxes[name] = found
    return file_records(base, ids, labels, wnids, boxes, np.array(sizes, np.int64), _masks(base, masks, ids))


def _masks(base: Path, folder: str | None, ids: Sequence[str]) -> MaskFiles | None:
    if folder is None:
        return None
    if not (base / folder).is_dir():
        raise DataError(f"dataset.masks: there is no folder '{base / folder}'; it should hold the masks as *.png")
    there = set(list_images(base / folder))
    files = [f"{Path(name).stem}.png" for name in ids]
    objects = [[file] if file in there and Path(file).stem not in _TURNED else [] for file in files]
    if not any(objects):
        raise DataError(
            f"'{base / folder}' holds no mask of an image in val/: they are named as the images, such as {files[0]}"
        )
    return MaskFiles(base / folder, objects, None, 0)


def _xml_folder(base: Path, candidates: Sequence[str]) -> Path | None:
    for candidate in candidates:
        folder = base / candidate
        if folder.is_dir() and any(entry.name.endswith(".xml") for entry in os.scandir(folder)):
            return folder
    return None


def _folder(base: Path, name: str) -> Path:
    if not (base / name).is_dir():
        raise DataError(f"there is no folder '{base / name}': ILSVRC has train/<wnid>/ and val/ under dataset.root")
    return base / name


def _not_empty(ids: list[str], folder: Path) -> list[str]:
    if not ids:
        raise DataError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)}): the split is empty")
    return ids
