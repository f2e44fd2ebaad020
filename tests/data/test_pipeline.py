"""Transforms, samples, batches: what reaches the network, and that randomness is what it should be."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from wsolkit import build_datamodule, load_config
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import EachOnce, GlobalBatches, TrainingLoader, WSOLDataset, one_thread
from wsolkit.data.shapes import CLASSES, ShapesRecords
from wsolkit.data.transforms import Transform, denormalise
from wsolkit.errors import ConfigError, DataError
from wsolkit.seeding import derive_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def square(
    size: int = 100, box: tuple[int, int, int, int] = (40, 30, 69, 49)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A white rectangle on black, its box and its mask."""
    x0, y0, x1, y1 = box
    mask = np.zeros((size, size), np.uint8)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return np.repeat(255 * mask[..., None], 3, axis=2), np.array([box]), mask


def test_evaluation_pixels_are_those_of_torchvision() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    out = Transform(224, 224, False, MEAN, STD)(image, np.zeros((0, 4), np.int64), None, 0).image
    resized = TF.resize(Image.fromarray(image), [224, 224])
    expected = TF.normalize(TF.to_tensor(resized), list(MEAN), list(STD))
    assert torch.allclose(out, expected, atol=1e-5)
    assert np.array_equal(denormalise(out, MEAN, STD), np.asarray(resized))


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_masks_follow_the_image(seed: int) -> None:
    image, boxes, mask = square()
    out = Transform(128, 112, True, (0.0,) * 3, (1.0,) * 3)(image, boxes, mask, seed)
    assert out.mask is not None
    bright = out.image[0].numpy() > 0.5
    assert (bright == (out.mask == 1)).mean() > 0.99
    rows, columns = np.nonzero(out.mask)
    seen = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert np.abs(out.boxes[0] - seen).max() <= 1


def test_boxes_keep_their_corners_where_nothing_is_resized() -> None:
    image, boxes, mask = square()
    out = Transform(100, 100, False, MEAN, STD)(image, boxes, mask, 0)
    assert out.boxes.tolist() == boxes.tolist()


def test_box_cropped_away_is_dropped_and_others_are_clipped() -> None:
    image, _, _ = square()
    boxes = np.array([[0, 0, 3, 3], [0, 40, 30, 60]])
    out = Transform(100, 60, False, MEAN, STD)(image, boxes, None, 0)  # the centre: 20 to 79
    assert out.boxes.tolist() == [[0, 20, 10, 40]]


def test_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot cut 256 pixels out of an image resized to 224"):
        Transform(224, 256, True, MEAN, STD)


def shapes(count: int = 24) -> WSOLDataset:
    records = ShapesRecords("train", {"train": count}, 64, 0)
    return WSOLDataset(records, Transform(72, 64, True, MEAN, STD), seed=0)


def training_loader(dataset: WSOLDataset, workers: int) -> TrainingLoader:
    batches = GlobalBatches(len(dataset), 8, seed=0, rank=0, world_size=1)
    return TrainingLoader(
        dataset,
        batches,
        len(batches),
        num_workers=workers,
        worker_init_fn=one_thread,
        persistent_workers=workers > 0,
    )


