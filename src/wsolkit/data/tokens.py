"""Keep the tokens that a frozen backbone makes of images, in memory or in files.

There is one store for the images of a split at one size, mirrored or not. A store in a file has a slot for each image,
with a head that describes the source file, and the tokens in half precision. A slot is valid while its source has the
time and the length in the head. The head is written after the tokens, so a slot that a stopped process left unfinished
is filled again. The file's name depends on all that the tokens depend on: the weights and settings of the backbone, the
list of images, their size and their normalisation. Other runs and processes share the file, and map it into memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wsolkit.data.cache import source_status
from wsolkit.data.dataset import Sample, WSOLDataset, check_shape
from wsolkit.data.pixels import Pixels
from wsolkit.data.records import Records, Split, uncut_boxes
from wsolkit.data.seeding import derive_seed
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Tokens

_FORMAT = 1  # The version of the format, which is part of the file's name.
_HEAD = 32  # The bytes of a slot's head.


class Seen(NamedTuple):
    """How the backbone sees the images of a split: at a size in pixels, mirrored or not."""

    split: Split
    size: int
    mirrored: bool


class TokenStore:
    """The tokens of a split's images.

    Args:
        records: the images.
        seen: how the backbone sees them.
        backbone: describes all of the backbone that the tokens depend on.
        pooled_dim: the width of the pooled feature.
        shape: the shape [L, D, h, w] of an image's patch tokens.
        folder: the folder of the file, or None to keep the tokens in memory.

    Attributes:
        path: the file, or None.
        nbytes: the size of all tokens in bytes.

    Raises:
        ConfigError: a folder is given, and the images do not come from files.
        DataError: the folder cannot be written to.
    """

    def __init__(
        self,
        records: Records,
        seen: Seen,
        backbone: str,
        pooled_dim: int,
        shape: tuple[int, int, int, int],
        folder: Path | None,
    ) -> None:
        self._records, self.seen = records, seen
        fields = [("source", "<i8", 2), ("width_height", "<i8", 2), ("pooled", "<f2", pooled_dim)]
        self._slot = np.dtype([*fields, ("patches", "<f2", shape)])
        self._count = len(records.labels)
        self.nbytes = self._count * self._slot.itemsize
        self.path: Path | None = None
        if folder is None:
            self._slots = np.zeros(0, self._slot)
            return
        first = records.source(0)
        if first is None:
            raise ConfigError(
                f"backbone.cache={folder}: this data set's images do not come from files, whose changes a cache could "
                "notice: use backbone.cache=memory"
            )
        what = [str(part) for part in (_FORMAT, *seen[1:], backbone, first.banner, first.exif, first.path.resolve())]
        names = [records.name(index) for index in range(self._count)]
        identity = hashlib.sha256("\n".join([*what, *names]).encode(errors="surrogateescape")).hexdigest()
        self.path = folder / f"{seen.size}{'_mirrored' if seen.mirrored else ''}_{identity[:16]}"

    def open(self) -> None:
        """Make room for the tokens.

        Raises:
            DataError: the folder cannot be written to.
        """
        if self.path is None:
            self._slots = np.zeros(self._count, self._slot)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.nbytes)  # This makes the file longer, without touching what others have written.
            self._slots = np.memmap(self.path, self._slot, "r", shape=self._count)
        except OSError as error:
            raise DataError(f"backbone.cache: cannot write '{self.path}' ({error}): choose another folder") from error

    @property
    def missing(self) -> list[int]:
        """Return the indices of the images whose tokens are not there yet, or are of another file than today's."""
        sources = self._slots["source"]
        there = self._slots["width_height"][:, 0] > 0
        found = zip(there.tolist(), sources.tolist(), strict=True)
        return [
            index
            for index, (is_there, source) in enumerate(found)
            if not is_there or source != source_status(self._records.source(index))
        ]

    def occupied(self) -> int:
        """Return the bytes that the file takes on the disk already. It may have holes."""
        if self.path is None or not self.path.is_file():
            return 0
        return getattr(self.path.stat(), "st_blocks", 0) * 512

    def write(self, indices: Sequence[int], sizes: Sequence[tuple[int, int]], tokens: Tokens) -> None:
        """Keep the tokens of images.

        Args:
            indices: the images.
            sizes: the width and height of each image.
            tokens: their tokens, on any device.

        Raises:
            DataError: the disk is full.
        """
        slots = np.zeros(len(indices), self._slot)
        slots["source"] = [source_status(self._records.source(index)) for index in indices]
        slots["width_height"] = sizes
        slots["pooled"], slots["patches"] = _half(tokens.pooled), _half(tokens.patches)
        if self.path is None:
            self._slots[list(indices)] = slots
            return
        try:
            with self.path.open("r+b", buffering=0) as file:
                for index, slot in zip(indices, slots, strict=True):
                    start, content = index * self._slot.itemsize, slot.tobytes()
                    for place, part in ((start + _HEAD, content[_HEAD:]), (start, content[:_HEAD])):
                        file.seek(place)
                        if file.write(part) != len(part):
                            raise OSError("the disk is full")
        except OSError as error:
            raise DataError(
                f"backbone.cache: cannot write '{self.path}' ({error}): make room and start again. What was written "
                "stays"
            ) from error

    def tokens(self, index: int) -> Tokens:
        """Return the tokens of an image as arrays: pooled [D], patches [L, D, h, w], in half precision."""
        slot = self._slots[index]
        return Tokens(slot["pooled"], slot["patches"])

    def image_size(self, index: int) -> tuple[int, int]:
        """Return the width and height of an image."""
        width, height = self._slots[index]["width_height"].tolist()
        return width, height


