"""ILSVRC 2012 classification and localization in its official layout, with ImageNetV2 as held-out split.

    ROOT/train/<wnid>/*.JPEG     1,281,167 images of 1,000 classes
    ROOT/val/*.JPEG              50,000 images, in one folder or in one folder per class: the papers' test split
    ROOT/<box folder>/*.xml      their boxes, in the official XML; the folder is a setting
    ROOT/val2/<label>/*.jpeg     10,000 held-out images: the folder of ImageNetV2's Threshold0.7 (Recht et al., ICML
                                 2019), by this name or its own
    ROOT/metadata/val/*.txt      their lists: metadata/ILSVRC/val of the WSOL benchmark's repository (Choe et al., CVPR
                                 2020)
    ROOT/metadata/test/*.txt     its lists for val/, instead of the XML
    ROOT/<mask folder>/*.png     masks of some of the images in val/, named as they are; the folder is a setting

Copies from Kaggle have the images in ROOT/ILSVRC/Data/CLS-LOC and the XML in ROOT/ILSVRC/Annotations/CLS-LOC. Checkouts
of the benchmark's repository have them in ROOT/dataset/ILSVRC.

Labels are the positions of the wnids in alphabetical order, as in every pretrained ImageNet network, in ImageNetV2 and
in the benchmark's lists. If `train/` does not have the 1,000 classes, the lists count either its classes or the 1,000,
see `_labels`.

ImageNetV2's publishers have renamed its images, from `0/0.jpeg` to `0/a31041fd….jpeg`. The benchmark's lists have the
old names. Those of an unmerged pull request (e9972606) have the new ones, and come with a file `mapping.txt`, which the
benchmark's authors made by comparing the images. With it, either lists fit either copy.

The masks that papers on localization use come from the LID challenge (CVPR 2020 workshops, track 3), which published
23,151. Images without a mask count for boxes alone. A pixel belongs to the object if its grey level is above 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from wsolkit.data.benchmarks.listed import first_image, held_out_records, read_fields, read_lists
from wsolkit.data.files import (
    IMAGE_SUFFIXES,
    list_folders,
    list_images,
    note_source,
    read_annotation,
    read_lines,
    say_left_out,
)
from wsolkit.data.layout import Layout, find_layout
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_count,
    check_folders,
    file_records,
    mending,
    missing_numbers,
    named,
    say_cut_boxes,
)
from wsolkit.errors import DataError

_NAME = "ILSVRC 2012"
_CLASSES = Path(__file__).with_name("imagenet_classes.txt")

# The LID challenge has the masks of these two turned by 90 degrees against the images as they are read.
_TURNED = {"ILSVRC2012_val_00017615", "ILSVRC2012_val_00018903"}

_FEWEST = 732  # No class has fewer training images.
_V2 = "val2"
# The archive's folder today, and in the past.
_V2_ARCHIVE = ("imagenetv2-threshold0.7-format-val", "imagenetv2-threshold0.7")


def imagenet_records(
    split: Split,
    root: str,
    box_folders: Sequence[str],
    lists: str,
    masks: str | None,
    num_classes: int,
    expected: Mapping[str, int] | None,
) -> FileRecords:
    """Read one split. "val" is ImageNetV2, and "test" are the official validation images.

    Args:
        split: the split.
        root: the folder of the data set, see `find_layout`.
        box_folders: where the XML files may be, see `Layout.find`. The first folder that has some counts.
        lists: the folder of the benchmark's lists. Those of the test split are read if there are no XML files.
        masks: the folder of masks of the test split, see `Layout.find`. None evaluates boxes alone.
        num_classes: the expected number of folders in `train/`.
        expected: the expected numbers of images, see `check_count`.

    Raises:
        DataError: a folder is missing or empty, the number of classes or images differs, or an XML file is wrong.
    """
    layout = find_layout(root, _NAME, "train/<wnid>/*.JPEG and val/", ["train/n*"], ["", "Data/CLS-LOC", "ILSVRC"])
    base = layout.base
    wnids = list_folders(_folder(base, "train"))
    official = [line for _, line in read_lines(_CLASSES, _NAME)]
    _check_classes(wnids, official, num_classes, base / "train")
    if split == "val":
        return _held_out(layout, lists, wnids, official, expected)
    if split == "train":
        left_out: Counter[str] = Counter()
        names = [list_images(base / "train" / wnid, left_out) for wnid in wnids]
        say_left_out(base / "train", left_out)
        ids = [f"train/{wnid}/{name}" for wnid, found in zip(wnids, names, strict=True) for name in found]
        records = file_records(base, _not_empty(ids, base / "train"), _repeat(names), wnids, {}, None)
        few = [wnid for wnid, found in zip(wnids, names, strict=True) if len(found) < _FEWEST]
        check_count(split, len(ids), expected, _NAME, lambda: named("images of", few))
        return records
    records = _validation_images(layout, wnids, official, box_folders, lists)
    found = [records.name(index) for index in range(len(records.labels))]
    numbered = (expected or {}).get(split, 0)
    check_count(split, len(found), expected, _NAME, lambda: missing_numbers(found, numbered))
    if masks is not None:
        records = replace(records, masks=_masks(layout, masks, found))
    return say_cut_boxes(records, split, _NAME)


def _check_classes(wnids: Sequence[str], official: Sequence[str], num_classes: int, train: Path) -> None:
    """Check that the folders in `train/` are the classes, even if their number is right by chance."""
    strays = sorted(set(wnids) - set(official))
    missing = sorted(set(official) - set(wnids)) if num_classes == len(official) else []
    if len(wnids) == num_classes and len(missing) in (0, len(official)):
        return
    mend = f"{mending(len(wnids), num_classes)}{named('class', missing)}, or set dataset.num_classes={len(wnids)}"
    if 0 < len(strays) < len(wnids):
        mend = f"take out {', '.join(map(repr, strays[:5]))}, which is no class of {_NAME}{named('class', missing)}"
    raise DataError(f"'{train}' holds {len(wnids)} class folders, dataset.num_classes says {num_classes}: {mend}")


def _labels(records: FileRecords, wnids: Sequence[str], official: Sequence[str], lists: Path) -> FileRecords:
    """Convert the labels in lists to those of the classes in `train/`.

    A part of the data set does not have all 1,000 classes. Its lists then number either the classes that it has, and
    use each of these numbers, or they are the benchmark's and number the 1,000.

    Raises:
        DataError: they do neither.
    """
    given = records.labels.tolist()
    if set(given) != set(range(len(wnids))) and not set(official).isdisjoint(wnids):
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        for label in given:
            if label >= len(official) or official[label] not in label_of:
                what = f"'{official[label]}', which has no folder in train/" if label < len(official) else "no class"
                raise DataError(
                    f"'{lists}' gives an image the label {label}: of the {len(official):,} classes of {_NAME} that is "
                    f"{what}. Take its images off the lists, or number all {len(wnids)} folders of train/ from 0"
                )
        records = replace(records, labels=np.array([label_of[official[label]] for label in given], np.int64))
    records = replace(records, classes=wnids)
    check_folders(records, lists)
    return records


def _held_out(
    layout: Layout, lists: str, wnids: Sequence[str], official: Sequence[str], expected: Mapping[str, int] | None
) -> FileRecords:
    folder = layout.find(f"{layout.setting(lists)}/val", "metadata/ILSVRC/val", holds="image_ids.txt")
    images = layout.find(_V2, *_V2_ARCHIVE)
    rename = _names_of_v2(folder, images)
    classes = max(wnids, official, key=len)
    return _labels(
        held_out_records("ImageNetV2", folder, images.parent, classes, expected, rename), wnids, official, folder
    )


def _names_of_v2(lists: Path, images: Path) -> Callable[[str], str]:
    """Return a function from the name in a list, val2/<label>/<name>, to that of the image. See the file's head.

    Raises:
        DataError: the lists belong to another copy, and no file says how the names of both correspond.
    """

    def renamed(name: str) -> str:
        folder, _, below = name.partition("/")
        return f"{images.name}/{other.get(below, below)}" if folder == _V2 else name

    other: dict[str, str] = {}
    first = first_image(lists)
    if (images.parent / renamed(first)).is_file() or not images.is_dir():
        return renamed
    if (lists / "mapping.txt").is_file():
        for _, (old, new) in read_fields(lists / "mapping.txt", 2):
            other |= {old.strip(): new.strip(), new.strip(): old.strip()}
        return renamed
    there = next((name for label in list_folders(images) for name in list_images(images / label)), first)
    if Path(first).stem.isdigit() != Path(there).stem.isdigit():
        raise DataError(
            f"'{lists}' calls images as '{first}', '{images}' as '{there}': ImageNetV2's publishers have changed the "
            f"names, and '{lists / 'mapping.txt'}', which says which is which, does not exist. Put the files of "
            "metadata/ILSVRC/val at the commit e9972606 of github.com/clovaai/wsolevaluation there, as python -m "
            "wsolkit.prepare does"
        )
    return renamed


def _repeat(names: Sequence[Sequence[str]]) -> list[int]:
    return [label for label, found in enumerate(names) for _ in found]


def _validation_images(
    layout: Layout, wnids: list[str], official: Sequence[str], box_folders: Sequence[str], lists: str
) -> FileRecords:
    base = layout.base
    val = _folder(base, "val")
    ids = [f"val/{name}" for name in list_images(val)]
    ids += [f"val/{wnid}/{name}" for wnid in list_folders(val) for name in list_images(val / wnid)]
    place_of = {PurePosixPath(name).name: name for name in _not_empty(ids, val)}
    for name in ids:
        if place_of[PurePosixPath(name).name] != name:
            raise DataError(
                f"'{base / name}' is there twice, also as '{place_of[PurePosixPath(name).name]}': delete one"
            )
    xml = _xml_folder(layout, box_folders)
    folder = layout.find(f"{layout.setting(lists)}/test", "metadata/ILSVRC/test", holds="localization.txt")
    if xml is None and (folder / "localization.txt").is_file():

        def where(name: str) -> str:
            return place_of.get(PurePosixPath(name).name, name)

        return _labels(read_lists("test", folder, base, max(wnids, official, key=len), where), wnids, official, folder)
    if xml is None:
        raise DataError(
            f"no box annotations (*.xml) under '{base}': looked in {', '.join(box_folders)}. Unpack the official "
            "validation boxes there, set dataset.box_folders=[FOLDER], or put the WSOL benchmark's lists into "
            f"'{folder}'"
        )
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels, sizes, boxes = [], [], {}
    for name in ids:
        path = xml / f"{Path(name).stem}.xml"
        wnid, size, boxes[name] = read_annotation(path)
        if wnid not in label_of:
            raise DataError(f"'{path}' names class '{wnid}', which has no folder in train/")
        for box in boxes[name]:
            check_boxes(str(path), box, size)
        labels.append(label_of[wnid])
        sizes.append(size)
    records = file_records(base, ids, labels, wnids, boxes, np.array(sizes, np.int64))
    check_folders(records, xml)
    return records


def _masks(layout: Layout, folder: str, ids: Sequence[str]) -> MaskFiles:
    root = layout.find(folder)
    if not root.is_dir():
        raise DataError(f"dataset.masks: there is no folder '{root}'; it should hold the masks as *.png")
    there = set(list_images(root))
    files = [f"{Path(name).stem}.png" for name in ids]
    objects = [[file] if file in there and Path(file).stem not in _TURNED else [] for file in files]
    if not any(objects):
        raise DataError(f"'{root}' holds no mask of an image in val/: they are named as the images, such as {files[0]}")
    return MaskFiles(root, objects, None, 0)


def _xml_folder(layout: Layout, candidates: Sequence[str]) -> Path | None:
    for candidate in candidates:
        folder = layout.find(candidate, around=True)
        if folder.is_dir():
            note_source(folder)
            if any(folder.glob("[!.]*.xml")):
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
