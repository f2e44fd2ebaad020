"""Boxes that stand in for ground truth: the published list, and what predict writes, as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.layouts import write_lines
from wsolkit.data.benchmarks.folder import folder_records
from wsolkit.data.benchmarks.listed import listed_records
from wsolkit.data.pseudo_boxes import pseudo_boxes
from wsolkit.data.records import FileRecords, file_records
from wsolkit.data.subset import part_of
from wsolkit.errors import DataError
from wsolkit.interop.coco import Source, prediction_files
from wsolkit.localizer import Prediction

SPLITS = {"train": "train", "val": "val", "test": "val"}


@pytest.fixture
def val(listed: Path) -> FileRecords:
    """Five images of 40×30 pixels, whose names have a comma and a space."""
    return listed_records("val", str(listed), SPLITS, 2)


def write_predictions(folder: Path, boxes: dict[str, list[list[int]]], size: tuple[int, int] = (40, 30)) -> Path:
    """Write what `python -m wsolkit.predict` writes: for each image the boxes of the best class and of another one."""
    width, height = size

    def prediction(label: int, own: list[list[int]]) -> Prediction:
        regions = np.zeros((height, width), np.int32)
        for number, (x0, y0, x1, y1) in enumerate(own, start=1):
            regions[y0 : y1 + 1, x0 : x1 + 1] = number
        corners = np.array(own, np.int64).reshape(-1, 4)
        return Prediction("ab"[label], label, 0.5, corners, np.zeros((height, width), np.float32), regions, 0.3, None)

    sources = [Source(name, [], None) for name in boxes]
    with prediction_files(folder, ["a", "b"], {"exif": "apply"}) as files:
        found = [[prediction(0, own), prediction(1, [[0, 0, 1, 1]])] for own in boxes.values()]
        files.add(zip(sources, found, strict=True))
        files.write(sources, {})
    return folder


def test_published_list_gives_each_image_its_boxes_and_says_who_has_none(tmp_path: Path, val: FileRecords) -> None:
    lines = [f"{val.name(1)},3,4,20,25", f"{val.name(0)},0,0,5,5", f"{val.name(1)},3,4,20,25", f"{val.name(1)},1,1,2,2"]
    write_lines(tmp_path / "clip" / "localization.txt", lines)
    with pytest.warns(
        UserWarning, match=r"no box for 3 of 5 held-out images \(image val/image 2, x\.png, .* missing\)"
    ):
        found = pseudo_boxes(tmp_path / "clip", val)
    assert [len(found.boxes(index)) for index in range(5)] == [1, 2, 0, 0, 0]
    assert found.boxes(1).tolist() == [[3, 4, 20, 25], [1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val/other.png,0,0,5,5", r"boxes\.txt:2: 'val/other\.png' is not among the held-out images"),
        ("val/image 1, x.png,0,0,five,5", r"boxes\.txt:2: '0,0,five,5' should be 4 whole numbers"),
        ("0,0,5,5", r"boxes\.txt:2: '0,0,5,5' has 4 fields separated by commas, expected 5"),
        ("val/image 1, x.png,9,0,5,5", r"boxes\.txt:2: box 9,0,5,5 ends before it begins"),
        ("val/image 1, x.png,40,0,45,5", r"boxes\.txt:2: box 40,0,45,5 does not lie in its image of 40×30 pixels"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, val: FileRecords, line: str, message: str) -> None:
    write_lines(tmp_path / "boxes.txt", [f"{val.name(0)},0,0,5,5", line])
    with pytest.raises(DataError, match=message):
        pseudo_boxes(tmp_path / "boxes.txt", val)


def test_box_that_reaches_past_its_image_is_cut_off(tmp_path: Path, val: FileRecords) -> None:
    write_lines(tmp_path / "boxes.txt", [f"{val.name(index)},3,4,40,30" for index in range(5)])
    with pytest.warns(UserWarning, match=r"5 of 5 boxes reach past an edge"):
        found = pseudo_boxes(tmp_path / "boxes.txt", val)
    assert (found.boxes(0).tolist(), found.uncut_boxes(0).tolist()) == ([[3, 4, 39, 29]], [[3, 4, 40, 30]])


@pytest.mark.parametrize("file", ["", "pseudo_labels.json", "predictions.csv"])
@pytest.mark.parametrize("source", ["", "val/"])
def test_output_of_predict_is_read_as_it_is(tmp_path: Path, val: FileRecords, file: str, source: str) -> None:
    """The folder or a file of it, for images that were found in the data set's folder or in that of the split."""
    boxes = {val.name(index).removeprefix(source): [[index, 4, 20, 25]] for index in range(5)}
    folder = write_predictions(tmp_path / "boxes", boxes | {"train/other.png": [[0, 0, 3, 3]]})
    found = pseudo_boxes(folder / file, val)
    assert [found.boxes(index).tolist() for index in range(5)] == [[[index, 4, 20, 25]] for index in range(5)]