def _half(values: Tensor) -> npt.NDArray[np.float16]:
    return np.asarray(values.detach().half().cpu().numpy())


def check_room(stores: Sequence[TokenStore], available: int) -> None:
    """Check that the tokens fit on the disk, or into memory.

    Args:
        stores: the stores, in one folder or in memory.
        available: the bytes of memory that may be used.

    Raises:
        DataError: they do not fit.
    """
    path = stores[0].path
    needed = sum(store.nbytes - store.occupied() for store in stores)
    if path is None:
        if needed > available:
            raise ConfigError(
                f"backbone.cache=memory: the tokens take {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of "
                "memory are to spare: use backbone.cache=DIR, a folder on a local disk"
            )
        return
    there = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"backbone.cache: the tokens take {needed / 2**30:.1f} GiB more, and '{path.parent}' has "
            f"{free / 2**30:.1f} GiB left: make room, choose another folder, or take fewer blocks or sizes"
        )


class TokenSamples(WSOLDataset):
    """Samples with tokens in place of images.

    Args:
        images: the samples of the images.
        stores: the tokens of each view. Training draws one of them at random for each image.
        training: whether the samples are for training.
    """

    def __init__(self, images: WSOLDataset, stores: Sequence[TokenStore], training: bool) -> None:
        super().__init__(images.records, images.transform, images.seed)
        self._stores, self._training = stores, training

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        views: list[tuple[Pixels | Tokens, bool]] = [
            (store.tokens(index), store.seen.mirrored) for store in self._stores
        ]
        boxes, mask = self.records.boxes(index), None if self._training else self.records.mask(index)
        drawn = 0
        if self._training and len(views) > 1:
            drawn = int(np.random.default_rng(derive_seed(self.seed, epoch, index)).integers(len(views)))
        size = self._stores[0].image_size(index)
        if mask is not None:
            check_shape(self.records.name(index), mask, *size)
        moved, mask = self.transform.whole(boxes, mask, size)
        return {
            "image": views[drawn][0],
            "label": int(self.records.labels[index]),
            "index": index,
            "boxes": moved,
            "mask": mask,
            "original_boxes": boxes,
            "uncut_boxes": uncut_boxes(self.records, index),
            "size": self.records.size(index) or size,
            "uncropped": None,
            "uncropped_mask": None,
            "views": [] if self._training or len(views) == 1 else views,
            "uncropped_views": [],
            "pseudo_box": None,
            "pseudo_mask": None,
        }
