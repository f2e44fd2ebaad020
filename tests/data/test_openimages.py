"""OpenImages30k as the benchmark publishes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.layouts import OPENIMAGES_BOXES, OPENIMAGES_CLASSES, write_openimages
from wsolkit.data.benchmarks.openimages import openimages_records
from wsolkit.errors import DataError

EXPECTED = {"train": 4, "val": 4, "test": 4}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_openimages(tmp_path / "OpenImages")


def test_masks_are_merged_and_ignored_regions_lie_beside_them(root: Path) -> None:
    test = openimages_records("test", str(root), 2, EXPECTED)
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert test.classes == list(OPENIMAGES_CLASSES)
    assert len(test.box_table) == 0
    expected = np.zeros((60, 80), np.uint8)
    expected[:, :40] = 255
    for x0, y0, x1, y1 in OPENIMAGES_BOXES:
        expected[2 * y0 : 2 * y1 + 2, 2 * x0 : 2 * x1 + 2] = 1
    assert np.array_equal(test.mask(0), expected)  # type: ignore[arg-type]
    assert np.unique(test.mask(1)).tolist() == [0, 1]  # type: ignore[arg-type]
    train = openimages_records("train", str(root), 2, EXPECTED)
    assert train.mask(0) is None
    assert train.image(0).shape == (30, 40, 3)
    assert openimages_records("val", str(root), 2, EXPECTED).name(0) == "val/01226z/32fdab44f6e415f00.jpg"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_7dab3050.png", "_gone.png", "localization.txt:1: mask '"),
        ("_ignore.png", "_gone.png", "localization.txt:1: mask '"),
        (
            "test/01226z/32fdab44f6e415f00.jpg,",
            "test/x.jpg,",
            "localization.txt:1: 'test/x.jpg' is not in image_ids.txt",
        ),
        (",test/01226z/32fdab44f6e415f00_m", "_m", "localization.txt:1: "),
        (
            "test/01226z/32fdab44f6e415f01.jpg,",
            "test/01226z/32fdab44f6e415f00.jpg,",
            "has no mask for 1 of 4 images, such as",
        ),
    ],
)
def test_broken_lines_are_named(root: Path, old: str, new: str, message: str) -> None:
    path = root / "metadata" / "test" / "localization.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        openimages_records("test", str(root), 2, EXPECTED)
    assert message in str(caught.value)


def test_number_of_images_is_that_of_the_publication(root: Path) -> None:
    with pytest.raises(DataError, match="the val split of OpenImages30k has 4 images here, 2500 as published"):
        openimages_records("val", str(root), 2, {"train": 29819, "val": 2500, "test": 5000})
    with pytest.raises(DataError, match="label 1 of .* is out of range: expected 0 to 0"):
        openimages_records("val", str(root), 1, None)


def test_lists_made_on_windows_in_a_copy_one_level_down(tmp_path: Path) -> None:
    expected = openimages_records("test", str(write_openimages(tmp_path / "plain")), 2, None)
    root = tmp_path / "copy"
    write_openimages(root / "OpenImages")
    (root / "OpenImages" / "metadata").rename(root / "metadata")
    for path in root.glob("metadata/*/*.txt"):
        path.write_text(path.read_text().replace("/", "\\"))
    found = openimages_records("test", str(root), 2, None)
    assert [found.name(index) for index in range(4)] == [expected.name(index) for index in range(4)]
    assert np.array_equal(found.mask(0), expected.mask(0))  # type: ignore[arg-type]
