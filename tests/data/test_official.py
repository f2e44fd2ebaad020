"""Genuine rows of the benchmarks' files, in the layouts in which copies go round, through the readers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from tests.conftest import protocol
from tests.data.layouts import structs, write_lines
from tests.data.official import (
    BANNER,
    EXCERPTS,
    WNIDS,
    blank,
    numbers,
    read_rows,
    write_official_aircraft,
    write_official_cars,
    write_official_cub,
    write_official_dogs,
    write_official_imagenet,
    write_official_lists,
    write_official_openimages,
)
from wsolkit.data.benchmarks.aircraft import aircraft_records
from wsolkit.data.benchmarks.cars import cars_records
from wsolkit.data.benchmarks.cub import cub_records
from wsolkit.data.benchmarks.dogs import dogs_records
from wsolkit.data.benchmarks.imagenet import imagenet_records
from wsolkit.data.benchmarks.openimages import openimages_records
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import FileRecords, Split
from wsolkit.errors import DataError


@pytest.fixture(params=["carried", "shared"])
def excerpts(request: pytest.FixtureRequest) -> Path:
    """Some rows, which are always there, and hundreds of them, which may lie beside the project."""
    if request.param == "carried":
        return EXCERPTS
    shared: Path = request.getfixturevalue("shared")
    return shared / "data" / "official-excerpts"


def boxes_of(records: FileRecords) -> dict[str, list[list[int]]]:
    return {records.name(index): records.boxes(index).tolist() for index in range(len(records.labels))}


def cub(root: Path, split: Split, **changes: Any) -> FileRecords:
    settings: dict[str, Any] = {
        **{"masks": None, "mask_threshold": 0, "num_classes": None, "expected": None},
        **{"held_out_root": f"{root}/CUBV2", "held_out_lists": f"{root}/metadata/val"},
    }
    return cub_records(split, str(root), **settings | changes)


def test_cub_has_the_boxes_of_the_benchmark_and_spa_its_own(tmp_path: Path, excerpts: Path) -> None:
    rows = write_official_cub(tmp_path, excerpts)
    with pytest.warns(UserWarning, match="CUB") as caught:
        test = cub(tmp_path, "test")
    assert boxes_of(test) == {row[1]: [numbers(row[4])] for row in rows}
    (line,) = {str(warning.message) for warning in caught}  # 16 test boxes pass an edge, 20 end at one
    assert line.startswith(f"the test split of CUB-200-2011: 36 of {len(rows):,} boxes reach past an edge")
    spa = protocol("spa", far_corner_shift=-1)
    for index, row in enumerate(rows):
        x, y, width, height = numbers(row[3])
        truth = spa.truth(test.uncut_boxes(index), *numbers(row[5]))
        assert truth.tolist() == [[x, y, x + width - 1, y + height - 1]]
    held_out = read_rows(excerpts, "cubv2")
    assert boxes_of(cub(tmp_path, "val")) == {row[0]: [numbers(row[3])] for row in held_out}
    assert cub(tmp_path, "val").labels.tolist() == [int(row[1]) for row in held_out]


def imagenet(root: Path, split: Split, num_classes: int = 1000, **changes: Any) -> FileRecords:
    settings: dict[str, Any] = {
        **{"box_folders": ["Annotations/CLS-LOC/val", "bbox/val", "val"], "lists": f"{root}/metadata"},
        **{"masks": None, "expected": None},
    }
    return imagenet_records(split, str(root), num_classes=num_classes, **settings | changes)


def in_class_folders(val: Path, rows: list[list[str]]) -> None:
    for row in rows:
        (val / row[1]).mkdir(exist_ok=True)
        (val / row[0]).rename(val / row[1] / row[0])


def check_validation(records: FileRecords, rows: list[list[str]]) -> None:
    wnids = WNIDS.read_text().split()
    found = {Path(name).name: boxes for name, boxes in boxes_of(records).items()}
    assert found == {row[0]: list(map(numbers, row[3:])) for row in rows}
    labels = {Path(records.name(index)).name: wnids[label] for index, label in enumerate(records.labels)}
    assert labels == {row[0]: row[1] for row in rows}
    assert all((records.root / records.name(index)).is_file() for index in range(len(rows)))


@pytest.mark.parametrize("folders", [False, True])
def test_ilsvrc_is_read_by_xml_and_by_lists(tmp_path: Path, excerpts: Path, folders: bool) -> None:
    xml = tmp_path / "Annotations" / "CLS-LOC" / "val"
    rows = write_official_imagenet(tmp_path, xml, excerpts)
    if folders:
        in_class_folders(tmp_path / "val", rows)
    check_validation(imagenet(tmp_path, "test"), rows)
    shutil.rmtree(tmp_path / "Annotations")
    labels = {wnid: str(label) for label, wnid in enumerate(WNIDS.read_text().split())}
    lists = tmp_path / "metadata" / "test"  # they name val/ILSVRC2012_val_….JPEG, wherever in val/ that is
    write_official_lists(lists, [[row[0], labels[row[1]], *row[2:]] for row in rows], "val/")
    check_validation(imagenet(tmp_path, "test"), rows)


@pytest.mark.parametrize("root", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_ilsvrc_of_kaggle(tmp_path: Path, root: str) -> None:
    kaggle = tmp_path / "ILSVRC"
    xml = kaggle / "Annotations" / "CLS-LOC"
    rows = write_official_imagenet(kaggle / "Data" / "CLS-LOC", xml / "val", EXCERPTS)
    (xml / "train" / "n01440764").mkdir(parents=True)
    check_validation(imagenet(tmp_path / root, "test"), rows)


OLD = {"a31041fd31109279f69ba5827fe508eee00abd75": "0/0", "c6006866ff066ef85e82e2f62bd8766fbf8ce8ab": "1/0"}
"""What images were called once, as the benchmark's mapping.txt has it."""


