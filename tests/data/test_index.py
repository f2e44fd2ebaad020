"""The index: what is read from it is what the official files say, and it is not used where they have changed."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_imagenet, write_listed
from tests.data.layouts import draw, write_aircraft, write_cub, write_openimages
from tests.data.test_folder import coco, encode, save, write_folder
from wsolkit import build_datamodule, load_config
from wsolkit.build import build_records
from wsolkit.data.files import list_folders, noted_sources, read_text
from wsolkit.data.preparing.index import read_index, write_index
from wsolkit.data.records import FileRecords, Split
from wsolkit.errors import DataError
from wsolkit.settings.compose import plain

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SMALL = ("dataset.num_classes=2", "dataset.expected=null")


def write(name: str, root: Path, *overrides: str, splits: tuple[Split, ...] = SPLITS) -> dict[Split, FileRecords]:
    """Write the index of a small data set; what the official files say."""
    cfg = load_config(f"dataset={name}", f"dataset.root={root}", *overrides)
    node = plain(cfg)["dataset"]
    return write_index(Path(node["index"]), splits, build_records(cfg), node["records"], root)


def read(name: str, root: Path, split: Split, *overrides: str) -> FileRecords | str:
    node = plain(load_config(f"dataset={name}", f"dataset.root={root}", *overrides))["dataset"]
    return read_index(Path(node["index"]), split, node["records"], root)


def assert_same(found: FileRecords | str, expected: FileRecords) -> None:
    assert isinstance(found, FileRecords), found
    assert found.classes == expected.classes
    assert np.array_equal(found.labels, expected.labels)
    for index in range(len(expected.labels)):
        assert found.name(index) == expected.name(index)
        assert found.size(index) == expected.size(index)
        assert found.boxes(index).tolist() == expected.boxes(index).tolist()
        assert np.array_equal(found.image(index), expected.image(index))
        masks = found.mask(index), expected.mask(index)
        assert np.array_equal(*masks) if masks[1] is not None else masks[0] is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "layout"), [("cub", write_cub), ("openimages", write_openimages)])
def test_index_says_what_the_official_files_say(name: str, layout: Callable[[Path], Path], tmp_path: Path) -> None:
    root = layout(tmp_path / "data")
    for split, expected in write(name, root, *SMALL).items():
        assert_same(read(name, root, split, *SMALL), expected)


def test_photos_stay_upright_or_as_they_are_annotated(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", "train", "val")
    save(root, coco(root))  # its photo has the size that it is stored at
    settings = ("dataset.annotations=annotations/val.json",)
    written = write("folder", root, *settings)
    for split, expected in written.items():
        assert_same(read("folder", root, split, *settings), expected)
    assert [written[split].image(3).shape for split in SPLITS] == [(40, 30, 3), (30, 40, 3), (30, 40, 3)]
    changed = read("folder", root, "train", *settings, "dataset.exif=ignore")
    assert changed == "it was made with exif=None, and this run has ignore"


def test_banner_of_aircraft_stays_cut_off(tmp_path: Path) -> None:
    root = write_aircraft(tmp_path / "data")
    settings = ("dataset.num_classes=3", "dataset.expected=null")
    for split, expected in write("aircraft", root, *settings).items():
        assert expected.image(0).shape == (30, 40, 3)
        assert_same(read("aircraft", root, split, *settings), expected)


def test_columns_are_used_where_they_lie(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "data")
    write("cub", root, *SMALL)
    found = read("cub", root, "test", *SMALL)
    assert isinstance(found, FileRecords)
    assert found.sizes is not None
    for column in (found.labels, found.box_table, found.box_starts, found.sizes, found.ids.block, found.ids.starts):
        assert not column.flags.owndata
        assert not column.flags.writeable  # the file's own pages


def test_index_holds_wherever_the_data_set_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cub(tmp_path / "data")
    expected = write("cub", root, *SMALL)
    root.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        found = read("cub", Path("moved"), split, *SMALL)
        assert isinstance(found, FileRecords)
        assert found.name(0) == expected[split].name(0)
        assert found.image(0).shape == (30, 40, 3)


@pytest.mark.parametrize("form", ["polygon", "compressed"])
def test_run_lengths_and_classes_of_own_images(form: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "my images", "train", "val")
    parts = [((4, 3, 20, 17), 0), ((24, 20, 31, 28), 0), ((0, 0, 19, 29), 1)]
    save(
        root,
        coco(
            root,
            *(
                {"image_id": 7, "category_id": 1, "iscrowd": crowd, "segmentation": encode(box, form)}
                for box, crowd in parts
            ),
        ),
    )
    settings = ("dataset.annotations=annotations/val.json",)
    expected = write("folder", root, *settings, splits=("train", "test"))
    assert set(np.unique(expected["test"].mask(0))) == {0, 1, 255}  # type: ignore[arg-type]
    for split, records in expected.items():
        assert_same(read("folder", root, split, *settings), records)


def test_new_class_in_the_root_itself_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a", "b"):
        for place in range(5):
            draw(root / name / f"{place}.jpg", [(1, 2, 9, 9)])
    write("folder", root, "dataset.splits=null", splits=("train", "test"))
    (root / "images.tar").touch()
    assert isinstance(read("folder", root, "train", "dataset.splits=null"), FileRecords)
    draw(root / "c" / "0.jpg", [(1, 2, 9, 9)])
    assert "has changed since" in str(read("folder", root, "train", "dataset.splits=null"))


def change_list(root: Path) -> None:
    path = root / "bounding_boxes.txt"
    path.write_text(path.read_text().replace("4 4.0", "4 3.0"))


def same_size_and_another_time(root: Path) -> None:
    path = root / "image_class_labels.txt"
    later = time.time() + 5
    os.utime(path, (later, later))


@pytest.mark.parametrize(
    ("change", "split", "what"),
    [
        (change_list, "test", "bounding_boxes.txt' has changed"),
        (same_size_and_another_time, "train", "image_class_labels.txt' has changed"),
        (lambda root: (root / "images.txt").unlink(), "train", "images.txt' has changed"),
        (lambda root: next(root.glob("images/001.*/*")).unlink(), "train", "Black_footed_Albatross' has changed"),
        (lambda root: (root / "images/002.Laysan_Albatross/new.jpg").touch(), "train", "Laysan_Albatross' has changed"),
        (lambda root: next(root.glob("segmentations/*/*")).unlink(), "test", "segmentations/"),
        (lambda root: next(root.glob("CUBV2/*/*")).unlink(), "val", "CUBV2/"),
        (lambda root: (root / "metadata/val/image_sizes.txt").write_text(""), "val", "image_sizes.txt' has changed"),
    ],
)
def test_changed_files_are_noticed(change: Callable[[Path], Any], split: Split, what: str, tmp_path: Path) -> None:
    root = write_cub(tmp_path / "data")
    write("cub", root, *SMALL)
    change(root)
    found = read("cub", root, split, *SMALL)
    assert isinstance(found, str)
    assert what in found
    assert "has changed since it was made" in found


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("dataset.masks=null", "masks=segmentations, and this run has None"),
        ("dataset.mask_threshold=127", "mask_threshold=0, and this run has 127"),
        ("dataset.held_out_root=elsewhere", "held_out_root=ROOT/CUBV2, and this run has elsewhere"),
        (
            "dataset.records._target_=other.cub",
            "_target_=wsolkit.data.benchmarks.cub.cub_records, and this run has other.cub",
        ),
    ],
)
def test_other_settings_are_noticed(override: str, what: str, tmp_path: Path) -> None:
    root = write_cub(tmp_path / "data")
    write("cub", root, *SMALL)
    assert f"it was made with {what}" in str(read("cub", root, "test", *SMALL, override))


def test_lists_elsewhere_are_watched_too(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "data")
    shutil.move(root / "metadata" / "val", tmp_path / "lists")
    settings = (*SMALL, f"dataset.held_out_lists={tmp_path}/lists")
    expected = write("cub", root, *settings)
    assert_same(read("cub", root, "val", *settings), expected["val"])
    (tmp_path / "lists" / "localization.txt").write_text("")
    assert "lists/localization.txt' has changed" in str(read("cub", root, "val", *settings))


def test_damaged_and_foreign_indices_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cub(tmp_path / "data")
    write("cub", root, *SMALL, splits=("train",))
    assert read("cub", root, "test", *SMALL) == "it does not have this split"
    monkeypatch.setattr("wsolkit.data.preparing.index.FORMAT", 99)
    assert "another version" in str(read("cub", root, "train", *SMALL))
    monkeypatch.undo()
    index = root / ".wsolkit" / "index.arrow"
    content = index.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no Arrow file at all"):
        index.write_bytes(damaged)
        assert "it is damaged" in str(read("cub", root, "train", *SMALL))


def test_training_uses_the_index_and_says_so_if_it_cannot(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "data", {"train": 12, "val": 5})
    write("listed", root, splits=("train", "test"))
    settings = ("dataset=listed", f"dataset.root={root}", "dataset.num_workers=0")

    def labels() -> list[int]:
        datamodule = build_datamodule(load_config(*settings))
        datamodule.setup("test")
        return list(datamodule.dataset("test").records.labels)

    path = root / "metadata" / "val" / "class_labels.txt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels() == [0, 1, 0, 1, 0]
        path.write_text(path.read_text())  # another time of change
    path.write_text(path.read_text().replace(",0", ",1"))
    with pytest.warns(
        UserWarning, match=r"index '.*' is not used for the test split: '.*class_labels.txt' has changed"
    ):
        assert labels() == [1] * 5
    (root / ".wsolkit" / "index.arrow").unlink()
    assert labels() == [1] * 5


def test_batches_from_the_index_are_those_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cub(tmp_path / "data")
    settings = ("dataset=cub", f"dataset.root={root}", *SMALL, "dataset.num_workers=2", "dataset.batch_size=4")

    def batches() -> list[Any]:
        datamodule = build_datamodule(load_config(*settings))
        datamodule.setup("fit")
        datamodule.setup("test")
        return [next(iter(datamodule.train_dataloader())), next(iter(datamodule.test_dataloader()))]

    from_files = batches()
    write("cub", root, *SMALL)
    monkeypatch.setattr("wsolkit.data.benchmarks.cub.read_by_id", None)  # the official lists are not touched any more
    for batch, expected in zip(batches(), from_files, strict=True):
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["label"], expected["label"])
    assert torch.equal(batch["mask"], expected["mask"])
    assert [boxes.tolist() for boxes in batch["boxes"]] == [boxes.tolist() for boxes in expected["boxes"]]


def test_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "data")
    (root / ".wsolkit").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written .*dataset.index=FILE"):
        write("cub", root, *SMALL)


def test_readers_say_what_they_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png")
    with noted_sources() as seen:
        read_text(tmp_path / "list.txt")
        list_folders(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_text(tmp_path / "gone.txt")
    assert seen == {tmp_path / "list.txt", tmp_path, tmp_path / "gone.txt"}
    list_folders(Path(__file__).parent)
    assert len(seen) == 3


def test_boxes_beside_the_root_are_watched(tmp_path: Path) -> None:
    """Kaggle's Annotations/ do not lie in the folder that has the images."""
    root = write_imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    annotations = (root / "Annotations").rename(tmp_path / "ILSVRC" / "Annotations")
    for split, expected in write("imagenet", root, *SMALL, splits=("train", "test")).items():
        assert_same(read("imagenet", root, split, *SMALL), expected)
    path = next(annotations.rglob("*.xml"))
    path.write_text(path.read_text().replace("<xmin>1<", "<xmin>3<"))
    assert f"{path.name}' has changed since it was made" in str(read("imagenet", root, "test", *SMALL))
