"""What is known of the images of a split, before any is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from wsolkit.errors import DataError
from wsolkit.types import Boxes, Image, Mask

Split = Literal["train", "val", "test"]


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

    def image(self, index: int) -> Image:
        """Read an image [H, W, 3]."""

    def boxes(self, index: int) -> Boxes:
        """Ground-truth boxes [n, 4] in pixels of the original image, n = 0 where there are none."""

    def size(self, index: int) -> tuple[int, int] | None:
        """Width and height of the image that the boxes are of, where it is not the image as read."""

    def mask(self, index: int) -> Mask | None:
        """Ground-truth mask [H, W] of the image: 0, 1, 255 to ignore; None where there is none."""


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
    """

    root: Path
    ids: Sequence[str]
    labels: npt.NDArray[np.int64]
    classes: Sequence[str]
    sizes: npt.NDArray[np.int64] | None
    box_table: Boxes
    box_starts: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        """The image's id."""
        return self.ids[index]

    def image(self, index: int) -> Image:
        """Read an image as RGB.

        Raises:
            DataError: it is missing, or cannot be decoded.
        """
        return read_image(self.root / self.ids[index])

    def boxes(self, index: int) -> Boxes:
        """See `Records.boxes`."""
        return self.box_table[self.box_starts[index] : self.box_starts[index + 1]]

    def size(self, index: int) -> tuple[int, int] | None:
        """See `Records.size`."""
        if self.sizes is None:
            return None
        width, height = self.sizes[index].tolist()
        return width, height

    def mask(self, index: int) -> None:
        """These data sets have no masks."""
        return None


def file_records(
    root: Path,
    ids: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    boxes: Mapping[str, list[list[int]]],
    sizes: npt.NDArray[np.int64] | None,
) -> FileRecords:
    """Lay out images and their boxes by id in columns."""
    counts = [len(boxes.get(name, ())) for name in ids]
    flat = [box for name in ids for box in boxes.get(name, ())]
    table = np.array(flat, dtype=np.int64).reshape(-1, 4)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return FileRecords(root, ids, np.asarray(labels, np.int64), classes, sizes, table, starts)


def read_image(path: Path) -> Image:
    """Decode an image file as RGB, without applying its EXIF rotation, as the papers' evaluations do.

    Raises:
        DataError: the file is missing, or cannot be decoded.
    """
    try:
        with PIL.Image.open(path) as image:
            pixels = _decode_jpeg(path) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
            return np.asarray(image.convert("RGB")) if pixels is None else pixels
    except FileNotFoundError as error:
        raise DataError(f"image '{path}' does not exist, but the data set's lists name it") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"image '{path}' cannot be decoded ({error}): replace it or take it off the list") from error


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