@pytest.mark.parametrize("folder", ["val2", "imagenetv2-threshold0.7-format-val"])
@pytest.mark.parametrize("lists", ["old", "new"])
@pytest.mark.parametrize("copy", ["old", "new"])
def test_imagenet_v2_by_both_of_its_names(tmp_path: Path, lists: str, copy: str, folder: str) -> None:
    rows = [row for row in read_rows(EXCERPTS, "imagenetv2") if Path(row[0]).stem in OLD]
    assert len(rows) == 2
    for wnid in WNIDS.read_text().split()[:2]:
        (tmp_path / "train" / wnid).mkdir(parents=True)

    def name(row: list[str], kind: str) -> str:
        return f"{OLD[Path(row[0]).stem]}.jpeg" if kind == "old" else row[0].removeprefix("val2/")

    for row in rows:
        blank(tmp_path / folder / name(row, copy), *numbers(row[2]))
    metadata = tmp_path / "metadata" / "val"
    write_official_lists(metadata, [[name(row, lists), *row[1:]] for row in rows], "val2/")
    if lists != copy:
        with pytest.raises(DataError, match=r"calls images as .*/mapping.txt', .* at the commit e9972606"):
            imagenet(tmp_path, "val", 2)
        write_lines(metadata / "mapping.txt", [f"{name(row, 'old')}, {name(row, 'new')}" for row in rows])
    records = imagenet(tmp_path, "val", 2)
    assert boxes_of(records) == {f"{folder}/{name(row, copy)}": list(map(numbers, row[3:])) for row in rows}
    assert records.labels.tolist() == [0, 1]


def test_all_rows_of_imagenet_v2(tmp_path: Path, excerpts: Path) -> None:
    write_official_imagenet(tmp_path, tmp_path / "xml", EXCERPTS)
    rows = read_rows(excerpts, "imagenetv2")
    for row in rows:
        blank(tmp_path / row[0], *numbers(row[2]))
    write_official_lists(tmp_path / "metadata" / "ILSVRC" / "val", rows)
    records = imagenet(tmp_path, "val")
    assert boxes_of(records) == {row[0]: list(map(numbers, row[3:])) for row in rows}
    assert records.labels.tolist() == [int(row[1]) for row in rows]


