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
from wsolkit.data.benchmarks.shapes import CLASSES, ShapesRecords
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import EachOnce, GlobalBatches, TrainingLoader, WSOLDataset, one_thread
from wsolkit.data.pixels import Pixels, normalised_batch
from wsolkit.data.records import read_image
from wsolkit.data.seeding import derive_seed
from wsolkit.data.transforms import Transform, denormalise
from wsolkit.errors import ConfigError, DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def square(
    size: int = 100, box: tuple[int, int, int, int] = (40, 30, 69, 49)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A white rectangle on black, its box and its mask."""
    x0, y0, x1, y1 = box
    mask = np.zeros((size, size), np.uint8)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return np.repeat(255 * mask[..., None], 3, axis=2), np.array([box]), mask


def normalised(image: Pixels) -> torch.Tensor:
    return normalised_batch([image])[0]


def plain_path(path: Path, size: int) -> torch.Tensor:
    """PIL decodes and resizes, torchvision normalises."""
    with Image.open(path) as image:
        resized = TF.resize(image.convert("RGB"), [size, size])
    expected: torch.Tensor = TF.normalize(TF.to_tensor(resized), list(MEAN), list(STD))
    return expected


def test_evaluation_pixels_are_those_of_torchvision() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    out = normalised(Transform(224, 224, False, MEAN, STD)(image, np.zeros((0, 4), np.int64), None, 0).image)
    resized = TF.resize(Image.fromarray(image), [224, 224])
    assert torch.equal(out, TF.normalize(TF.to_tensor(resized), list(MEAN), list(STD)))
    assert np.array_equal(denormalise(out, MEAN, STD), np.asarray(resized))


@pytest.mark.parametrize("size", [(224, 224), (500, 375), (333, 500)])
def test_real_images_are_evaluated_and_trained_on_as_by_the_plain_path(
    shared: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    none = np.zeros((0, 4), np.int64)
    evaluation, training = Transform(224, 224, False, MEAN, STD), Transform(256, 224, True, MEAN, STD)
    for number, source in enumerate(sorted((shared / "data" / "ilsvrc10" / "val").rglob("*.JPEG"))[::30]):
        path = tmp_path / f"{number}.JPEG"
        Image.open(source).convert("RGB").resize(size).save(path, quality=95, subsampling="4:2:0")
        image = read_image(path)
        assert torch.equal(normalised(evaluation(image, none, None, 0).image), plain_path(path, 224))
        out = normalised(training(image, none, None, number).image)
        whole = plain_path(path, 256)
        assert any(is_crop(out, view) for view in (whole, whole.flip(2)))


def is_crop(image: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether an image is, value for value, a part of another."""
    side = image.shape[-1]
    starts = whole.unfold(2, side, 1) == image[:, :1, None]  # where its first row is found [3, H, places, side]
    places = starts.all(-1).all(0).nonzero().tolist()
    return any(torch.equal(whole[:, y : y + side, x : x + side], image) for y, x in places)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_masks_follow_the_image(seed: int) -> None:
    image, boxes, mask = square()
    out = Transform(128, 112, True, (0.0,) * 3, (1.0,) * 3)(image, boxes, mask, seed)
    assert out.mask is not None
    bright = normalised(out.image)[0].numpy() > 0.5
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


@pytest.mark.parametrize(
    ("batch", "accumulate", "limit", "skip"),
    [
        (8, 1, 6, 3),  # as it was
        (12, 1, 4, 2),
        (4, 1, 12, 6),
        (4, 2, 12, 6),
        (16, 1, 3, 2),  # the next whole batch: 8 images are left out
        (8, 2, 6, 4),  # the next whole step
        (5, 1, 9, 5),
        (48, 1, 1, 0),  # no whole batch is left: the last one comes again, and validation after it
        (8, 1, 2, 1),  # trainer.limit_train_batches=2
    ],
)
def test_place_in_an_epoch_is_counted_in_images(batch: int, accumulate: int, limit: int, skip: int) -> None:
    """After 24 of 48 images, in batches of 8."""
    batches = GlobalBatches(48, batch, seed=0, rank=0, world_size=1)
    loader = TrainingLoader(shapes(48), batches, limit, accumulate)
    loader.load_state_dict({"epoch": 1, "taken": 3, "over": False, "batch": 8, "images": 48, "seed": 0})
    assert loader.start == (1, skip, True)
    batches.epoch = 0
    (every,) = GlobalBatches(48, 48, seed=0, rank=0, world_size=1)
    assert next(iter(batches)) == every[skip * batch : (skip + 1) * batch]


@pytest.mark.parametrize("taken", [6, 3])
def test_an_epoch_that_is_over_is_over_in_batches_of_any_size(taken: int) -> None:
    """Six of six batches, or three of six where trainer.max_steps ended it."""
    loader = TrainingLoader(shapes(48), GlobalBatches(48, 4, seed=0, rank=0, world_size=1), 12)
    loader.load_state_dict({"epoch": 1, "taken": taken, "over": True, "batch": 8, "images": 48, "seed": 0})
    assert loader.start == (2, 0, False)


def test_places_of_earlier_versions_count_batches() -> None:
    for taken, start in ((2, (4, 2, True)), (3, (5, 0, False))):
        loader = training_loader(shapes(), 0)
        loader.load_state_dict({"epoch": 4, "taken": taken})
        assert loader.start == start


def test_augmentations_do_not_depend_on_the_number_of_workers() -> None:
    dataset = shapes()
    expected = epoch_of(dataset, 0, workers=0)
    for workers in (1, 2):
        assert torch.equal(epoch_of(dataset, 0, workers), expected)


def test_augmentations_differ_between_samples_epochs_and_seeds() -> None:
    """albumentations alone would repeat them in every worker and every epoch."""
    dataset = shapes()
    views = [dataset[epoch, 3]["image"] for epoch in range(8)]
    assert len({view.image.tobytes() for view in views}) >= 6
    image, boxes, mask = square()
    transform = dataset.transform
    assert (
        len({transform(image, boxes, mask, derive_seed(0, 0, index)).image.image.tobytes() for index in range(8)}) >= 6
    )
    other = WSOLDataset(dataset.records, transform, seed=1)
    assert any((dataset[0, i]["image"].image != other[0, i]["image"].image).any() for i in range(8))
    two = epoch_of(dataset, 0, workers=2), epoch_of(dataset, 1, workers=2)
    assert not torch.equal(*two)


class Positions(ShapesRecords):
    """Equal images whose pixels tell where they were: what differs between samples is the augmentation alone."""

    def image(self, index: int) -> np.ndarray:
        rows, columns = np.mgrid[:256, :256].astype(np.uint8)
        return np.stack([rows, columns, np.zeros_like(rows)], axis=-1)

    def mask(self, index: int) -> None:  # type: ignore[override]
        return None

    def boxes(self, index: int) -> np.ndarray:
        return np.zeros((0, 4), np.int64)


def views(seed: int, epoch: int, rank: int, world_size: int, workers: int) -> list[list[tuple[float, ...]]]:
    """Batches of (top left value, next value to its right) of each image: its crop and flip."""
    dataset = WSOLDataset(
        Positions("train", {"train": 256}, 64, 0), Transform(256, 224, True, (0,) * 3, (1,) * 3), seed
    )
    batches = GlobalBatches(len(dataset), 32, seed, rank, world_size)
    loader = TrainingLoader(dataset, batches, len(batches), num_workers=workers, worker_init_fn=one_thread)
    loader.load_state_dict({"epoch": epoch, "taken": 0})
    return [
        [tuple((image[:2, 0, :2] * 255).round().flatten().tolist()) for image in batch["image"]] for batch in loader
    ]


def test_no_two_workers_ranks_epochs_or_seeds_share_random_numbers() -> None:
    """Where they did, the crops of a batch would be those of another in the same place."""
    runs = {
        (seed, epoch, rank): views(seed, epoch, rank, 2, workers=2)
        for seed, epoch, rank in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0))
    }
    batches = [
        batch for run in runs.values() for batch in run
    ]  # odd ones are made by one worker, even ones by the other
    assert len(batches) == 5 * 8
    for number, batch in enumerate(batches):
        assert len(set(batch)) > 12  # of 16 images, with 33 · 33 · 2 views to have
        for other in batches[:number]:
            assert sum(mine == theirs for mine, theirs in zip(batch, other, strict=True)) <= 2
    everything = [view for batch in batches for view in batch]
    assert len(set(everything)) > 0.75 * len(everything)  # 640 drawn out of 2178 at random: 554 different ones
    assert views(0, 0, 1, 2, workers=0) == runs[0, 0, 1] == views(0, 0, 1, 2, workers=3)


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
