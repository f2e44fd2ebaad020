"""What is known of the images of a split, before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from wsolkit.errors import DataError
from wsolkit.types import Boxes, Image, Mask

Split = Literal["train", "val", "test"]


class Source(NamedTuple):
    """What an image is read from: a file, and how many rows at its bottom are left out."""

    path: Path
    banner: int


class Records(Protocol):
    """The images of a split, by position: what a data set's file of records returns."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels [n]."""

    def name(self, index: int) -> str:
        """What identifies an image to a person."""

    def source(self, index: int) -> Source | None:
        """What an image is read from; None: it is made in memory."""

    def image(self, index: int) -> Image:
        """Read an image [H, W, 3]."""

    def boxes(self, index: int) -> Boxes:
        """Ground-truth boxes [n, 4] in pixels of the original image, n = 0 where there are none."""

    def size(self, index: int) -> tuple[int, int] | None:
        """Width and height of the image that the boxes are of, where it is not the image as read."""

    def mask(self, index: int) -> Mask | None:
        """Ground-truth mask [h, w]: 0, 1, 255 to ignore; of the image's shape, perhaps smaller; None: there is none."""


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
        """Names that lie in memory already: their UTF-8, one after another, and where each starts [n + 1]."""
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
    """Images in files, described by columns, so that a million of them stay small in memory.

    Args:
        root: folder that the ids are relative to.
        ids: paths of the images [n].
        labels: [n].
        classes: names by label.
        sizes: width and height [n, 2] that the boxes refer to, or None: those of the files.
        box_table: all boxes [m, 4], image after image.
        box_starts: where each image's boxes start in `box_table` [n + 1].
        masks: reads the mask of an image; None: the split has none.
        banner: rows of pixels at the bottom of each file that are no part of the image.
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

    def name(self, index: int) -> str:
        """The image's id."""
        return self.ids[index]

    def source(self, index: int) -> Source:
        """See `Records.source`."""
        return Source(self.root / self.ids[index], self.banner)

    def image(self, index: int) -> Image:
        """Read an image as RGB.

        Raises:
            DataError: it is missing, or cannot be decoded.
        """
        path, banner = self.source(index)
        image = read_image(path)
        return image[: len(image) - banner]

    def boxes(self, index: int) -> Boxes:
        """See `Records.boxes`."""
        return self.box_table[self.box_starts[index] : self.box_starts[index + 1]]

    def size(self, index: int) -> tuple[int, int] | None:
        """See `Records.size`."""
        if self.sizes is None:
            return None
        width, height = self.sizes[index].tolist()
        return width, height

    def mask(self, index: int) -> Mask | None:
        """See `Records.mask`."""
        return None if self.masks is None else self.masks(index)


def file_records(
    root: Path,
    ids: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    boxes: Mapping[str, list[list[int]]],
    sizes: npt.NDArray[np.int64] | None,
    masks: Callable[[int], Mask | None] | None = None,
    banner: int = 0,
) -> FileRecords:
    """Lay out images and their boxes by id in columns; see `FileRecords`.

    Raises:
        DataError: an image is there twice.
    """
    if len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise DataError(f"image '{root / twice}' is listed twice: each image counts once")
    counts = [len(boxes.get(name, ())) for name in ids]
    flat = [box for name in ids for box in boxes.get(name, ())]
    table = np.array(flat, dtype=np.int64).reshape(-1, 4)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return FileRecords(root, Names(ids), np.asarray(labels, np.int64), classes, sizes, table, starts, masks, banner)


def read_image(path: Path) -> Image:
    """Decode an image file as RGB, without applying its EXIF rotation, as the papers' evaluations do.

    Raises:
        DataError: the file is missing, or cannot be decoded.
    """
    with _opened(path, "image") as image:
        pixels = _decode_jpeg(path) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        return rgb(image) if pixels is None else pixels


def rgb(image: PIL.Image.Image) -> Image:
    """Pixels [H, W, 3] of an image in any mode: 16 bits are scaled to 8, opacity is left out."""
    if image.mode.startswith("I;16"):  # PIL would cut off what is above 255
        image = PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def read_grey(path: Path) -> npt.NDArray[np.uint8]:
    """Decode an image file as grey levels [H, W], as masks are stored.

    Raises:
        DataError: the file is missing, or cannot be decoded.
    """
    with _opened(path, "mask") as image:
        return np.asarray(image.convert("L"))


