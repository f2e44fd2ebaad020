"""The file of resized training images: the same batches, filled and shared safely, and noticed when it is out of date."""

from __future__ import annotations

import os
import pickle
import shutil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.data.layouts import draw
from wsolkit import build_datamodule, load_config
from wsolkit.data.benchmarks.listed import listed_records
from wsolkit.data.cache import ImageCache
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.pixels import resize
from wsolkit.data.records import FileRecords, file_records
from wsolkit.data.transforms import Transform
from wsolkit.errors import ConfigError, DataError


def datamodule(listed: Path, *settings: str) -> WSOLDataModule:
    return build_datamodule(
        load_config(
            "dataset=listed", f"dataset.root={listed}", "dataset.batch_size=4", "dataset.num_workers=0", *settings
        )
    )


def epochs(data: WSOLDataModule, count: int = 2) -> torch.Tensor:
    loader = data.train_dataloader()
    return torch.cat([batch["image"] for _ in range(count) for batch in loader])


def records(listed: Path) -> FileRecords:
    return listed_records("train", str(listed), {"train": "train"}, None)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_with_a_cache(listed: Path, tmp_path: Path, workers: int) -> None:
    cached = datamodule(listed, f"dataset.cache={tmp_path / 'cache'}", f"dataset.num_workers={workers}")
    assert torch.equal(epochs(cached), epochs(datamodule(listed)))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_images_are_decoded_once_and_evaluation_decodes_always(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = f"dataset.cache={tmp_path / 'cache'}"
    expected = epochs(datamodule(listed, setting))
    evaluated = next(iter(datamodule(listed).val_dataloader()))["image"]
    read: list[str] = []
    decode = FileRecords.image

    def count(self: FileRecords, index: int) -> Any:
        read.append(self.name(index))
        return decode(self, index)

    monkeypatch.setattr(FileRecords, "image", count)
    again = datamodule(listed, setting)  # another run
    assert torch.equal(epochs(again), expected)
    assert read == []
    assert torch.equal(next(iter(again.val_dataloader()))["image"], evaluated)
    assert len(read) == 5


def test_photos_read_upright_and_as_they_are_stored_do_not_mix(tmp_path: Path) -> None:
    draw(tmp_path / "x.jpg", [(0, 0, 9, 9)], "exif")
    for upright in (True, False, True):
        kept = file_records(tmp_path, ["x.jpg"], [0], ["a"], {}, None, upright=upright)
        for _ in range(2):
            image, size = ImageCache(tmp_path / "cache", kept, 32).image(0)
            assert size == ((30, 40) if upright else (40, 30))
            assert np.array_equal(image, resize(kept.image(0), 32, 32))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_boxes_and_masks_follow_a_cached_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)
    mask = rng.integers(0, 2, (375, 500), dtype=np.uint8)
    boxes = np.array([[10, 20, 300, 200], [0, 0, 499, 374], [480, 3, 499, 8]])
    transform = Transform(256, 224, True, (0.5,) * 3, (0.5,) * 3)
    for seed in range(10):
        expected = transform(image, boxes, mask, seed)
        cached = transform(resize(image, 256, 256), boxes, mask, seed, (500, 375))
        assert expected.mask is not None
        assert cached.mask is not None
        assert np.array_equal(cached.boxes, expected.boxes)
        assert np.array_equal(cached.mask, expected.mask)
        assert np.array_equal(cached.image.image, expected.image.image)


def test_a_changed_source_is_read_again(listed: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, records(listed), 32)
    _, size = cache.image(0)
    assert size == (40, 30)
    source = listed / "train" / "image 0, x.png"
    PIL.Image.new("RGB", (50, 20), (7, 8, 9)).save(source)
    after, size = ImageCache(tmp_path, records(listed), 32).image(0)
    assert size == (50, 20)
    assert (after == (7, 8, 9)).all()
    assert (cache.image(0)[0] == (7, 8, 9)).all()  # one that was open notices too
    source.unlink()
    with pytest.raises(DataError, match="does not exist"):
        cache.image(0)


def test_other_sizes_and_other_images_have_files_of_their_own(listed: Path, tmp_path: Path) -> None:
    all_images = records(listed)
    fewer = listed_records("val", str(listed), {"train": "train", "val": "val"}, None)
    paths = {ImageCache(tmp_path, images, size).path for images in (all_images, fewer) for size in (32, 48)}
    assert len(paths) == 4


def test_a_slot_that_was_half_written_is_filled_again(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path, records(listed), 32)
    expected = np.array(cache.image(1)[0])
    cache.path.unlink()
    cache = ImageCache(tmp_path, records(listed), 32)

    def stop(self: ImageCache, index: int, head: bytes, pixels: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(index * self._slots.itemsize + len(head))
            file.write(b"\x55" * (len(pixels) // 2))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageCache, "_write", stop)
        cache.image(1)
    again = ImageCache(tmp_path, records(listed), 32)
    assert np.array_equal(again.image(1)[0], expected)
    assert np.array_equal(again.image(1)[0], expected)


def fill(cache: ImageCache, order: list[int]) -> None:
    for index in order:
        cache.image(index)


def test_processes_may_fill_it_together(listed: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, records(listed), 64)
    orders = [list(range(12)), list(range(11, -1, -1)), [*range(6, 12), *range(6)]]
    processes = [get_context("fork").Process(target=fill, args=(cache, order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    images = records(listed)
    for index in range(12):
        assert np.array_equal(cache._slots[index]["image"], resize(images.image(index), 64, 64))


def test_it_travels_to_other_processes_without_its_images(listed: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, records(listed), 256)
    expected = cache.image(3)[0]
    luggage = pickle.dumps(cache)
    assert len(luggage) < 10_000
    assert np.array_equal(pickle.loads(luggage)._slots[3]["image"], expected)


def test_too_little_room_is_named(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        with pytest.raises(
            DataError, match=r"12 images of 256×256 take 0\.0 GiB, and '.*' has 0\.0 GiB left: make room"
        ):
            datamodule(listed, f"dataset.cache={tmp_path / 'cache'}").setup("fit")
    cache = ImageCache(tmp_path / "cache", records(listed), 256)
    monkeypatch.setattr(ImageCache, "_write", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(DataError, match="No space left on device.*make room, or train without a cache"):
        cache.image(0)


def test_a_folder_that_cannot_be_is_named(listed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"dataset\.cache: cannot write '.*file/cache"):
        datamodule(listed, f"dataset.cache={tmp_path / 'file' / 'cache'}").setup("fit")


def test_images_that_are_in_memory_need_none(tmp_path: Path) -> None:
    data = build_datamodule(load_config("dataset=shapes", f"dataset.cache={tmp_path}"))
    with pytest.raises(ConfigError, match="in memory already: leave it null"):
        data.setup("fit")
