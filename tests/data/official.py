"""The benchmarks' official files, made of genuine rows of them; images are of the right size, and empty.

The rows lie in `excerpts/`, and more of them beside the project (fixture `shared`). Their columns, separated by ";":

    cub             id; path; is training image; x y w h of a test image; box of the benchmark's list; width height
    cubv2, ilsvrc, imagenetv2, dogs_test, dogs_train
                    path; label (ilsvrc: wnid); width height; boxes, one a column
    aircraft        id; variant; list (0 train, 1 val, 2 test); xmin ymin xmax ymax height width
    cars_ims        number; class from 1; is test image; x1 y1 x2 y2 height width
    openimages      path; label; masks, one a column: mask,ignore
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io

from tests.data.layouts import structs, write_dogs_list, write_lines
from wsolkit.data.benchmarks import imagenet

WNIDS = imagenet._CLASSES
EXCERPTS = Path(__file__).with_name("excerpts")
BANNER = 20


def read_rows(folder: Path, name: str) -> list[list[str]]:
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(";") for line in lines]


def numbers(text: str) -> list[int]:
    return [int(float(number)) for number in text.split()]


def blank(path: Path, width: int, height: int) -> None:
    """Write an image file that has a size, and no pixels to decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def write_official_lists(folder: Path, rows: Sequence[Sequence[str]], prefix: str = "") -> None:
    """The benchmark's lists of rows `path; label; width height; box; …`."""
    write_lines(folder / "image_ids.txt", [prefix + row[0] for row in rows])
    write_lines(folder / "class_labels.txt", [f"{prefix}{row[0]},{row[1]}" for row in rows])
    write_lines(folder / "image_sizes.txt", [f"{prefix}{row[0]},{row[2].replace(' ', ',')}" for row in rows])
    boxes = [f"{prefix}{row[0]},{box.replace(' ', ',')}" for row in rows for box in row[3:]]
    write_lines(folder / "localization.txt", boxes)


def write_xml(path: Path, wnid: str, size: str, boxes: Sequence[str]) -> None:
    width, height = size.split()
    objects = [
        f"<object><name>{wnid}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "</object>"
        for x0, y0, x1, y1 in map(str.split, boxes)
    ]
    lines = [
        "<annotation>",
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        *objects,
        "</annotation>",
    ]
    write_lines(path, lines)


def write_official_cub(root: Path, excerpts: Path) -> list[list[str]]:
    """CUB-200-2011 and CUBV2; returns the rows of the test images."""
    rows = read_rows(excerpts, "cub")
    classes = {int(row[1][:3]): row[1].partition("/")[0] for row in rows}
    for row in rows:
        blank(root / "images" / row[1], *numbers(row[5]))
    write_lines(root / "images.txt", [f"{row[0]} {row[1]}" for row in rows])
    write_lines(root / "train_test_split.txt", [f"{row[0]} {row[2]}" for row in rows])
    write_lines(root / "image_class_labels.txt", [f"{row[0]} {int(row[1][:3])}" for row in rows])
    write_lines(root / "bounding_boxes.txt", [f"{row[0]} {row[3] or '1.0 1.0 1.0 1.0'}" for row in rows])
    write_lines(root / "classes.txt", [f"{number} {classes[number]}" for number in sorted(classes)])
    held_out = read_rows(excerpts, "cubv2")
    for row in held_out:
        blank(root / "CUBV2" / row[0], *numbers(row[2]))
    write_official_lists(root / "metadata" / "val", held_out)
    return [row for row in rows if row[2] == "0"]


def write_official_imagenet(images: Path, boxes: Path, excerpts: Path) -> list[list[str]]:
    """ILSVRC 2012: all classes in `images/train`, and validation images in `images/val`; the XML goes to `boxes`."""
    for wnid in WNIDS.read_text(encoding="utf-8").split():
        (images / "train" / wnid).mkdir(parents=True)
    rows = read_rows(excerpts, "ilsvrc")
    for row in rows:
        blank(images / "val" / row[0], *numbers(row[2]))
        write_xml(boxes / f"{Path(row[0]).stem}.xml", row[1], row[2], row[3:])
    return rows


def write_official_dogs(images: Path, annotations: Path, lists: Path, excerpts: Path) -> list[list[str]]:
    test, train = (read_rows(excerpts, f"dogs_{split}") for split in ("test", "train"))
    for row in test:
        blank(images / row[0], *numbers(row[2]))
        write_xml((annotations / row[0]).with_suffix(""), row[0][10:].partition("/")[0], row[2], row[3:])
    for row in train:
        blank(images / row[0], 1, 1)
    lists.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        write_dogs_list(lists / f"{split}_list.mat", [(row[0].removesuffix(".jpg"), int(row[1]) + 1) for row in rows])
    return test


def write_official_aircraft(data: Path, excerpts: Path) -> list[list[str]]:
    rows = read_rows(excerpts, "aircraft")
    for row in rows:
        height, width = numbers(row[3])[4:]
        blank(data / "images" / f"{row[0]}.jpg", width, height)
    write_lines(data / "variants.txt", [row[0] for row in read_rows(excerpts, "aircraft_variants")])
    write_lines(data / "images_box.txt", [f"{row[0]} {' '.join(row[3].split()[:4])}" for row in rows])
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"{row[0]} {row[1]}" for row in rows if row[2] == str(number)]
        write_lines(data / f"images_variant_{split}.txt", lines)
    return rows


def write_official_cars(root: Path, excerpts: Path) -> list[list[str]]:
    """The older layout of Stanford Cars."""
    rows = read_rows(excerpts, "cars_ims")
    table = []
    for row in rows:
        x1, y1, x2, y2, height, width = numbers(row[3])
        name = f"car_ims/{row[0]}.jpg"
        blank(root / name, width, height)
        table.append(
            {
                "relative_im_path": name,
                **{"bbox_x1": x1, "bbox_y1": y1, "bbox_x2": x2, "bbox_y2": y2},
                **{"class": int(row[1]), "test": int(row[2])},
            }
        )
    names = np.empty((1, max(int(row[1]) for row in rows)), object)
    names[0] = [f"car {number}" for number in range(names.size)]
    scipy.io.savemat(root / "cars_annos.mat", {"annotations": structs(table), "class_names": names})
    return rows


def write_official_openimages(images: Path, metadata: Path, excerpts: Path) -> dict[str, list[list[str]]]:
    rows = {split: read_rows(excerpts, f"openimages_{split}") for split in ("train", "val", "test")}
    for split, found in rows.items():
        files = [file for row in found for mask in row[2:] for file in mask.split(",") if file]
        for name in (*(row[0] for row in found), *files):
            blank(images / name, 4, 3)
        write_lines(metadata / split / "image_ids.txt", [row[0] for row in found])
        write_lines(metadata / split / "class_labels.txt", [f"{row[0]},{row[1]}" for row in found])
        if split != "train":
            lines = [f"{row[0]},{mask}" for row in found for mask in row[2:]]
            write_lines(metadata / split / "localization.txt", lines)
    return rows
