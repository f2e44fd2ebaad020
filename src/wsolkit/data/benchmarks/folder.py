"""Read your own images from a folder for each class.

    ROOT/train/<class>/…     images for training, at any depth
    ROOT/val/<class>/…       images to evaluate; the setting `splits` allows other names and a third folder

Without this division, `splits` is null, and a share of each class is evaluated instead of trained on:

    ROOT/<class>/…

The names of the training folders are the classes, and their positions in alphabetical order are the labels. Training
needs no boxes. Without them, only classification is evaluated. Boxes and masks of the evaluated images come in COCO's
JSON (wsolkit/data/coco.py).

Images are read upright, as their EXIF orientation says and as people see them. If there are annotations, their width
and height decide, because tools differ in whether they show an image upright.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning_utilities.core.rank_zero import rank_zero_warn

from wsolkit.data.coco import coco_annotations
from wsolkit.data.files import IMAGE_SUFFIXES, images_below, list_folders, read_json, say_left_out
from wsolkit.data.records import (
    FileRecords,
    Split,
    check_classes,
    file_records,
    no_held_out,
    read_orientations,
    require_folder,
)
from wsolkit.data.seeding import derive_seed
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Exif


def folder_records(
    split: Split,
    root: str,
    splits: Mapping[str, str] | None,
    test_fraction: float,
    annotations: str | Mapping[str, str] | None,
    num_classes: int | None,
    exif: Exif | None = None,
) -> FileRecords:
    """Read one split.

    Args:
        split: the split.
        root: the folder of the data set.
        splits: the name of the folder under `root` for each split. None means that the classes' folders lie in `root`.
        test_fraction: without `splits`, the share of each class that is evaluated. The names of the images decide
            which.
        annotations: COCO's JSON with boxes or masks of the evaluated images, relative to `root`, or one file per split,
            or None.
        num_classes: the expected number of classes, or None for any.
        exif: whether images are turned as their EXIF orientation says. The sizes in annotations take precedence. None
            means "apply", or what the annotations say elsewhere.

    Raises:
        ConfigError: a setting is wrong.
        DataError: a folder is missing or empty, or an annotation is wrong.
    """
    base = require_folder(root, "train/<class>/ and val/<class>/ with images")
    if splits is None:
        if split == "val":
            raise no_held_out("a folder without dataset.splits")
        train = name = ""
    else:
        train, name = splits["train"], splits[split]
    classes = _class_names(base, train)
    check_classes(len(classes), num_classes, base / train)
    ids, labels = _images(base, name, classes, needs_all=split == "train")
    if splits is None:
        chosen = _share(ids, labels, classes, test_fraction, split == "test")
        ids, labels = [ids[index] for index in chosen], [labels[index] for index in chosen]
    file = annotations.get(split) if isinstance(annotations, Mapping) else annotations
    if split == "train" or file is None:
        return file_records(base, ids, labels, classes, {}, None, upright=exif != "ignore")
    path = base / file
    found = coco_annotations(path, ids, name, [classes[label] for label in labels], needs_all=True)
    upright = _annotated_upright(base, ids, found.sizes, path, exif)
    return file_records(base, ids, labels, classes, found.boxes, found.sizes, found.masks, upright=upright)


def _annotated_upright(
    base: Path, ids: Sequence[str], annotated: npt.NDArray[np.int64], path: Path, exif: Exif | None
) -> npt.NDArray[np.bool_]:
    """Say which images were annotated upright, as their EXIF orientation turns them, by the annotated sizes [n, 2].

    It reports in one line if images differ in this, differ from `exif`, or fit both.

    Raises:
        DataError: the annotated size of an image has other proportions.
    """
    by_size: dict[int, bool] = {}
    left_open = []
    for place, (width, height, orientation) in enumerate(read_orientations(base, ids).tolist()):
        w, h = annotated[place].tolist()
        upright = (height, width) if orientation >= 5 else (width, height)
        fitting = _fitting((w, h), (width, height), upright)
        if not fitting:
            turned = f" ({upright[0]}×{upright[1]} as its EXIF data turn it)" if orientation >= 5 else ""
            raise DataError(
                f"'{base / ids[place]}' is {width}×{height} pixels{turned}, '{path}' says {w}×{h}: these are other "
                "proportions, so the annotation is of another image"
            )
        if len(fitting) == 1:
            by_size[place] = True in fitting
        elif orientation != 1:
            left_open.append(place)
    said = exif or (_said(path) if left_open else None)
    rule = said or ("ignore" if by_size and not any(by_size.values()) else "apply")
    found = np.full(len(ids), rule == "apply")
    found[list(by_size)] = list(by_size.values())
    others = [ids[place] for place, upright in by_size.items() if upright != (rule == "apply")]
    lines = _lines(rule, others, [] if said else [ids[place] for place in left_open], exif)
    if lines:
        rank_zero_warn(f"'{path}': {'; '.join(lines)}")
    return found


_READ = {"apply": "upright", "ignore": "as they are stored"}


def _lines(rule: Exif, others: Sequence[str], left_open: Sequence[str], exif: Exif | None) -> list[str]:
    """Return messages about images that are not read by the rule, and about those whose size fits both ways."""
    other: Exif = "ignore" if rule == "apply" else "apply"
    lines = []
    if others:
        spite = "" if exif is None else f", in spite of dataset.exif={exif}"
        lines.append(f"{len(others)} images, such as '{others[0]}', are read {_READ[other]}, as sized there{spite}")
    if left_open:
        lines.append(
            f"{len(left_open)} images, such as '{left_open[0]}', have one size, whether their EXIF data turn them or "
            f"not: they are read {_READ[rule]}, and with dataset.exif={other} {_READ[other]}"
        )
    return lines


def _fitting(annotated: tuple[int, int], stored: tuple[int, int], upright: tuple[int, int]) -> set[bool]:
    """Say whether the annotated size fits the upright size (True) or the stored one (False), up to a scale."""
    w, h = annotated
    sizes = {True: upright, False: stored}
    same = {key for key, size in sizes.items() if size == (w, h)}
    return same or {key for key, (x, y) in sizes.items() if abs(h * x - w * y) <= h + w + x + y}


def _said(path: Path) -> Exif | None:
    """Return how `python -m wsolkit.predict` read the images of a file, if it has written it."""
    info = read_json(path).get("info")
    exif = info.get("exif") if isinstance(info, dict) else None
    return exif if exif in ("apply", "ignore") else None


def _class_names(base: Path, train: str) -> list[str]:
    if not (base / train).is_dir():
        raise DataError(
            f"there is no folder '{base / train}': dataset=folder expects {train}/<class>/ under dataset.root. If the "
            "classes' folders lie in dataset.root itself, set dataset.splits=null"
        )
    classes = list_folders(base / train)
    if not classes:
        raise DataError(f"'{base / train}' holds no folders: expected one for each class, with its images")
    return classes


def _images(base: Path, name: str, classes: Sequence[str], needs_all: bool) -> tuple[list[str], list[int]]:
    """Return the paths of a split's images, relative to `base`, and their labels."""
    folder = base / name
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}', which dataset.splits names: expected a folder in it for each class, with "
            "the images to evaluate"
        )
    for found in list_folders(folder):
        if found not in classes:
            raise DataError(f"'{folder / found}' is no class: there is no such folder among the training images")
    left_out: Counter[str] = Counter()
    ids, labels = [], []
    for label, class_name in enumerate(classes):
        images = images_below(folder / class_name, left_out) if (folder / class_name).is_dir() else []
        if not images and needs_all:
            raise DataError(f"'{folder / class_name}' holds no images ({', '.join(IMAGE_SUFFIXES)}) to train on")
        prefix = Path(name, class_name).as_posix()
        ids += [f"{prefix}/{path}" for path in sorted(images, key=_parts)]
        labels += [label] * len(images)
    say_left_out(folder, left_out)
    if not ids:
        raise DataError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)}) in its classes' folders")
    return ids, labels


def _parts(path: str) -> list[str]:
    return path.split("/")


def _share(
    ids: Sequence[str], labels: Sequence[int], classes: Sequence[str], fraction: float, evaluated: bool
) -> list[int]:
    """Return the positions of the evaluated images, which are a share of each class, or of the others.

    The name of an image decides its rank in its class, so new images change little in who is evaluated.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"dataset.test_fraction={fraction}: expected a share of each class between 0 and 1")
    of_class: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        of_class[label].append(index)
    positions: list[int] = []
    for name, members in zip(classes, of_class, strict=True):
        if len(members) < 2:
            raise DataError(
                f"class '{name}' has one image: with dataset.splits=null each class needs two or more, one to train on "
                "and one to evaluate"
            )
        members.sort(key=lambda index: derive_seed(*ids[index].encode(errors="surrogateescape")))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        positions += members[:count] if evaluated else members[count:]
    return sorted(positions)
