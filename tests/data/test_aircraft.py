"""FGVC-Aircraft in its official layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.layouts import AIRCRAFT, BANNER, BOXES, write_aircraft
from wsolkit.data.benchmarks.aircraft import aircraft_records
from wsolkit.data.records import FileRecords, Split
from wsolkit.errors import ConfigError, DataError

OFFICIAL = {"train": "train", "val": "val", "test": "test"}
PAPERS = {"train": "trainval", "val": "val", "test": "test"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_aircraft(tmp_path / "fgvc-aircraft-2013b")


def read(root: Path, split: Split, **changes: Any) -> FileRecords:
    expected = {"train": 3, "val": 3, "trainval": 6, "test": 3}
    settings: dict[str, Any] = {"splits": OFFICIAL, "banner": BANNER, "num_classes": 3, "expected": expected}
    return aircraft_records(split, str(root), **settings | changes)


def test_splits_labels_and_boxes(root: Path) -> None:
    train, val, test = read(root, "train"), read(root, "val"), read(root / "data", "test")
    assert train.classes == val.classes == test.classes == list(AIRCRAFT)
    assert [records.labels.tolist() for records in (train, val, test)] == [[0, 1, 2]] * 3
    assert [records.name(1) for records in (train, val, test)] == ["1025804.jpg", "1025805.jpg", "1025806.jpg"]
    for records in (val, test):
        assert [records.boxes(index).tolist() for index in range(3)] == [[list(box)] for box in BOXES]
    assert len(train.boxes(0)) == 0


def test_papers_train_on_both_lists(root: Path) -> None:
    assert read(root, "train", splits=PAPERS).labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ConfigError, match=r"the images of 'val' cannot be held out, .* selection=test"):
        read(root, "val", splits=PAPERS)


def test_banner_is_cut_off(root: Path) -> None:
    test = read(root, "test")
    assert (test.image(1).shape, test.size(1)) == ((30, 40, 3), (40, 30))
    assert test.image(1).min() > 200  # the box of this image is all of it but the banner, which is black
    whole = read(root, "test", banner=0)
    assert (whole.image(1).shape, whole.size(1)) == ((50, 40, 3), (40, 50))
    assert whole.image(1)[30:].max() < 60
    assert whole.boxes(1).tolist() == test.boxes(1).tolist()


@pytest.mark.parametrize(
    ("given", "clipped"),
    [
        ("0 1 41 45", [0, 0, 39, 29]),  # from 0, past the edge by a pixel, into the banner
        ("40 30 40 30", [39, 29, 39, 29]),
        ("5 4 42 9", [4, 3, 39, 8]),
        ("5 4 621 18", [4, 3, 39, 17]),
    ],
)
def test_boxes_are_cut_off_at_the_image_s_edges(root: Path, given: str, clipped: list[int]) -> None:
    replace(root / "data" / "images_box.txt", "1025796 5 4 21 18", f"1025796 {given}")
    assert read(root, "test").boxes(0).tolist() == [clipped]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "images_box.txt",
            "1025796 5 4 21 18",
            "1025796 5 31 21 40",
            "box 4,30,20,39 does not lie in its image of 40×30",
        ),
        (
            "images_box.txt",
            "1025796 5 4 21 18",
            "1025796 41 4 621 18",
            "images_box.txt:3: box 40,3,620,17 does not lie",
        ),
        ("images_box.txt", "1025796 5 4 21 18", "1025796 5 4 x 18", "images_box.txt:3: '5 4 x 18' should be 4 numbers"),
        ("images_box.txt", "1025796 5 4 21 18\n", "", "images_box.txt' has no line for image 1025796 of"),
        ("images_box.txt", "1025795 ", "1025796 1", "images_box.txt:3: id 1025796 is listed twice"),
        ("images_variant_test.txt", "707-320", "707-321", "test.txt:1: there is no variant '707-321' in variants.txt"),
        ("images_variant_test.txt", "1025796", "1025797", "images_variant_test.txt:1: image '"),
        ("images_variant_test.txt", "1025796 707-320\n", "", "the test split of FGVC-Aircraft has 2 images here, 3 as"),
        ("variants.txt", "F/A-18\n", "", "variants.txt' names 2 classes, dataset.num_classes says 3"),
    ],
)
def test_broken_lines_are_named(root: Path, file: str, old: str, new: str, message: str) -> None:
    replace(root / "data" / file, old, new)
    with pytest.raises(DataError) as caught:
        read(root, "test")
    assert message in str(caught.value)


def test_missing_files_are_named(root: Path) -> None:
    (root / "data" / "images_box.txt").unlink()
    with pytest.raises(DataError, match="images_box.txt' does not exist: FGVC-Aircraft needs it"):
        read(root, "test")
    with pytest.raises(ConfigError, match="dataset.banner=-1: expected 0 or more pixels"):
        read(root, "test", banner=-1)