@pytest.mark.parametrize("file", ["pseudo_labels.json", "predictions.csv"])
def test_predictions_of_images_of_another_size_are_refused(tmp_path: Path, val: FileRecords, file: str) -> None:
    folder = write_predictions(tmp_path / "boxes", {val.name(0): [[0, 0, 3, 3]]}, size=(30, 40))
    with pytest.raises(DataError, match=r"'val/image 0, x\.png' has 30×40 pixels there, but 40×30 in the data set"):
        pseudo_boxes(folder / file, val)


def test_prediction_without_a_box_is_none(tmp_path: Path, val: FileRecords) -> None:
    folder = write_predictions(tmp_path / "boxes", {val.name(0): [[0, 0, 3, 3]], val.name(1): []})
    with pytest.warns(UserWarning, match="no box for 4 of 5"):
        assert len(pseudo_boxes(folder / "predictions.csv", val).box_table) == 1


def test_other_files_and_none_are_refused(tmp_path: Path, val: FileRecords) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder '.*gone'"):
        pseudo_boxes(tmp_path / "gone", val)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds neither localization\.txt nor pseudo_labels\.json"):
        pseudo_boxes(tmp_path / "empty", val)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"table\.csv' has no column 'file_name'"):
        pseudo_boxes(tmp_path / "table.csv", val)
    write_lines(tmp_path / "nothing.txt", [])
    with pytest.raises(DataError, match=r"no box for any of the 5 held-out images: .* such as 'val/image 0, x\.png'"):
        pseudo_boxes(tmp_path / "nothing.txt", val)
    folder = write_predictions(tmp_path / "boxes", {val.name(0): [[0, 0, 3, 3]]})
    with pytest.raises(DataError, match="not in COCO's format"):
        pseudo_boxes(folder / "predictions.json", val)


def test_mapping_beside_a_list_tells_the_names_of_the_images(tmp_path: Path) -> None:
    """As in ImageNetV2, whose publishers have renamed the images, and whose folder has another name in its archive."""
    ids = ["imagenetv2-threshold0.7/0/a31.jpeg", "imagenetv2-threshold0.7/1/b07.jpeg"]
    val = file_records(Path(), ids, [0, 1], ["a", "b"], {}, np.array([[40, 30], [40, 30]]))
    write_lines(tmp_path / "localization.txt", ["val2/0/0.jpeg,1,2,3,4", "val2/1/0.jpeg,5,6,7,8"])
    write_lines(tmp_path / "mapping.txt", ["0/0.jpeg,0/a31.jpeg", "1/0.jpeg,1/b07.jpeg"])
    assert pseudo_boxes(tmp_path, val).box_table.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_part_of_a_split_takes_its_own_boxes_from_the_list_of_the_whole(tmp_path: Path, val: FileRecords) -> None:
    write_lines(tmp_path / "boxes.txt", [f"{val.name(index)},{index},4,20,25" for index in range(5)])
    part = part_of(val, "val", ["1"], None, None, 0)
    assert pseudo_boxes(tmp_path / "boxes.txt", part).box_table[:, 0].tolist() == [1, 3]


def test_own_photos_without_annotations_have_the_size_of_their_files(tmp_path: Path) -> None:
    """A photo that its EXIF data turn is 30×40 pixels, as predict sees it."""
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        turned = PIL.Image.Exif()
        turned[0x0112] = 6
        PIL.Image.new("RGB", (40, 30)).save(tmp_path / "photos" / split / "cat" / "turned.jpg", exif=turned)
    val = folder_records("val", str(tmp_path / "photos"), SPLITS, 0.2, None, None)
    folder = write_predictions(tmp_path / "boxes", {"cat/turned.jpg": [[0, 30, 20, 39]]}, size=(30, 40))
    assert pseudo_boxes(folder, val).box_table.tolist() == [[0, 30, 20, 39]]
    assert json.loads((folder / "pseudo_labels.json").read_text())["images"][0]["height"] == 40
