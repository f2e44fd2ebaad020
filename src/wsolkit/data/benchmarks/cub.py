"""CUB-200-2011 (Wah et al., 2011) in its official layout, with CUBV2 (Choe et al., CVPR 2020) as held-out split.

    ROOT/images/<class>/*.jpg         11,788 images of 200 classes
    ROOT/images.txt                   id path
    ROOT/train_test_split.txt         id is_training_image           5,994 for training, 5,794 for the test
    ROOT/image_class_labels.txt       id class_id                    counted from 1
    ROOT/classes.txt                  class_id class_name
    ROOT/bounding_boxes.txt           id x y width height
    ROOT/segmentations/<class>/*.png  masks, a download of their own; the folder is a setting
    ROOT/CUBV2/<class>/*.jpg          1,000 held-out images; the folder is a setting
    ROOT/metadata/val/*.txt           their lists: metadata/CUB/val of the WSOL benchmark's repository; a setting too

The text files may lie in a folder `CUB_200_2011` in ROOT with the masks beside that folder, as the archives unpack.

A box is x, y, min(x + width, image width - 1), min(y + height, image height - 1), without decimals, as in the lists of
the benchmark. Its far corner therefore lies one past the object's last pixel, but never past the last pixel of the
image. 36 test boxes end at an edge or beyond it, one of them by 32 pixels. SPA's protocol has x + width - 1, y + height
- 1 instead, also beyond the image. It starts from the box before clipping (`far_corner_shift`).

The grey levels of a mask say how many annotators marked a pixel. Code that evaluates masks on CUB (CALM, DA-WSOL, and
BAS by SAT's authors) counts every level above 0 as object.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wsolkit.data.benchmarks.listed import first_image, held_out_records
from wsolkit.data.files import check_images, numbers_of, read_by_id
from wsolkit.data.layout import Layout, find_layout
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_boxes,
    check_classes,
    check_count,
    file_records,
    missing_numbers,
    read_sizes,
    say_cut_boxes,
)
from wsolkit.errors import DataError

_NAME = "CUB-200-2011"


def cub_records(
    split: Split,
    root: str,
    masks: str | None,
    mask_threshold: int,
    held_out_root: str,
    held_out_lists: str,
    num_classes: int | None,
    expected: Mapping[str, int] | None,
) -> FileRecords:
    """Read one split. "val" is CUBV2.

    Args:
        split: the split.
        root: the folder of the data set, see `find_layout`.
        masks: the folder of the masks, see `Layout.find`. None evaluates boxes alone.
        mask_threshold: a pixel belongs to the object if its grey level is higher.
        held_out_root: the folder of CUBV2's images.
        held_out_lists: the folder of CUBV2's lists.
        num_classes: the expected number of classes.
        expected: the expected numbers of images, see `check_count`.

    Raises:
        DataError: a file is missing, or a line of it is wrong. The message names both.
    """
    layout = find_layout(
        root,
        _NAME,
        f"images/, images.txt, bounding_boxes.txt and the other files of {_NAME}",
        ["images.txt"],
        ["", "CUB_200_2011"],
    )
    base = layout.base
    class_lines = read_by_id(base / "classes.txt", _NAME)
    classes = [name for _, name in class_lines.values()]
    check_classes(
        len(classes), num_classes, base / "classes.txt", lambda: missing_numbers(class_lines, num_classes or 0)
    )
    if split == "val":
        lists = layout.find(layout.setting(held_out_lists), "metadata/CUB/val", holds="image_ids.txt")
        folder = layout.setting(held_out_root)
        images_in = layout.find(folder, f"{folder}/CUBV2", holds=first_image(lists), around=True)
        return held_out_records("CUBV2", lists, images_in, classes, expected)

    images = read_by_id(base / "images.txt", _NAME)
    training = _column(base / "train_test_split.txt", images)
    numbers = [number for number in images if (training[number][1] == "1") == (split == "train")]
    check_count(split, len(numbers), expected, _NAME, lambda: _missing(images, expected))
    ids = [images[number][1] for number in numbers]
    check_images(base / "images", ids, [images[number][0] for number in numbers])
    label_of = {number: label for label, number in enumerate(class_lines)}
    labels = []
    given = _column(base / "image_class_labels.txt", images)
    for where, class_id in (given[number] for number in numbers):
        if class_id not in label_of:
            raise DataError(f"{where}: there is no class {class_id} in classes.txt")
        labels.append(label_of[class_id])
    if split == "train":
        return file_records(base / "images", ids, labels, classes, {}, None)

    sizes = read_sizes(base / "images", ids)
    lines = _column(base / "bounding_boxes.txt", images)
    boxes = {}
    for number, name, size in zip(numbers, ids, sizes.tolist(), strict=True):
        where, text = lines[number]
        x, y, width, height = numbers_of(where, text.split(), 4)
        if width <= 0 or height <= 0:
            raise DataError(f"{where}: '{text}' is a box of {width:g}×{height:g} pixels, expected more than 0")
        box = [int(x), int(y), int(x + width), int(y + height)]
        check_boxes(where, box, size)
        boxes[name] = [box]
    found = None if masks is None else _masks(layout, masks, mask_threshold, ids)
    return say_cut_boxes(file_records(base / "images", ids, labels, classes, boxes, sizes, found), split, _NAME)


def _missing(images: Mapping[str, object], expected: Mapping[str, int] | None) -> str:
    """Say which numbers are missing. They count over both splits."""
    return missing_numbers(images, sum((expected or {}).get(split, 0) for split in ("train", "test")))


def _masks(layout: Layout, folder: str, threshold: int, ids: list[str]) -> MaskFiles:
    files = [str(Path(name).with_suffix(".png")) for name in ids]
    root = layout.find(folder, f"{folder}/{Path(folder).name}", holds="".join(files[:1]), around=True)
    if not root.is_dir():
        raise DataError(
            f"there is no folder '{root}' with the masks of {_NAME}: unpack segmentations.tgz there, or set "
            "dataset.masks=null to evaluate boxes alone"
        )
    for name in files:
        if not (root / name).is_file():
            raise DataError(f"mask '{root / name}' does not exist: every test image of {_NAME} has one")
    return MaskFiles(root, [[name] for name in files], None, threshold)


def _column(path: Path, images: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Read lines of `id text`, one for each image."""
    found = read_by_id(path, _NAME)
    for number in images:
        if number not in found:
            raise DataError(f"'{path}' has no line for image {number} of images.txt")
    return found