def read_sizes(root: Path, ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """Width and height [n, 2] of images, from the heads of their files.

    Raises:
        DataError: a file is missing, or is no image.
    """
    return np.array([_size(root / name) for name in ids], np.int64).reshape(-1, 2)


def _size(path: Path) -> tuple[int, int]:
    with _opened(path, "image") as image:
        return image.size


@contextmanager
def _opened(path: Path, what: str) -> Iterator[PIL.Image.Image]:
    try:
        with PIL.Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{what} '{path}' does not exist, but the data set's lists name it") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{what} '{path}' cannot be decoded ({error}): replace it or take it off the list") from error


def _decode_jpeg(path: Path) -> Image | None:
    """Decode a JPEG by the decoder that PIL uses too, without PIL's copies of the image; None if it is damaged."""
    try:
        pixels = decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), mode=ImageReadMode.RGB)
    except RuntimeError:  # PIL decides what to make of it
        return None
    return np.asarray(pixels.permute(1, 2, 0))  # [3, H, W] → [H, W, 3], as it lies in memory


def require_folder(root: str, what: str) -> Path:
    """Check that a data set's root folder exists.

    Raises:
        DataError: it does not.
    """
    path = Path(root)
    if not path.is_dir():
        raise DataError(f"dataset.root: there is no folder '{path}'; it should hold {what}")
    return path


def check_boxes(where: str, box: Sequence[int], size: Sequence[int]) -> None:
    """Check that a box lies in its image and is not empty.

    Corners may touch the image's far edge (x1 = width), since some data sets give the corner past the last pixel.

    Raises:
        DataError: it does not; `where` names file and line.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise DataError(
            f"{where}: box {x0},{y0},{x1},{y1} does not lie in its image of {width}×{height} pixels; "
            f"expected 0 ≤ x0 ≤ x1 ≤ {width} and 0 ≤ y0 ≤ y1 ≤ {height}"
        )


def clip_box(where: str, box: Sequence[int], size: Sequence[int], slack: int | None) -> list[int]:
    """Cut a box off at the edges of its image, as annotations by hand may reach past them.

    Args:
        where: names file and line.
        box: x0, y0, x1, y1, both corners inside.
        size: width and height of the image.
        slack: by how many pixels it may reach past; None: by any number.

    Raises:
        DataError: it reaches farther, or nothing of it lies in the image.
    """
    (width, height), (x0, y0, x1, y1) = size, box
    farthest = max(-x0, -y0, x1 + 1 - width, y1 + 1 - height)
    clipped = [max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)]
    if (slack is not None and farthest > slack) or clipped[0] > clipped[2] or clipped[1] > clipped[3]:
        raise DataError(f"{where}: box {x0},{y0},{x1},{y1} does not lie in its image of {width}×{height} pixels")
    return clipped


def check_count(split: str, found: int, expected: Mapping[str, int] | None, what: str) -> None:
    """Check how many images a split has.

    Args:
        split: which.
        found: its number of images.
        expected: the published numbers by split; splits that are left out may have any; None: nothing is checked.
        what: name of the data set.

    Raises:
        DataError: the numbers differ.
    """
    if expected is not None and found != expected.get(split, found):
        raise DataError(
            f"the {split} split of {what} has {found} images here, {expected[split]} as published: complete the copy, "
            "or set dataset.expected=null to work with what there is"
        )


def check_classes(found: int, num_classes: int | None, where: Path) -> None:
    """Check how many classes a file or folder names; `num_classes` None: any number.

    Raises:
        DataError: the numbers differ.
    """
    if num_classes is not None and found != num_classes:
        raise DataError(
            f"'{where}' names {found} classes, dataset.num_classes says {num_classes}: complete the copy, or set "
            f"dataset.num_classes={found}"
        )


def no_held_out(name: str) -> DataError:
    """The error of a data set without a split "val"."""
    return DataError(f"{name} has no held-out split: set dataset.held_out=false, which chooses on the test split")
