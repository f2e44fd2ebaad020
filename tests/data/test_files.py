"""Data sets in files: what is read, and how images are decoded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.conftest import write_listed
from tests.data.layouts import mark, write_imagenet_v2, write_lists
from wsolkit.data.benchmarks.imagenet import imagenet_records
from wsolkit.data.benchmarks.listed import listed_records
from wsolkit.data.records import FileRecords, Split, read_image
from wsolkit.errors import DataError

SPLITS = {"train": "train", "val": "val", "test": "val"}
BOX_FOLDERS = ["Annotations/CLS-LOC/val", "val"]


def test_listed_reads_images_labels_and_ragged_boxes(listed: Path) -> None:
    train = listed_records("train", str(listed), SPLITS, None)
    val = listed_records("val", str(listed), SPLITS, None)
    assert (len(train.labels), len(val.labels)) == (12, 5)
    assert train.labels.tolist() == [0, 1] * 6
    assert train.classes == ["0", "1"]
    assert [len(val.boxes(index)) for index in range(5)] == [2, 1, 1, 1, 1]
    assert val.boxes(0)[1].tolist() == [0, 0, 3, 3]
    assert len(train.boxes(0)) == 0
    assert val.size(3) == (40, 30)
    for index in range(5):
        x0, y0, x1, y1 = val.boxes(index)[0]
        assert (val.image(index)[y0 : y1 + 1, x0 : x1 + 1, val.labels[index]] == 255).all()


def test_listed_takes_class_names_from_their_file(listed: Path) -> None:
    (listed / "classes.txt").write_text("tench,0\nspringer,1\n")
    assert listed_records("train", str(listed), SPLITS, None).classes == ["tench", "springer"]


def test_listed_boxes_refer_to_the_listed_sizes(listed: Path) -> None:
    """Images stored smaller than the lists say keep their boxes: only the ratio counts."""
    path = listed / "val" / "image 0, x.png"
    PIL.Image.open(path).resize((20, 15)).save(path)
    val = listed_records("val", str(listed), SPLITS, None)
    assert val.image(0).shape == (15, 20, 3)
    assert val.size(0) == (40, 30)


def test_listed_has_a_held_out_split_where_there_is_one(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "three", {"train": 4, "val": 3, "test": 2})
    splits = {"train": "train", "val": "val", "test": "test"}
    assert len(listed_records("test", str(root), splits, None).labels) == 2


def test_real_images_are_read(shared: Path) -> None:
    records = listed_records("val", str(shared / "data" / "ilsvrc10"), SPLITS, None)
    assert len(records.labels) == 300
    assert len(records.box_table) == 456
    assert records.classes[0] == "n01440764"
    assert records.image(0).shape == (224, 224, 3)


def read_imagenet(root: Path, split: Split, masks: str | None = None) -> FileRecords:
    expected = {"train": 6, "val": 4, "test": 2}
    return imagenet_records(split, str(root), BOX_FOLDERS, str(root / "metadata"), masks, 2, expected)


@pytest.mark.parametrize("flat", [True, False])
def test_imagenet_reads_the_official_layout(imagenet: Path, flat: bool) -> None:
    if not flat:
        for number, wnid in ((1, "n02102040"), (2, "n01440764")):
            (imagenet / "val" / wnid).mkdir()
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            (imagenet / "val" / name).rename(imagenet / "val" / wnid / name)
    train, val = (read_imagenet(imagenet, split) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.classes == ["n01440764", "n02102040"]
    found = {Path(val.name(i)).name: (int(val.labels[i]), val.boxes(i).tolist()) for i in range(2)}
    assert found == {
        "ILSVRC2012_val_00000001.JPEG": (1, [[1, 2, 20, 23]]),
        "ILSVRC2012_val_00000002.JPEG": (0, [[1, 2, 20, 23], [2, 2, 20, 23]]),
    }
    assert val.size(0) == (32, 24)
    assert val.image(0).shape == train.image(2).shape == (24, 32, 3)


def test_imagenet_v2_is_held_out(imagenet: Path) -> None:
    with pytest.raises(DataError, match=r"chosen on ImageNetV2, whose lists .* selection=test"):
        read_imagenet(imagenet, "val")
    write_imagenet_v2(imagenet)
    val = read_imagenet(imagenet, "val")
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert val.name(2) == "val2/1/a31041fd31109279f69ba5827fe508eee00abd710.jpeg"
    assert val.boxes(0).tolist() == [[4, 3, 20, 17], [0, 0, 39, 29]]
    assert val.image(3).shape == (30, 40, 3)


def test_imagenet_boxes_may_come_as_lists(imagenet: Path) -> None:
    by_xml = read_imagenet(imagenet, "test")
    shutil.rmtree(imagenet / "Annotations")
    with pytest.raises(DataError, match=r"no box annotations .* or put the WSOL benchmark's lists into '.*/test'"):
        read_imagenet(imagenet, "test")
    images = {by_xml.name(i): (int(by_xml.labels[i]), by_xml.boxes(i).tolist()) for i in range(2)}
    write_lists(imagenet / "metadata" / "test", images)
    by_lists = read_imagenet(imagenet, "test")
    assert by_lists.labels.tolist() == by_xml.labels.tolist() == [1, 0]
    for index in range(2):
        assert by_lists.boxes(index).tolist() == by_xml.boxes(index).tolist()


@pytest.mark.parametrize("lists", [False, True])
def test_imagenet_masks_are_of_some_of_the_images(imagenet: Path, lists: bool) -> None:
    if lists:
        shutil.rmtree(imagenet / "Annotations")
        names = {f"val/ILSVRC2012_val_{number:08d}.JPEG": (0, [(1, 2, 20, 24)]) for number in (1, 2)}
        write_lists(imagenet / "metadata" / "test", names)
    with pytest.raises(DataError, match=r"dataset.masks: there is no folder '.*/masks'"):
        read_imagenet(imagenet, "test", "masks")
    mark(imagenet / "masks" / "other.png", [(0, 0, 3, 3)])
    with pytest.raises(DataError, match=r"holds no mask of an image in val/: .* such as ILSVRC2012_val_00000001.png"):
        read_imagenet(imagenet, "test", "masks")
    mark(imagenet / "masks" / "ILSVRC2012_val_00000002.png", [(0, 0, 3, 3)])
    records = read_imagenet(imagenet, "test", "masks")
    assert records.mask(0) is None
    assert records.mask(1).sum() == 16  # type: ignore[union-attr]


def test_incomplete_imagenet_is_named(imagenet: Path) -> None:
    published = {"train": 1281167, "val": 10000, "test": 50000}
    message = "the train split of ILSVRC 2012 has 6 images here, 1281167 as published"
    with pytest.raises(DataError, match=message):
        imagenet_records("train", str(imagenet), BOX_FOLDERS, "none", None, 2, published)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)) if mode == "I;16" else None
    (image or PIL.Image.new("RGB", (8, 8), (200, 30, 30)).convert(mode)).save(tmp_path / f"x.{suffix}")
    assert read_image(tmp_path / f"x.{suffix}").shape == (8, 8, 3)


def test_png_under_the_name_of_a_jpeg_is_read(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "x.JPEG", format="PNG")
    assert read_image(tmp_path / "x.JPEG")[0, 0].tolist() == [9, 8, 7]


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    PIL.Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (4, 6, 3)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    PIL.Image.new("RGB", (60, 60), (1, 2, 3)).save(tmp_path / "short.jpg")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "short.jpg").read_bytes()[:400])
    for name in ("cut.jpg", "short.jpg"):
        with pytest.raises(DataError, match=f"{name}' cannot be decoded"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"none.jpg' does not exist"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
def test_jpegs_have_the_pixels_that_pil_decodes(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))
    coarse.resize((131, 97), PIL.Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "x.jpg", **options)
    expected = by_pil(tmp_path / "x.jpg")
    assert expected is not None
    assert np.array_equal(read_image(tmp_path / "x.jpg"), expected)


def by_pil(path: Path) -> np.ndarray | None:
    """An image as PIL decodes it; None where it refuses."""
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_are_read_where_pil_reads_them_and_named_where_not(tmp_path: Path, progressive: bool) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.jpg"
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))
    coarse.resize((131, 97), PIL.Image.Resampling.BICUBIC).save(path, progressive=progressive)
    whole = path.read_bytes()
    damaged = [whole[: len(whole) - cut] for cut in (1, 2, 3, 100, 2000)]
    for _ in range(80):
        changed = bytearray(whole)
        changed[rng.integers(2, len(whole))] ^= int(rng.integers(1, 256))
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        expected = by_pil(path)
        if expected is None:
            refused += 1
            with pytest.raises(DataError, match=r"x.jpg' cannot be decoded"):
                read_image(path)
        else:
            assert np.array_equal(read_image(path), expected)
    assert 5 <= refused < len(damaged) // 2
