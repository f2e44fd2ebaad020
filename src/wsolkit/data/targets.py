"""Read what training learns beside the labels: pseudo boxes and pseudo masks of the training images.

`dataset.train_boxes` names boxes in any form of `wsolkit.data.pseudo_boxes`, and `dataset.train_masks` a folder of
masks, which `python -m wsolkit.pseudo_masks` writes: a PNG file `<id of the image>.png` for each image, with the grey
level 0 for background, 255 for the object and 128 for neither, and `settings.json` when it is complete. A mask may have
other proportions than its image. It then covers the image like a mask of the squashed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsolkit.data.pseudo_boxes import pseudo_boxes
from wsolkit.data.records import FileRecords, Records, check_inside, read_grey
from wsolkit.errors import DataError
from wsolkit.system.drafts import draft
from wsolkit.system.folders import SETTINGS
from wsolkit.types import Boxes, Mask

_NEITHER, _IGNORED = 128, 255


@dataclass(frozen=True)
class Targets:
    """The pseudo boxes and pseudo masks of the training images, either or both.

    Args:
        boxes: the training images with pseudo boxes for their boxes, or None.
        masks: the folder of the masks, or None.
    """

    boxes: FileRecords | None
    masks: Path | None

    @classmethod
    def of(cls, boxes: str | None, masks: str | None, records: Records) -> Targets | None:
        """Read the boxes, and look whether the masks are there. Return None if neither are given.

        Args:
            boxes: the file or folder of the boxes, or None.
            masks: the folder of the masks, or None.
            records: the training images.

        Raises:
            DataError: a file is missing, or a line of it is wrong.
        """
        if boxes is None and masks is None:
            return None
        if masks is not None:
            _check_masks(Path(masks), records)
        read = None if boxes is None else pseudo_boxes(Path(boxes), records, "train", "train_boxes")
        return cls(read, None if masks is None else Path(masks))

    def boxes_of(self, index: int) -> Boxes:
        """Return the pseudo boxes [n, 4] of an image in its pixels."""
        return np.zeros((0, 4), np.int64) if self.boxes is None else self.boxes.boxes(index)

    def mask_of(self, name: str) -> Mask | None:
        """Read the pseudo mask [h, w] of an image: 0, 1, or 255 for neither.

        Args:
            name: the id of the image.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """
        return None if self.masks is None else as_mask(read_grey(mask_path(self.masks, name)))


def mask_path(folder: Path, name: str) -> Path:
    """Return the file of an image's mask."""
    return folder / f"{name}.png"


def as_mask(grey: Mask) -> Mask:
    """Turn the grey levels [h, w] of a file into a mask."""
    return np.select([grey < _NEITHER // 2, grey > _NEITHER + _NEITHER // 2], [0, 1], _IGNORED).astype(np.uint8)


def write_mask(folder: Path, name: str, mask: Mask) -> None:
    """Write the mask [h, w] of an image: 0, 1, or 255 for neither."""
    path = mask_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.select([mask == 0, mask == 1], [0, 255], _NEITHER).astype(np.uint8)
    with draft(path, "wb", sync=False) as file:
        file.write(cv2.imencode(".png", grey)[1].tobytes())


def _check_masks(folder: Path, records: Records) -> None:
    """Look at the first and the last image, since looking for a million files takes long.

    Raises:
        DataError: the folder is not complete, or is that of other images.
    """
    if not (folder / SETTINGS).is_file():
        raise DataError(
            f"dataset.train_masks: '{folder}' has no {SETTINGS}, so it is no complete folder of pseudo masks: write it "
            f"with python -m wsolkit.pseudo_masks checkpoint=PATH output={folder}"
        )
    names = [records.name(index) for index in range(len(records.labels))]
    check_inside(folder, names)
    for name in (names[0], names[-1]):
        if not mask_path(folder, name).is_file():
            raise DataError(
                f"dataset.train_masks: '{folder}' has no mask '{name}.png': expected one for each training image of "
                "this data set"
            )
