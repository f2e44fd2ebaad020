"""Small copies of the benchmarks, each in its official layout, with the odd files that real ones have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1; both corners lie inside."""

WIDTH, HEIGHT = 40, 30
KINDS = ("grey", "cmyk", "png", "exif", "plain")
"""How image files of real data sets differ, whatever their names say."""


def draw(path: Path, boxes: Sequence[Box], kind: str = "plain", seed: int = 0) -> None:
    """Write an image of 40×30 pixels with bright rectangles."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0 : y1 + 1, x0 : x1 + 1] = 230
    image = PIL.Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = PIL.Image.Exif()
    if kind == "exif":
        exif[0x0112] = 6  # rotated by a quarter
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(path, "PNG" if kind == "png" else "JPEG", quality=95, exif=exif)


def mark(path: Path, boxes: Sequence[Box], level: int = 255, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write a mask of some width and height, with rectangles of a grey level, given for 40×30 pixels."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    for x0, y0, x1, y1 in boxes:
        (left, right), (top, bottom) = (
            (np.array(side) * size[axis] // (WIDTH, HEIGHT)[axis])
            for axis, side in enumerate(((x0, x1 + 1), (y0, y1 + 1)))
        )
        mask[top:bottom, left:right] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(mask).save(path)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_lists(folder: Path, images: Mapping[str, tuple[int, Sequence[Box]]]) -> None:
    """Write the four lists of the WSOL benchmark: path → label and boxes."""
    write_lines(folder / "image_ids.txt", list(images))
    write_lines(folder / "class_labels.txt", [f"{name},{label}" for name, (label, _) in images.items()])
    write_lines(folder / "image_sizes.txt", [f"{name},{WIDTH},{HEIGHT}" for name in images])
    write_lines(
        folder / "localization.txt",
        [f"{name},{x0},{y0},{x1},{y1}" for name, (_, boxes) in images.items() for x0, y0, x1, y1 in boxes],
    )


CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
CUB_BOXES: Sequence[Box] = ((4, 3, 20, 17), (0, 0, 39, 29), (7, 9, 7, 9))
"""Of the test images of each class: an ordinary one, the whole image, a pixel."""


def write_cub(root: Path, train: int = 3) -> Path:
    """CUB-200-2011 with two classes of some training and three test images, and CUBV2 with two a class."""
    images: list[str] = []
    labels, boxes, training = [], [], []
    for label, name in enumerate(CUB_CLASSES):
        for place in range(train + len(CUB_BOXES)):
            number, stem = len(images) + 1, f"{name}/{name[4:]}_{place:04d}_{place}"
            box = CUB_BOXES[max(place - train, 0)]
            draw(root / "images" / f"{stem}.jpg", [box], KINDS[place % len(KINDS)], number)
            mark(root / "segmentations" / f"{stem}.png", [box], 51 if place % 2 else 255)
            x0, y0, x1, y1 = box
            images.append(f"{number} {stem}.jpg")
            labels.append(f"{number} {label + 1}")
            boxes.append(f"{number} {x0}.0 {y0}.0 {x1 + 1 - x0}.0 {y1 + 1 - y0}.0")
            training.append(f"{number} {int(place < train)}")
    write_lines(root / "images.txt", images)
    write_lines(root / "image_class_labels.txt", labels)
    write_lines(root / "bounding_boxes.txt", boxes)
    write_lines(root / "train_test_split.txt", training)
    write_lines(root / "classes.txt", [f"{label} {name}" for label, name in enumerate(CUB_CLASSES, start=1)])
    held_out = {
        f"{name}/{30107316117 + label * 2 + place}.jpg": (label, [CUB_BOXES[place]])
        for label, name in enumerate(CUB_CLASSES)
        for place in range(2)
    }
    for name, (_, found) in held_out.items():
        draw(root / "CUBV2" / name, found)
    write_lists(root / "metadata" / "val", held_out)
    return root


OPENIMAGES_CLASSES = ("01226z", "0138tl")
OPENIMAGES_BOXES: Sequence[Box] = ((4, 3, 19, 17), (24, 20, 31, 29))
"""Of an image's two objects."""


def write_openimages(root: Path) -> Path:
    """OpenImages30k with two classes and two images of each in every split; masks are twice as large as images.

    The first image of a class has two masks and a file of what to ignore, the left half of the image; the second has
    one mask and no such file.
    """
    for split in ("train", "val", "test"):
        ids, labels, localization = [], [], []
        for label, name in enumerate(OPENIMAGES_CLASSES):
            for place in range(2):
                stem = f"{split}/{name}/32fdab44f6e415f{label}{place}"
                boxes = OPENIMAGES_BOXES[: 2 - place]
                draw(root / f"{stem}.jpg", boxes, KINDS[label * 2 + place], label * 2 + place)
                ids.append(f"{stem}.jpg")
                labels.append(f"{stem}.jpg,{label}")
                if split == "train":
                    continue
                for number, box in enumerate(boxes):
                    mask = f"{stem}_m{name}_7dab305{number}.png"
                    mark(root / mask, [box], size=(2 * WIDTH, 2 * HEIGHT))
                    ignore = "" if place or number else f"{stem}_ignore.png"
                    localization.append(f"{stem}.jpg,{mask},{ignore}")
                if not place:
                    mark(root / f"{stem}_ignore.png", [(0, 0, 19, 29)], size=(2 * WIDTH, 2 * HEIGHT))
        folder = root / "metadata" / split
        write_lines(folder / "image_ids.txt", ids)
        write_lines(folder / "class_labels.txt", labels)
        if split != "train":
            write_lines(folder / "localization.txt", localization)
    return root


def write_imagenet_v2(root: Path) -> None:
    """ImageNetV2 beside ILSVRC: two classes of two images, the first with two boxes."""
    boxes: Sequence[Sequence[Box]] = (((4, 3, 20, 17), (0, 0, 39, 29)), ((7, 9, 7, 9),))
    images = {
        f"val2/{label}/a31041fd31109279f69ba5827fe508eee00abd7{label}{place}.jpeg": (label, boxes[place])
        for label in range(2)
        for place in range(2)
    }
    for name, (_, found) in images.items():
        draw(root / name, found)
    write_lists(root / "metadata" / "val", images)
