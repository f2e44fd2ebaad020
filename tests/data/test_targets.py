"""What training learns beside the labels: pseudo boxes and masks, which go through the augmentation with the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.layouts import write_lines
from tests.data.test_pseudo_boxes import write_predictions
from wsolkit import build_datamodule, load_config
from wsolkit.data.dataset import WSOLDataset, training_batch
from wsolkit.data.targets import Targets, as_mask, write_mask
from wsolkit.data.transforms import Transform
from wsolkit.errors import ConfigError, DataError

RECORDS = "dataset.records.sizes={train: 8, val: 2, test: 2}"


def shapes(*overrides: str) -> WSOLDataset:
    return build_datamodule(load_config("method=cam", RECORDS, *overrides)).dataset("train")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The true boxes and masks of the built-in data set, as pseudo boxes and masks of its training images."""
    records, lines = shapes().records, []
    for index in range(8):
        name, (box,), mask = records.name(index), records.boxes(index).tolist(), records.mask(index)
        lines.append(",".join(map(str, [name, *box])))
        assert mask is not None
        write_mask(tmp_path / "masks", name, mask)
    write_lines(tmp_path / "boxes.txt", lines)
    (tmp_path / "masks" / "settings.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("crop", ["null", "[0.3,1.0]"])
def test_box_and_mask_move_with_the_image(files: Path, crop: str) -> None:
    """The box surrounds the mask, up to the pixel, in each crop and mirror image that shows all of the object."""
    given = [f"dataset.train_boxes={files / 'boxes.txt'}", f"dataset.train_masks={files / 'masks'}"]
    dataset = shapes(*given, f"dataset.crop_scale={crop}")
    seen = 0
    for index in range(8):
        for epoch in range(4):
            sample = dataset[epoch, index]
            mask, box = sample["pseudo_mask"], sample["pseudo_box"]
            assert mask is not None
            assert box is not None
            rows, columns = np.nonzero(mask == 1)
            if len(rows) == 0 or np.isnan(box).any():
                continue
            around = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
            edges = np.concatenate([box[:2], box[:2] + box[2:]])
            whole = (edges > 0).all() and (edges < 1).all()
            seen += int(whole)
            if whole:
                assert np.abs(edges - around).max() <= 3 / 64
    assert seen >= 10
    batch = training_batch([dataset[0, 0], dataset[0, 1]])
    assert batch["pseudo_box"].shape == (2, 4)
    assert (batch["pseudo_mask"].shape, batch["pseudo_mask"].dtype) == ((2, 64, 64), torch.uint8)


def test_true_boxes_and_masks_of_training_images_reach_no_loss(files: Path) -> None:
    assert training_batch([shapes()[0, 0]]).keys() == {"image", "label"}
    boxes = training_batch([shapes(f"dataset.train_boxes={files / 'boxes.txt'}")[0, 0]])
    assert boxes.keys() == {"image", "label", "pseudo_box"}


def test_shares_are_exact() -> None:
    """A box of 10 of 40 pixels, in an image that is resized to 64 and not cropped."""
    found = Transform(64, 64, False, (0, 0, 0), (1, 1, 1))(
        np.zeros((40, 80, 3), np.uint8), np.array([[7, 5, 22, 14]]), None, seed=0
    )
    np.testing.assert_allclose(found.shares, [[7 / 80, 5 / 40, 16 / 80, 10 / 40]], rtol=1e-6)


def test_image_without_a_box_has_none(files: Path) -> None:
    lines = (files / "boxes.txt").read_text().splitlines()
    write_lines(files / "boxes.txt", lines[1:])
    with pytest.warns(UserWarning, match=r"no box for 1 of 8 training images .* nothing about boxes is learned from"):
        dataset = shapes(f"dataset.train_boxes={files / 'boxes.txt'}")
    none, known = dataset[0, 0]["pseudo_box"], dataset[0, 1]["pseudo_box"]
    assert none is not None
    assert known is not None
    assert np.isnan(none).all()
    assert np.isfinite(known).all()


def test_output_of_predict_is_learned_as_well(tmp_path: Path) -> None:
    names = [shapes().records.name(index) for index in range(8)]
    folder = write_predictions(tmp_path / "boxes", {name: [[8, 16, 23, 31], [0, 0, 3, 3]] for name in names}, (64, 64))
    for path in (folder, folder / "predictions.csv"):
        targets = Targets.of(str(path), None, shapes().records)
        assert targets is not None
        assert targets.boxes_of(3).tolist() == [[8, 16, 23, 31], [0, 0, 3, 3]]
    box = shapes(f"dataset.train_boxes={folder}", "dataset.resize=64")[0, 3]["pseudo_box"]
    assert box is not None
    assert box[2:].tolist() == [0.25, 0.25]  # the larger of the two


def test_masks_survive_their_files(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [255, 1]], np.uint8)
    write_mask(tmp_path, "a/b.jpg", mask)
    targets = Targets(None, tmp_path)
    np.testing.assert_array_equal(targets.mask_of("a/b.jpg"), mask)
    assert as_mask(np.array([[10, 250, 120]], np.uint8)).tolist() == [[0, 1, 255]]


def test_messages(files: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.train_boxes: there is no file or folder 'gone'"):
        shapes("dataset.train_boxes=gone")
    write_lines(files / "boxes.txt", ["val/00000,0,0,3,3"])
    with pytest.raises(DataError, match="'val/00000' is not among the training images"):
        shapes(f"dataset.train_boxes={files / 'boxes.txt'}")
    (files / "masks" / "train" / "00007.png").unlink()
    with pytest.raises(DataError, match=r"has no mask 'train/00007\.png'"):
        shapes(f"dataset.train_masks={files / 'masks'}")
    (files / "masks" / "settings.json").unlink()
    with pytest.raises(DataError, match=r"no complete folder .* wsolkit\.pseudo_masks checkpoint=PATH"):
        shapes(f"dataset.train_masks={files / 'masks'}")
    for scale in ("[0.5]", "[0.5,0.2]", "[0,1]"):
        with pytest.raises(ConfigError, match=r"dataset\.crop_scale=.*: expected the smallest and the largest share"):
            shapes(f"dataset.crop_scale={scale}")
