"""Small copies of the benchmarks, each in its official layout, with the odd files that real ones have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import scipy.io

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1; both corners lie inside."""

WIDTH, HEIGHT = 40, 30
KINDS = ("grey", "cmyk", "png", "exif", "plain")
"""How image files of real data sets differ, whatever their names say."""


def draw(path: Path, boxes: Sequence[Box], kind: str = "plain", seed: int = 0, banner: int = 0) -> None:
    """Write an image of 40×30 pixels with bright rectangles, and a black banner of some rows below."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0 : y1 + 1, x0 : x1 + 1] = 230
    image = PIL.Image.fromarray(np.pad(pixels, ((0, banner), (0, 0), (0, 0))))
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
    names = [name.removeprefix("val2/") for name in images]
    write_lines(root / "metadata" / "val" / "mapping.txt", [f"{name[0]}/{name[-6]}.jpeg, {name}" for name in names])


BOXES: Sequence[Box] = ((4, 3, 20, 17), (0, 0, 39, 29), (7, 9, 7, 9))
"""An ordinary box, the whole image, a pixel."""

DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")


def write_dogs(root: Path) -> Path:
    """Stanford Dogs with two classes of two training and three test images; the first of those has two boxes."""
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, name in enumerate(DOGS):
        for place in range(5):
            stem = f"{name}/{name[:9]}_{place}{label}7"
            split = "train" if place < 2 else "test"
            boxes = [BOXES[max(place - 2, 0)], *([(24, 20, 31, 28)] if place == 2 else [])]
            draw(root / "Images" / f"{stem}.jpg", boxes, KINDS[place], place)
            objects = "".join(
                f"\t<object>\n\t\t<name>{name[10:]}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
                f"\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n\t\t\t<ymin>{y0}</ymin>\n"
                f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
                for x0, y0, x1, y1 in boxes
            )
            write_lines(
                root / "Annotation" / stem,
                [
                    f"<annotation>\n\t<folder>{name[1:9]}</folder>\n\t<filename>%s</filename>\n\t<source>\n"
                    f"\t\t<database>ImageNet database</database>\n\t</source>\n\t<size>\n\t\t<width>{WIDTH}</width>\n"
                    f"\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n\t</size>\n\t<segment>0</segment>\n"
                    f"{objects}</annotation>"
                ],
            )
            lists[split].append((stem, label + 1))
    for split, images in lists.items():
        write_dogs_list(root / f"{split}_list.mat", images)
    return root


def write_dogs_list(path: Path, images: Sequence[tuple[str, int]]) -> None:
    """A list as the authors' MATLAB wrote it: cell arrays [n, 1] of paths, and doubles [n, 1] of labels."""

    def cells(texts: Sequence[str]) -> np.ndarray:
        column = np.empty((len(texts), 1), object)
        column[:, 0] = texts
        return column

    scipy.io.savemat(
        path,
        {
            "file_list": cells([f"{stem}.jpg" for stem, _ in images]),
            "annotation_list": cells([stem for stem, _ in images]),
            "labels": np.array([[float(label)] for _, label in images]),
        },
    )


CARS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012")
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def write_cars(root: Path, together: bool = False) -> Path:
    """Stanford Cars with two classes of two training and three test images, in the newer or the older layout."""
    rows: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for label in range(len(CARS)):
        for place in range(5):
            split = "train" if place < 2 else "test"
            box = BOXES[max(place - 2, 0)]
            number = 5 * label + place + 1 if together else len(rows[split]) + 1
            file = f"car_ims/{number:06d}.jpg" if together else f"{number:05d}.jpg"
            draw(root / file if together else root / f"cars_{split}" / file, [box], KINDS[place], number)
            # MATLAB counts from 1, and stores each number as the smallest type that holds it.
            row: dict[str, object] = {key: np.uint8(side + 1) for key, side in zip(_CORNERS, box, strict=True)}
            row["class"] = np.uint8(label + 1)
            if together:
                row = {"relative_im_path": file, **row, "test": np.uint8(split == "test")}
            else:
                row["fname"] = file
            rows[split].append(row)
    names = np.empty((1, len(CARS)), object)
    names[0] = CARS
    if together:
        scipy.io.savemat(
            root / "cars_annos.mat", {"annotations": structs(rows["train"] + rows["test"]), "class_names": names}
        )
        return root
    (root / "devkit").mkdir()
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    scipy.io.savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": structs(rows["train"])})
    scipy.io.savemat(root / "cars_test_annos_withlabels.mat", {"annotations": structs(rows["test"])})
    bare = [{key: value for key, value in row.items() if key != "class"} for row in rows["test"]]
    scipy.io.savemat(root / "devkit" / "cars_test_annos.mat", {"annotations": structs(bare)})
    return root


def structs(rows: Sequence[Mapping[str, object]]) -> np.ndarray:
    """A struct array [1, n] of MATLAB."""
    array = np.empty((1, len(rows)), [(key, object) for key in rows[0]])
    for place, row in enumerate(rows):
        array[0, place] = tuple(row.values())
    return array


AIRCRAFT = ("707-320", "F/A-18", "Falcon 2000")
BANNER = 20


def write_aircraft(root: Path) -> Path:
    """FGVC-Aircraft with three variants, of which each split has one image, and a banner below all of them."""
    data = root / "data"
    boxes: list[str] = []
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(AIRCRAFT):
        for place, lines in enumerate(lists.values()):
            number = f"{1025794 + 10 * label + place:07d}"
            x0, y0, x1, y1 = BOXES[label]
            kind = KINDS[(3 * label + place) % len(KINDS)]
            draw(data / "images" / f"{number}.jpg", [BOXES[label]], kind, label, BANNER)
            boxes.append(f"{number} {x0 + 1} {y0 + 1} {x1 + 1} {y1 + 1}")
            lines.append(f"{number} {name}")
    write_lines(data / "variants.txt", AIRCRAFT)
    write_lines(data / "images_box.txt", boxes)
    for split, lines in {**lists, "trainval": lists["train"] + lists["val"]}.items():
        write_lines(data / f"images_variant_{split}.txt", lines)
    return root