KAGGLE_DOGS = ("images/Images", "annotations/Annotation", "lists")


@pytest.mark.parametrize("places", [("Images", "Annotation", "."), KAGGLE_DOGS, tuple(f"x/{p}" for p in KAGGLE_DOGS)])
def test_dogs(tmp_path: Path, excerpts: Path, places: tuple[str, str, str]) -> None:
    images, annotations, lists = (tmp_path / place for place in places)
    rows = write_official_dogs(images, annotations, lists, excerpts)
    test = dogs_records("test", str(tmp_path), None, None)
    assert boxes_of(test) == {row[0]: list(map(numbers, row[3:])) for row in rows}
    assert test.labels.tolist() == [int(row[1]) for row in rows]
    assert test.root == images
    assert len(dogs_records("train", str(tmp_path), None, None).labels) == len(read_rows(excerpts, "dogs_train"))


@pytest.mark.parametrize("data", ["data", "fgvc-aircraft-2013b/fgvc-aircraft-2013b/data", "."])
def test_aircraft(tmp_path: Path, excerpts: Path, data: str) -> None:
    rows = write_official_aircraft(tmp_path / data, excerpts)
    expected = {}
    for row in rows:
        x0, y0, x1, y1, height, width = numbers(row[3])
        box = np.array([x0, y0, x1, y1]) - 1
        expected[f"{row[0]}.jpg"] = [np.clip(box, 0, [width - 1, height - BANNER - 1] * 2).tolist()]
    found: dict[str, list[list[int]]] = {}
    for split in ("val", "test"):
        records = aircraft_records(split, str(tmp_path), {s: s for s in ("train", "val", "test")}, BANNER, None, None)
        found |= boxes_of(records)
    assert found == {name: expected[name] for name in found}
    assert len(found) == sum(row[2] != "0" for row in rows)


def test_cars(tmp_path: Path, excerpts: Path) -> None:
    rows = write_official_cars(tmp_path, excerpts)
    test = cars_records("test", str(tmp_path), None, None)
    expected = {}
    for row in rows:
        x1, y1, x2, y2, height, width = numbers(row[3])
        expected[f"car_ims/{row[0]}.jpg"] = [[x1 - 1, y1 - 1, min(x2, width) - 1, min(y2, height) - 1]]
    assert boxes_of(test) == {name: expected[name] for name in boxes_of(test)}
    assert test.labels.tolist() == [int(row[1]) - 1 for row in rows if row[2] == "1"]


def test_cars_of_kaggle_and_every_row_of_its_tables(tmp_path: Path, shared: Path) -> None:
    official = shared / "data" / "official-excerpts"
    kit = tmp_path / "car_devkit" / "devkit"
    kit.mkdir(parents=True)
    for name in ("cars_meta", "cars_train_annos", "cars_test_annos"):
        shutil.copy(official / f"{name}.mat", kit)
    bare = scipy.io.loadmat(kit / "cars_test_annos.mat", squeeze_me=True)["annotations"]
    labels = [int(line.split()[1]) for line in (official / "cars_test_labels.txt").read_text().splitlines()]
    rows = [
        {**dict(zip(bare.dtype.names, row, strict=True)), "class": label}
        for row, label in zip(bare.tolist(), labels, strict=True)
    ]
    scipy.io.savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": structs(rows)})
    images = tmp_path / "cars_test" / "cars_test"
    for row in rows:
        blank(images / row["fname"], row["bbox_x2"], row["bbox_y2"])
    for number in range(1, 8145):
        path = tmp_path / "cars_train" / "cars_train" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    published = {"train": 8144, "test": 8041}
    train, test = (cars_records(split, str(tmp_path), 196, published) for split in ("train", "test"))
    assert (train.classes[0], train.labels[0]) == ("AM General Hummer SUV 2000", 13)
    corners = [[row[f"bbox_{side}"] - 1 for side in ("x1", "y1", "x2", "y2")] for row in rows]
    assert test.box_table.tolist() == corners
    (images / "00007.jpg").unlink()
    kept = [row for row in rows if row["fname"] != "00007.jpg"]
    scipy.io.savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": structs(kept)})
    with pytest.raises(
        DataError, match=r"has 8040 images here, 8041 as published: complete the copy \(number 7 missing\), or"
    ):
        cars_records("test", str(tmp_path), 196, published)


