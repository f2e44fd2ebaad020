"""CUB-200-2011 in its official layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.layouts import CUB_BOXES, CUB_CLASSES, write_cub
from wsolkit.data.benchmarks.cub import cub_records
from wsolkit.data.records import FileRecords, Split
from wsolkit.errors import DataError


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "CUB_200_2011")


def read(root: Path, split: Split, **changes: Any) -> FileRecords:
    settings: dict[str, Any] = {
        "masks": "segmentations",
        "mask_threshold": 0,
        "held_out_root": str(root / "CUBV2"),
        "held_out_lists": str(root / "metadata" / "val"),
        "num_classes": 2,
        "expected": {"train": 6, "val": 4, "test": 6},
    }
    return cub_records(split, str(root), **settings | changes)


SPLITS: tuple[Split, ...] = ("train", "val", "test")


def test_splits_labels_and_boxes(cub: Path) -> None:
    train, val, test = (read(cub, split) for split in SPLITS)
    assert train.classes == test.classes == val.classes == list(CUB_CLASSES)
    assert [records.labels.tolist() for records in (train, val, test)] == [
        [0] * 3 + [1] * 3,
        [0, 0, 1, 1],
        [0] * 3 + [1] * 3,
    ]
    assert train.name(0) == "001.Black_footed_Albatross/Black_footed_Albatross_0000_0.jpg"
    assert [len(train.boxes(index)) for index in range(6)] == [0] * 6
    # x, y, x + width, y + height: the far corner lies past the object's last pixel, but not past the image's.
    assert [test.boxes(index).tolist() for index in range(3)] == [
        [[x0, y0, min(x1 + 1, 39), min(y1 + 1, 29)]] for x0, y0, x1, y1 in CUB_BOXES
    ]
    assert [test.size(index) for index in range(6)] == [(40, 30)] * 6
    assert val.name(3) == "002.Laysan_Albatross/30107316120.jpg"
    assert val.boxes(1).tolist() == [[0, 0, 39, 29]]


def test_images_are_read_whatever_is_in_their_files(cub: Path) -> None:
    """Grey, CMYK, a PNG under the name of a JPEG, rotated by EXIF (not applied)."""
    for split in SPLITS:
        records = read(cub, split)
        for index in range(len(records.labels)):
            assert records.image(index).shape == (30, 40, 3)


def test_masks_are_what_any_annotator_marked(cub: Path) -> None:
    test = read(cub, "test")
    for index, (x0, y0, x1, y1) in enumerate(CUB_BOXES):
        expected = np.zeros((30, 40), np.uint8)
        expected[y0 : y1 + 1, x0 : x1 + 1] = 1
        assert np.array_equal(test.mask(index), expected)  # type: ignore[arg-type]
    assert read(cub, "train").mask(0) is read(cub, "val").mask(0) is None
    strict = read(cub, "test", mask_threshold=127)
    assert [int(strict.mask(index).sum() > 0) for index in range(3)] == [0, 1, 0]  # type: ignore[union-attr]
    assert read(cub, "test", masks=None).mask(0) is None


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "1 001.B", "1 003.B", "images.txt:1: image '"),
        ("images.txt", "2 001", "1 001", "images.txt:2: id 1 is listed twice, first in "),
        ("train_test_split.txt", "3 1\n", "", "train_test_split.txt' has no line for image 3 of images.txt"),
        ("train_test_split.txt", "3 1\n", "3\n", "train_test_split.txt:3: '3' should be an id and what belongs to it"),
        ("image_class_labels.txt", "3 1\n", "3 9\n", "image_class_labels.txt:3: there is no class 9 in classes.txt"),
        ("bounding_boxes.txt", "4 4.0", "4 four", "bounding_boxes.txt:4: 'four 3.0 17.0 15.0' should be 4 numbers"),
        ("bounding_boxes.txt", "4 4.0", "4 nan", "bounding_boxes.txt:4: 'nan 3.0 17.0 15.0' should be 4 numbers"),
        ("bounding_boxes.txt", "4 4.0", "4", "bounding_boxes.txt:4: '3.0 17.0 15.0' should be 4 numbers"),
        (
            "bounding_boxes.txt",
            "4 4.0",
            "4 40.0",
            "bounding_boxes.txt:4: box 40,3,57,18 does not lie in its image of 40×30",
        ),
        (
            "bounding_boxes.txt",
            "4 4.0 3.0 17.0 15.0",
            "4 4.0 3.0 -1.0 15.0",
            "bounding_boxes.txt:4: '4.0 3.0 -1.0 15.0' is a box of -1×15",
        ),
        (
            "bounding_boxes.txt",
            "4 4.0 3.0 17.0 15.0",
            "4 4.0 3.0 17.0 0.0",
            "bounding_boxes.txt:4: '4.0 3.0 17.0 0.0' is a box of 17×0",
        ),
        ("classes.txt", "2 002", "3 002", "there is no class 2 in classes.txt"),
        ("metadata/val/localization.txt", "0,0,39,29", "40,0,41,29", "localization.txt:2: box 40,0,41,29 does not"),
        ("metadata/val/image_ids.txt", "30107316118", "3010", "image_ids.txt:2: image '"),
    ],
)
def test_broken_lines_are_named(cub: Path, file: str, old: str, new: str, message: str) -> None:
    change(cub / file, old, new)
    with pytest.raises(DataError) as caught:
        for split in SPLITS:
            read(cub, split)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("classes.txt", r"classes.txt' does not exist: CUB-200-2011 needs it"),
        ("segmentations", r"unpack segmentations.tgz there, or set dataset.masks=null"),
        ("metadata", r"on CUBV2, whose lists the WSOL benchmark publishes .* selection=test"),
        ("segmentations/001.Black_footed_Albatross", r"mask '.*_0003_3.png' does not exist"),
    ],
)
def test_missing_files_are_named(cub: Path, missing: str, message: str) -> None:
    path = cub / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=message):
        for split in SPLITS:
            read(cub, split)


def test_numbers_that_differ_from_the_published_are_named(cub: Path) -> None:
    published = {"train": 5994, "val": 1000, "test": 5794}
    message = "the train split of CUB-200-2011 has 6 images here, 5994 as published: .* dataset.expected=null"
    with pytest.raises(DataError, match=message):
        read(cub, "train", expected=published)
    with pytest.raises(DataError, match="the val split of CUBV2 has 4 images here, 1000 as published"):
        read(cub, "val", expected=published)
    assert len(read(cub, "train", expected=None).labels) == 6
    with pytest.raises(DataError, match=r"names 2 classes, dataset.num_classes says 200: .* dataset.num_classes=2"):
        read(cub, "train", num_classes=200)
