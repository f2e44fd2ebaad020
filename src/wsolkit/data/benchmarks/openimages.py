"""OpenImages30k (Choe et al., CVPR 2020; from Open Images V5) as the WSOL benchmark publishes it.

    ROOT/{train,val,test}/<class>/*.jpg       29,819 + 2,500 + 5,000 images of 100 classes
    ROOT/{val,test}/<class>/*.png             their masks, beside them
    ROOT/metadata/<split>/image_ids.txt       metadata/OpenImages of the benchmark's repository: path of an image
                          class_labels.txt    path,label
                          localization.txt    path,mask,ignore; a line for each mask, "ignore" in one line at most

The lists may also be in ROOT/metadata/OpenImages, and the images in ROOT/OpenImages or ROOT/dataset/OpenImages, as in
the benchmark's repository.

The folders' names are the Open Images codes of the classes. There are no boxes, so masks alone measure localization.
All masks of an image form its object. What the ignore file marks beside it does not count, and an image may have no
ignore file. A mask may have another size than its image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from wsolkit.data.benchmarks.listed import check_first_label, first_image, read_fields, read_labels
from wsolkit.data.files import as_written, is_file
from wsolkit.data.layout import Layout, find_layout
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import FileRecords, Split, check_count, file_records
from wsolkit.errors import DataError

_NAME = "OpenImages30k"


def openimages_records(split: Split, root: str, num_classes: int, expected: Mapping[str, int] | None) -> FileRecords:
    """Read one split.

    Args:
        split: the split.
        root: the folder of the data set, see `find_layout`.
        num_classes: labels are below this number.
        expected: the expected numbers of images, see `check_count`.

    Raises:
        DataError: a file is missing, or a line of it is wrong. The message names both.
    """
    layout = find_layout(
        root,
        _NAME,
        f"metadata/<split>/image_ids.txt and the images of {_NAME}",
        ["metadata/t*/image_ids.txt", "metadata/OpenImages"],
        [""],
    )
    lists = layout.find(f"metadata/{split}", f"metadata/OpenImages/{split}", holds="image_ids.txt")
    base = _folder(layout, first_image(lists))
    ids, labels = read_labels(lists, base, num_classes)
    check_count(split, len(ids), expected, _NAME)
    if split == "train":
        check_first_label(lists / "class_labels.txt", set(labels))
    classes = [str(label) for label in range(num_classes)]
    label_of: dict[str, int] = {}
    for name, label in zip(ids, labels, strict=True):
        own = PurePosixPath(name).parent.name
        if label_of.setdefault(own, label) != label or classes[label] not in (own, str(label)):
            raise DataError(
                f"'{lists / 'class_labels.txt'}' gives '{name}' the label {label}, and others of its folder, or of its "
                "label, another one: each class has one folder and one label"
            )
        classes[label] = own
    masks = None if split == "train" else _masks(layout, lists / "localization.txt", ids)
    return file_records(base, ids, labels, classes, {}, None, masks)


def _folder(layout: Layout, file: str) -> Path:
    """Return the folder that the paths in lists are relative to. Lists from Windows have its separators."""
    return layout.find(".", "OpenImages", "dataset/OpenImages", holds=file.replace("\\", "/"))


def _masks(layout: Layout, path: Path, ids: list[str]) -> MaskFiles:
    base = _folder(layout, next((mask for _, (_, mask, _) in read_fields(path, 3)), ""))
    objects: dict[str, list[str]] = {name: [] for name in ids}
    ignored = dict.fromkeys(ids, "")
    for where, fields in read_fields(path, 3):
        name, mask, ignore = (as_written(base, field) for field in fields)
        if name not in objects:
            raise DataError(f"{where}: '{name}' is not in image_ids.txt")
        for file in (mask, ignore) if ignore else (mask,):
            if not is_file(base / file):
                raise DataError(f"{where}: mask '{base / file}' does not exist")
        if ignore and ignored[name] not in ("", ignore):
            raise DataError(f"{where}: '{name}' has the ignore file '{ignore}', but '{ignored[name]}' in a line before")
        if mask not in objects[name]:
            objects[name].append(mask)
        ignored[name] = ignored[name] or ignore
    without = [name for name in ids if not objects[name]]
    if without:
        raise DataError(
            f"'{path}' has no mask for {len(without)} of {len(ids)} images, such as '{without[0]}': every image "
            "that is evaluated needs one"
        )
    return MaskFiles(base, list(objects.values()), list(ignored.values()), 0)
