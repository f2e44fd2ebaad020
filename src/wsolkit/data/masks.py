"""Read masks from image files when they are needed, and merge them into one mask for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsolkit.data.records import check_inside, read_grey
from wsolkit.errors import DataError
from wsolkit.types import Mask


@dataclass(frozen=True)
class MaskFiles:
    """Masks of a split in image files. Several masks of one image are merged.

    Args:
        root: the folder that the paths are relative to.
        objects: for each image, the files that mark its objects. Without any, the image has no mask.
        ignored: for each image, the file that marks regions to ignore, or "" for none. An object takes precedence.
        threshold: a pixel is marked if its grey level, from 0 to 255, is higher.

    Raises:
        DataError: a path leads out of the root.
    """

    root: Path
    objects: Sequence[Sequence[str]]
    ignored: Sequence[str] | None
    threshold: int

    def __post_init__(self) -> None:
        check_inside(self.root, (name for names in (*self.objects, self.ignored or ()) for name in names))

    def __call__(self, index: int) -> Mask | None:
        """Read the mask of an image [h, w]: 0, 1, or 255 to ignore.

        Raises:
            DataError: see `read_grey`, or a file has 0 and 1 where grey levels up to 255 are expected.
        """
        marked = [self._marked(name) for name in self.objects[index]]
        if not marked:
            return None
        height, width = marked[0].shape
        mask: Mask = np.stack([_at_size(part, width, height) for part in marked]).max(axis=0)
        if self.ignored is not None and self.ignored[index]:
            ignored = _at_size(self._marked(self.ignored[index]), width, height)
            mask[(ignored == 1) & (mask == 0)] = 255
        return mask

    def count(self) -> int:
        """Return how many images have a mask."""
        return sum(len(files) > 0 for files in self.objects)

    def _marked(self, name: str) -> Mask:
        levels = read_grey(self.root / name)
        if self.threshold > 0 and levels.max() == 1:
            raise DataError(
                f"mask '{self.root / name}' holds nothing above 1, and marks are above {self.threshold}: store it with "
                "255 for the object, or set a threshold of 0"
            )
        return (levels > self.threshold).astype(np.uint8)


def _at_size(mask: Mask, width: int, height: int) -> Mask:
    if mask.shape == (height, width):
        return mask
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
