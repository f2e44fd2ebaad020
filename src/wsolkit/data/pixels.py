"""Resize and normalise images with the same numbers as PIL and torchvision, several times as fast.

PIL scales in two passes, one for each direction, in fixed-point numbers, and rounds to 8 bits after each. The pass down
the rows is fast here, because pixels next to each other in memory have the same weights. For the other pass, the image
is transposed before and after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from wsolkit.system.compiled import compiled
from wsolkit.types import Image

_FRACTION = 22  # PIL's fixed-point numbers have this many bits after the point.


def resize(image: Image, height: int, width: int) -> Image:
    """Resize an image [H, W, 3] to [height, width, 3], bilinearly with antialiasing, as the installed PIL does."""
    if image.shape[:2] == (height, width):
        return image
    passes = _passes(image.shape[0], image.shape[1], height, width)
    if passes is None:
        return np.asarray(_resize_by_pil(image, height, width))
    for scale, size in passes:
        image = scale(image, size)
    return image


@functools.lru_cache(maxsize=2**16)
def _passes(
    height: int, width: int, new_height: int, new_width: int
) -> Sequence[tuple[Callable[[Image, int], Image], int]] | None:
    """Find out by trying in which order PIL scales the two directions of an image, since versions differ.

    Returns:
        The passes, or None if neither order gives PIL's pixels.
    """
    noise = np.frombuffer(np.random.default_rng(0).bytes(height * width), np.uint8).reshape(height, width)
    expected = _resize_by_pil(noise, new_height, new_width)
    columns, rows = (_scale_columns, new_width), (_scale_rows, new_height)
    for first, second in ((columns, rows), (rows, columns)):
        if np.array_equal(second[0](first[0](noise[..., None], first[1]), second[1])[..., 0], expected):
            return first, second
    return None


def _resize_by_pil(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR))


def _scale_rows(image: Image, new_height: int) -> Image:
    height, width, channels = image.shape
    return np.asarray(_scale(image.reshape(height, width * channels), new_height).reshape(new_height, width, channels))


def _scale_columns(image: Image, new_width: int) -> Image:
    height, width, channels = image.shape
    turned = cv2.transpose(image.reshape(height, width * channels)).reshape(width, channels * height)
    scaled = _scale(turned, new_width).reshape(new_width * channels, height)
    return np.asarray(cv2.transpose(scaled).reshape(height, new_width, channels))


@compiled
def _scale(lines: Any, count: int) -> Any:
    """Scale [n, k] uint8 to [count, k]. Each output line is a weighted mean of the input lines around its place."""
    n, k = lines.shape
    step = n / count
    reach = max(step, 1.0)
    scaled = np.empty((count, k), np.uint8)
    weights = np.empty(2 * int(np.ceil(reach)) + 1)
    total = np.empty(k, np.int32)
    for line in range(count):
        centre = (line + 0.5) * step
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), n)
        whole = 0.0
        for i in range(first, last):
            weights[i - first] = max(1.0 - abs((i - centre + 0.5) * (1.0 / reach)), 0.0)
            whole += weights[i - first]
        total[:] = 1 << (_FRACTION - 1)
        for i in range(first, last):
            weight = np.int32(0.5 + weights[i - first] / whole * (1 << _FRACTION))
            for j in range(k):
                total[j] += weight * np.int32(lines[i, j])
        for j in range(k):
            scaled[line, j] = total[j] >> _FRACTION
    return scaled


class Pixels(NamedTuple):
    """An image [S, S, 3] before its normalisation, and the normalised values of its levels [3, 256]."""

    image: Image
    levels: npt.NDArray[np.float32]


def normalised_levels(mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return what torchvision's `to_tensor` and `normalize` make of the levels 0 to 255 of each channel [3, 256]."""
    levels = torch.arange(256).to(torch.float32).div(255).expand(3, 256)
    return np.asarray(levels.sub(torch.tensor(mean)[:, None]).div(torch.tensor(std)[:, None]))


def normalised_batch(images: Sequence[Pixels]) -> Tensor:
    """Make a normalised batch [B, 3, S, S] of images of one size.

    A loader's process writes it straight into the memory that it shares with the training process, because copying a
    batch takes about as long as resizing its images.
    """
    height, width, channels = images[0].image.shape
    batch = torch.empty(0)
    if get_worker_info() is not None:
        size = len(images) * channels * height * width
        batch = torch.empty(0).set_(torch.UntypedStorage._new_shared(size * batch.element_size()))
    batch.resize_(len(images), channels, height, width)
    for image, place in zip(images, batch.numpy(), strict=True):
        _look_up(image.image, image.levels, place)
    return batch


@compiled
def _look_up(image: Any, levels: Any, planes: Any) -> None:
    height, width, channels = image.shape
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                planes[channel, y, x] = levels[channel, image[y, x, channel]]
