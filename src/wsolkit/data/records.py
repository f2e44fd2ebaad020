"""Describe the images of a split before any of them is read."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torchvision.io import ImageReadMode, decode_jpeg

from wsolkit.data.decoding import decoding, grey, orientation, rgb, stored_size, turned
from wsolkit.data.files import note_source
from wsolkit.errors import DataError
from wsolkit.types import Boxes, Exif, Image, Mask

Split = Literal["train", "val", "test"]

_NAMED = 5  # A message names this many missing things.


class Source(NamedTuple):
    """The source of an image: a file, the rows that are left out at its bottom, and how its EXIF data are used."""

    path: Path
    banner: int
    exif: Exif


class Records(Protocol):
    """The images of a split, by position. The module of a data set returns this."""

    @property
    def classes(self) -> Sequence[str]:
        """Return the names of the classes, by label."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels [n]."""

    def name(self, index: int) -> str:
        """Return the name that identifies an image for people."""

    def source(self, index: int) -> Source | None:
        """Return the source of an image, or None if it is made in memory."""

    def image(self, index: int) -> Image:
        """Read an image [H, W, 3]."""

    def boxes(self, index: int) -> Boxes:
        """Return the true boxes [n, 4] in pixels of the original image, n = 0 if there are none."""

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of the image that the boxes refer to, if it is not the image as read."""

    def mask(self, index: int) -> Mask | None:
        """Return the true mask [h, w]: 0, 1, or 255 to ignore. Return None if there is none.

        It has the shape of the image, and may be smaller.
        """


class Names:
    """Strings in one block of memory.

    A list takes a hundred bytes for each of a million names, and every loader process would copy it bit by bit.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self.block = np.frombuffer(b"".join(encoded), np.uint8)
        self.starts = np.concatenate([[0], np.cumsum([len(name) for name in encoded], dtype=np.int64)])

    @classmethod
    def of_block(cls, block: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> Names:
        """Make names that lie in memory already, as UTF-8 one after another, with the start of each [n + 1]."""
        names = cls.__new__(cls)
        names.block, names.starts = block, starts
        return names

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.starts[index : index + 2]
        return self.block[start:end].tobytes().decode(errors="surrogateescape")


@dataclass(frozen=True)
class FileRecords:
    """Images in files, described by columns, so that a million of them take little memory.

    Args:
        root: the folder that the ids are relative to.
        ids: the paths of the images [n].
        labels: [n].
        classes: the names of the classes by label.
        sizes: the width and height [n, 2] that the boxes refer to. None means those of the files.
        box_table: all boxes [m, 4] as published, image after image. They may exceed their image.
        box_starts: the start of each image's boxes in `box_table` [n + 1].
        masks: reads the mask of an image, or None if the split has no masks.
        banner: the rows of pixels at the bottom of each file that do not belong to the image.
        upright: which images are turned as their EXIF orientation says [n].
    """

    root: Path
    ids: Names
    labels: npt.NDArray[np.int64]
    classes: Sequence[str]
    sizes: npt.NDArray[np.int64] | None
    box_table: Boxes
    box_starts: npt.NDArray[np.int64]
    masks: Callable[[int], Mask | None] | None
    banner: int
    upright: npt.NDArray[np.bool_]

    def name(self, index: int) -> str:
        """Return the image's id."""
        return self.ids[index]

    def source(self, index: int) -> Source:
        """Return the source of an image, see `Records.source`."""
        return Source(self.root / self.ids[index], self.banner, "apply" if self.upright[index] else "ignore")

    def image(self, index: int) -> Image:
        """Read an image as RGB.

        Raises:
            DataError: see `read_image`.
        """
        path, banner, exif = self.source(index)
        image = read_image(path, exif)
        return image[: len(image) - banner]

    def boxes(self, index: int) -> Boxes:
        """Return boxes that are clipped at the last pixel of the image, see `Records.boxes`."""
        uncut = self.uncut_boxes(index)
        return uncut if self.sizes is None else np.clip(uncut, 0, np.tile(self.sizes[index] - 1, 2))

    def uncut_boxes(self, index: int) -> Boxes:
        """Return the boxes as published [n, 4], which may exceed the image. SPA's protocol begins with these."""
        return self.box_table[self.box_starts[index] : self.box_starts[index + 1]]

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the size that boxes refer to, see `Records.size`."""
        if self.sizes is None:
            return None
        width, height = self.sizes[index].tolist()
        return width, height

    def mask(self, index: int) -> Mask | None:
        """Read the mask of an image, see `Records.mask`."""
        return None if self.masks is None else self.masks(index)


def uncut_boxes(records: Records, index: int) -> Boxes:
    """Return the true boxes [n, 4] of an image before they were clipped. Only boxes from files exceed the image."""
    uncut: Boxes = getattr(records, "uncut_boxes", records.boxes)(index)
    return uncut


def file_records(
    root: Path,
    ids: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    boxes: Mapping[str, list[list[int]]],
    sizes: npt.NDArray[np.int64] | None,
    masks: Callable[[int], Mask | None] | None = None,
    banner: int = 0,
    upright: bool | npt.NDArray[np.bool_] = False,
) -> FileRecords:
    """Lay out images and their boxes by id in columns, see `FileRecords`. `upright` may be one value for all images.

    Raises:
        DataError: an id leads out of the root, or an image is listed twice.
    """
    check_inside(root, ids)
    if len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise DataError(f"image '{root / twice}' is listed twice: each image counts once")
    counts = [len(boxes.get(name, ())) for name in ids]
    flat = [box for name in ids for box in boxes.get(name, ())]
    table = np.array(flat, dtype=np.int64).reshape(-1, 4)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    turn = np.broadcast_to(upright, len(ids))
    numbers = np.asarray(labels, np.int64)
    return FileRecords(root, Names(ids), numbers, classes, sizes, table, starts, masks, banner, turn)


def check_inside(root: Path, names: Iterable[str]) -> None:
    """Check that the paths in a list stay in the folder that they are relative to. Links in it may lead anywhere.

    Raises:
        DataError: a path does not.
    """
    for name in names:
        # Paths with "..", a root or a drive are rare, and taking a million paths apart is slow.
        if (".." in name or name[:1] in "/\\" or name[1:2] == ":") and _leads_out(name):
            raise DataError(f"'{name}' leads out of its folder '{root}': expected a path relative to that folder")


def _leads_out(name: str) -> bool:
    path = PureWindowsPath(name) if os.name == "nt" else PurePosixPath(name)
    depths = itertools.accumulate((-1 if part == ".." else 1 for part in path.parts), initial=0)
    return path.is_absolute() or bool(path.anchor) or min(depths) < 0


def read_image(path: Path, exif: Exif = "ignore") -> Image:
    """Decode the first frame of an image file as RGB. By default it is read as stored, as in the papers' evaluations.

    Raises:
        DataError: the file is missing, cannot be decoded, or its type does not determine the brightness.
    """
    with _opened(path, "image") as image:
        return _decoded(image, path, exif, f"image '{path}'")


def decode_image(content: Path | bytes, exif: Exif, what: str) -> Image:
    """Decode an image that does not belong to a data set, as `read_image` does.

    Args:
        content: an image file, or its bytes.
        exif: see `Exif`.
        what: names the image in errors.

    Raises:
        DataError: the image cannot be decoded, or its type does not determine the brightness.
    """
    with decoding(what):
        try:
            opened = PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        except PIL.UnidentifiedImageError as error:
            if isinstance(content, Path):
                raise
            raise DataError(
                f"{what} came as {len(content)} bytes in no format that Pillow knows: expected what an image file "
                "holds, for example a JPEG or a PNG. Pass pixels as an array"
            ) from error
        with opened as image:
            return _decoded(image, content, exif, what)


def _decoded(image: PIL.Image.Image, content: Path | bytes, exif: Exif, what: str) -> Image:
    pixels = _decode_jpeg(content) if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") else None
    if pixels is None:
        return rgb(image, exif, what)
    return pixels if exif == "ignore" else turned(pixels, orientation(image))


def read_grey(path: Path) -> npt.NDArray[np.uint8]:
    """Decode an image file as grey levels [H, W], as masks are stored.

    Raises:
        DataError: the file is missing or cannot be decoded, or it is not clear what it marks.
    """
    with _opened(path, "mask") as image:
        return grey(image, f"mask '{path}'")


def read_sizes(root: Path, ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """Read the stored width and height [n, 2] of images from the headers of their files.

    Raises:
        DataError: a file is missing, or is not an image.
    """
    return np.array([_size(root / name) for name in ids], np.int64).reshape(-1, 2)


def read_orientations(root: Path, ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """Read the stored width and height, and the EXIF orientation [n, 3] of images.

    Raises:
        DataError: a file is missing, or is not an image.
    """
    return np.array([_orientation(root / name) for name in ids], np.int64).reshape(-1, 3)


def _size(path: Path) -> tuple[int, int]:
    with _opened(path, "image") as image:
        return stored_size(image)


def _orientation(path: Path) -> tuple[int, int, int]:
    with _opened(path, "image") as image:
        if image.format == "PNG" and _goes_on_after_pixels(path):
            image.load()
        return *stored_size(image), orientation(image)


def _goes_on_after_pixels(path: Path) -> bool:
    """Say whether a PNG file may have EXIF data behind its pixels, which can only be found by decoding the pixels."""
    with path.open("rb") as file:
        kind, after = b"", False
        file.seek(8)
        while len(head := file.read(8)) == 8 and kind != b"IEND":
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if after and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            after |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


@contextmanager
def _opened(path: Path, what: str) -> Iterator[PIL.Image.Image]:
    with decoding(f"{what} '{path}'", ": replace it or take it off the list"):
        note_source(path)
        try:
            image = PIL.Image.open(path)
        except FileNotFoundError as error:
            raise DataError(f"{what} '{path}' does not exist, but the data set's lists name it") from error
        with image:
            yield image


def _decode_jpeg(content: Path | bytes) -> Image | None:
    """Decode a JPEG with the same decoder as PIL, but without PIL's copies. Return None if it is damaged."""
    # It copies, since PyTorch warns of memory that is read-only.
    encoded = np.frombuffer(content, np.uint8).copy() if isinstance(content, bytes) else np.fromfile(content, np.uint8)
    try:
        pixels = decode_jpeg(torch.from_numpy(encoded), mode=ImageReadMode.RGB)
    except RuntimeError:  # PIL decides how to treat it.
        return None
    return np.asarray(pixels.permute(1, 2, 0))  # [3, H, W] → [H, W, 3], the layout in memory.


def require_folder(root: str, what: str) -> Path:
    """Check that a data set's root folder exists.

    Raises:
        DataError: it does not exist.
    """
    path = Path(root)
    if not path.is_dir():
        raise DataError(f"dataset.root: there is no folder '{path}'; it should hold {what}")
    return path


def check_boxes(where: str, box: Sequence[int], size: Sequence[int]) -> None:
    """Check that a published box is meaningful. It may exceed its image, see `say_cut_boxes`.

    Raises:
        DataError: it ends before it begins, or lies outside of the image. `where` names file and line.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    if x1 < x0 or y1 < y0:
        raise DataError(f"{where}: box {x0},{y0},{x1},{y1} ends before it begins: expected x0 ≤ x1 and y0 ≤ y1")
    if x0 >= width or y0 >= height or x1 < 0 or y1 < 0:
        raise DataError(f"{where}: box {x0},{y0},{x1},{y1} does not lie in its image of {width}×{height} pixels")


def say_cut_boxes(records: FileRecords, split: str, what: str) -> FileRecords:
    """Warn in one line how many published boxes exceed their image.

    Args:
        records: the records of the split.
        split: the split.
        what: the name of the data set.
    """
    if records.sizes is not None:
        last = np.tile(np.repeat(records.sizes - 1, np.diff(records.box_starts), axis=0), 2)  # [m, 4]
        cut = np.count_nonzero(((records.box_table < 0) | (records.box_table > last)).any(axis=1))
        if cut:
            rank_zero_warn(
                f"the {split} split of {what}: {cut:,} of {len(last):,} boxes reach past an edge of their image "
                "and are cut off at its last pixel"
            )
    return records


def clip_box(where: str, box: Sequence[int], size: Sequence[int], slack: int | None) -> list[int]:
    """Clip a box at the edges of its image, because annotations by hand may exceed it.

    Args:
        where: names file and line.
        box: x0, y0, x1, y1, with both corners inside.
        size: the width and height of the image.
        slack: the number of pixels by which it may exceed the image, or None for any number.

    Raises:
        DataError: it exceeds the image by more, or lies outside of it.
    """
    (width, height), (x0, y0, x1, y1) = size, box
    farthest = max(-x0, -y0, x1 + 1 - width, y1 + 1 - height)
    clipped = [max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)]
    if (slack is not None and farthest > slack) or clipped[0] > clipped[2] or clipped[1] > clipped[3]:
        raise DataError(f"{where}: box {x0},{y0},{x1},{y1} does not lie in its image of {width}×{height} pixels")
    return clipped


def check_folders(records: FileRecords, lists: Path) -> None:
    """Check that images in a folder with a class's name have the label of that class.

    Args:
        records: the records of the split.
        lists: the file that gives them their labels.

    Raises:
        DataError: an image has another label.
    """
    label_of = {name: label for label, name in enumerate(records.classes)}
    for index, label in enumerate(records.labels.tolist()):
        name = records.name(index)
        own = name.rpartition("/")[0].rpartition("/")[2]
        if label_of.get(own, label) != label:
            raise DataError(
                f"'{lists}' gives '{name}' the label {label}, which is of '{records.classes[label]}'; the label of "
                f"'{own}' is {label_of[own]}: the classes are not those that the labels count"
            )


def check_count(
    split: str, found: int, expected: Mapping[str, int] | None, what: str, known: Callable[[], str] = str
) -> None:
    """Check the number of images in a split.

    Args:
        split: the split.
        found: its number of images.
        expected: the published numbers by split. Missing splits may have any number, and None checks nothing.
        what: the name of the data set.
        known: says which images are missing, as far as that is known, see `missing_numbers`.

    Raises:
        DataError: the numbers differ.
    """
    if expected is not None and found != expected.get(split, found):
        raise DataError(
            f"the {split} split of {what} has {found} images here, {expected[split]} as published: "
            f"{mending(found, expected[split])}{known()}, or set dataset.expected=null to work with what there is"
        )


def check_classes(found: int, num_classes: int | None, where: Path, known: Callable[[], str] = str) -> None:
    """Check the number of classes in a file or folder. `num_classes` None allows any number.

    Args:
        found: their number.
        num_classes: the expected number.
        where: the file or folder.
        known: says which classes are missing, as far as that is known, see `named`.

    Raises:
        DataError: the numbers differ.
    """
    if num_classes is not None and found != num_classes:
        raise DataError(
            f"'{where}' names {found} classes, dataset.num_classes says {num_classes}: "
            f"{mending(found, num_classes)}{known()}, or set dataset.num_classes={found}"
        )


def mending(found: int, expected: int) -> str:
    """Say what to do about a number that differs from the expected one."""
    return "complete the copy" if found < expected else "take out what does not belong to it"


def missing_numbers(names: Iterable[str], count: int) -> str:
    """Say which numbers from 1 to `count` are missing at the ends of names, or return "".

    Args:
        names: for example "ILSVRC2012_val_00000001" or "00001.jpg". Names without a number are ignored.
        count: the number of images.
    """
    there = {int(found[1]) for found in (re.search(r"(\d+)(\.\w+)?$", name) for name in names) if found}
    return named("number", [str(number) for number in range(1, count + 1) if number not in there])


def named(what: str, missing: Sequence[str]) -> str:
    """Say in an error which things are missing, with the first ones by name, or return ""."""
    if not missing:
        return ""
    more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
    return f" ({what} {', '.join(missing[:_NAMED])}{more} missing)"


def no_held_out(name: str) -> DataError:
    """Return the error for a data set without a split "val"."""
    return DataError(f"{name} has no held-out split: set dataset.held_out=false, which chooses on the test split")
