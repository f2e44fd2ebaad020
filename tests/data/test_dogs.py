"""Stanford Dogs in its official layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tests.data.layouts import BOXES, DOGS, write_dogs, write_dogs_list
from wsolkit.data.benchmarks.dogs import dogs_records
from wsolkit.errors import DataError

EXPECTED = {"train": 4, "test": 6}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_dogs(tmp_path / "Stanford Dogs")


def test_splits_labels_and_boxes(root: Path) -> None:
    train, test = dogs_records("train", str(root), 2, EXPECTED), dogs_records("test", str(root), 2, EXPECTED)
    assert train.classes == test.classes == list(DOGS)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1], [0] * 3 + [1] * 3)
    assert train.name(0) == "n02085620-Chihuahua/n02085620_007.jpg"
    assert len(train.boxes(0)) == 0
    assert test.boxes(0).tolist() == [list(BOXES[0]), [24, 20, 31, 28]]
    assert [test.boxes(index).tolist() for index in (1, 2)] == [[list(box)] for box in BOXES[1:]]
    assert test.size(0) == (40, 30)
    assert {records.image(i).shape for records in (train, test) for i in range(4)} == {(30, 40, 3)}


def test_boxes_are_cut_off_at_the_image_s_edges(root: Path) -> None:
    path = root / "Annotation" / "n02085620-Chihuahua" / "n02085620_207"
    path.write_text(path.read_text().replace("<xmax>20<", "<xmax>44<").replace("<ymin>3<", "<ymin>-1<"))
    assert dogs_records("test", str(root), 2, EXPECTED).boxes(0)[0].tolist() == [4, 0, 39, 17]
    path.write_text(path.read_text().replace("<xmin>4<", "<xmin>41<"))
    with pytest.raises(DataError, match=r"n02085620_207: box 41,-1,44,17 does not lie in its image of 40×30"):
        dogs_records("test", str(root), 2, EXPECTED)


def test_a_list_of_one_image_is_a_list(root: Path) -> None:
    write_dogs_list(root / "test_list.mat", [("n02085782-Japanese_spaniel/n02085782_217", 2)])
    test = dogs_records("test", str(root), 2, None)
    assert (test.labels.tolist(), test.name(0)) == ([1], "n02085782-Japanese_spaniel/n02085782_217.jpg")


def test_what_is_wrong_is_named(root: Path) -> None:
    def message(split: str = "test") -> str:
        with pytest.raises(DataError) as caught:
            dogs_records(split, str(root), 2, EXPECTED)  # type: ignore[arg-type]
        return str(caught.value)

    assert "Stanford Dogs has no held-out split: set dataset.held_out=false" in message("val")
    good = [("n02085620-Chihuahua/n02085620_207", 1)] * 6
    write_dogs_list(root / "test_list.mat", good[1:])
    assert "the test split of Stanford Dogs has 5 images here, 6 as published" in message()
    write_dogs_list(root / "test_list.mat", [*good[1:], ("n02085620-Chihuahua/n02085620_207", 2)])
    assert "n02085620_207.jpg' the label 2, which is of another class" in message()
    write_dogs_list(root / "test_list.mat", [*good[1:], ("n02085620-Chihuahua/gone", 1)])
    assert "test_list.mat: image '" in message()
    write_dogs_list(root / "test_list.mat", good)
    (root / "Annotation" / "n02085620-Chihuahua" / "n02085620_207").unlink()
    assert "there are no boxes for image 'n02085620_207'" in message()
    with pytest.raises(DataError, match=r"names 2 classes, dataset.num_classes says 120"):
        dogs_records("train", str(root), 120, None)


def test_broken_lists_are_named(root: Path) -> None:
    path = root / "train_list.mat"
    whole = path.read_bytes()
    for content in (b"", b"no MATLAB file", whole[:300], whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train_list.mat' cannot be read as a MATLAB file"):
            dogs_records("train", str(root), 2, EXPECTED)
    scipy.io.savemat(path, {"list": np.zeros(3)})
    with pytest.raises(DataError, match=r"holds no variable 'file_list', but list: it is another file"):
        dogs_records("train", str(root), 2, EXPECTED)
    path.unlink()
    with pytest.raises(DataError, match=r"train_list.mat' does not exist: Stanford Dogs needs it"):
        dogs_records("train", str(root), 2, EXPECTED)
    shutil.rmtree(root)
    with pytest.raises(DataError, match=r"dataset.root: there is no folder"):
        dogs_records("train", str(root), 2, EXPECTED)
