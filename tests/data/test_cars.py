"""Stanford Cars in its official layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tests.data.layouts import BOXES, CARS, structs, write_cars
from wsolkit.data.benchmarks.cars import cars_records
from wsolkit.errors import DataError

EXPECTED = {"train": 4, "test": 6}


@pytest.mark.parametrize("together", [False, True])
def test_splits_labels_and_boxes(tmp_path: Path, together: bool) -> None:
    root = str(write_cars(tmp_path, together))
    train, test = cars_records("train", root, 2, EXPECTED), cars_records("test", root, 2, EXPECTED)
    assert train.classes == test.classes == list(CARS)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1], [0] * 3 + [1] * 3)
    assert (train.name(2), test.name(5)) == (
        ("car_ims/000006.jpg", "car_ims/000010.jpg") if together else ("00003.jpg", "00006.jpg")
    )
    assert [test.boxes(index).tolist() for index in range(6)] == [[list(box)] for box in (*BOXES, *BOXES)]
    assert test.size(0) == (40, 30)
    assert len(train.boxes(0)) == 0
    # The boxes are where the files say, counted from 1: bright where the image was drawn so.
    x0, y0, x1, y1 = test.boxes(2)[0]
    image = test.image(2).astype(int)
    assert image[y0 : y1 + 1, x0 : x1 + 1].mean() > image.mean() + 60


def test_images_decide_which_layout_it_is(tmp_path: Path) -> None:
    """Copies go round with the annotations of both."""
    write_cars(tmp_path)
    (tmp_path / "cars_annos.mat").write_bytes(b"not read")
    assert len(cars_records("train", str(tmp_path), 2, EXPECTED).labels) == 4
    (tmp_path / "car_ims").mkdir()
    with pytest.raises(DataError, match=r"cars_annos.mat' cannot be read as a MATLAB file"):
        cars_records("train", str(tmp_path), 2, EXPECTED)


def test_labels_of_the_test_may_lie_beside_the_others(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    file = root / "cars_test_annos_withlabels.mat"
    file.rename(root / "devkit" / file.name)
    assert len(cars_records("test", str(root), 2, EXPECTED).labels) == 6
    (root / "devkit" / file.name).unlink()
    with pytest.raises(DataError, match=r"withlabels.mat' does not exist: .* cars_test_annos.mat leaves out"):
        cars_records("test", str(root), 2, EXPECTED)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    path = root / "devkit" / "cars_train_annos.mat"

    def message(split: str = "train") -> str:
        with pytest.raises(DataError) as caught:
            cars_records(split, str(root), 2, EXPECTED)  # type: ignore[arg-type]
        return str(caught.value)

    assert "Stanford Cars has no held-out split" in message("val")
    bare = (root / "devkit" / "cars_test_annos.mat").read_bytes()
    (root / "cars_test_annos_withlabels.mat").write_bytes(bare)
    assert "the variable 'annotations' has no field 'class'; it is another file" in message("test")
    row = {"bbox_x1": 41, "bbox_y1": 1, "bbox_x2": 42, "bbox_y2": 9, "class": 1, "fname": "00001.jpg"}
    scipy.io.savemat(root / "cars_test_annos_withlabels.mat", {"annotations": structs([row] * 6)})
    assert "withlabels.mat', '00001.jpg': box 40,0,41,8 does not lie in its image of 40×30 pixels" in message("test")
    scipy.io.savemat(path, {"annotations": structs([row] * 3)})
    assert "the train split of Stanford Cars has 3 images here, 4 as published" in message()
    scipy.io.savemat(path, {"annotations": structs([{**row, "class": 3}] * 4)})
    assert "gives '00001.jpg' the class 3, of 1 to 2" in message()
    scipy.io.savemat(path, {"annotations": structs([{**row, "class": "two"}] * 4)})
    assert "the field 'class' of 'annotations' should hold numbers" in message()
    scipy.io.savemat(path, {"annotations": structs([{**row, "fname": "gone.jpg"}] * 4)})
    assert "gone.jpg' does not exist" in message()
    scipy.io.savemat(path, {"annotations": np.arange(4)})
    assert "the variable 'annotations' has no field 'fname'" in message()
    with pytest.raises(DataError, match=r"cars_meta.mat' names 2 classes, dataset.num_classes says 196"):
        cars_records("train", str(root), 196, None)


def test_a_single_image_is_a_list(tmp_path: Path) -> None:
    root = write_cars(tmp_path)
    row = {"bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 41, "bbox_y2": 9, "class": 2, "fname": "00001.jpg"}
    scipy.io.savemat(root / "cars_test_annos_withlabels.mat", {"annotations": structs([row])})
    test = cars_records("test", str(root), 2, None)
    assert test.labels.tolist() == [1]
    assert test.boxes(0).tolist() == [[0, 0, 39, 8]]  # a pixel past the edge is cut off
