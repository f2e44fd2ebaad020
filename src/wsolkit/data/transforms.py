"""Transform images together with their boxes and masks. Only this file uses albumentations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Importing it would ask the network for news.

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsolkit.data.pixels import Pixels, normalised_levels, resize
from wsolkit.errors import ConfigError
from wsolkit.types import Boxes, Image, Mask


class Transformed(NamedTuple):
    """image [S, S, 3]; boxes [n, 4] in its pixels, with both corners inside; mask [S, S] or None."""

    image: Pixels
    boxes: Boxes
    mask: Mask | None


class Transform:
    """Turns an image as read into the input of a network.

    Args:
        resize: the side in pixels to which images are scaled first, whatever their aspect ratio.
        image_size: the side of the result. Training cuts it out at a random place, and evaluation from the centre.
        train: whether to also flip horizontally at random.
        mean, std: the values of the backbone's pretraining, for values in [0, 1].

    Raises:
        ConfigError: `image_size` exceeds `resize`.
    """

    def __init__(self, resize: int, image_size: int, train: bool, mean: Sequence[float], std: Sequence[float]) -> None:
        if image_size > resize:
            raise ConfigError(
                f"cannot cut {image_size} pixels out of an image resized to {resize}: dataset.resize is too small"
            )
        crop = A.RandomCrop if train else A.CenterCrop
        steps: list[Any] = [crop(image_size, image_size)] if image_size < resize else []
        steps += [A.HorizontalFlip(p=0.5)] if train else []
        # albumentations' own treatment of boxes would take longer than all other steps together.
        self._compose = A.Compose(steps, save_applied_params=True)
        self._train, self._resize, self._image_size = train, resize, image_size
        self._levels = normalised_levels(mean, std)

    def __call__(
        self, image: Image, boxes: Boxes, mask: Mask | None, seed: int, size: tuple[int, int] | None = None
    ) -> Transformed:
        """Apply the transform. Equal seeds give equal results, in any process and any order.

        Images are scaled bilinearly with antialiasing, as in the papers. Masks take the nearest pixel. Boxes that
        shrink below a pixel, or are cropped away, are dropped.

        Args:
            image: [H, W, 3].
            boxes: [n, 4] in its pixels, with both corners inside.
            mask: [h, w] with the same proportions, or None.
            seed: the seed of the random choices.
            size: the width and height of the image that boxes and mask refer to, if this is a resized one.
        """
        if self._train:
            self._compose.set_random_seed(seed)
        given: dict[str, Any] = {"image": resize(image, self._resize, self._resize)}
        if mask is not None:
            given["mask"] = self._resized(mask)
        out = self._compose(**given)
        moved = self._move(boxes, size or (image.shape[1], image.shape[0]), out["applied_transforms"])
        pixels = Pixels(out["image"], self._levels)
        return Transformed(pixels, moved, None if mask is None else np.ascontiguousarray(out["mask"]))

    def whole(self, boxes: Boxes, mask: Mask | None, size: tuple[int, int]) -> tuple[Boxes, Mask | None]:
        """Transform boxes and mask alone, without a crop or a mirror image.

        Args:
            boxes, mask: see `__call__`.
            size: the width and height of the image that they refer to.
        """
        return self._move(boxes, size, ()), None if mask is None else self._resized(mask)

    def _resized(self, mask: Mask) -> Mask:
        return np.asarray(cv2.resize(mask, (self._resize, self._resize), interpolation=cv2.INTER_NEAREST))

    def _move(self, boxes: Boxes, size: tuple[int, int], steps: Sequence[tuple[str, dict[str, Any]]]) -> Boxes:
        """Move boxes of an image of this size through the resizing and the steps that albumentations reports."""
        if len(boxes) == 0:
            return boxes
        edges = boxes + np.array([0, 0, 1, 1])  # The corners become edges, for which scaling is exact.
        edges = np.minimum(edges, size * 2) * (self._resize / np.array(size * 2))
        for name, applied in steps:
            if name == "HorizontalFlip":
                edges[:, [0, 2]] = self._image_size - edges[:, [2, 0]]
            else:  # This step is a crop.
                edges -= np.tile(applied["crop_coords"][:2], 2)
        edges = edges.clip(0, self._image_size)
        edges = np.round(edges[(edges[:, 2:] - edges[:, :2] >= 1).all(axis=1)])
        return np.asarray(edges.astype(np.int64) - np.array([0, 0, 1, 1]))


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.uint8]:
    """Turn a normalised image [3, H, W] into pixels [H, W, 3]."""
    pixels = image.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
