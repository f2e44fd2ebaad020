"""Your own images in folders, with boxes and masks in COCO's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as rle_masks

from tests.data.layouts import BOXES, KINDS, draw
from wsolkit.data.benchmarks.folder import folder_records
from wsolkit.data.files import IMAGE_SUFFIXES
from wsolkit.data.records import FileRecords, Split, read_image
from wsolkit.errors import ConfigError, DataError

CLASSES = ("grey cat", "Žába, green")
IMAGES = ", ".join(IMAGE_SUFFIXES)
OWN = {"train": "train", "val": "val", "test": "val"}


def write_folder(root: Path, *splits: str, images: int = 3) -> Path:
    """A folder for each class, in each of some splits; names have spaces, one image lies deeper."""
    for split in splits:
        for label, name in enumerate(CLASSES):
            for place in range(images):
                below = "more of them/" if place == 2 else ""
                kind, suffix = KINDS[(place + label) % len(KINDS)], ("jpg", "JPEG", "jpeg")[place % 3]
                path = root / split / name / f"{below}{name[:3]} {place}.{suffix}"
                draw(path, [BOXES[place % len(BOXES)]], kind, place)
            (root / split / name / "notes.txt").write_text("no image")
            (root / split / name / "._cat 0.jpg").write_bytes(b"what some systems leave behind")
        (root / split / ".cache").mkdir(exist_ok=True)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "my images", "train", "val")


def read(root: Path, split: Split, **changes: Any) -> FileRecords:
    settings = {"splits": OWN, "test_fraction": 0.2, "annotations": None, "num_classes": None}
    return folder_records(split, str(root), **settings | changes)  # type: ignore[arg-type]


def names(records: FileRecords) -> list[str]:
    return [records.name(index) for index in range(len(records.labels))]


def test_folders_are_classes(root: Path) -> None:
    train, test = read(root, "train"), read(root, "test")
    assert train.classes == test.classes == list(CLASSES)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert names(train)[:3] == [
        "train/grey cat/gre 0.jpg",
        "train/grey cat/gre 1.JPEG",
        "train/grey cat/more of them/gre 2.jpeg",
    ]
    upright = {name for index, name in enumerate(names(train)) if train.image(index).shape == (40, 30, 3)}
    assert upright == {"train/Žába, green/more of them/Žáb 2.jpeg"}  # a photo that EXIF data turn
    assert len(test.boxes(0)) == 0
    assert test.mask(0) is None


def test_a_third_folder_may_be_held_out(root: Path) -> None:
    write_folder(root, "test", images=1)
    splits = {"train": "train", "val": "val", "test": "test"}
    assert len(read(root, "val", splits=splits).labels) == 6
    assert names(read(root, "test", splits=splits)) == ["test/grey cat/gre 0.jpg", "test/Žába, green/Žáb 0.jpg"]


@pytest.mark.parametrize(("images", "fraction", "evaluated"), [(10, 0.2, 2), (10, 0.01, 1), (2, 0.9, 1), (10, 0.55, 6)])
def test_without_splits_a_share_of_each_class_is_evaluated(
    tmp_path: Path, images: int, fraction: float, evaluated: int
) -> None:
    root = write_folder(tmp_path, "", images=images)
    train, test = (read(root, split, splits=None, test_fraction=fraction) for split in ("train", "test"))
    assert set(names(train)).isdisjoint(names(test))
    assert len(names(train) + names(test)) == 2 * images
    assert np.bincount(test.labels).tolist() == [evaluated, evaluated]
    assert names(read(root, "test", splits=None, test_fraction=fraction)) == names(test)
    kept = set(names(test))
    draw(root / CLASSES[0] / "new.jpg", [])  # changes the choice by one image at most
    assert len(kept - set(names(read(root, "test", splits=None, test_fraction=fraction)))) <= 1


def remove(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in [path for path in root.glob(pattern) if path.is_file()]:
            path.unlink()

    return change


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda root: (root / "train").rename(root / "Train"), {}, "set dataset.splits=null"),
        (
            lambda root: (root / "val").rename(root / "valid"),
            {},
            "/val', which dataset.splits names: expected a folder",
        ),
        (
            lambda root: (root / "val" / "dog").mkdir(),
            {},
            "/val/dog' is no class: there is no such folder among the tr",
        ),
        (
            remove("train/grey cat/**/*"),
            {},
            f"train/grey cat' holds no images ({IMAGES}) to train",
        ),
        (
            remove("val/*/**/*"),
            {},
            f"/val' holds no images ({IMAGES}) in its classes' folders",
        ),
        (lambda root: None, {"num_classes": 3}, "/train' names 2 classes, dataset.num_classes says 3"),
        (lambda root: None, {"annotations": "a/val.json"}, "dataset.annotations: there is no file '"),
        (lambda root: None, {"splits": {**OWN, "train": "train/grey cat/more of them"}}, "holds no folders: expected"),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, change: Callable[[Path], None], settings: dict[str, Any], message: str
) -> None:
    change(root)
    with pytest.raises(DataError) as caught:
        for split in ("train", "test"):
            read(root, split, **settings)
    assert message in str(caught.value)


def test_wrong_settings_without_splits_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "", images=1)
    with pytest.raises(
        DataError, match="class 'grey cat' has one image: with dataset.splits=null each class needs two"
    ):
        read(root, "train", splits=None)
    with pytest.raises(ConfigError, match="dataset.test_fraction=1.5: expected a share of each class between 0 and 1"):
        read(root, "train", splits=None, test_fraction=1.5)
    with pytest.raises(DataError, match="has no held-out split: set dataset.held_out=false"):
        read(root, "val", splits=None)


def coco(root: Path, *annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A file for the images of val, of which each has a box around its bright rectangle, and more annotations."""
    files = names(read(root, "test"))
    images = [{"id": 7 + n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(files)]
    boxes = []
    for number in range(len(files)):
        x0, y0, x1, y1 = BOXES[number % 3]
        boxes.append(
            {
                "id": number,
                "image_id": 7 + number,
                "category_id": 1 + (number > 2),
                "bbox": [x0, y0, x1 + 1 - x0, y1 + 1 - y0],
            }
        )
    categories = [{"id": 1, "name": CLASSES[0]}, {"id": 2, "name": CLASSES[1]}, {"id": 3, "name": "bowl"}]
    return {"images": images, "annotations": [*boxes, *annotations], "categories": categories} | changes


def save(root: Path, content: object) -> Path:
    path = root / "annotations" / "val.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def annotated(root: Path, content: object) -> FileRecords:
    save(root, content)
    return read(root, "test", annotations={"test": "annotations/val.json"})


def test_boxes_are_those_of_the_image_s_class(root: Path) -> None:
    bowl = {"image_id": 7, "category_id": 3, "bbox": [1, 1, 2, 2]}
    second = {"image_id": 7, "category_id": 1, "bbox": [24.4, 19.6, 8.1, 9.3]}
    test = annotated(root, coco(root, bowl, second))
    assert [test.boxes(index).tolist() for index in range(1, 6)] == [[list(box)] for box in (*BOXES[1:], *BOXES)]
    assert test.boxes(0).tolist() == [list(BOXES[0]), [24, 20, 31, 28]]
    assert test.size(0) == (40, 30)
    assert test.mask(0) is None
    thing = coco(root, bowl, categories=[{"id": n, "name": "thing"} for n in (1, 2, 3)])
    assert annotated(root, thing).boxes(0).tolist() == [list(BOXES[0]), [1, 1, 2, 2]]
    thing.pop("categories")
    assert len(annotated(root, thing).boxes(0)) == 2
    assert len(read(root, "train", annotations="annotations/val.json").boxes(0)) == 0


@pytest.mark.parametrize("part", ["relative to the root", "relative to the split", "bare"])
def test_images_go_by_several_names(root: Path, part: str) -> None:
    content = coco(root)
    for image in content["images"]:
        path = Path(image["file_name"])
        short = path.name if part == "bare" else str(path.relative_to("val"))
        image["file_name"] = str(path) if part == "relative to the root" else short
    content["images"].append({"id": 99, "file_name": "train/another.jpg", "width": 1, "height": 1})
    content["annotations"].append({"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]})
    assert len(annotated(root, content).box_table) == 6


def test_one_file_serves_images_without_splits(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "all", "", images=4)
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.j*") if not path.name.startswith(".")]
    files += [path.relative_to(root).as_posix() for path in root.rglob("*.J*")]
    content = {
        "images": [{"id": name, "file_name": name, "width": 40, "height": 30} for name in files],
        "annotations": [{"image_id": name, "bbox": [1, 2, 3, 4]} for name in files],
    }
    (root / "all.json").write_text(json.dumps(content))
    test = read(root, "test", splits=None, annotations="all.json")
    assert test.box_table.tolist() == [[1, 2, 3, 5]] * 2


def rectangle(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((30, 40), np.uint8)
    x0, y0, x1, y1 = box
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return mask


def runs(mask: np.ndarray) -> list[int]:
    """Run lengths, column by column, of 0 first."""
    flat = mask.T.ravel()
    ends = [*np.flatnonzero(np.diff(flat)) + 1, flat.size]
    lengths: list[int] = np.diff([0, *ends]).tolist()
    return [0] * int(flat[0]) + lengths


def encode(box: tuple[int, int, int, int], form: str) -> Any:
    x0, y0, x1, y1 = box
    if form == "polygon":
        return [[x0, y0, x1 + 1, y0, x1 + 1, y1 + 1, x0, y1 + 1]]
    if form == "runs":
        return {"size": [30, 40], "counts": runs(rectangle(box))}
    compressed = rle_masks.encode(np.asfortranarray(rectangle(box)))
    return {"size": [30, 40], "counts": compressed["counts"].decode()}


@pytest.mark.parametrize("form", ["polygon", "runs", "compressed"])
def test_masks_are_merged_and_crowds_ignored(root: Path, form: str) -> None:
    one, two = BOXES[0], (24, 20, 31, 28)
    content = coco(
        root,
        {"image_id": 7, "category_id": 1, "segmentation": encode(one, form)},
        {"image_id": 7, "category_id": 1, "segmentation": encode(two, form)},
        {"image_id": 7, "category_id": 1, "iscrowd": 1, "segmentation": encode((0, 0, 19, 29), form)},
        {"image_id": 8, "category_id": 1, "segmentation": encode((0, 0, 39, 29), form)},
        {"image_id": 9, "category_id": 1, "segmentation": encode((7, 9, 7, 9), form)},
        {"image_id": 10, "category_id": 1, "segmentation": encode(one, form)},  # of another class
    )
    test = annotated(root, content)
    expected = np.where(rectangle((0, 0, 19, 29)) == 1, 255, 0)
    expected[(rectangle(one) | rectangle(two)) == 1] = 1
    assert np.array_equal(test.mask(0), expected)  # type: ignore[arg-type]
    assert test.mask(1).sum() == 1200  # type: ignore[union-attr]
    assert np.array_equal(test.mask(2), rectangle((7, 9, 7, 9)))  # type: ignore[arg-type]
    assert test.mask(3) is None
    # A box without "bbox" is around the mask; crowds have none.
    assert test.boxes(0).tolist() == [list(one), list(one), list(two)]
    assert test.boxes(2).tolist() == [[7, 9, 7, 9]] * 2


def test_run_lengths_are_those_of_the_library(root: Path) -> None:
    rng = np.random.default_rng(0)
    for density in (0.01, 0.3, 0.9):
        mask = (rng.random((30, 40)) < density).astype(np.uint8)
        compressed = rle_masks.encode(np.asfortranarray(mask))["counts"].decode()
        whole = {"image_id": 7, "category_id": 1, "segmentation": {"size": [30, 40], "counts": compressed}}
        assert np.array_equal(annotated(root, coco(root, whole)).mask(0), mask)  # type: ignore[arg-type]


def segmentation(value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = value

    return change


def put(key: str, field: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[key][0][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "val.json' is not in COCO's format: it has no list 'images'"),
        (lambda content: content.pop("annotations"), "it has no list 'annotations'"),
        (lambda content: content["images"][0].pop("width"), "val.json: entry 0 of 'images' has no 'width'"),
        (put("images", "width", -4), "image 'val/grey cat/gre 0.jpg' is -4×30: expected numbers of pixels"),
        (
            put("images", "width", 10**30),
            "gre 0.jpg' is 1000000000000000000000000000000×30: expected numbers of pixels",
        ),
        (
            put("images", "file_name", "gre 1.JPEG"),
            "'gre 1.JPEG' and 'val/grey cat/gre 1.JPEG' are both of 'val/grey cat",
        ),
        (put("annotations", "bbox", [1, 2, 10**400, 4]), "annotation 0: [1, 2, 1000"),
        (put("images", "width", 30), "gre 0.jpg' is 40×30 pixels, '"),
        (put("images", "file_name", "x.jpg"), "has no box or mask for 1 of 6 images, such as 'val/grey cat/gre 0.jpg'"),
        (put("annotations", "image_id", 3), "annotation 0 is of image 3, which is not among the images"),
        (put("annotations", "image_id", [7]), "entry 0 of 'annotations' has [7] for its 'image_id'"),
        (put("annotations", "category_id", 2), "has no box or mask for 1 of 6 images"),
        (put("annotations", "category_id", None), "entry 0 of 'annotations' has None for its 'category_id'"),
        (put("annotations", "bbox", [1, 2, 3]), "annotation 0: [1, 2, 3] should be 4 numbers"),
        (put("annotations", "bbox", None), "annotation 0: None should be 4 numbers"),
        (put("annotations", "bbox", [1, 2, -3, 4]), "annotation 0: the box is -3×4 pixels"),
        (put("annotations", "bbox", [1, 2, 0, 4]), "annotation 0: the box is 0×4 pixels"),
        (put("annotations", "bbox", [1, 2, 3, True]), "annotation 0: [1, 2, 3, True] should be 4 numbers"),
        (put("annotations", "bbox", [1, 2, 3, "nan"]), "annotation 0: [1, 2, 3, 'nan'] should be 4 numbers"),
        (put("annotations", "bbox", []), "annotation 0: [] should be 4 numbers"),
        (put("annotations", "id", 1), "val.json: annotation 1 is there twice: give each annotation an id of its own"),
        (put("annotations", "id", True), "entry 0 of 'annotations' has True for its 'id'"),
        (put("annotations", "category_id", 9), "annotation 0 is of category 9, which is not among the categories"),
        (put("annotations", "iscrowd", 2), "annotation 0: 'iscrowd' is 2: expected 0 or 1"),
        (
            put("images", "id", 8),
            "val.json: two entries of 'images' have the id 8, {'id': 8, 'file_name': 'val/grey cat",
        ),
        (put("images", "id", "8"), "val.json: two entries of 'images' have the id 8, {'id': '8'"),
        (put("images", "id", float("nan")), "entry 0 of 'images' has nan for its 'id'"),
        (put("images", "file_name", None), "val.json: image 7 has None for its 'file_name'"),
        (put("images", "height", 30.5), "gre 0.jpg' is 40×30.5: expected numbers of pixels"),
        (put("categories", "id", 2), "two entries of 'categories' have the id 2, {'id': 2, 'name': 'grey cat'}"),
        (
            lambda content: content["images"].extend(
                {"id": n, "file_name": "x", "width": 1, "height": 1} for n in "ab"
            ),
            "val.json: 'x' is the file_name of the images a and b: list each once",
        ),
        (segmentation({"size": [30, 40], "counts": "o" * 10_000}), "is no run-length encoding of 30×40 pixels"),
        (put("annotations", "bbox", [1, 2, 300, 4]), "annotation 0: box 1,2,300,5 does not lie in its image of 40×30"),
        (put("annotations", "bbox", [1, 2, float("inf"), 4]), "annotation 0: [1, 2, inf, 4] should be 4 numbers"),
        (segmentation([[1, 2, 3, 4]]), "annotation 0: a polygon of 4 numbers: expected x and y of three corners"),
        (segmentation([[1, 2, 3, 4, 5, "a"]]), "annotation 0: [1, 2, 3, 4, 5, 'a'] should be a list of numbers"),
        (segmentation([[1, 2, 3, 4, 500, 6]]), "annotation 0: a polygon does not lie in its image of 40×30"),
        (segmentation({"size": [40, 30], "counts": [1200]}), "or a run-length encoding with the image's size [30, 40]"),
        (segmentation({"size": [30, 40], "counts": [1100]}), "is no run-length encoding of 30×40 pixels"),
        (segmentation({"size": [30, 40], "counts": [-5, 1205]}), "is no run-length encoding of 30×40 pixels"),
        (segmentation({"size": [30, 40], "counts": "zzz"}), "is no run-length encoding of 30×40 pixels"),
        (segmentation({"size": [30, 40], "counts": "é000"}), "is no run-length encoding of 30×40 pixels"),
        (segmentation("polygon"), "annotation 0: 'polygon' should be polygons"),
    ],
)
def test_wrong_annotations_are_named(root: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = coco(root)
    change(content)
    with pytest.raises(DataError) as caught:
        annotated(root, content)
    assert message in str(caught.value)


def as_text(content: dict[str, Any]) -> None:
    for key, field in (("images", "id"), ("annotations", "image_id"), ("annotations", "category_id")):
        for entry in content[key]:
            entry[field] = str(entry[field])
    for entry in content["annotations"]:
        entry["bbox"] = [str(number) for number in entry["bbox"]]


def with_decimals(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image |= {"id": float(image["id"]), "width": 40.0, "height": "30"}


def with_empty_fields(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image |= {"license": None, "date_captured": None}
    for number, entry in enumerate(content["annotations"]):
        entry |= {"segmentation": (None, [], [[]], {})[number % 4], "area": None, "id": None}
        entry["iscrowd"] = (None, False, "0", "false", 0.0, 0)[number]


def with_masks_alone(content: dict[str, Any]) -> None:
    for number, entry in enumerate(content["annotations"]):
        entry |= {"segmentation": encode(BOXES[number % 3], "polygon"), "bbox": ([], None)[number % 2]}


def of_windows(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("/", "\\")


@pytest.mark.parametrize("change", [as_text, with_decimals, with_empty_fields, with_masks_alone, of_windows])
def test_annotations_may_be_written_in_many_ways(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = coco(root)
    change(content)
    path = save(root, content)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    test = read(root, "test", annotations="annotations/val.json")
    assert [test.boxes(index).tolist() for index in range(6)] == [[list(box)] for box in (*BOXES, *BOXES)]


def test_crowds_may_be_said_in_many_ways(root: Path) -> None:
    whole = {"image_id": 7, "category_id": 1, "segmentation": encode((0, 0, 39, 29), "runs")}
    marked = {"image_id": 7, "category_id": 1, "segmentation": encode(BOXES[0], "runs")}
    for crowd in (1, True, "1", "true", 1.0):
        mask = annotated(root, coco(root, marked, whole | {"iscrowd": crowd})).mask(0)
        assert np.array_equal(mask, np.where(rectangle(BOXES[0]) == 1, 1, 255))  # type: ignore[arg-type]


def test_files_that_are_no_json_are_named(root: Path) -> None:
    for content, message in (
        (b"{", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b'{"images": [], "images": []}', "an object has the key 'images' twice"),
        ('{"images": []}'.encode("utf-16"), "is not a text file in UTF-8, but in UTF-16 or no text at all: save it as"),
        (b'{"name": "\xe9"}', "is not a text file in UTF-8"),
    ):
        save(root, {}).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(root, "test", annotations="annotations/val.json")
    with pytest.raises(DataError, match="expected an object with images and annotations"):
        annotated(root, [1, 2])


def photos(root: Path, *orientations: int) -> list[str]:
    """Note orientations in the first images of val; their names."""
    found = names(read(root, "test"))[: len(orientations)]
    for name, orientation in zip(found, orientations, strict=True):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.new("RGB", (40, 30), (200, 0, 0)).save(root / name, "JPEG", exif=exif)
    return found


def shapes(records: FileRecords, count: int) -> list[tuple[int, ...]]:
    return [records.image(index).shape[:2] for index in range(count)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_without_annotations_are_read_upright_unless_the_setting_says_otherwise(
    root: Path, split: Split
) -> None:
    photos(root, 6, 8, 1)
    draw(root / "train" / "grey cat" / "gre 0.jpg", [], "exif")
    assert shapes(read(root, split), 1) == shapes(read(root, split, exif="apply"), 1) == [(40, 30)]
    assert shapes(read(root, split, exif="ignore"), 1) == [(30, 40)]


def sized(root: Path, *sizes: tuple[int, int], **changes: Any) -> dict[str, Any]:
    """Annotations that give the first images other sizes."""
    content = coco(root, **changes)
    for image, (width, height) in zip(content["images"], sizes, strict=False):
        image |= {"width": width, "height": height}
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 4, 4]
    return content


STORED, UPRIGHT = (40, 30), (30, 40)


@pytest.mark.parametrize(
    ("orientations", "sizes", "exif", "upright", "line"),
    [
        ((6, 8), (UPRIGHT, UPRIGHT), None, (True, True), None),
        ((6, 8), (STORED, STORED), None, (False, False), None),
        ((5, 7), ((60, 80), (15, 20)), None, (True, True), None),  # but for scale
        ((6, 3), (UPRIGHT, STORED), None, (True, True), "1 images, such as '{1}', have one size, whether"),
        (
            (6, 3),
            (STORED, STORED),
            None,
            (False, False),
            "they are read as they are stored, and with dataset.exif=apply",
        ),
        (
            (2, 4),
            (STORED, STORED),
            None,
            (True, True),
            "2 images, such as '{0}', have one size, whether their EXIF data tu",
        ),
        (
            (2, 4),
            (STORED, STORED),
            None,
            (True, True),
            "they are read upright, and with dataset.exif=ignore as they are s",
        ),
        ((2, 4), (STORED, STORED), "apply", (True, True), None),
        ((2, 4), (STORED, STORED), "ignore", (False, False), None),
        (
            (6, 8),
            (UPRIGHT, STORED),
            None,
            (True, False),
            "1 images, such as '{1}', are read as they are stored, as sized",
        ),
        (
            (6, 8),
            (UPRIGHT, UPRIGHT),
            "ignore",
            (True, True),
            "2 images, such as '{0}', are read upright, as sized there, in ",
        ),
        ((6, 8), (STORED, UPRIGHT), "apply", (False, True), "stored, as sized there, in spite of dataset.exif=apply"),
    ],
)
def test_annotated_sizes_say_whether_an_image_is_upright(
    root: Path,
    orientations: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...],
    exif: str | None,
    upright: tuple[bool, ...],
    line: str | None,
    recwarn: pytest.WarningsRecorder,
) -> None:
    found = photos(root, *orientations, 1, 1, 1, 1)
    save(root, sized(root, *sizes))
    records = read(root, "test", annotations="annotations/val.json", exif=exif)
    assert records.upright[: len(upright)].tolist() == list(upright)
    said = of_sizes(recwarn)
    assert len(said) == (line is not None)
    assert line is None or line.format(*found) in said[0]
    for index, (orientation, turn) in enumerate(zip(orientations, upright, strict=True)):
        expected = read_image(root / found[index], "apply" if turn else "ignore")
        assert np.array_equal(records.image(index), expected)
        assert (records.image(index).shape[0] == 40) == (turn and orientation >= 5)


def of_sizes(recwarn: pytest.WarningsRecorder) -> list[str]:
    """What was said, but for the files that are no images."""
    said = [str(warning.message) for warning in recwarn]
    return [line for line in said if "left out" not in line]


def test_square_photos_are_read_as_the_others_or_as_the_file_says(root: Path, recwarn: pytest.WarningsRecorder) -> None:
    found = photos(root, 6, 6, 1, 1, 1, 1)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (20, 20)).save(root / found[0], "JPEG", exif=exif)
    for said, expected in ((None, False), ({"exif": "apply"}, True), ({"exif": "ignore"}, False), ("text", False)):
        assert annotated(root, sized(root, (20, 20), STORED, info=said)).upright[0] == expected
    said_of = of_sizes(recwarn)
    assert len(said_of) == 2  # where the file does not say it, and where the other photo is sized otherwise
    assert f"1 images, such as '{found[0]}', have one size" in said_of[0]


def test_images_of_other_proportions_than_annotated_are_named(root: Path) -> None:
    photos(root, 6)
    with pytest.raises(DataError) as caught:
        annotated(root, sized(root, (40, 40)))
    assert "gre 0.jpg' is 40×30 pixels (30×40 as its EXIF data turn it), '" in str(caught.value)
    assert "says 40×40: these are other proportions, so the annotation is of another image" in str(caught.value)