@pytest.mark.parametrize(
    ("images", "metadata"), [(".", "metadata"), ("dataset/OpenImages", "metadata/OpenImages"), ("x", "x/metadata")]
)
def test_openimages(tmp_path: Path, excerpts: Path, images: str, metadata: str) -> None:
    rows = write_official_openimages(tmp_path / images, tmp_path / metadata, excerpts)
    for split, found in rows.items():
        records = openimages_records(split, str(tmp_path), 100, None)  # type: ignore[arg-type]
        assert [records.name(index) for index in range(len(found))] == [row[0] for row in found]
        assert records.labels.tolist() == [int(row[1]) for row in found]
        assert all((records.root / row[0]).is_file() for row in found)
        if split != "train":
            assert isinstance(records.masks, MaskFiles)
            assert records.masks.objects == [[mask.split(",")[0] for mask in row[2:]] for row in found]


def write_cub(root: Path) -> None:
    write_official_cub(root, EXCERPTS)


def write_dogs(root: Path) -> None:
    write_official_dogs(root / "Images", root / "Annotation", root, EXCERPTS)


def write_imagenet(root: Path) -> None:
    write_official_imagenet(root, root / "bbox" / "val", EXCERPTS)


def write_aircraft(root: Path) -> None:
    write_official_aircraft(root / "data", EXCERPTS)


def read_dogs(root: Path, split: Split) -> FileRecords:
    return dogs_records(split, str(root), None, None)


def read_cars(root: Path, split: Split) -> FileRecords:
    return cars_records(split, str(root), None, None)


def read_aircraft(root: Path, split: Split) -> FileRecords:
    return aircraft_records(split, str(root), {"train": "train", "val": "val", "test": "test"}, BANNER, None, None)


def read_openimages(root: Path, split: Split) -> FileRecords:
    return openimages_records(split, str(root), 100, None)


@pytest.mark.parametrize(
    ("write", "read", "too_low"),
    [
        (write_cub, cub, "images"),
        (write_cub, cub, "images/001.Black_footed_Albatross"),
        (write_dogs, read_dogs, "Annotation"),
        (write_imagenet, imagenet, "train"),
        (write_aircraft, read_aircraft, "data/images"),
        (lambda root: write_official_cars(root, EXCERPTS), read_cars, "car_ims"),
        (lambda root: write_official_openimages(root, root / "metadata", EXCERPTS), read_openimages, "test"),
    ],
)
def test_a_root_too_high_or_too_low(
    tmp_path: Path, write: Callable[[Path], object], read: Callable[[Path, Split], FileRecords], too_low: str
) -> None:
    root = tmp_path / "above" / "copy"
    write(root)
    (tmp_path / "above" / "other").mkdir()
    assert boxes_of(read(root.parent, "test")) == boxes_of(read(root, "test"))
    with pytest.raises(DataError, match=r"lies within .*: you probably mean dataset.root=.*/copy(/data)?$"):
        read(root / too_low, "test")
    shutil.copytree(root, tmp_path / "above" / "other copy")
    with pytest.raises(DataError, match=r"holds more than one copy .* one of '.*/copy', '.*/other copy'"):
        read(root.parent, "test")


def test_cub_as_its_archives_unpack(tmp_path: Path) -> None:
    """The masks lie beside the folder that has the rest, or in a folder twice."""
    root = tmp_path / "CUB_200_2011"
    rows = write_official_cub(root, EXCERPTS)
    for row in rows:
        blank(tmp_path / "segmentations" / "segmentations" / Path(row[1]).with_suffix(".png"), 2, 2)
    (root / "CUBV2").rename(tmp_path / "CUBV2")
    shutil.move(root / "metadata", tmp_path / "metadata")
    for place in (tmp_path, root):
        lists = {"held_out_lists": f"{tmp_path}/metadata/val"}
        assert len(cub(place, "val", **lists).labels) == len(read_rows(EXCERPTS, "cubv2"))
        test = cub(place, "test", masks="segmentations")
        assert isinstance(test.masks, MaskFiles)
        assert test.masks.count() == len(rows)