def epoch_of(dataset: WSOLDataset, epoch: int, workers: int) -> torch.Tensor:
    loader = training_loader(dataset, workers)
    loader.load_state_dict({"epoch": epoch, "taken": 0})
    return torch.cat([batch["image"] for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", range(7))
def test_loader_goes_on_where_it_was(workers: int, taken: int) -> None:
    """After any batch of two epochs of three, whatever its workers have prepared by then; and into a third epoch."""
    loader, seen = training_loader(shapes(), workers), list[torch.Tensor]()
    expected = [epoch_of(shapes(), epoch, 0) for epoch in range(3)]
    state = loader.state_dict()
    for _ in range(2):
        for batch in loader:
            if len(seen) == taken:
                break
            seen.append(batch["image"])
            state = loader.state_dict()
    resumed = training_loader(shapes(), workers)
    resumed.load_state_dict(state)
    for _ in range(3 - taken // 3):
        seen += [batch["image"] for batch in resumed]
    assert torch.equal(torch.cat(seen), torch.cat(expected))


def test_augmentations_do_not_depend_on_the_number_of_workers() -> None:
    dataset = shapes()
    expected = epoch_of(dataset, 0, workers=0)
    for workers in (1, 2):
        assert torch.equal(epoch_of(dataset, 0, workers), expected)


def test_augmentations_differ_between_samples_epochs_and_seeds() -> None:
    """albumentations alone would repeat them in every worker and every epoch."""
    dataset = shapes()
    views = [dataset[epoch, 3]["image"] for epoch in range(8)]
    assert len({view.numpy().tobytes() for view in views}) >= 6
    image, boxes, mask = square()
    transform = dataset.transform
    assert (
        len({transform(image, boxes, mask, derive_seed(0, 0, index)).image.numpy().tobytes() for index in range(8)})
        >= 6
    )
    other = WSOLDataset(dataset.records, transform, seed=1)
    assert any(not torch.equal(dataset[0, i]["image"], other[0, i]["image"]) for i in range(8))
    two = epoch_of(dataset, 0, workers=2), epoch_of(dataset, 1, workers=2)
    assert not torch.equal(*two)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_a_global_batch(world_size: int) -> None:
    def run(rank: int, world: int) -> list[list[tuple[int, int]]]:
        return list(GlobalBatches(29, 8, seed=3, rank=rank, world_size=world))

    single = [set(batch) for batch in run(0, 1)]
    parts = [run(rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [3] * world_size  # 29 images: the last five are left out
    for step, whole in enumerate(single):
        together = list(chain.from_iterable(part[step] for part in parts))
        assert len(together) == 8
        assert set(together) == whole


def test_order_changes_with_the_epoch_and_small_sets_make_one_batch() -> None:
    small = GlobalBatches(6, 8, seed=0, rank=0, world_size=4)
    assert [len(batch) for batch in small] == [1]
    batches = GlobalBatches(16, 8, seed=0, rank=0, world_size=1)
    orders = [[index for _, index in chain.from_iterable(batches)] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1]
    with pytest.raises(DataError, match="2 training images cannot be spread over 3 processes"):
        GlobalBatches(2, 8, seed=0, rank=0, world_size=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_counts_each_image_once(world_size: int) -> None:
    parts = [[index for _, index in EachOnce(5, rank, world_size)] for rank in range(world_size)]
    assert sorted(chain.from_iterable(parts)) == list(range(5))


def test_shapes_are_what_they_say() -> None:
    records = ShapesRecords("val", {"val": 40}, 64, 0)
    again = ShapesRecords("val", {"val": 40}, 64, 0)
    train = ShapesRecords("train", {"train": 40}, 64, 0)
    assert np.bincount(records.labels).tolist() == [5] * len(CLASSES)
    areas = []
    for index in range(40):
        image, mask = records.image(index), records.mask(index)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        rows, columns = np.nonzero(mask)
        assert records.boxes(index).tolist() == [[columns.min(), rows.min(), columns.max(), rows.max()]]
        assert np.array_equal(image, again.image(index))
        assert not np.array_equal(image, train.image(index))
        areas.append(mask.mean())
    assert 0.08 < np.mean(areas) < 0.16


def test_datamodule_gives_batches_without_a_trainer(listed: Path) -> None:
    cfg = load_config("dataset=listed", f"dataset.root={listed}", "dataset.batch_size=4", "dataset.num_workers=0")
    datamodule: WSOLDataModule = build_datamodule(cfg)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (4, 3, 224, 224)
    evaluation = next(iter(datamodule.val_dataloader()))
    assert evaluation["image"].shape == (5, 3, 224, 224)
    assert evaluation["boxes"][0].tolist()[1] == [0, 0, 3, 3]
    assert evaluation["mask"] is None
    assert evaluation["size"].tolist() == [[40, 30]] * 5
    assert datamodule.class_names == ["0", "1"]
