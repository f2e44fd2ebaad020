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
    """image [S, S, 3]; boxes [n, 4] in its pixels, with both corners inside; mask [S, S] or None.

    shares [n, 4]: the same boxes without rounding, as x, y, w, h in shares of the image.
    """

    image: Pixels
    boxes: Boxes
    mask: Mask | None
    shares: npt.NDArray[np.float32]


class Transform:
    """Turns an image as read into the input of a network.

    Args:
        resize: the side in pixels to which images are scaled first, whatever their aspect ratio.
        image_size: the side of the result. Training cuts it out at a random place, and evaluation from the centre.
        train: whether to also flip horizontally at random.
        mean, std: the values of the backbone's pretraining, for values in [0, 1].
        crop_scale: the smallest and the largest share of the image's area that training cuts out, for random resized
            crops. None cuts out `image_size` pixels.

    Raises:
        ConfigError: `image_size` exceeds `resize`, or `crop_scale` is no range of shares.
    """

    def __init__(
        self,
        resize: int,
        image_size: int,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        crop_scale: Sequence[float] | None = None,
    ) -> None:
        if crop_scale is not None and not (len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1):
            raise ConfigError(
                f"dataset.crop_scale={list(crop_scale)}: expected the smallest and the largest share of an image's "
                "area, above 0 and up to 1, for example [0.08,1.0], or null"
            )
        if image_size > resize:
            raise ConfigError(
                f"cannot cut {image_size} pixels out of an image resized to {resize}: dataset.resize is too small"
            )
        crop = A.RandomCrop if train else A.CenterCrop
        steps: list[Any] = [crop(image_size, image_size)] if image_size < resize else []
        if train and crop_scale is not None:
            steps = [A.RandomResizedCrop((image_size, image_size), tuple(crop_scale))]
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
        edges = self._edges(boxes, size or (image.shape[1], image.shape[0]), out["applied_transforms"])
        pixels = Pixels(out["image"], self._levels)
        moved = None if mask is None else np.ascontiguousarray(out["mask"])
        shares = np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], axis=1) / self._image_size
        return Transformed(pixels, _whole_pixels(edges), moved, shares.astype(np.float32))

    def whole(self, boxes: Boxes, mask: Mask | None, size: tuple[int, int]) -> tuple[Boxes, Mask | None]:
        """Transform boxes and mask alone, without a crop or a mirror image.

        Args:
            boxes, mask: see `__call__`.
            size: the width and height of the image that they refer to.
        """
        return _whole_pixels(self._edges(boxes, size, ())), None if mask is None else self._resized(mask)

    def _resized(self, mask: Mask) -> Mask:
        return np.asarray(cv2.resize(mask, (self._resize, self._resize), interpolation=cv2.INTER_NEAREST))

    def _edges(
        self, boxes: Boxes, size: tuple[int, int], steps: Sequence[tuple[str, dict[str, Any]]]
    ) -> npt.NDArray[np.float64]:
        """Move the edges of boxes of an image of this size through the resizing and the steps that were applied."""
        if len(boxes) == 0:
            return np.zeros((0, 4))
        edges = boxes + np.array([0, 0, 1, 1])  # The corners become edges, for which scaling is exact.
        edges = np.minimum(edges, size * 2) * (self._resize / np.array(size * 2))
        for name, applied in steps:
            if name == "HorizontalFlip":
                edges[:, [0, 2]] = self._image_size - edges[:, [2, 0]]
            else:  # This step is a crop, which may be resized.
                left, top, right, bottom = applied["crop_coords"]
                scale = self._image_size / np.array([right - left, bottom - top])
                edges = (edges - np.tile([left, top], 2)) * np.tile(scale, 2)
        edges = edges.clip(0, self._image_size)
        return edges[(edges[:, 2:] - edges[:, :2] >= 1).all(axis=1)]  # type: ignore[no-any-return]


def _whole_pixels(edges: npt.NDArray[np.float64]) -> Boxes:
    """Round edges [n, 4] to boxes [n, 4] with both corners inside."""
    return np.asarray(np.round(edges).astype(np.int64) - np.array([0, 0, 1, 1]))


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.uint8]:
    """Turn a normalised image [3, H, W] into pixels [H, W, 3]."""
    pixels = image.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