def drop_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "n01443537")


def add_stray(root: Path) -> None:
    (root / "train" / "a stray").mkdir()


def swap(root: Path) -> None:
    drop_class(root)
    add_stray(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_class, r"holds 999 class folders, .* says 1000: complete the copy \(class n01443537 missing\), or"),
        (add_stray, r"holds 1001 class folders, .* says 1000: take out 'a stray', which is no class of ILSVRC 2012$"),
        (swap, r"holds 1000 class folders, .* take out 'a stray', .* \(class n01443537 missing\)$"),
    ],
)
def test_classes_that_are_missing_or_strange_are_named(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    write_imagenet(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        imagenet(tmp_path, "train")


def test_labels_of_lists_are_of_the_same_classes_whatever_is_in_train(tmp_path: Path) -> None:
    """Someone sets num_classes to the number of folders: the labels of the 1,000 classes must not be shifted."""
    write_imagenet(tmp_path)
    rows = [row for row in read_rows(EXCERPTS, "imagenetv2") if row[1] != "1"]
    for row in rows:
        blank(tmp_path / row[0], *numbers(row[2]))
    write_official_lists(tmp_path / "metadata" / "val", rows)
    add_stray(tmp_path)
    whole = imagenet(tmp_path, "val", 1001)
    assert whole.classes[0] == "a stray"
    names = WNIDS.read_text().split()
    assert [whole.classes[label] for label in whole.labels] == [names[int(row[1])] for row in rows]
    shutil.rmtree(tmp_path / "train" / "a stray")
    drop_class(tmp_path)
    part = imagenet(tmp_path, "val", 999)
    assert [part.classes[label] for label in part.labels] == [names[int(row[1])] for row in rows]
    shutil.rmtree(tmp_path / "train" / names[int(rows[-1][1])])
    with pytest.raises(DataError, match=r"gives an image the label 102: .* has no folder in train/"):
        imagenet(tmp_path, "val", 998)


def test_labels_of_cub_v2_are_of_the_same_classes_whatever_is_in_the_file(tmp_path: Path) -> None:
    write_cub(tmp_path)
    path = tmp_path / "classes.txt"
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(DataError, match=r"label 0, which is of '002.*'; the label of|gives .* the label \d"):
        cub(tmp_path, "val")
    with pytest.raises(DataError, match=r"complete the copy \(number 1, .* missing\), or"):
        cub(tmp_path, "val", num_classes=200)


def test_images_that_are_missing_are_named(tmp_path: Path) -> None:
    rows = write_official_imagenet(tmp_path, tmp_path / "bbox" / "val", EXCERPTS)
    published = {"train": 1281167, "test": len(rows)}
    assert len(imagenet(tmp_path, "test", expected=published).labels) == len(rows)
    (tmp_path / "val" / rows[3][0]).unlink()
    with pytest.raises(DataError, match=rf"has {len(rows) - 1} images .* complete the copy \(number 4 missing\), or"):
        imagenet(tmp_path, "test", expected=published)
    blank(tmp_path / "train" / "n01440764" / "n01440764_18.JPEG", 1, 1)
    with pytest.raises(
        DataError, match=r"complete the copy \(images of n01440764, n01443537, .* and 995 more missing\)"
    ):
        imagenet(tmp_path, "train", expected=published)
    (tmp_path / "val" / rows[0][1]).mkdir()
    shutil.copy(tmp_path / "val" / rows[0][0], tmp_path / "val" / rows[0][1])
    with pytest.raises(DataError, match=rf"{rows[0][0]}' is there twice"):
        imagenet(tmp_path, "test")
