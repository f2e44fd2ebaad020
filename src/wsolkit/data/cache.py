"""Resize training images once and keep them on disk, for data sets whose resized images fit there.

There is one file for each list of images and each size. It has a slot for each image, with a head that describes the
source file, and the pixels. A slot is valid while its source has the time and the length in the head. The head is
written after the pixels, so a slot that a stopped process left unfinished is filled again. Processes that fill the same
slot write the same bytes. Readers map the file into memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from wsolkit.data.pixels import resize
from wsolkit.data.records import Records, Source
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Image

_FORMAT = 1  # The version of the format, which is part of the file's name.


class ImageCache:
    """The images of some records at size×size.

    Args:
        folder: the folder of the file, on a local disk. Runs that read the same images share it.
        records: the images. Either all are read upright, or all as they are stored.
        size: the side in pixels.

    Raises:
        ConfigError: the images do not come from files.
        DataError: the folder cannot be written to, or has no room for all images.
    """

    def __init__(self, folder: Path, records: Records, size: int) -> None:
        self._folder, self._records, self._size = folder, records, size
        first = records.source(0)
        if first is None:
            raise ConfigError(f"dataset.cache={folder}: this data set's images are in memory already: leave it null")
        names = [records.name(index) for index in range(len(records.labels))]
        what = [str(part) for part in (_FORMAT, size, first.banner, first.exif, first.path.resolve())]
        identity = hashlib.sha256("\n".join([*what, *names]).encode(errors="surrogateescape")).hexdigest()
        self.path = folder / f"{size}_{identity[:16]}"
        slot = np.dtype([("source", "<i8", 2), ("width_height", "<i8", 2), ("image", "u1", (size, size, 3))])
        try:
            self._make_room(len(names) * slot.itemsize)
            self._slots = np.memmap(self.path, slot, "r", shape=len(names))
        except OSError as error:
            raise DataError(f"dataset.cache: cannot write '{self.path}' ({error}): choose another folder") from error

    def __reduce__(self) -> Any:  # A process that is not forked opens the file itself.
        return ImageCache, (self._folder, self._records, self._size)

    def image(self, index: int) -> tuple[Image, tuple[int, int]]:
        """Return an image [size, size, 3], and its original width and height.

        Raises:
            DataError: it is missing or cannot be decoded, or the disk is full.
        """
        source = source_status(self._records.source(index))
        slot = self._slots[index]
        width, height = slot["width_height"].tolist()
        if width and slot["source"].tolist() == source:
            return np.asarray(slot["image"]), (width, height)
        image = self._records.image(index)
        height, width = image.shape[:2]
        resized = resize(image, self._size, self._size)
        try:
            self._write(index, np.array([*source, width, height], "<i8").tobytes(), resized.tobytes())
        except OSError as error:
            raise DataError(
                f"dataset.cache: cannot write '{self.path}' ({error}): make room, or train without a cache"
            ) from error
        return resized, (width, height)

    def _write(self, index: int, head: bytes, pixels: bytes) -> None:
        start = index * self._slots.itemsize
        with self.path.open("r+b") as file:
            file.seek(start + len(head))
            file.write(pixels)
            file.flush()
            file.seek(start)
            file.write(head)

    def _make_room(self, length: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            used = getattr(os.fstat(file.fileno()), "st_blocks", 0) * 512  # The file has holes.
            free = shutil.disk_usage(self._folder).free
            if free < length - used:
                raise DataError(
                    f"dataset.cache: {len(self._records.labels)} images of {self._size}×{self._size} take "
                    f"{length / 2**30:.1f} GiB, and '{self._folder}' has {free / 2**30:.1f} GiB left: make room, "
                    "choose another folder, or train without a cache"
                )
            file.truncate(length)  # This makes the file longer, without touching what other processes have written.


def source_status(source: Source | None) -> list[int]:
    """Return what changes when a file changes: its time in nanoseconds and its length. Without a file, nothing does."""
    if source is None:
        return [0, 0]
    try:
        status = source.path.stat()
    except OSError:  # Reading the file will say what is wrong.
        return [-1, -1]
    return [status.st_mtime_ns, status.st_size]
